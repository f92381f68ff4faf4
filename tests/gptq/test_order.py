"""The order in which inputs are rounded."""

import torch

from gptq.order import group_order, restore


def test_groups_stay_whole_and_the_largest_come_first():
    importance = torch.tensor([1.0, 3.0, 2.0, 9.0, 0.0, 5.0, 4.0, 4.0])
    assert group_order(importance, 2).tolist() == [3, 2, 6, 7, 5, 4, 1, 0]
    assert group_order(importance, 8).tolist() == [3, 5, 6, 7, 1, 2, 0, 4]
    assert group_order(torch.zeros(6), 3).tolist() == [0, 1, 2, 3, 4, 5]


def test_restore_undoes_the_order():
    generator = torch.Generator().manual_seed(0)
    order = group_order(torch.rand(48, generator=generator), 16)
    codes, scales = torch.arange(48)[:, None], torch.arange(3)[:, None]
    ordered_scales = scales[order[::16] // 16]
    found = restore(codes[order], ordered_scales, order)
    assert torch.equal(found[0], codes) and torch.equal(found[1], scales)
