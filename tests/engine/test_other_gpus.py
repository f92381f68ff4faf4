"""What runs on GPUs that are not here: their selections run on this one, and fit theirs.

The whole suite also passes here in a build that holds nothing but PTX of 8.0:
``MARLIN_CUDA_ARCHS=8.0+PTX make test PYTHON=python3``.
"""

import itertools
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from marlin import host, ops
from marlin.testing.problems import check_product, random_rows, random_weight
from marlin.testing.shapes import GPUS, GROUP_SIZES, LIKE, MODELS, ROWS

OTHERS = list(LIKE)


@pytest.mark.gpu
@pytest.mark.parametrize("config", LIKE.values(), ids=LIKE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_selections_of_other_gpus(config, dtype, group_size):
    for k, n in ((512, 192), (2048, 4096), (4096, 6144)):
        weight = random_weight(k, n, group_size, device="cuda")
        values = weight.values()
        for m in (1, 9, 16, 31, 64, 100, 257, 600):
            a = random_rows(m, k, dtype=dtype, device="cuda")
            check_product(ops.matmul(a, weight.b, weight.s, config=config), a, values)


@pytest.mark.gpu
def test_refused_limits():
    weight = random_weight(128, 64, 64, device="cuda")
    a = random_rows(4, 128, device="cuda")
    for limits in ("like:", "like:108", "like:0:166912", "like:108:1000000", "like:x:166912"):
        with pytest.raises(RuntimeError, match="config: expected"):
            ops.matmul(a, weight.b, weight.s, config=limits)


def cuobjdump() -> str | None:
    """The disassembler, from the toolkit or from Triton's package."""
    if found := shutil.which("cuobjdump"):
        return found
    triton = pytest.importorskip("triton")
    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return str(bundled) if bundled.exists() else None


@pytest.mark.parametrize("gpu", OTHERS)
def test_selected_kernels_do_not_spill(gpu):
    """Kernels that are selected on an 8.x GPU have machine code for it, without a stack frame."""
    capability, sm_count, shared_bytes = GPUS[gpu]
    library = Path(ops.__file__).parent / "_ops_cuda.so"
    if not library.exists() or capability not in ops.build_report()["archs"].split(";"):
        pytest.skip(f"this build has no machine code for {capability}")
    tool = cuobjdump()
    assert tool, "no cuobjdump"
    arch = f"sm_{capability.replace('.', '')}"
    listing = subprocess.run(
        [tool, "-arch", arch, "-res-usage", str(library)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kernels = re.findall(
        r"Function (\S*sm80_kernelILm(\d+)E\S*):\s*\n\s*REG:\d+ STACK:(\d+)", listing
    )
    names = [name for name, s in host.kernel_shapes().items() if s["engine"] == "sm80"]
    built = {names[int(index)] for _, index, _ in kernels}
    layers = {layer for model in MODELS.values() for layer in model.values()}
    selected = {
        host.select(m, n, k, 128, sm_count, shared_bytes).split("@")[0]
        for (k, n), m in itertools.product(layers, (*ROWS[1:], 512, 4096))
    }
    assert selected <= built
    spilling = [name for name, index, stack in kernels
                if names[int(index)] in selected and int(stack) > 0]  # fmt: skip
    assert not spilling
