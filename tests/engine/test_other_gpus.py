"""What runs on GPUs that are not here: their selections run on this one, and fit theirs.

The whole suite also passes here in a build that holds nothing but PTX of 8.0:
``MARLIN_CUDA_ARCHS=8.0+PTX make test PYTHON=python3``.
"""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from marlin import host, ops
from marlin.testing.problems import check_product, random_rows, random_weight
from marlin.testing.shapes import GPUS, GROUP_SIZES, LIKE

OTHERS = list(LIKE)


@pytest.mark.gpu
@pytest.mark.parametrize("config", LIKE.values(), ids=LIKE)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_selections_of_other_gpus(config, dtype, group_size):
    for k, n in ((512, 192), (2048, 4096), (4096, 6144)):
        weight = random_weight(k, n, group_size, device="cuda")
        values = weight.values()
        for m in (1, 9, 16, 31, 64, 100, 257, 600, 1024, 2500):
            a = random_rows(m, k, dtype=dtype, device="cuda")
            check_product(ops.matmul(a, weight.b, weight.s, config=config), a, values)


@pytest.mark.gpu
@pytest.mark.parametrize("config", LIKE.values(), ids=LIKE)
@pytest.mark.parametrize("m", [1, 40, 100, 512, 1000])
def test_scales_that_fp16_cannot_hold(config, m):
    """FP16 rows and BF16 scales: only shapes that scale sums will do."""
    weight = random_weight(512, 4096, 128, device="cuda")
    scales = weight.scales.clone().to(torch.bfloat16)
    scales[1, 3::16], scales[:, 6::16] = 1e5, 1e-9
    weight.scales = scales
    a = random_rows(m, 512, device="cuda") / 8192
    y = ops.matmul(a, weight.b, ops.pack_scales(scales), config=config)
    check_product(y, a, weight.values())


@pytest.mark.gpu
def test_refused_limits():
    weight = random_weight(128, 64, 64, device="cuda")
    a = random_rows(4, 128, device="cuda")
    for limits in (
        "like:",
        "like:108",
        "like:0:166912",
        "like:108:1000",
        "like:108:1000000",
        "like:x:1",
    ):
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
def test_kernels_do_not_spill(gpu):
    """All of the engine have machine code for a GPU of 8.x, without a stack frame."""
    capability = GPUS[gpu][0]
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
    assert {names[int(index)] for _, index, _ in kernels} == set(names)
    spilling = [name for name, _, stack in kernels if int(stack) > 0]
    assert not spilling
