"""Random problems with a float64 answer, and the tolerance that every result is held to."""

from dataclasses import dataclass

import torch
from torch import Tensor

from marlin import ops


@dataclass
class Weight:
    """A quantized weight, in natural order (codes, scales, zeros) and packed (b, s, z)."""

    codes: Tensor  # uint8 (k, n)
    scales: Tensor  # (groups, n)
    b: Tensor
    s: Tensor
    zeros: Tensor | None = None  # uint8 (groups, n); None: 8 everywhere
    z: Tensor | None = None

    def values(self) -> Tensor:
        """The exact weight, float64 (k, n), computed without any code of ours."""
        k = self.codes.shape[0]
        size = k // self.scales.shape[0]
        scales = self.scales.double().repeat_interleave(size, 0)
        zeros = 8 if self.zeros is None else self.zeros.double().repeat_interleave(size, 0)
        return (self.codes.double() - zeros) * scales


def random_weight(
    k: int, n: int, group_size: int, *, dtype=torch.float16, device="cpu", seed=0, zeros=False
) -> Weight:
    """Uniform codes, zeros if wanted, and scales around the size that a real layer has."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8, generator=generator)
    groups = 1 if group_size == -1 else k // group_size
    scales = (torch.rand(groups, n, generator=generator) * 0.02 + 0.001).to(dtype)
    codes, scales = codes.to(device), scales.to(device)
    weight = Weight(codes, scales, ops.pack(codes), ops.pack_scales(scales))
    if zeros:
        drawn = torch.randint(0, 17, (groups, n), dtype=torch.uint8, generator=generator)
        weight.zeros = drawn.to(device)
        weight.z = ops.pack_scales(weight.zeros)
    return weight


def random_rows(m: int, k: int, *, dtype=torch.float16, device="cpu", seed=1, mean=0.0) -> Tensor:
    """Activations (m, k): normal, around ``mean``."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(m, k, generator=generator) + mean).to(dtype).to(device)


# Per activation type: bound on mean |error| / mean |reference|, and on an element's error in units
# of sqrt(sum of squared products). For float32, whose output is not rounded to 16 bits, what FP32
# sums of a few thousand terms cost.
TOLERANCE = {
    torch.float16: (5e-4, 2.0**-9),
    torch.bfloat16: (4e-3, 2.0**-6),
    torch.float32: (2e-6, 2.0**-18),
}


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` at each value (float64)."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(values.abs().clamp_min(info.tiny))
    return torch.ldexp(torch.full_like(values, info.eps), exponent - 1)


def rounding_on_the_way(a64: Tensor, weight_values: Tensor, group_size: int, dtype) -> Tensor:
    """What it may cost to round weights, and the product before a bias, to 16 bits.

    Under one scale there are only 16 different weights, so the errors of a group need not cancel
    where activations have a mean; those of different groups do.
    """
    half_ulp = torch.finfo(dtype).eps / 2
    squares = torch.zeros_like(a64 @ weight_values)
    for rows in range(0, a64.shape[1], group_size):
        part = slice(rows, rows + group_size)
        squares += (a64[:, part].abs() @ weight_values[part].abs()).square()
    return half_ulp * (squares.sqrt() + (a64 @ weight_values).abs())


def check_product(
    y: Tensor,
    a: Tensor,
    weight_values: Tensor,
    bias: Tensor | None = None,
    dense_group: int | None = None,
) -> None:
    """Asserts that y = a · W (+ bias) to the project's tolerance, against float64.

    Every element: |error| ≤ 2 ulp(reference) + c · sqrt(Σ (a w)²). In the mean: |error| /
    |reference| below the bound of y's type.

    ``dense_group``: of a path that dequantizes first, which rounds more often: how many rows of the
    weight share a scale. It matters where zero points give a group's weights a mean.
    """
    mean_bound, element_bound = TOLERANCE[y.dtype]
    a64 = a.double().flatten(0, -2)
    reference = a64 @ weight_values
    spread = (a64.square() @ weight_values.square()).sqrt()
    if bias is not None:
        reference = reference + bias.double()
    assert y.shape == (*a.shape[:-1], weight_values.shape[1])
    error = (y.double().flatten(0, -2) - reference).abs()
    if error.numel() == 0:
        return
    bound = 2 * ulp(reference, y.dtype) + element_bound * spread
    if dense_group is not None:
        bound += rounding_on_the_way(a64, weight_values, dense_group, y.dtype)
    worst = (error / bound).max().item()
    assert worst <= 1, f"an element is {worst:.3g} times its bound off"  # also false for NaN
    mean = (error.mean() / reference.abs().mean()).item()
    assert mean < mean_bound, f"mean |error| / mean |reference| is {mean:.3g}"
