"""Who may see whom (DESIGN §3), enforced; and the checker itself, tried on planted violations."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# For each room of csrc/ the rooms whose headers it may include, besides its own.
# DESIGN leaves dequant, pipeline and epilogue side by side; among them the data's path decides.
DEQUANT = {"core", "format", "ptx"}
PIPELINE = DEQUANT | {"dequant"}
EPILOGUE = PIPELINE | {"pipeline"}
KERNEL = EPILOGUE | {"epilogue"}
ROOMS = {
    "core": set(),
    "ptx": set(),
    "format": {"core"},
    "dequant": DEQUANT,
    "pipeline": PIPELINE,
    "epilogue": EPILOGUE,
    "kernel": KERNEL,
    "dispatch": KERNEL | {"kernel"},
    "cpu": {"core", "format"},
    "bindings": {"core", "format", "cpu"},  # the NumPy functions run the CPU's loops
    "torch": KERNEL | {"kernel", "dispatch", "cpu"},
}
SELECTION = re.compile(r"dispatch/select\w*\.h")  # a pure function: for all to ask
CUDA_ROOMS = {"ptx", "dequant", "pipeline", "epilogue", "kernel", "dispatch", "torch"}
FOREIGN = {  # outside headers, and the only rooms that may include them
    "Torch": (re.compile(r"(torch|ATen|c10|caffe2)/"), {"torch"}),
    "pybind11 or Python": (re.compile(r"pybind11/|Python\.h"), {"bindings"}),
    "CUDA": (re.compile(r"cuda|cub/|cute/|cutlass/|cooperative_groups|nv/"), CUDA_ROOMS),
}

# Files of the Python packages that may import transformers (and peft).
INTEGRATIONS = re.compile(r"marlin/(checkpoint|integrations/\w+)\.py|gptq/(walk|record|export)\.py")


def without_comments(text: str) -> str:
    """C++ with comments gone and the insides of string literals too."""
    token = re.compile(r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"', re.DOTALL)
    return token.sub(lambda m: '""' if m[0].startswith('"') else " ", text)


def check_cpp(path: str, text: str) -> list[str]:
    """Violations in a file of csrc/, given as its path below csrc/ and its text."""
    room = path.split("/")[0]
    if room not in ROOMS:
        return [f"{path}: no room of DESIGN §3 is called {room}"]
    found = []
    for bracket, header in re.findall(r'^\s*#\s*include\s*([<"])([^>"]+)', text, re.MULTILINE):
        other = header.split("/")[0]
        if bracket == '"':
            if other not in ROOMS:
                found.append(f"{path}: {header}: write includes of our own from csrc/ on")
            elif other != room and other not in ROOMS[room] and not SELECTION.fullmatch(header):
                found.append(f"{path}: {room} may not see {header}")
            continue
        for name, (pattern, rooms) in FOREIGN.items():
            if pattern.match(header) and room not in rooms:
                found.append(
                    f"{path}: {header}: {name} headers belong in {', '.join(sorted(rooms))}"
                )
    if room != "ptx" and re.search(r"\b(asm|__asm|__asm__)\b", without_comments(text)):
        found.append(f"{path}: inline asm belongs in ptx")
    return found


IMPORT_CALLS = ("__import__", "import_module", "importlib.import_module")


def imports(tree: ast.AST) -> list[tuple[str, bool]]:
    """Every imported module's dotted name, and whether that happens at the file's top level."""
    top = set()

    def mark(node):  # conditions and try blocks run on import too, functions do not
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
                top.add(child)
                mark(child)

    mark(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, node in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found += [(f"{node.module}.{alias.name}", node in top) for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORT_CALLS:
            found.append((ast.unparse(node.args[0]).strip("'"), node in top))
    return found


def check_python(path: str, text: str) -> list[str]:
    """Violations in a Python file, given as its path below the repository root and its text."""
    tree = ast.parse(text)
    package = path.split("/")[0]
    found = []
    for name, at_top in imports(tree):
        first = name.split(".")[0]
        if first in ("transformers", "peft") and package in ("marlin", "gptq"):
            if not INTEGRATIONS.fullmatch(path):
                found.append(f"{path}: only integration files import {first}")
            elif at_top and path == "marlin/checkpoint.py":
                found.append(f"{path}: comes with `import marlin`: {first} inside functions only")
        integration = name.startswith("marlin.integrations.")
        if at_top and integration and not path.startswith("marlin/integrations/"):
            found.append(f"{path}: integrations are imported inside functions")
        if package == "marlin" and first in ("gptq", "bench", "demo"):
            if path != "marlin/cli.py":
                found.append(f"{path}: marlin never imports {first}")
            elif at_top:
                found.append(f"{path}: the CLI imports {first} inside functions")
        if package in ("marlin", "gptq") and first == "tests":
            found.append(f"{path}: what is installed imports no tests")
        if name.startswith(("torch.ops", "torch._ops")) and path != "marlin/ops.py":
            found.append(f"{path}: only marlin/ops.py touches torch.ops")
    operators = any(
        isinstance(node, ast.Attribute) and ast.unparse(node).endswith("torch.ops.marlin")
        for node in ast.walk(tree)
    )
    by_name = re.search(r"torch\.ops\s*,\s*['\"]marlin|['\"]marlin::", text)
    if (operators or by_name) and path != "marlin/ops.py":
        found.append(f"{path}: only marlin/ops.py touches torch.ops.marlin")
    return found


# ------------------------------------------------------------------------------- on the tree


def test_csrc():
    files = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in CPP]
    assert len(files) > 10
    found = []
    for path in files:
        found += check_cpp(str(path.relative_to(ROOT / "csrc")), path.read_text())
    assert not found, "\n".join(found)


CPP = {".h", ".hpp", ".inl", ".def", ".cpp", ".cc", ".cu", ".cuh"}


def test_nothing_in_csrc_escapes_the_check():
    others = {p.name for p in (ROOT / "csrc").rglob("*") if p.is_file() and p.suffix not in CPP}
    assert others <= {"README.md"}


def test_python():
    files = [
        p for folder in ("marlin", "gptq", "demo", "bench") for p in (ROOT / folder).rglob("*.py")
    ]
    assert len(files) > 5
    found = []
    for path in files:
        found += check_python(str(path.relative_to(ROOT)), path.read_text())
    assert not found, "\n".join(found)


IMPORT = """
import sys
for name in {blocked}:
    sys.modules[name] = None  # importing it fails
