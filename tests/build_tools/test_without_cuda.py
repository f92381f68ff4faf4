"""The package as a build without nvcc leaves it: the CPU works, CUDA says why it does not."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from marlin import ops

WHY = "nvcc was not found (on PATH or under CUDA_HOME) when marlin was built"

# Redispatched to CUDA's key, CPU tensors reach what CUDA tensors would, on any machine.
SCRIPT = """
import json, torch
from marlin import ops
from marlin.testing.problems import check_product, random_rows, random_weight

weight, a = random_weight(64, 64, 32), random_rows(3, 64)
check_product(ops.matmul(a, weight.b, weight.s), a, weight.values())

cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
out = torch.empty(3, 64, dtype=torch.float16)
arguments = {
    "mul": (a, weight.b, weight.s), "mul_inference": (a, weight.b, weight.s),
    "mul.out": (a, weight.b, weight.s, None, None), "pack": (weight.codes,),
    "unpack": (weight.b,), "pack_scales": (weight.scales,), "unpack_scales": (weight.s,),
    "dequantize": (weight.b, weight.s),
    "quantize_columns": (torch.ones(2, 3), torch.eye(2), torch.ones(3)),
    "trial_losses": (torch.ones(2, 3), torch.eye(2), torch.ones(2), torch.ones(1, 3)),
}
said = {"why": ops.why_no_cuda()}
for name in ops.OPERATORS:
    base, _, overload = name.partition(".")
    operator = getattr(getattr(torch.ops.marlin, base), overload or "default")
    try:
        operator.redispatch(cuda, *arguments[name], **({"out": out} if overload else {}))
    except RuntimeError as error:
        said[name] = str(error)
print(json.dumps(said))
"""


@pytest.fixture(scope="module")
def without_cuda(tmp_path_factory):
    """A copy of the package, its CUDA library left out."""
    folder = tmp_path_factory.mktemp("without")
    ignored = shutil.ignore_patterns("_ops_cuda.so", "__pycache__")
    shutil.copytree(Path(ops.__file__).parent, folder / "marlin", ignore=ignored)
    report = {"cuda": False, "why_no_cuda": WHY, "torch": "2.11.0"}
    (folder / "marlin" / "_build.json").write_text(json.dumps(report))
    return folder


def run_there(folder, *arguments):
    run = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env={"PATH": "", "PYTHONPATH": str(folder)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_cpu_works_and_cuda_says_why(without_cuda):
    said = json.loads(run_there(without_cuda, "-c", SCRIPT))
    assert said.pop("why") == WHY
    assert said.keys() == set(ops.OPERATORS)
    for name, message in said.items():
        assert message == f"marlin::{name}: no CUDA operators: {WHY}"


def test_info_says_why(without_cuda):
    text = run_there(without_cuda, "-m", "marlin", "info")
    assert f"{without_cuda}/marlin" in text
    assert WHY in text and "no nvcc" in text


def test_a_cuda_library_that_does_not_load_says_why(without_cuda):
    broken = without_cuda / "marlin" / "_ops_cuda.so"
    broken.write_text("not a library")
    try:
        text = run_there(without_cuda, "-m", "marlin", "info")
    finally:
        broken.unlink()
    assert "_ops_cuda.so does not load in torch" in text and "file too short" in text


def test_a_package_that_was_not_built(without_cuda, tmp_path):
    shutil.copytree(without_cuda / "marlin", tmp_path / "marlin")
    (tmp_path / "marlin" / "_ops.so").unlink()
    run = subprocess.run(
        [sys.executable, "-c", "import marlin"], cwd=tmp_path, capture_output=True, text=True
    )
    assert "ImportError: marlin: " in run.stderr and "was not built" in run.stderr
