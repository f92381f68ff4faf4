"""The fused column loop against a loop over single numbers in float64."""

import pytest
import torch

from gptq import columns, grid
from marlin import ops

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def problem(rows, n, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    work = torch.randn(rows, n, generator=generator)
    coupling = torch.randn(rows, rows, generator=generator) / rows**0.5
    scale = grid.round_scale(torch.rand(n, generator=generator) - 0.5)
    scale[0] = 0  # a group of zeros: codes 8, and nothing is moved to a value
    weights = torch.rand(rows, generator=generator) + 0.1
    current = work + torch.randn(rows, n, generator=generator) / 4
    return [tensor.to(device) for tensor in (work, coupling, scale, weights, current)]


def check(work, coupling, scale, current, codes, moved):
    """Each step of what came out follows in float64 from the steps before it, as they came out."""
    work, coupling, scale, codes, moved = (
        t.double().cpu() for t in (work, coupling, scale, codes, moved)
    )
    for j in range(len(work)):
        at = work[j] - coupling[:j, j] @ moved[:j]
        level = at / torch.where(scale == 0, torch.inf, scale)
        assert codes[j].equal(codes[j].round().clamp(0, 15))
        # Half a step away at most, but for FP32's rounding; or at the end of the grid.
        away = (level.clamp(-8, 7) - (codes[j] - 8)).abs()
        assert away.max() <= 0.5 + 1e-4 * (1 + level.abs().max())
        before = at if current is None else current[j].double().cpu()
        torch.testing.assert_close(moved[j], before - (codes[j] - 8) * scale, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("second_look", [False, True])
@pytest.mark.parametrize("rows, n", [(1, 1), (16, 5), (37, 64), (64, 130), (100, 3), (128, 333)])
def test_columns_step_by_step(rows, n, second_look, device):
    work, coupling, scale, _, current = problem(rows, n, device, seed=rows)
    current = current if second_look else None
    before = work.clone()
    found = columns.quantize_columns(work, coupling, scale, current)
    assert torch.equal(work, before)
    check(work, coupling, scale, current, *found)
    expected = columns.quantize_columns_in_torch(work, coupling, scale, current)
    assert (found[0] == expected[0]).float().mean() > 0.999  # ties may fall either way


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows, n, candidates", [(16, 3, 1), (50, 70, 9), (128, 40, 20)])
def test_trials_lose_what_rounding_loses(rows, n, candidates, device):
    work, coupling, scale, weights, _ = problem(rows, n, device, seed=n)
    scales = grid.round_scale(scale * torch.linspace(1, 0.4, candidates, device=device)[:, None])
    losses = columns.trial_losses(work, coupling, weights, scales)
    for scale, loss in zip(scales, losses, strict=True):
        _, moved = columns.quantize_columns(work, coupling, scale)
        torch.testing.assert_close(loss, weights @ moved.square(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_views_of_larger_matrices_are_read_in_place(device):
    work, coupling, scale, weights, _ = problem(64, 24, device)
    large = torch.full((90, 90), torch.nan, device=device)
    large[10:74, 20:84] = coupling
    alone = columns.quantize_columns(work, coupling, scale)
    within = columns.quantize_columns(work, large[10:74, 20:84], scale)
    assert all(map(torch.equal, alone, within))
    whole = columns.trial_losses(work, large[10:74, 20:84], weights, scale[None])
    assert torch.equal(whole, columns.trial_losses(work, coupling, weights, scale[None]))


def test_float64_and_long_segments_are_looped_over_in_torch():
    work, coupling, scale, _, _ = (t.double() for t in problem(32, 6))
    check(work, coupling, scale, None, *columns.quantize_columns(work, coupling, scale))
    work, coupling, scale, _, _ = problem(150, 4)
    check(work, coupling, scale, None, *columns.quantize_columns(work, coupling, scale))


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck(device):
    work, coupling, scale, weights, current = problem(32, 8, device)
    operators = torch.ops.marlin
    torch.library.opcheck(operators.quantize_columns.default, (work, coupling, scale))
    torch.library.opcheck(operators.quantize_columns.default, (work, coupling, scale, current))
    torch.library.opcheck(operators.trial_losses.default, (work, coupling, weights, scale[None]))


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"work": torch.zeros(129, 8)}, r"work: expected Float \(rows, n\) of 1 to 128 rows"),
        ({"work": torch.zeros(32, 8).double()}, r"work: expected Float .* got Double"),
        ({"work": torch.zeros(8, 32).T}, "work: expected a contiguous tensor"),
        ({"coupling": torch.zeros(31, 32)}, r"coupling: expected Float \(rows, rows\)"),
        ({"coupling": torch.zeros(32, 64)[:, ::2]}, "coupling: expected rows without gaps"),
        ({"scale": torch.zeros(9)}, r"scale: expected Float \(n,\)"),
        ({"current": torch.zeros(32, 9)}, r"current: expected Float \(rows, n\)"),
    ],
)
def test_misuse_is_refused(changed, message):
    work, coupling, scale, _, _ = problem(32, 8)
    arguments = {"work": work, "coupling": coupling, "scale": scale, "current": None, **changed}
    with pytest.raises(RuntimeError, match=message):
        ops.quantize_columns(**arguments)


def test_trials_of_another_size_are_refused():
    work, coupling, scale, weights, _ = problem(32, 8)
    with pytest.raises(RuntimeError, match=r"scales: expected Float \(candidates, n\)"):
        ops.trial_losses(work, coupling, weights, scale)
    with pytest.raises(RuntimeError, match=r"weights: expected Float \(rows,\)"):
        ops.trial_losses(work, coupling, weights[1:], scale[None])