from marlin import *
"""


@pytest.mark.parametrize(
    "blocked", [["marlin.host"], ["transformers", "peft", "gptq", "bench"]], ids=str
)
def test_import_marlin_needs_neither(blocked):
    code = IMPORT.format(blocked=blocked)
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


# ---------------------------------------------------------------------- on planted violations


@pytest.mark.parametrize(
    "path, text",
    [
        ("core/a.h", '#include "format/words.h"'),
        ("core/a.h", "#include <cuda_fp16.h>"),
        ("core/a.h", "#include <torch/csrc/stable/tensor.h>"),
        ("core/a.h", '#include "torch/checks.h"'),
        ("format/a.h", '#include "ptx/mma.cuh"'),
        ("ptx/a.cuh", '#include "core/types.h"'),
        ("dequant/a.cuh", '#include "kernel/sm80.cuh"'),
        ("dequant/a.cuh", '#include "pipeline/x.cuh"'),
        ("bindings/a.cpp", '#include "pipeline/x.h"'),
        ("pipeline/a.cuh", '  #  include "epilogue/x.cuh"'),
        ("kernel/a.cu", '#include "dispatch/select.h_"'),
        ("kernel/a.cu", "#include <ATen/ATen.h>"),
        ("kernel/a.cu", "#include <c10/cuda/CUDAStream.h>"),
        ("dispatch/a.cpp", '#include "torch/checks.h"'),
        ("dispatch/a.cpp", '#include "cpu/backend.h"'),
        ("cpu/a.cpp", '#include "kernel/launch.h"'),
        ("cpu/a.cpp", '#include "dispatch/device.h"'),
        ("cpu/a.cpp", "#include <cuda_runtime_api.h>"),
        ("bindings/a.cpp", '#include "torch/tensors.h"'),
        ("bindings/a.cpp", "#include <torch/extension.h>"),
        ("torch/a.cpp", "#include <pybind11/pybind11.h>"),
        ("torch/a.cpp", "#include <Python.h>"),
        ("torch/a.cpp", '#include "bindings/module.h"'),
        ("torch/a.cpp", '#include "checks.h"'),
        ("torch/a.cpp", '#include "../core/types.h"'),
        ("kernel/a.cu", 'void f() { asm volatile("mov"); }'),
        ("kernel/a.cu", '/* ptx */ __asm__("mov");'),
        ("attic/a.cpp", ""),
    ],
)
def test_the_cpp_check_finds(path, text):
    assert len(check_cpp(path, text)) == 1


@pytest.mark.parametrize(
    "path, text",
    [
        ("core/a.h", "#include <cstdint>"),
        ("cpu/a.cpp", '#include "dispatch/select.h"\n#include "core/types.h"\n#include "cpu/b.h"'),
        ("kernel/a.cu", '// no asm here\nconst char* s = "asm";  /* asm */ int plasma;'),
        ("kernel/a.cu", '#include <cuda_fp16.h>\n#include "ptx/mma.cuh"'),
        ("ptx/a.cuh", 'asm volatile("mov");'),
        ("torch/a.cpp", '#include <torch/csrc/stable/ops.h>\n#include "kernel/launch.h"'),
        ("bindings/a.cpp", '#include <pybind11/numpy.h>\n#include "cpu/pack.h"'),
    ],
)
def test_the_cpp_check_lets_pass(path, text):
    assert check_cpp(path, text) == []


@pytest.mark.parametrize(
    "path, text",
    [
        ("marlin/layer.py", "import torch\ny = torch.ops.marlin.mul(a, b, s)"),
        ("marlin/layer.py", "from torch import ops\n"),
        ("gptq/solver.py", "import torch\nf = torch.ops.marlin"),
        ("demo/run.py", "import torch\nf = getattr(torch.ops, 'marlin')"),
        ("marlin/layer.py", "@torch.library.register_fake('marlin::mul')\ndef f(): pass"),
        ("marlin/layer.py", "import transformers"),
        ("marlin/layer.py", "def f():\n    from transformers.pytorch_utils import Conv1D"),
        ("marlin/checkpoint.py", "from transformers import AutoConfig"),
        ("marlin/checkpoint.py", "try:\n    import transformers\nexcept ImportError:\n    pass"),
        ("marlin/layer.py", "def f():\n    import peft"),
        ("marlin/layer.py", "from marlin.integrations.transformers import MarlinConfig"),
        ("gptq/solver.py", "import transformers as t"),
        ("gptq/solver.py", "import importlib\nt = importlib.import_module('transformers')"),
        ("marlin/layer.py", "import gptq"),
        ("marlin/layer.py", "def f():\n    from gptq.solver import solve"),
        ("marlin/cli.py", "from gptq import cli"),
        ("marlin/ops.py", "import bench.run"),
        ("gptq/walk.py", "from tests.conftest import x"),
    ],
)
def test_the_python_check_finds(path, text):
    assert len(check_python(path, text)) == 1


@pytest.mark.parametrize(
    "path, text",
    [
        ("marlin/ops.py", "import torch\ny = torch.ops.marlin.mul(a, b, s)"),
        ("marlin/checkpoint.py", "def f():\n    import transformers"),
        ("marlin/integrations/hf.py", "import transformers\nfrom marlin.integrations import x"),
        ("marlin/__init__.py", "from marlin import integrations"),
        ("marlin/__init__.py", "def f():\n    from marlin.integrations.hf import Config"),
        ("marlin/cli.py", "def f():\n    import gptq"),
        ("gptq/export.py", "import transformers\nfrom marlin.layer import MarlinLinear"),
        ("gptq/solver.py", "'''torch.ops.marlin, in words'''\nimport torch.nn"),
        ("demo/run.py", "import transformers, gptq, marlin"),
    ],
)
def test_the_python_check_lets_pass(path, text):
    assert check_python(path, text) == []
