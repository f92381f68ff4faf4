"""The 4-bit grid and the search for scales, against loops over single numbers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gptq import grid


def weighted_error(column, scale, metric):
    """The error of one column under one scale, from the definition and in plain Python."""
    error = []
    for value in column.tolist():
        code = 8 if scale == 0 else min(15, max(0, round(value / scale) + 8))
        error.append(value - (code - 8) * scale)
    error = torch.tensor(error, dtype=torch.float64)
    return (error @ metric @ error).item()


def random_metric(size, generator):
    data = torch.randn(2 * size, size, generator=generator, dtype=torch.float64)
    return data.T @ data / (2 * size)


def test_codes_cover_the_grid_and_saturate_outside():
    scale = torch.tensor(0.5)
    weight = torch.tensor([-100.0, -4.0, -3.5, 0.0, 0.2, 0.26, 3.5, 4.0, 100.0])
    codes = grid.encode(weight, scale)
    assert codes.tolist() == [0, 0, 1, 8, 8, 9, 15, 15, 15]
    assert grid.decode(codes, scale)[:4].tolist() == [-4.0, -4.0, -3.5, 0.0]


def test_every_code_survives_decode_and_encode():
    codes = torch.arange(16.0)
    for scale in (2.0**-14, 0.0123, 1.0, 60000.0):
        scale = grid.round_scale(torch.tensor(scale))
        assert torch.equal(grid.encode(grid.decode(codes, scale), scale), codes)


def test_zero_scale_means_zero_not_nan():
    codes = grid.encode(torch.tensor([0.0, 1e-12, -1e-12]), torch.tensor(0.0))
    assert codes.tolist() == [8, 8, 8]


def test_scales_are_fp16_values_and_saturate():
    scales = grid.round_scale(torch.tensor([0.1, 1e-5, 1e9]))
    assert torch.equal(scales, scales.half().float())
    assert scales[0] != 0.1
    assert scales[2] == torch.finfo(torch.float16).max


def test_absmax_scale_puts_the_largest_weight_at_seven_and_a_half():
    group = torch.tensor([[1.0, -3.75], [-7.5, 0.0]])
    assert grid.absmax_scale(group).tolist() == [1.0, 0.5]


def test_full_range_scale_puts_the_largest_weight_at_code_zero():
    group = torch.tensor([[1.0, -4.0], [-8.0, 2.0], [2.0, 3.0]])
    assert grid.full_range_scale(group).tolist() == [1.0, 0.5]
    assert grid.full_range_scale(-group).tolist() == [-1.0, -0.5]
    assert grid.encode(-group, grid.full_range_scale(-group))[[1, 0], [0, 1]].tolist() == [0, 0]


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("full_range", [False, True])
def test_candidates_start_with_absmax_and_are_fp16_values(clip, full_range):
    group = torch.randn(3, 32, 5, generator=torch.Generator().manual_seed(1))
    found = grid.candidate_scales(group, clip=clip, full_range=full_range, count=7)
    expected = 7 if clip else 1
    if full_range:  # one more, and with clip both signs of all
        expected = (expected + 1) * (2 if clip else 1)
        extremes = [grid.full_range_scale(group)] + [-grid.full_range_scale(group)] * clip
        assert all((found == extreme).all(dim=(1, 2)).any() for extreme in extremes)
    assert found.shape == (expected, 3, 5)
    assert torch.equal(found[0], grid.absmax_scale(group))
    assert torch.equal(found, found.half().float())
    assert (found < 0).any() == full_range
    assert found.unique(dim=0).shape[0] == expected
    smallest = grid.SMALLEST_RATIO * found[0].abs()
    assert (found.abs() >= smallest * (1 - 1e-3)).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), size=st.sampled_from([4, 16, 32]), full=st.booleans())
def test_losses_are_the_weighted_errors_of_rounding(seed, size, full):
    generator = torch.Generator().manual_seed(seed)
    group = torch.randn(size, 3, generator=generator, dtype=torch.float64)
    metric = random_metric(size, generator)
    metric = metric if full else metric.diagonal()
    scales = grid.candidate_scales(group, clip=True, full_range=True, count=5)
    losses = grid.rounding_losses(group, scales, metric[None] if full else metric)
    matrix = metric if full else metric.diag()
    for candidate in range(len(scales)):
        for column in range(3):
            expected = weighted_error(group[:, column], scales[candidate, column].item(), matrix)
            assert losses[candidate, column] == pytest.approx(expected, rel=1e-6)


def search(group, metric):
    scales = grid.candidate_scales(group, clip=True, full_range=False)
    return grid.cheapest(scales, grid.rounding_losses(group, scales, metric))


def test_search_clips_an_outlier_nobody_listens_to():
    """The largest weight meets an input that is hardly ever on: give it up for the others."""
    group = torch.full((32, 1), 0.9)
    group[::2] = 0.45
    group[0] = 8.0
    importance = torch.ones(32)
    importance[0] = 1e-4
    assert search(group, importance) < 0.6 * grid.absmax_scale(group)
    importance[0] = 1e4  # now it is all that matters, and keeps its range
    assert search(group, importance) == grid.absmax_scale(group)


def test_cheapest_takes_the_first_of_equals():
    scales = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    losses = torch.tensor([[2.0, 1.0], [1.0, 1.0], [1.0, 3.0]])
    assert grid.cheapest(scales, losses).tolist() == [3.0, 2.0]


def test_blocks_of_the_metric_add_up():
    generator = torch.Generator().manual_seed(3)
    group = torch.randn(48, 5, generator=generator, dtype=torch.float64)
    blocks = torch.stack([random_metric(16, generator) for _ in range(3)])
    whole = torch.block_diag(*blocks)[None]
    scales = grid.candidate_scales(group, clip=True, full_range=True)
    torch.testing.assert_close(
        grid.rounding_losses(group, scales, blocks), grid.rounding_losses(group, scales, whole)
    )


@pytest.mark.parametrize("at_once", [500, 10**6])
def test_losses_are_the_same_however_many_at_once(monkeypatch, at_once):
    generator = torch.Generator().manual_seed(4)
    group = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    blocks = torch.stack([random_metric(16, generator) for _ in range(2)])
    scales = grid.candidate_scales(group, clip=True, full_range=True)
    metrics = (blocks, torch.rand(32, generator=generator, dtype=torch.float64))
    one_by_one = [grid.rounding_losses(group, scales, metric) for metric in metrics]
    monkeypatch.setitem(grid.ERRORS_AT_ONCE, "cpu", at_once)
    for metric, losses in zip(metrics, one_by_one, strict=True):
        torch.testing.assert_close(grid.rounding_losses(group, scales, metric), losses)


def test_metric_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"tile a group of 32, got \(1, 16, 16\)"):
        grid.rounding_losses(torch.zeros(32, 2), torch.ones(1, 2), torch.eye(16)[None])
