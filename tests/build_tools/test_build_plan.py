"""What setup.py decides to build, on machines that have or lack nvcc; and that ninja rebuilds
what changed and nothing else."""

import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ninja_file = pytest.importorskip("build_tools.ninja_file")  # needs ninja
plan = pytest.importorskip("build_tools.plan")


@pytest.fixture(autouse=True)
def bare_machine(monkeypatch, tmp_path):
    """No CUDA anywhere, no wishes."""
    for name in ("CUDA_HOME", "CUDA_PATH", "MARLIN_BUILD_CUDA", "MARLIN_CUDA_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    monkeypatch.setattr(plan, "USUAL_CUDA_HOME", tmp_path / "nowhere")


@pytest.fixture
def cuda_home(tmp_path):
    """Makes a toolkit whose nvcc does nothing but tell its version."""

    def make(version="13.0", exit_code=0) -> Path:
        nvcc = tmp_path / "cuda" / "bin" / "nvcc"
        nvcc.parent.mkdir(parents=True)
        answer = f"Cuda compilation tools, release {version}, V{version}.88"
        nvcc.write_text(f"#!/bin/sh\necho '{answer}'\nexit {exit_code}\n")
        nvcc.chmod(0o755)
        return tmp_path / "cuda"

    return make


def architectures(build_plan, source="csrc/kernel/format.cu"):
    return [flag for flag in build_plan.flags_for(source) if "gencode" in flag]


def library_names(build_plan):
    return [library.name for library in build_plan.libraries]


def test_without_nvcc_the_cpu_library_and_a_reason():
    build = plan.plan_build(ROOT)
    assert library_names(build) == ["_ops", "host"]
    report = json.loads(build.report_text())
    assert report["cuda"] is False
    assert report["why_no_cuda"].startswith("nvcc was not found")


def test_demanding_cuda_without_nvcc_fails(monkeypatch):
    monkeypatch.setenv("MARLIN_BUILD_CUDA", "1")
    with pytest.raises(SystemExit, match="MARLIN_BUILD_CUDA=1, but nvcc was not found"):
        plan.plan_build(ROOT)


def test_refusing_cuda(monkeypatch, cuda_home):
    monkeypatch.setenv("CUDA_HOME", str(cuda_home()))
    monkeypatch.setenv("MARLIN_BUILD_CUDA", "0")
    build = plan.plan_build(ROOT)
    assert library_names(build) == ["_ops", "host"]
    assert "MARLIN_BUILD_CUDA=0" in build.report["why_no_cuda"]


def test_other_wishes_are_an_error(monkeypatch):
    monkeypatch.setenv("MARLIN_BUILD_CUDA", "yes")
    with pytest.raises(SystemExit, match="MARLIN_BUILD_CUDA: expected 0, 1 or nothing, got 'yes'"):
        plan.plan_build(ROOT)


@pytest.mark.parametrize("where", ["CUDA_HOME", "CUDA_PATH", "PATH", "usual"])
def test_with_nvcc(where, monkeypatch, cuda_home):
    home = cuda_home()
    if where == "usual":
        monkeypatch.setattr(plan, "USUAL_CUDA_HOME", home)
    else:
        monkeypatch.setenv(where, str(home / "bin" if where == "PATH" else home))
    build = plan.plan_build(ROOT)
    assert library_names(build) == ["_ops", "host", "_ops_cuda"]
    assert build.nvcc == str(home / "bin" / "nvcc")
    assert build.report == {
        "cuda": True,
        "why_no_cuda": None,
        "torch": build.report["torch"],
        "nvcc": "13.0",
        "archs": "8.0;8.6;8.9;9.0a;8.0+PTX",
    }
    assert architectures(build) == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_86,code=sm_86",
        "-gencode=arch=compute_89,code=sm_89",
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_80,code=compute_80",
    ]
    hopper = ["-gencode=arch=compute_90a,code=sm_90a"]
    assert architectures(build, "csrc/kernel/instances/sm90_h8x64x512x1.cu") == hopper


