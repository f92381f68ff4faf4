"""The column loop: round one input after the other, and let those that follow make up for it.

One segment of up to 128 inputs at a time, with one scale per output for all of it. Outputs never
interact, so the loop is as wide as the weight has outputs and as long as the segment has inputs.
FP32 goes to the fused kernels of ``marlin.ops``; the loop in Torch is what they are tested against,
and takes FP64 and longer segments.
"""

import torch
from torch import Tensor

from marlin import ops

from . import grid

LONGEST_SEGMENT = 128  # that the kernels take


def quantize_columns(
    work: Tensor, coupling: Tensor, scale: Tensor, current: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Round ``work`` (b, n) input by input: ``work_i -= coupling[j, i] · moved_j`` for i > j.

    coupling: (b, b), read above its diagonal. scale: (n,), values that FP16 holds.
    moved: how far input j went, ``work_j - value of its code``; with ``current`` (b, n) given,
    ``current_j - value of its code`` (a second look at weights that have codes already).
    Returns codes (b, n) in work's dtype, and moved (b, n). ``work`` is left as it was.
    """
    if _fused(work):
        return ops.quantize_columns(work, coupling.contiguous(), scale, current)
    return quantize_columns_in_torch(work, coupling, scale, current)


def trial_losses(work: Tensor, coupling: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """What ``quantize_columns`` would lose under several scales each: ``Σ_j weights_j moved_j²``.

    work: (b, n). coupling: (b, b). weights: (b,). scales: (candidates, n). Returns
    (candidates, n).
    """
    if _fused(work):
        return ops.trial_losses(work, coupling.contiguous(), weights, scales)
    return trial_losses_in_torch(work, coupling, weights, scales)


def quantize_columns_in_torch(
    work: Tensor, coupling: Tensor, scale: Tensor, current: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    work = work.clone()
    codes, moved = torch.empty_like(work), torch.empty_like(work)
    for j in range(len(work)):
        codes[j] = grid.encode(work[j], scale)
        before = work[j] if current is None else current[j]
        moved[j] = before - grid.decode(codes[j], scale)
        work[j + 1 :].addr_(coupling[j, j + 1 :], moved[j], alpha=-1)
    return codes, moved


def trial_losses_in_torch(
    work: Tensor, coupling: Tensor, weights: Tensor, scales: Tensor
) -> Tensor:
    candidates, n = scales.shape
    wide = work[:, None].expand(-1, candidates, n).flatten(1)
    _, moved = quantize_columns_in_torch(wide, coupling, scales.flatten())
    return torch.mv(moved.square_().T, weights).view(candidates, n)


def _fused(work: Tensor) -> bool:
    served = work.device.type == "cpu" or (work.is_cuda and ops.why_no_cuda() is None)
    return served and work.dtype == torch.float32 and len(work) <= LONGEST_SEGMENT
