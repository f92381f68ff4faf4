"""A reduced sweep over every CUDA operator, for `make sanitize` (compute-sanitizer runs it).

Small shapes, since the sanitizer slows kernels down a hundredfold; results are checked as well.
"""

import itertools
import os

import torch

from marlin import host, ops
from marlin.testing.problems import check_product, random_rows, random_weight

HOPPER = torch.cuda.get_device_capability()[0] == 9 and "9.0a" in ops.build_report()["archs"]
SHAPES = {
    name: shape
    for name, shape in host.kernel_shapes().items()
    if HOPPER or shape["engine"] == "sm80"
}
# Without "dense": initcheck does not see what cuBLAS stores.
CONFIGS = [None, "reference", *SHAPES]
# racecheck does not follow barriers that another CTA of a cluster arrives at, and takes what pairs
# of CTAs read of one another for races: for it, slices are shared over global memory only.
PAIRS = os.environ.get("SANITIZER_TOOL") != "racecheck"


def named(config: str | None, m: int, k: int, n: int) -> str | None:
    """The configuration, with a number of runs for which CTAs never work in pairs if need be."""
    if PAIRS or config == "reference":
        return config
    shape = SHAPES[config or next(iter(SHAPES))]
    slices = -(-n // shape["columns"]) * -(-m // shape["rows"])
    tiles = slices * -(-k // shape["depth"])
    runs = min(3 * slices, tiles)
    name = config or next(iter(SHAPES))
    return f"{name}@{runs if runs != 2 * slices else slices}"


def sweep() -> int:
    """Runs all problems; returns how many."""
    problems = 0
    for k, n, group_size in ((128, 64, 32), (256, 320, 128), (176, 192, -1)):
        for dtype in (torch.float16, torch.bfloat16):
            weight = random_weight(k, n, group_size, dtype=dtype, device="cuda")
            values = weight.values()
            assert torch.equal(ops.unpack(weight.b), weight.codes)
            assert torch.equal(ops.unpack_scales(weight.s), weight.scales)
            assert torch.equal(ops.dequantize(weight.b, weight.s, torch.float32), values.float())
            bias = torch.randn(n, device="cuda").to(dtype)
            for m, config in itertools.product((1, 33), CONFIGS):
                a = random_rows(m, k, dtype=dtype, device="cuda")
                y = ops.matmul(a, weight.b, weight.s, bias, named(config, m, k, n))
                check_product(y, a, values, bias)
                problems += 1
            weight = random_weight(k, n, group_size, dtype=dtype, device="cuda", zeros=True)
            values = weight.values()
            assert torch.equal(ops.unpack_scales(weight.z), weight.zeros)
            unpacked = ops.dequantize(weight.b, weight.s, torch.float32, weight.z)
            assert torch.equal(unpacked, values.float())
            # By name: the net's Y is what cuBLAS stores, see above.
            y = ops.matmul(a, weight.b, weight.s, bias, "reference", weight.z)
            check_product(y, a, values, bias)
            problems += 1
    # Rings that go round, slices shared by pairs of CTAs and over global memory.
    weight = random_weight(2048, 256, 128, device="cuda")
    values = weight.values()
    for m, config in itertools.product((1, 65), CONFIGS):
        a = random_rows(m, 2048, device="cuda")
        y = ops.matmul(a, weight.b, weight.s, config=named(config, m, 2048, 256))
        check_product(y, a, values)
        problems += 1
    problems += sweep_columns("cuda")
    torch.cuda.synchronize()
    return problems


def sweep_columns(device: str) -> int:
    """The quantizer's loop, against the CPU's; ties may fall either way."""
    shapes = ((1, 1), (37, 64), (128, 130))
    for rows, n in shapes:
        work, current = torch.randn(2, rows, n).unbind()
        coupling, scale = torch.randn(rows, rows) / rows, torch.rand(n)
        weights, scales = torch.rand(rows), torch.rand(9, n)
        for arguments in ((work, coupling, scale), (work, coupling, scale, current)):
            codes, moved = ops.quantize_columns(*(t.to(device) for t in arguments))
            expected, _ = ops.quantize_columns(*arguments)
            assert (codes.cpu() == expected).float().mean() > 0.99 and moved.isfinite().all()
        losses = ops.trial_losses(*(t.to(device) for t in (work, coupling, weights, scales)))
        expected = ops.trial_losses(work, coupling, weights, scales)
        torch.testing.assert_close(losses.cpu(), expected, rtol=0.05, atol=0.05)
    return len(shapes)


if __name__ == "__main__":
    print(f"{sweep()} problems, all right")
