"""Without its operators, `marlin info` reports why, and all else ends in one clear error."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marlin import cli, libraries

SCRIPT = "import sys\nfrom marlin.cli import main\nsys.exit(main())\n"  # as pip writes it
BREAK = {
    "is missing": lambda library: library.unlink(),
    "was cut short": lambda library: os.truncate(library, library.stat().st_size // 2),
    "does not load in torch": lambda library: library.write_text("not a library"),
}
WAYS = {  # to start the command
    "is missing": ["-m", "marlin"],
    "was cut short": ["-mmarlin"],
    "does not load in torch": ["scripts/marlin"],
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    shutil.copytree(libraries.HERE, folder / "marlin", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "scripts").mkdir()
    (folder / "scripts" / "marlin").write_text(SCRIPT)
    (folder / "program.py").write_text("import marlin")
    return folder


@pytest.fixture
def broken(copy, request):
    """A copy of the package whose operators' library is broken as the parameter says."""
    library = copy / "marlin" / "_ops.so"
    shutil.copy(libraries.HERE / "_ops.so", library)
    BREAK[request.param](library)
    return copy


def run(folder, *arguments):
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=os.environ | {"PYTHONPATH": str(folder)},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.mark.parametrize("broken, why", [(why, why) for why in BREAK], indirect=["broken"])
def test_info_reports_why(broken, why):
    told = run(broken, *WAYS[why], "info")
    assert (told.returncode, told.stderr) == (1, "")
    lines = {line[:12].strip(): line[12:] for line in told.stdout.splitlines()}
    assert lines["marlin"].endswith(f"in {broken / 'marlin'}")
    assert lines["operators"].startswith(f"{broken / 'marlin' / '_ops.so'} {why}")
    assert lines["CUDA"] == "the operators did not load"
    assert "portable" in lines["CPU"]  # the NumPy module is another library


@pytest.mark.parametrize("broken", ["was cut short"], indirect=True)
def test_the_report_for_machines(broken):
    told = run(broken, "-m", "marlin", "info", "--json")
    assert told.returncode == 1
    report = json.loads(told.stdout)
    assert "_ops.so was cut short: expected at least" in report["why_no_operators"]


def test_the_other_libraries_may_be_cut_short_too(tmp_path):
    shutil.copytree(libraries.HERE, tmp_path / "marlin")
    cut = [tmp_path / "marlin" / "_ops_cuda.so", *(tmp_path / "marlin").glob("host.*.so")]
    for library in cut:
        shutil.copy(tmp_path / "marlin" / "_ops.so", library)
        BREAK["was cut short"](library)
    told = run(tmp_path, "-m", "marlin", "info")
    assert (told.returncode, told.stderr) == (0, "")
    for library in cut:
        assert f"{library} was cut short" in told.stdout


@pytest.mark.parametrize("broken", ["was cut short"], indirect=True)
@pytest.mark.parametrize(
    "arguments", ["info .", "convert a b --format gptq", "quantize model --out q"]
)
def test_other_commands_end_with_one_line(broken, arguments):
    told = run(broken, "-m", "marlin", *arguments.split())
    assert (told.returncode, told.stdout) == (2, "")
    (line,) = told.stderr.splitlines()
    assert line.startswith(f"marlin: error: {broken / 'marlin' / '_ops.so'} was cut short")


@pytest.mark.parametrize("broken", ["was cut short"], indirect=True)
def test_a_program_gets_an_import_error(broken):
    told = run(broken, "-m", "program", "info")
    assert told.returncode == 1
    last = told.stderr.splitlines()[-1]
    assert last.startswith(f"ImportError: marlin: {broken}") and "was cut short" in last


@pytest.mark.parametrize(
    "argv, orig_argv, command",
    [
        (["-m", "info"], ["python", "-m", "marlin", "info"], True),
        (["-m"], ["python", "-X", "dev", "-mmarlin"], True),
        (["/usr/bin/marlin", "info"], ["python", "/usr/bin/marlin", "info"], True),
        (["-m", "-m", "marlin"], ["python", "-m", "gptq", "-m", "marlin"], False),
        (["/site/pytest/__main__.py"], ["python", "-m", "pytest"], False),
        (["-c", "marlin"], ["python", "-c", "import marlin", "marlin"], False),
        (["serve_marlin.py"], ["python", "serve_marlin.py"], False),
        ([""], ["python"], False),
    ],
)
def test_whether_the_command_runs(argv, orig_argv, command, monkeypatch):
    monkeypatch.setattr(sys, "argv", argv)
    monkeypatch.setattr(sys, "orig_argv", orig_argv)
    assert cli.is_running() == command


def test_the_length_of_a_library(tmp_path):
    whole = (libraries.HERE / "_ops.so").read_bytes()
    path = Path(tmp_path / "library.so")
    path.write_bytes(whole)
    libraries.check_length(path)
    path.write_bytes(whole[:-1])
    with pytest.raises(ImportError, match=rf"{len(whole)} bytes, got {len(whole) - 1}"):
        libraries.check_length(path)
