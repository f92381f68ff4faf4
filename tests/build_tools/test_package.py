"""What goes into a wheel and a source distribution. A pretended compiler keeps this quick."""

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytest.importorskip("ninja")

# Writes an empty file for -o, and dependencies where asked for; answers --version as nvcc does.
COMPILER = """#!/bin/sh
[ "$1" = --version ] && { echo "release 13.0, V13.0.88"; exit; }
while [ $# -gt 0 ]; do
  case "$1" in -o) : > "$2";; -MF) echo "all:" > "$2";; esac
  shift
done
"""
LEFT_OUT = ("out", "*.egg-info", "*.so", "_build.json", "__pycache__")
EXTENSION = sysconfig.get_config_var("EXT_SUFFIX")


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """The repository, as if just cloned."""
    tree = tmp_path_factory.mktemp("package") / "marlin"
    tree.mkdir()
    for path in ROOT.iterdir():
        if path.is_dir() and not path.name.startswith(".") and path.name != "build":
            shutil.copytree(path, tree / path.name, ignore=shutil.ignore_patterns(*LEFT_OUT))
        elif path.is_file():
            shutil.copy(path, tree)
    return tree


@pytest.fixture
def environment(tmp_path):
    """Compilers that only pretend to compile."""
    for compiler in (tmp_path / "c++", tmp_path / "cuda" / "bin" / "nvcc"):
        compiler.parent.mkdir(parents=True, exist_ok=True)
        compiler.write_text(COMPILER)
        compiler.chmod(0o755)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MARLIN_")}
    return environment | {"CXX": str(tmp_path / "c++"), "CUDA_HOME": str(tmp_path / "cuda")}


def build(kind: str, tree: Path, target: Path, environment) -> Path:
    """What pip does in an isolated environment, in this one."""
    code = f"import sys; from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"
    target.mkdir(exist_ok=True)
    run = subprocess.run(
        [sys.executable, "-c", code, str(target)],
        cwd=tree, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    (result,) = target.iterdir()
    return result


def wheel_files(tree, target, environment) -> set[str]:
    return set(zipfile.ZipFile(build("wheel", tree, target, environment)).namelist())


def binaries(files):
    return {name for name in files if name.endswith(".so")}


def test_wheels(tree, tmp_path, environment):
    with_cuda = wheel_files(tree, tmp_path / "with", environment)
    host = f"marlin/host{EXTENSION}"
    assert binaries(with_cuda) == {"marlin/_ops.so", "marlin/_ops_cuda.so", host}
    assert "marlin/_build.json" in with_cuda
    python = {
        str(path.relative_to(tree))
        for package in ("marlin", "gptq")
        for path in (tree / package).rglob("*.py")
    }
    assert {name for name in with_cuda if name.endswith(".py")} == python

    # A later build without CUDA holds nothing of that one, nor what lies in the working tree.
    for stale in ("_ops_cuda.so", "host.cpython-00-x86_64-linux-gnu.so", "_build.json"):
        (tree / "marlin" / stale).write_text("stale")
    without_cuda = wheel_files(tree, tmp_path / "without", environment | {"MARLIN_BUILD_CUDA": "0"})
    assert binaries(without_cuda) == {"marlin/_ops.so", host}
    wheel = zipfile.ZipFile(next((tmp_path / "without").iterdir()))
    assert "MARLIN_BUILD_CUDA=0" in wheel.read("marlin/_build.json").decode()
    scripts = next(name for name in without_cuda if name.endswith("entry_points.txt"))
    assert "marlin = marlin.cli:main" in wheel.read(scripts).decode()


def test_in_place_without_cuda_after_a_build_with_cuda(tree, environment):
    command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    for wish, names in (("1", {"_ops.so", "_ops_cuda.so"}), ("0", {"_ops.so"})):
        wished = environment | {"MARLIN_BUILD_CUDA": wish}
        subprocess.run(command, cwd=tree, env=wished, check=True, capture_output=True)
        assert {path.name for path in (tree / "marlin").glob("_ops*.so")} == names
        report = (tree / "marlin" / "_build.json").read_text()
        assert ('"cuda": true' in report) == (wish == "1")


def test_source_distribution(tree, tmp_path, environment):
    with tarfile.open(build("sdist", tree, tmp_path / "sdist", environment)) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        str(path.relative_to(tree))
        for folder in (
            "csrc",
            "build_tools",
            "marlin",
            "gptq",
            "requirements",
            "tests",
            "bench",
            "demo",
        )
        for path in (tree / folder).rglob("*")
        if path.is_file() and path.suffix not in (".so", ".pyc") and path.name != "_build.json"
    }
    needed |= {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "CHANGELOG.md"}
    assert needed <= files
    unwanted = (".so", ".pyc", "_build.json")
    assert not [name for name in files if name.endswith(unwanted) or "__pycache__" in name]
