"""GPTQ and round-to-nearest as pure functions of tensors.

GPTQ rounds a weight (k, n) row by row, one input at a time, and lets the inputs not yet rounded
make up for each rounding error as far as the inputs' second moments H say they can. Outputs never
interact, so the weights of several layers that read one input may be laid side by side along n
and solved together.

    (H + λI)⁻¹ = Uᵀ U,  U upper triangular
    input j:  q = round(w_j),  e = (w_j - q) / U_jj,  w_i -= U_ji · e  for every i > j

The updates of inputs beyond the current block are put off to one matrix product per block.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from . import grid
from .phases import phase

BLOCK = 128  # inputs per lazy update; every group size in use divides it
DAMPING = 0.01  # of the mean of H's diagonal
MAX_DAMPING = 1.0  # beyond, what the data say drowns; time for other means


class FactorizationError(ArithmeticError):
    """H has no Cholesky factor in this precision, however much damping is allowed."""


@dataclass(frozen=True)
class Solution:
    """A quantized weight in natural order: what ``marlin.MarlinLinear.from_quantized`` takes."""

    codes: Tensor  # uint8 (k, n), 0..15
    scales: Tensor  # float16 (groups, n)
    damping: float = 0.0  # what the factorization needed, relative to mean(diag(H)); 0 for RTN

    def dequantize(self) -> Tensor:
        """The (k, n) FP32 values of the codes."""
        group = self.codes.shape[0] // self.scales.shape[0]
        return grid.decode(self.codes, self.scales.float().repeat_interleave(group, dim=0))

    def cpu(self) -> "Solution":
        """The same, in host memory."""
        return Solution(self.codes.cpu(), self.scales.cpu(), self.damping)

    def outputs(self, start: int, stop: int) -> "Solution":
        """The part for outputs start..stop-1, to take layers solved together apart again."""
        return Solution(
            self.codes[:, start:stop].contiguous(),
            self.scales[:, start:stop].contiguous(),
            self.damping,
        )


def rtn(weight: Tensor, group_size: int, *, clip: bool = False) -> Solution:
    """Round every weight to the nearest code under absmax scales, or clipped ones.

    weight: (k, n) floating. group_size: a divisor of k, or -1 for one group per output.
    clip: search scales of least squared error in the weights.
    Raises ValueError for anything else.
    """
    weight, group = _checked(weight, group_size)
    groups = weight.unflatten(0, (-1, group))
    if clip:
        even = weight.new_ones(group, 1, 1)
        scales = torch.stack([grid.search_scale(rows, even) for rows in groups])
    else:
        scales = grid.absmax_scale(groups)
    codes = grid.encode(groups, scales[:, None]).flatten(0, 1)
    return Solution(codes.to(torch.uint8), scales.half())


def gptq(
    weight: Tensor,
    hessian: Tensor,
    group_size: int,
    *,
    clip: bool = True,
    damping: float = DAMPING,
    block: int = BLOCK,
) -> Solution:
    """Round ``weight`` (k, n) so that its outputs change least under ``hessian`` (k, k).

    Computes in FP32, or in FP64 for an FP64 weight.
    group_size: a divisor of k, or -1 for one group per output. clip: search each group's scale
    (``grid.search_scale``) instead of taking the absmax. damping: λ relative to mean(diag(H)),
    raised as far as the factorization needs it; the value used is in the result.
    Inputs that never saw data (zero rows of H) are simply rounded.
    Raises ValueError on shapes that do not fit and on values that are NaN or infinite.
    """
    weight, group = _checked(weight, group_size)
    k, n = weight.shape
    if hessian.shape != (k, k):
        raise ValueError(f"hessian: expected ({k}, {k}), got {tuple(hessian.shape)}")
    hessian = hessian.to(weight.dtype)
    upper, damping = factor(hessian, damping)

    work = weight.clone()
    codes = torch.empty_like(work)
    scales = work.new_empty(k // group, n)

    # A group is weighed by its own part of H, a long one by the blocks on that part's diagonal.
    size = math.gcd(group, block)

    def choose_scale(first: int) -> Tensor:
        rows = work[first : first + group]
        if not clip:
            return grid.absmax_scale(rows)
        parts = [slice(i, i + size) for i in range(first, first + group, size)]
        return grid.search_scale(rows, torch.stack([hessian[part, part] for part in parts]))

    for start in range(0, k, block):
        stop = min(start + block, k)
        errors = work.new_empty(stop - start, n)
        for j in range(start, stop):
            index, offset = divmod(j, group)
            if offset == 0:
                scales[index] = choose_scale(j)
            codes[j] = grid.encode(work[j], scales[index])
            errors[j - start] = (work[j] - grid.decode(codes[j], scales[index])) / upper[j, j]
            work[j + 1 : stop].addr_(upper[j, j + 1 : stop], errors[j - start], alpha=-1)
        work[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return Solution(codes.to(torch.uint8), scales.half(), damping)


def factor(hessian: Tensor, damping: float = DAMPING) -> tuple[Tensor, float]:
    """Upper triangular U with ``(H + λI)⁻¹ = Uᵀ U``, and the λ it took relative to mean(diag(H)).

    λ starts at damping and grows tenfold, up to MAX_DAMPING, until the Cholesky factorization
    holds. Raises FactorizationError when it never does.
    """
    if not torch.isfinite(hessian).all():
        raise ValueError("hessian: expected finite values, got NaN or Inf")
    mean = hessian.diagonal().mean().item()
    if mean <= 0:  # no data at all: with any multiple of the identity GPTQ is plain rounding
        hessian, mean = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device), 1.0
    with phase("factor"):
        while True:
            upper = _factor(hessian, damping * mean)
            if upper is not None:
                return upper, damping
            if damping >= MAX_DAMPING:
                raise FactorizationError(
                    f"hessian: expected a positive definite matrix, got one that is not even with "
                    f"damping {damping:g} of its mean diagonal in {hessian.dtype}"
                )
            damping = min(max(10 * damping, DAMPING), MAX_DAMPING)


def _factor(hessian: Tensor, shift: float) -> Tensor | None:
    """U of ``(H + shift·I)⁻¹ = Uᵀ U``, or None when the factorization fails.

    Each copy of H may take gigabytes, so none lives longer than it is needed.
    """
    # Factoring H with its order reversed gives H = R Rᵀ with R upper; then U = R⁻¹ is one
    # triangular solve, where inverting H and factoring the inverse would lose digits twice.
    damped = hessian.flip(0, 1)
    damped.diagonal().add_(shift)
    lower, failed = torch.linalg.cholesky_ex(damped)
    del damped
    if failed:
        return None
    right = lower.flip(0, 1)
    del lower
    eye = torch.eye(len(right), dtype=right.dtype, device=right.device)
    return torch.linalg.solve_triangular(right, eye, upper=True)


def output_loss(weight: Tensor, solution: Solution, hessian: Tensor) -> float:
    """Share of the layer's output energy that rounding lost: tr(Eᵀ H E) / tr(Wᵀ H W)."""
    weight = weight.float()
    error = weight - solution.dequantize()
    energy = ((hessian @ weight) * weight).sum()
    lost = ((hessian @ error) * error).sum()
    return (lost / energy.clamp(min=torch.finfo(torch.float32).tiny)).item()


def _checked(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
    """``weight`` as FP32 (FP64 stays) and the number of inputs in a group."""
    if weight.dim() != 2 or not weight.is_floating_point():
        raise ValueError(
            f"weight: expected a floating (k, n) matrix, got {weight.dtype} {tuple(weight.shape)}"
        )
    k = weight.shape[0]
    group = k if group_size == -1 else group_size
    if group < 1 or k % group:
        raise ValueError(f"group_size: expected -1 or a divisor of k = {k}, got {group_size}")
    if not torch.isfinite(weight).all():
        raise ValueError("weight: expected finite values, got NaN or Inf")
    return weight.to(torch.promote_types(weight.dtype, torch.float32)), group
