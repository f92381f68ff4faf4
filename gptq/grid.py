"""The 4-bit grid: sixteen codes around a zero at 8, and the search for each group's scale.

A code q in 0..15 stands for ``(q - 8) * scale``. Scales are rounded to FP16 *before* anything is
rounded with them, so the codes are the best ones for the scales that end up on disk.
Weights are (k, n) as everywhere in Marlin: a group is a run of rows, a scale belongs to a column.
"""

import torch
from torch import Tensor

LEVELS = 16
ZERO = 8
# With this divisor the largest weight lands half-way between codes 7 and 8 of either sign: the
# even split of the error between the negative end (which has the code -8) and the positive one.
HALF_RANGE = 7.5
SMALLEST_RATIO = 0.35
CANDIDATES = 40


def round_scale(scale: Tensor) -> Tensor:
    """``scale`` as values that FP16 holds exactly (saturating rather than infinite), same dtype."""
    return scale.clamp(max=torch.finfo(torch.float16).max).half().to(scale.dtype)


def absmax_scale(group: Tensor) -> Tensor:
    """Round-to-nearest's scales: (..., g, n) -> (..., n), values that FP16 holds."""
    return round_scale(group.abs().amax(dim=-2) / HALF_RANGE)


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """Nearest codes, in weight's dtype; shapes broadcast. A zero scale gives code 8."""
    # Infinity in place of zero keeps 0/0 from making a NaN out of an all-zero group.
    divisor = torch.where(scale == 0, torch.inf, scale)
    return (weight / divisor).round_().add_(ZERO).clamp_(0, LEVELS - 1)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The values that codes stand for, in scale's dtype; shapes broadcast."""
    return (codes.to(scale.dtype) - ZERO) * scale


def search_scale(group: Tensor, metric: Tensor, candidates: int = CANDIDATES) -> Tensor:
    """For each column of one group, the clipped scale of least weighted rounding error.

    group: (g, n) FP32 or FP64. metric: (b, h, h) of the same dtype, positive semi-definite blocks
    with b·h = g, the weights of the error ``Σ_b e_bᵀ metric_b e_b``. One block of g is the usual
    case; a long per-column group brings several, so that the cost stays linear in g.
    Returns (n,) scales that FP16 holds exactly. The first candidate is ``absmax_scale``, so
    by this measure the result is never worse than round-to-nearest.
    Raises ValueError when metric does not tile the group.
    """
    height, columns = group.shape
    blocks, size, _ = metric.shape
    if blocks * size != height:
        raise ValueError(
            f"metric: expected square blocks that tile a group of {height}, "
            f"got {tuple(metric.shape)}"
        )
    full = group.abs().amax(dim=0) / HALF_RANGE
    best_scale = round_scale(full)
    best_cost = torch.full((columns,), torch.inf, dtype=group.dtype, device=group.device)
    for ratio in torch.linspace(1.0, SMALLEST_RATIO, candidates).tolist():
        scale = round_scale(full * ratio)
        error = (group - decode(encode(group, scale), scale)).view(blocks, size, columns)
        cost = (torch.bmm(metric, error) * error).sum(dim=(0, 1))
        better = cost < best_cost
        best_cost = torch.where(better, cost, best_cost)
        best_scale = torch.where(better, scale, best_scale)
    return best_scale
