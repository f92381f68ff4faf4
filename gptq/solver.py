"""GPTQ and round-to-nearest as pure functions of tensors.

GPTQ rounds a weight (k, n) row by row, one input at a time, and lets the inputs not yet rounded
make up for each rounding error as far as the inputs' second moments H say they can. Outputs never
interact, so the weights of several layers that read one input may be laid side by side along n
and solved together.

    (H + λI)⁻¹ = Uᵀ U,  U upper triangular,  V = diag(U)⁻¹ U
    input j:  q = round(w_j),  d = w_j - q,  w_i -= V_ji · d  for every i > j;  loss += (d / U_jj)²

The updates of inputs beyond the current block are put off to one matrix product per block.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import grid, refine
from .columns import quantize_columns, trial_losses
from .hessian import energies
from .order import group_order, restore
from .phases import phase

BLOCK = 128  # inputs per lazy update; every group size in use divides it
DAMPING = 0.01  # of the mean of H's diagonal
MAX_DAMPING = 1.0  # beyond, what the data say drowns; time for other means
GUARD_OUTPUTS, GUARD_MARGIN = 256, 0.95  # at least so many of a layer's; what is clearly less
INVERTED_AT_ONCE = 512  # rows of a triangular matrix
METRICS = ("block", "conditional", "diagonal", "trial")
# The options under which ``gptq`` is the published algorithm.
PUBLISHED = {
    "clip": False,
    "full_range": False,
    "order": False,
    "refit": False,
    "sweeps": 0,
    "guard": False,
}


class FactorizationError(ArithmeticError):
    """H has no Cholesky factor in this precision, however much damping is allowed."""


@dataclass(frozen=True)
class Solution:
    """A quantized weight in natural order: what ``marlin.MarlinLinear.from_quantized`` takes."""

    codes: Tensor  # uint8 (k, n), 0..15
    scales: Tensor  # float16 (groups, n)
    damping: float = 0.0  # what the factorization needed, relative to mean(diag(H)); 0 for RTN
    lost: Tensor | None = None  # (n,) eᵀ H e of each output, where it became known on the way

    def dequantize(self) -> Tensor:
        """The (k, n) FP32 values of the codes."""
        group = self.codes.shape[0] // self.scales.shape[0]
        return grid.decode(self.codes, self.scales.float().repeat_interleave(group, dim=0))

    def cpu(self) -> "Solution":
        """The same, in host memory."""
        lost = None if self.lost is None else self.lost.cpu()
        return Solution(self.codes.cpu(), self.scales.cpu(), self.damping, lost)

    def outputs(self, start: int, stop: int) -> "Solution":
        """The part for outputs start..stop-1, to take layers solved together apart again."""
        return Solution(
            self.codes[:, start:stop].contiguous(),
            self.scales[:, start:stop].contiguous(),
            self.damping,
            None if self.lost is None else self.lost[start:stop],
        )


def rtn(
    weight: Tensor,
    group_size: int,
    *,
    clip: bool = False,
    full_range: bool = False,
    importance: Tensor | None = None,
) -> Solution:
    """Round every weight to the nearest code; by default under absmax scales.

    weight: (k, n) floating. group_size: a divisor of k, or -1 for one group per output.
    clip, full_range: of ``grid.candidate_scales`` take those of least squared error.
    importance: (k,) from 0 on, what an input's squared error counts in that; all alike by default.
    Raises ValueError for anything else.
    """
    weight, group = _checked(weight, group_size)
    if importance is None:
        importance = weight.new_ones(len(weight))
    if importance.shape != (len(weight),) or not (importance >= 0).all():
        raise ValueError(
            f"importance: expected ({len(weight)},) numbers from 0 on, got "
            f"{tuple(importance.shape)}, the least {importance.min().item():.3g}"
        )
    groups = weight.unflatten(0, (-1, group))
    candidates = grid.candidate_scales(groups, clip=clip, full_range=full_range)
    scales = candidates[0]
    if len(candidates) > 1:
        counts = importance.to(weight).unflatten(0, (-1, group))
        losses = [
            grid.rounding_losses(groups[i], candidates[:, i], counts[i]) for i in range(len(groups))
        ]
        scales = grid.cheapest(candidates, torch.stack(losses, dim=1))
    codes = grid.encode(groups, scales[:, None]).flatten(0, 1)
    return Solution(codes.to(torch.uint8), scales.half())


def gptq(
    weight: Tensor,
    hessian: Tensor,
    group_size: int,
    *,
    clip: bool = True,
    metric: str = "block",
    full_range: bool = True,
    order: bool = True,
    refit: bool = True,
    sweeps: int = 0,
    guard: bool = True,
    damping: float = DAMPING,
    block: int = BLOCK,
    widths: Sequence[int] | None = None,
) -> Solution:
    """Round ``weight`` (k, n) so that its outputs change least under ``hessian`` (k, k).

    Computes in FP32, or in FP64 for an FP64 weight.
    group_size: a divisor of k, or -1 for one group per output. damping: λ relative to
    mean(diag(H)), raised as far as the factorization needs it; the value used is in the result.
    block: inputs per lazy update. The rest are switches, ``PUBLISHED`` turns them off:

    clip: search each group's scale instead of taking the absmax. full_range: try negative scales
    too. metric: by what loss a scale is chosen; with e the error of rounding the group to nearest,
        "block"        eᵀ H_gg e, what the group alone does
        "conditional"  eᵀ (U_ggᵀ U_gg)⁻¹ e, what is left once later inputs make up for it
        "diagonal"     Σ (e_j / U_jj)², the same if later inputs of the group do, too
        "trial"        what the column loop really loses under that scale
    (in groups longer than ``block``, which are searched before they are rounded, "block" and
    "conditional" take blocks on the diagonal, "trial" is "diagonal").
    order: round inputs that matter most first (``group_order``). refit, sweeps: ``sweeps`` times
    fit scales to codes, then codes to scales, and scales once more (``refine``). guard: a layer
    that would lose less by the published algorithm gets what that finds. widths: how many outputs
    each layer has, of layers laid side by side; by default there is one.

    What is on by default was chosen by how well language models predict, not by the layers' loss,
    which is least with "trial" and sweeps: what the calibration text lets later inputs make up for
    holds less on other text. The README has the numbers.
    Inputs that never saw data (zero rows of H) are simply rounded.
    Raises ValueError on shapes that do not fit, options that are none, and on values that are NaN
    or infinite.
    """
    weight, group = _checked(weight, group_size)
    k = len(weight)
    if hessian.shape != (k, k):
        raise ValueError(f"hessian: expected ({k}, {k}), got {tuple(hessian.shape)}")
    if metric not in METRICS:
        raise ValueError(f"metric: expected one of {', '.join(METRICS)}, got {metric!r}")
    if not 0 <= damping <= MAX_DAMPING:
        raise ValueError(f"damping: expected 0 to {MAX_DAMPING:g}, got {damping}")
    if sweeps < 0:
        raise ValueError(f"sweeps: expected 0 or more, got {sweeps}")
    hessian = hessian.to(weight.dtype)
    switches = {"clip": clip, "full_range": full_range, "order": order, "refit": refit,
                "sweeps": sweeps}  # fmt: skip
    shared = {"metric": metric, "damping": damping, "block": block}
    found = _gptq(weight, hessian, group, **switches, **shared)
    if not guard or not any(switches.values()):
        return found
    plain = {**dict.fromkeys(switches, False), **shared}

    def published(outputs: Tensor) -> Solution:
        return _gptq(weight[:, outputs], hessian, group, **plain)

    return _guarded(weight, hessian, found, widths or [weight.shape[1]], published)


def _gptq(
    weight: Tensor,
    hessian: Tensor,
    group: int,
    *,
    clip: bool,
    metric: str,
    full_range: bool,
    order: bool,
    refit: bool,
    sweeps: int,
    damping: float,
    block: int,
) -> Solution:
    """``gptq`` of input that has been checked, without its guard. group: inputs in a group."""
    if order:
        permutation = group_order(hessian.diagonal(), group)
        weight, hessian = weight[permutation], hessian[permutation][:, permutation]
    unseen = hessian.diagonal() == 0
    upper, damping = factor(hessian, damping)
    size = math.gcd(group, block)
    pivots = upper.diagonal().clone()
    coupling = upper.div_(pivots[:, None])  # in place: upper is as large as H
    codes, scales = _round(weight, hessian, coupling, pivots, group, size, metric, clip, full_range)
    del upper, coupling

    if refit or sweeps:
        shift = damping * hessian.diagonal().mean().item() or 1.0
        damped = hessian if order else hessian.clone()  # a copy already, and too large for two
        damped.diagonal().add_(shift)
    for _ in range(sweeps):
        if refit:
            scales, _ = refine.refit_scales(weight, codes, scales, damped, shift)
        codes = refine.sweep(weight, codes, scales, damped, size)
    lost = None
    if refit:
        scales, lost = refine.refit_scales(weight, codes, scales, damped, shift)
    if refit and unseen.any():  # its scale may have changed, for the others
        each = scales.repeat_interleave(group, dim=0)
        codes[unseen] = grid.encode(weight[unseen], each[unseen])
    if order:
        codes, scales = restore(codes, scales, permutation)
    return Solution(codes.to(torch.uint8), scales.half(), damping, lost)


def _guarded(
    weight: Tensor,
    hessian: Tensor,
    found: Solution,
    widths: Sequence[int],
    published: Callable[[Tensor], Solution],
) -> Solution:
    """``found``, but ``published(outputs)`` for layers that lose less with it.

    By layers, not by outputs: whichever of two solutions loses less in calibration, output by
    output, predicts worse (README). A large layer is solved a second time only if a part of its
    outputs does not say already that it loses clearly less than as published.
    """

    def losses(solution: Solution, outputs: Tensor) -> Tensor:
        if solution.lost is not None:
            return solution.lost
        scales = solution.scales.to(weight.dtype)
        return refine.losses(weight[:, outputs], solution.codes, scales, hessian, shift=0.0)

    outputs = torch.arange(weight.shape[1], device=weight.device)
    codes, scales, damping = found.codes, found.scales, found.damping
    lost = losses(found, outputs)
    layers = outputs.split(list(widths))
    parts = [layer[:: max(1, len(layer) // GUARD_OUTPUTS)] for layer in layers]
    looks = published(torch.cat(parts))
    start = 0
    for layer, part in zip(layers, parts, strict=True):
        other = looks.outputs(start, start + len(part))
        start += len(part)
        less = losses(other, part)
        if lost[part].sum() < GUARD_MARGIN * less.sum():
            continue
        if len(part) < len(layer):
            other = published(layer)
            less = losses(other, layer)
        if less.sum() < lost[layer].sum():
            codes[:, layer], scales[:, layer], lost[layer] = other.codes, other.scales, less
            damping = max(damping, other.damping)
    return Solution(codes, scales, damping, lost)


def _round(
    weight: Tensor,
    hessian: Tensor,
    coupling: Tensor,
    pivots: Tensor,
    group: int,
    size: int,
    metric: str,
    clip: bool,
    full_range: bool,
) -> tuple[Tensor, Tensor]:
    """GPTQ's pass over all inputs in segments of ``size``: codes (k, n) and scales (groups, n).

    pivots, coupling: U's diagonal (k,), and U (k, k) with every row divided by its own.
    """
    k, n = weight.shape
    work = weight.clone()
    codes = torch.empty_like(work)
    scales = work.new_empty(k // group, n)

    def choose_scale(first: int) -> Tensor:
        rows = work[first : first + group]
        candidates = grid.candidate_scales(rows, clip=clip, full_range=full_range)
        if len(candidates) == 1:
            return candidates[0]
        inside = slice(first, first + group)
        weights = pivots[inside].square().reciprocal()
        if metric == "trial" and group == size:
            losses = trial_losses(rows, coupling[inside, inside], weights, candidates)
        elif metric in ("trial", "diagonal"):
            losses = grid.rounding_losses(rows, candidates, weights)
        else:
            parts = [slice(i, i + size) for i in range(first, first + group, size)]
            if metric == "block":
                blocks = [hessian[part, part] for part in parts]
            else:
                blocks = [_conditional(coupling[part, part] * pivots[part, None]) for part in parts]
            losses = grid.rounding_losses(rows, candidates, torch.stack(blocks))
        return grid.cheapest(candidates, losses)

    for start in range(0, k, size):
        stop = start + size
        index, offset = divmod(start, group)
        if offset == 0:
            scales[index] = choose_scale(start)
        codes[start:stop], moved = quantize_columns(
            work[start:stop], coupling[start:stop, start:stop], scales[index]
        )
        work[stop:].addmm_(coupling[start:stop, stop:].T, moved, alpha=-1)
    return codes, scales


def _conditional(upper: Tensor) -> Tensor:
    """(UᵀU)⁻¹ of a block of U: its part of H given that later inputs make up for the error."""
    eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
    inverse = torch.linalg.solve_triangular(upper, eye, upper=True)
    return inverse @ inverse.T


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
    _invert(right)
    return right


def _invert(upper: Tensor) -> None:
    """Replace an upper triangular matrix by its inverse.

    By halves: products of matrices are the fastest thing there is, and two thirds of the work of
    solving for the identity.
    """
    half = len(upper) // 2
    if half < INVERTED_AT_ONCE:
        eye = torch.eye(len(upper), dtype=upper.dtype, device=upper.device)
        upper.copy_(torch.linalg.solve_triangular(upper, eye, upper=True))
        return
    first, second, corner = upper[:half, :half], upper[half:, half:], upper[:half, half:]
    _invert(first)
    _invert(second)
    corner.copy_(-(first @ corner) @ second)


def output_losses(weight: Tensor, solutions: Sequence[Solution], hessian: Tensor) -> list[float]:
    """Share of the layer's output energy that each solution loses: tr(Eᵀ H E) / tr(Wᵀ H W)."""
    weight = weight.to(hessian.dtype)
    energy = energies(hessian, weight).sum().clamp(min=torch.finfo(hessian.dtype).tiny)
    shares = []
    for solution in solutions:
        lost = solution.lost
        if lost is None:
            lost = energies(hessian, weight - solution.dequantize())
        shares.append((lost.sum() / energy).item())
    return shares


def _checked(weight: Tensor, group_size: int) -> tuple[Tensor, int]:
    """``weight`` as contiguous FP32 (FP64 stays) and the number of inputs in a group."""
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
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).contiguous(), group
