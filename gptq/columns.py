"""The column loop: round one input after the other, and let those that follow make up for it.

One segment of up to 128 inputs at a time, with one scale per output for all of it. Outputs never
interact, so the loop is as wide as the weight has outputs and as long as the segment has inputs.
"""

import torch
from torch import Tensor

from . import grid

# Outputs that are looped over together on a CPU: a segment of them should stay in its cache.
CPU_WIDTH = 2048


def quantize_columns(
    work: Tensor, coupling: Tensor, scale: Tensor, current: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round ``work`` (b, n) input by input: ``work_i -= coupling[j, i] · moved_j`` for i > j.

    coupling: (b, b), read above its diagonal. scale: (n,), values that FP16 holds.
    moved: how far input j went, ``work_j - value of its code``; with ``current`` (b, n) given,
    ``current_j - value of its code`` (a second look at weights that have codes already).
    Returns codes (b, n) in work's dtype, and moved (b, n). ``work`` is left as it was.
    """
    codes, moved = torch.empty_like(work), torch.empty_like(work)
    width = CPU_WIDTH if work.device.type == "cpu" else work.shape[1]
    for start in range(0, work.shape[1], max(width, 1)):
        part = slice(start, start + width)
        _loop(
            work[:, part].clone(),
            coupling,
            scale[part],
            None if current is None else current[:, part],
            codes[:, part],
            moved[:, part],
        )
    return codes, moved


def trial_losses(work: Tensor, coupling: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """What ``quantize_columns`` would lose under each of several scales: ``Σ_j weights_j moved_j²``.

    work: (b, n). coupling: (b, b). weights: (b,). scales: (candidates, n). Returns
    (candidates, n).
    """
    candidates, n = scales.shape
    wide = work[:, None].expand(-1, candidates, n).flatten(1)
    _, moved = quantize_columns(wide, coupling, scales.flatten())
    return torch.mv(moved.square_().T, weights).view(candidates, n)


def _loop(
    work: Tensor,
    coupling: Tensor,
    scale: Tensor,
    current: Tensor | None,
    codes: Tensor,
    moved: Tensor,
) -> None:
    for j in range(len(work)):
        codes[j] = grid.encode(work[j], scale)
        before = work[j] if current is None else current[j]
        torch.sub(before, grid.decode(codes[j], scale), out=moved[j])
        if j + 1 < len(work):
            work[j + 1 :].addr_(coupling[j, j + 1 :], moved[j], alpha=-1)
