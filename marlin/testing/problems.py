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


def check_product(y: Tensor, a: Tensor, weight_values: Tensor, bias: Tensor | None = None) -> None:
    """Asserts that y = a · W (+ bias) to the project's tolerance, against float64.

    Every element: |error| ≤ 2 ulp(reference) + c · sqrt(Σ (a w)²). In the mean: |error| /
    |reference| below the bound of y's type.
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
    worst = (error / bound).max().item()
    assert worst <= 1, f"an element is {worst:.3g} times its bound off"  # also false for NaN
    mean = (error.mean() / reference.abs().mean()).item()
    assert mean < mean_bound, f"mean |error| / mean |reference| is {mean:.3g}"
