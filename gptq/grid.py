"""The 4-bit grid: sixteen codes around a zero at 8, and which scales a group of weights may take.

A code q in 0..15 stands for ``(q - 8) * scale``. Scales are rounded to FP16 *before* anything is
rounded with them, so the codes are the best ones for the scales that end up on disk. A scale may
be negative: that gives the code -8, which has no positive twin, to the positive end.
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
# Errors (inputs, outputs) under several scales held at once: a CPU wants them in its cache, a GPU
# wants few launches.
ERRORS_AT_ONCE = {"cpu": 0, "cuda": 2**24}


def round_scale(scale: Tensor) -> Tensor:
    """``scale`` as values that FP16 holds exactly (saturating rather than infinite), same dtype."""
    largest = torch.finfo(torch.float16).max
    return scale.clamp(-largest, largest).half().to(scale.dtype)


def absmax_scale(group: Tensor) -> Tensor:
    """Round-to-nearest's scales: (..., g, n) -> (..., n), values that FP16 holds."""
    return round_scale(group.abs().amax(dim=-2) / HALF_RANGE)


def full_range_scale(group: Tensor) -> Tensor:
    """Scales under which the largest weight is exactly code -8: (..., g, n) -> (..., n)."""
    largest = group.gather(-2, group.abs().argmax(dim=-2, keepdim=True)).squeeze(-2)
    return round_scale(largest / -ZERO)


def candidate_scales(
    group: Tensor, *, clip: bool, full_range: bool, count: int = CANDIDATES
) -> Tensor:
    """Scales worth trying for a group (..., g, n): (candidates, ..., n), values that FP16 holds.

    The first is always ``absmax_scale``. clip: ``count`` ratios of it, down to SMALLEST_RATIO, so
    that the largest weights are given up for the others. full_range: also ``full_range_scale``
    and, with clip, its negative and those of all the others.
    """
    full = group.abs().amax(dim=-2) / HALF_RANGE
    if not clip:
        found = [round_scale(full)] + ([full_range_scale(group)] if full_range else [])
        return torch.stack(found)
    ratios = torch.linspace(1.0, SMALLEST_RATIO, count, dtype=full.dtype, device=full.device)
    scales = round_scale(full * ratios.view(-1, *(1,) * full.dim()))
    if not full_range:
        return scales
    extreme = full_range_scale(group)[None]
    return torch.cat([scales, extreme, -scales, -extreme])


def encode(weight: Tensor, scale: Tensor) -> Tensor:
    """Nearest codes, in weight's dtype; shapes broadcast. A zero scale gives code 8."""
    # Infinity in place of zero keeps 0/0 from making a NaN out of an all-zero group.
    divisor = torch.where(scale == 0, torch.inf, scale)
    return (weight / divisor).round_().add_(ZERO).clamp_(0, LEVELS - 1)


def decode(codes: Tensor, scale: Tensor) -> Tensor:
    """The values that codes stand for, in scale's dtype; shapes broadcast."""
    return (codes.to(scale.dtype) - ZERO) * scale


def rounding_errors(weight: Tensor, scale: Tensor) -> Tensor:
    """``weight - decode(encode(weight, scale), scale)`` in as few passes as there can be."""
    divisor = torch.where(scale == 0, torch.inf, scale)
    levels = (weight / divisor).round_().clamp_(-ZERO, LEVELS - 1 - ZERO)
    return torch.addcmul(weight, levels, scale, value=-1, out=levels)


def cheapest(scales: Tensor, losses: Tensor) -> Tensor:
    """Of ``scales`` (candidates, ..., n) those of least loss, (..., n); the first of equals."""
    return scales.gather(0, losses.argmin(dim=0, keepdim=True)).squeeze(0)


def rounding_losses(group: Tensor, scales: Tensor, metric: Tensor) -> Tensor:
    """The weighted error of rounding a group to nearest, for each column under several scales.

    group: (g, n) FP32 or FP64. scales: (candidates, n). metric, of the same dtype, is what the
    error e is weighted by: (g,) for ``Σ_i metric_i e_i²``, or (b, h, h) with b·h = g, positive
    semi-definite blocks, for ``Σ_b e_bᵀ metric_b e_b``. Returns (candidates, n).
    Raises ValueError when metric does not tile the group.
    """
    height = len(group)
    tiles = metric.shape[0] * (metric.shape[1] if metric.dim() == 3 else 1)
    if tiles != height:
        raise ValueError(
            f"metric: expected ({height},) or square blocks that tile a group of {height}, "
            f"got {tuple(metric.shape)}"
        )
    at_once = max(1, ERRORS_AT_ONCE[group.device.type] // group.numel())
    losses = []
    for some in scales.split(at_once):
        error = rounding_errors(group, some[:, None])
        if metric.dim() == 1:
            losses.append(torch.matmul(metric, error.square_()))
        else:
            error = error.unflatten(1, (len(metric), -1))
            losses.append((torch.matmul(metric, error) * error).sum(dim=(1, 2)))
    return torch.cat(losses)
