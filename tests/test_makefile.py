"""`make` on machines that lack something: one clear line each, and nothing half done."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@pytest.fixture
def tree(tmp_path):
    """What the set-up reads, in a place of its own."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "requirements", tmp_path / "requirements")
    return tmp_path


def make(tree, *arguments, **environment):
    # As from a shell: under `make test` this make would be a part of that one.
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "PYTHON"))}
    inherited.pop("MFLAGS", None)
    return subprocess.run(
        ["make", *arguments], cwd=tree, env=inherited | environment, capture_output=True, text=True
    )


def complaint(run):
    """The line that explains a failure: of all of stderr, make's own lines aside."""
    assert run.returncode != 0
    lines = [line for line in run.stderr.splitlines() if not line.startswith("make")]
    assert len(lines) == 1 and lines[0].startswith("marlin: "), run.stderr
    return lines[0]


def fake_python(tree, fails_on):
    """An interpreter that fails on one question and is the real one otherwise."""
    path = tree / "fake-python"
    path.write_text(
        f'#!/bin/sh\ncase "$*" in --version) echo Python 3.9.2;; *{fails_on}*) exit 1;;'
        f' *) exec {sys.executable} "$@";; esac\n'
    )
    path.chmod(0o755)
    return path


def test_help_names_every_target():
    text = make(ROOT, "help").stdout
    for target in ["test", "fuzz", "demo", "lint", "format", "bench", "sanitize", "setup", "clean"]:
        assert f"make {target} " in text


@pytest.mark.parametrize(
    "question, line",
    [
        ("version_info", "Python 3.10 or newer is needed, this is Python 3.9.2"),
        ("ensurepip", "apt install python3-venv"),
        ("Python.h", "apt install python3-dev"),
    ],
)
def test_a_python_that_lacks_something(question, line, tree):
    run = make(tree, "test", f"BASE_PYTHON={fake_python(tree, question)}")
    assert line in complaint(run)
    assert not (tree / ".venv").exists()


def test_no_python_and_no_compiler(tree):
    assert "no pythonless" in complaint(make(tree, "test", "BASE_PYTHON=pythonless"))
    assert "no C++ compiler" in complaint(make(tree, "test", "CXX=no-such-compiler"))
    assert not (tree / ".venv").exists()


def test_a_given_python(tree):
    assert "no PYTHON=/nowhere" in complaint(make(tree, "test", "PYTHON=/nowhere"))
    bare = make(tree, "test", f"PYTHON={fake_python(tree, 'NO')}", "NEEDED=torch no_such_module")
    assert complaint(bare).endswith("lacks no_such_module")
    compiler = make(tree, "demo", f"PYTHON={sys.executable}", "CXX=no-such-compiler")
    assert "no C++ compiler" in complaint(compiler)


def test_a_download_that_fails(tree):
    # An index without packages stands for a registry out of reach.
    run = make(tree, "test", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(tree / "requirements"))
    assert run.returncode != 0
    lines = [line for line in run.stderr.splitlines() if line.startswith("marlin: ")]
    assert len(lines) == 1 and "pip could not install torch" in lines[0]
    assert "== 2/4" in run.stdout and "== 3/4" not in run.stdout
    assert not (tree / ".venv" / ".installed").exists()


def test_arguments_reach_the_commands(tree):
    for arguments, expected in [
        (["demo", "MODEL=/models/x"], "-m demo --model /models/x"),
        (["demo"], "-m demo"),
        (["test", "ARGS=-k layer"], "-m pytest -k layer"),
        (["bench", "ARGS=--quick"], "-m bench --quick"),
    ]:
        run = make(tree, "-n", *arguments, "PYTHON=/usr/bin/python3")
        assert f"/usr/bin/python3 {expected}" in run.stdout
        assert "pip" not in run.stdout.replace("pybind", "")


@pytest.mark.parametrize("tools, fails", [("racecheck memcheck", False), ("racecheck", False),
                                          ("memcheck racecheck", True)])  # fmt: skip
def test_sanitize_leaves_the_usual_build(tree, tools, fails):
    """Racecheck's kernels are slower: they must not stay, even where racecheck finds something."""
    log = tree / "log"
    scripts = {
        "python": f'case "$1" in setup.py) echo "build$MARLIN_RACECHECK" >> {log};; esac',
        "compute-sanitizer": f'echo "$2" >> {log}; [ $2 != racecheck ] || exit {int(fails)}',
    }
    for name, script in scripts.items():
        (tree / name).write_text(f"#!/bin/sh\n{script}\n")
        (tree / name).chmod(0o755)
    run = make(tree, "sanitize", f"PYTHON={tree / 'python'}", f"SANITIZER_TOOLS={tools}")
    assert (run.returncode != 0) == fails, run.stderr
    steps = {"racecheck": ["build1", "racecheck"], "memcheck": ["build", "memcheck"]}
    ran = [step for tool in tools.split() for step in steps[tool]]
    assert log.read_text().split() == ["build", *ran, "build"]


def test_ci_runs_make_test():
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & 0o111
    assert path.read_text().split()[-2:] == ["make", "test"]


def test_tool_versions_agree():
    pins = (ROOT / "requirements" / "pins.txt").read_text()
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    for tool in ("ruff==", "clang-format=="):
        version = next(line for line in pins.splitlines() if line.startswith(tool))
        assert f"[{version}]" in hooks
