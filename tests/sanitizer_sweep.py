"""A reduced sweep over every CUDA operator, for `make sanitize` (compute-sanitizer runs it).

Small shapes, since the sanitizer slows kernels down a hundredfold. Results are checked as well, on
the CPU: torch's own kernels would take the sanitizer longer than ours.
"""

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


def slices_of(shape: dict, m: int, n: int) -> int:
    return -(-n // shape["columns"]) * -(-m // shape["rows"])


def named(config: str | None, m: int, k: int, n: int) -> str | None:
    """The configuration, with a number of runs for which CTAs never work in pairs if need be."""
    if PAIRS or config == "reference":
        return config
    shape = SHAPES[config or next(iter(SHAPES))]
    slices = slices_of(shape, m, n)
    tiles = slices * -(-k // shape["depth"])
    runs = min(3 * slices, tiles)
    name = config or next(iter(SHAPES))
    return f"{name}@{runs if runs != 2 * slices else slices}"


class Problems:
    """A weight on the GPU, and on the CPU what its products must be."""

    count = 0

    def __init__(self, k, n, group_size, dtype=torch.float16, zeros=False, bias=True):
        drawn = {"dtype": dtype, "zeros": zeros}
        self.weight = random_weight(k, n, group_size, device="cuda", **drawn)
        self.twin = random_weight(k, n, group_size, **drawn)
        self.values, self.dtype = self.twin.values(), dtype
        self.bias = torch.randn(n).to(dtype) if bias else None

    def check(self, m: int, config: str | None) -> None:
        w, a = self.weight, random_rows(m, len(self.values), dtype=self.dtype)
        bias = None if self.bias is None else self.bias.cuda()
        y = ops.matmul(a.cuda(), w.b, w.s, bias, config, w.z)
        check_product(y.cpu(), a, self.values, self.bias)
        Problems.count += 1

    def check_weight(self) -> None:
        w, twin = self.weight, self.twin
        assert torch.equal(ops.unpack(w.b).cpu(), twin.codes)
        assert torch.equal(ops.unpack_scales(w.s).cpu(), twin.scales)
        if w.z is not None:
            assert torch.equal(ops.unpack_scales(w.z).cpu(), twin.zeros)
        unpacked = ops.dequantize(w.b, w.s, torch.float32, w.z)
        assert torch.equal(unpacked.cpu(), self.values.float())


def sweep() -> int:
    """Runs all problems; returns how many."""
    dtypes = (torch.float16, torch.bfloat16)
    for shape, rows in (
        ((128, 64, 32), (1, 33)),
        ((256, 320, 128), (33, 1)),
        ((176, 192, -1), (1, 33)),
    ):
        for dtype, m in zip(dtypes, rows, strict=True):
            plain, with_zeros = (Problems(*shape, dtype, zeros) for zeros in (False, True))
            plain.check_weight()
            with_zeros.check_weight()
            with_zeros.check(m, "reference")
            if os.environ.get("SANITIZER_TOOL") != "initcheck":
                with_zeros.check(m, "dense")
            for config in CONFIGS:
                plain.check(m, named(config, m, *shape[:2]))
    # Slices shared by many CTAs.
    deep = Problems(2048, 256, 128, bias=False)
    for config in CONFIGS:
        deep.check(65, named(config, 65, 2048, 256))
    # Whole slices in turn, what is left shared; the second of the last twins has no columns.
    wide = Problems(512, 832, 64, bias=False)
    for name, shape in SHAPES.items():
        wide.check(65, f"{name}@{slices_of(shape, 65, 832) * 3 // 4}")
    # One CTA for everything: what comes after a ring's first round, up to edges of n and k.
    long = Problems(2048 + 384, 320, 128, bias=False)
    for name in SHAPES:
        long.check(9, f"{name}@1")
    # Two CTAs for every slice: of the last rows one has none, or half of them.
    if PAIRS:
        for name, shape in SHAPES.items():
            for m in (shape["rows"], shape["rows"] + 1) if shape["can_pair"] else ():
                long.check(m, f"{name}@{2 * slices_of(shape, m, 320)}")
    problems = Problems.count
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