@pytest.mark.parametrize(
    "version, builds, compresses",
    [("11.8", False, None), ("12.3", False, None), ("12.4", True, False), ("12.8", True, True)],
)
def test_old_nvcc(version, builds, compresses, monkeypatch, cuda_home):
    monkeypatch.setenv("CUDA_HOME", str(cuda_home(version)))
    build = plan.plan_build(ROOT)
    assert ("_ops_cuda" in library_names(build)) == builds
    if builds:
        assert ("--compress-mode=size" in build.nvcc_flags) == compresses
    else:
        expected = f"nvcc {version} is too old: 12.4 or newer is needed"
        assert build.report["why_no_cuda"] == expected


def test_an_nvcc_that_does_not_work(monkeypatch, cuda_home):
    home = cuda_home(version="unknown", exit_code=1)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert plan.plan_build(ROOT).report["why_no_cuda"] == f"{home}/bin/nvcc --version failed"


def test_narrowed_architectures(monkeypatch, cuda_home):
    monkeypatch.setenv("CUDA_HOME", str(cuda_home()))
    monkeypatch.setenv("MARLIN_CUDA_ARCHS", "9.0a; 12.0+PTX")
    build = plan.plan_build(ROOT)
    assert architectures(build) == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_120,code=compute_120",
    ]
    assert build.report["archs"] == "9.0a; 12.0+PTX"


@pytest.mark.parametrize("archs, with_hopper", [("8.0;9.0a", True), ("8.0;9.0+PTX", False)])
def test_hopper_kernels_are_built_for_hopper_only(archs, with_hopper, monkeypatch, cuda_home):
    monkeypatch.setenv("CUDA_HOME", str(cuda_home()))
    monkeypatch.setenv("MARLIN_CUDA_ARCHS", archs)
    library = plan.plan_build(ROOT).libraries[-1]
    assert any(map(plan.is_sm90, library.sources)) == with_hopper
    assert ("-DMARLIN_SM90" in library.flags) == with_hopper


@pytest.mark.parametrize("archs", ["hopper", "8.0;sm_90", "+PTX", ";"])
def test_wrong_architectures(archs, monkeypatch, cuda_home):
    monkeypatch.setenv("CUDA_HOME", str(cuda_home()))
    monkeypatch.setenv("MARLIN_CUDA_ARCHS", archs)
    with pytest.raises(SystemExit, match="MARLIN_CUDA_ARCHS: expected"):
        plan.plan_build(ROOT)


def test_every_source_is_compiled(monkeypatch, cuda_home):
    monkeypatch.setenv("CUDA_HOME", str(cuda_home()))
    planned = {s for library in plan.plan_build(ROOT).libraries for s in library.sources}
    there = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in (".cpp", ".cu")
    }
    assert planned <= there
    if plan.ISA_FLAGS.keys() <= planned:  # on other processors than x86 those stay out
        assert there <= planned


# ------------------------------------------------------------------------------------- ninja


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A library of two files, one of which includes a header."""
    monkeypatch.undo()  # a compiler is wanted
    source = tmp_path / "csrc"
    source.mkdir()
    (source / "answer.h").write_text("inline int answer() { return 41; }\n")
    (source / "one.cpp").write_text('#include "answer.h"\nint one() { return answer(); }\n')
    (source / "two.cpp").write_text("int two() { return 2; }\n")
    library = plan.Library("tiny", ["csrc/one.cpp", "csrc/two.cpp"])
    return plan.BuildPlan(tmp_path, [library], "g++", None, [], "", {"why_no_cuda": None})


def test_ninja_rebuilds_what_changed_and_nothing_else(tiny, capfd):
    folder = tiny.root / "build"

    def compiled():
        assert ninja_file.run_ninja(tiny, folder)["tiny"].exists()
        log = capfd.readouterr().out
        return [name for name in ("one.cpp", "two.cpp") if name in log]

    assert compiled() == ["one.cpp", "two.cpp"]
    assert compiled() == []
    (tiny.root / "csrc" / "answer.h").write_text("inline int answer() { return 42; }\n")
    assert compiled() == ["one.cpp"]
    tiny.libraries[0].flags = ["-DNEW_FLAG"]
    assert compiled() == ["one.cpp", "two.cpp"]


def test_a_compile_error_fails_the_build(tiny, capfd):
    (tiny.root / "csrc" / "two.cpp").write_text("int two() { return }\n")
    with pytest.raises(SystemExit, match="compiling failed"):
        ninja_file.run_ninja(tiny, tiny.root / "build")
    assert "two.cpp" in capfd.readouterr().out
