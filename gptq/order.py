"""In which order inputs are rounded, such that groups stay groups.

Whoever is rounded early is made up for by everyone after, so inputs that matter most (largest
second moment) go first: groups by their sum, and inputs within their group. Codes and scales are
put back in natural order afterwards, so a checkpoint needs no permutation.
"""

import torch
from torch import Tensor


def group_order(importance: Tensor, group: int) -> Tensor:
    """The inputs in the order to round them: (k,) indices, whole groups of ``group`` at a time.

    importance: (k,), largest first; equal ones keep their order.
    """
    grouped = importance.view(-1, group)
    within = grouped.argsort(dim=1, descending=True, stable=True)
    starts = torch.arange(0, len(importance), group, device=importance.device)
    across = grouped.sum(dim=1).argsort(descending=True, stable=True)
    return (within + starts[:, None])[across].flatten()


def restore(codes: Tensor, scales: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (k, n) and scales (groups, n) of inputs in ``group_order``, back in natural order."""
    group = len(order) // len(scales)
    natural = order.argsort()
    return codes[natural], scales[natural[::group] // group]
