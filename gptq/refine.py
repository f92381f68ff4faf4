"""What can still be gained when every weight has a code: better scales, better codes, in turn.

Both steps look at all inputs at once, where the column loop saw only those still ahead, and both
lower the loss ``tr((W - Ŵ)ᵀ H (W - Ŵ))`` of every output or leave it alone.
"""

import torch
from torch import Tensor

from . import grid
from .columns import quantize_columns
from .hessian import energies

# Numbers in the linear systems held at once, (outputs, groups, groups): 256 MB in FP32.
SYSTEM_NUMBERS = 2**26
# Keeps a system solvable in FP32 when two groups' contributions are nearly the same.
RIDGE = 1e-5


def refit_scales(
    weight: Tensor, codes: Tensor, scales: Tensor, damped: Tensor, shift: float
) -> tuple[Tensor, Tensor]:
    """For given codes the scales of least loss, per output: a linear system over its groups.

    weight, codes: (k, n). scales: (groups, n). damped: (k, k), H with ``shift`` added on its
    diagonal, which the system is made with. The verdict is undamped: an output gets its new scales
    only if they, rounded to FP16, lose less under H. Returns (groups, n), values that FP16 holds,
    and (n,) the ``losses`` that they have.
    """
    groups, n = scales.shape
    width = max(1, SYSTEM_NUMBERS // groups**2)
    found = [
        _refit(*(t[:, start : start + width] for t in (weight, codes, scales)), damped, shift)
        for start in range(0, n, width)
    ]
    fitted, lost = zip(*found, strict=True)
    return torch.cat(fitted, dim=1), torch.cat(lost)


def _refit(
    weight: Tensor, codes: Tensor, scales: Tensor, damped: Tensor, shift: float
) -> tuple[Tensor, Tensor]:
    groups, n = scales.shape
    levels = (codes - grid.ZERO).view(groups, -1, n)
    group = levels.shape[1]
    # With e the error so far, scales that change by c lose eᵀHe - 2 cᵀ pull + cᵀ system c, where
    # pull[i] = levels_iᵀ (H e)_i and system[i, j] = levels_iᵀ H_ij levels_j, for every output.
    error = weight - grid.decode(codes, scales.repeat_interleave(group, dim=0))
    seen = damped @ error
    pull = (seen.view_as(levels) * levels).sum(dim=1)
    pull_of_shift = shift * (error.view_as(levels) * levels).sum(dim=1)
    before = ((seen - shift * error) * error).sum(dim=0)
    del error, seen
    system = weight.new_zeros(groups, groups, n)
    for j in range(groups):  # symmetric: i ≥ j is enough
        start = j * group
        seen = damped[start:, start : start + group] @ levels[j]
        torch.sum(seen.view_as(levels[j:]).mul_(levels[j:]), dim=1, out=system[j:, j])
    system = system.permute(2, 0, 1).contiguous()
    diagonal = system.diagonal(dim1=1, dim2=2)
    added = diagonal * RIDGE + (diagonal == 0)  # all weights of a group 0: its scale stays
    diagonal.add_(added)
    factors, failed = torch.linalg.cholesky_ex(system)
    change = torch.cholesky_solve(pull.T.unsqueeze(2), factors)
    usable = torch.isfinite(change) & (failed == 0)[:, None, None]
    fitted = grid.round_scale(scales + torch.where(usable, change, 0).squeeze(2).T)
    change = fitted - scales
    quadratic = (factors.mT @ change.T.unsqueeze(2)).square().sum(dim=(1, 2))
    added = added.T + shift * levels.square().sum(dim=1)
    quadratic -= (added * change.square()).sum(dim=0)
    after = before - 2 * ((pull - pull_of_shift) * change).sum(dim=0) + quadratic
    better = after < before
    return torch.where(better, fitted, scales), torch.where(better, after, before).clamp_(min=0)


def losses(weight: Tensor, codes: Tensor, scales: Tensor, damped: Tensor, shift: float) -> Tensor:
    """(n,) eᵀ H e of each output, without what was added to H: ``shift`` on its diagonal."""
    group = len(weight) // len(scales)
    error = weight - grid.decode(codes, scales.repeat_interleave(group, dim=0))
    return energies(damped, error) - shift * error.square().sum(dim=0)


def sweep(weight: Tensor, codes: Tensor, scales: Tensor, damped: Tensor, block: int) -> Tensor:
    """Every code once more, given all others: the nearest to what is best for the output.

    weight, codes: (k, n). scales: (groups, n). damped: (k, k), positive diagonal. block: inputs per
    lazy update, at most a group's and dividing it. Returns codes (k, n).
    """
    k = len(weight)
    group = k // len(scales)
    codes = codes.clone()
    values = grid.decode(codes, scales.repeat_interleave(group, dim=0))
    pull = damped @ (weight - values)
    diagonal = damped.diagonal()
    coupling = -damped / diagonal  # [j, i]: what moving input j does to the best place of input i
    for start in range(0, k, block):
        part = slice(start, start + block)
        best = values[part] + pull[part] / diagonal[part, None]
        # All of it: moving j also asks for a new look at the inputs before it, in the next sweep.
        codes[part], moved = quantize_columns(
            best, coupling[part, part], scales[start // group], values[part]
        )
        pull.addmm_(damped[:, part], moved)
    return codes
