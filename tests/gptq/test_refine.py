"""Scales fitted to codes and codes to scales, against one output at a time in float64."""

import pytest
import torch

from gptq import grid, refine, solver

K, N = 96, 7


def rounded(group, seed=0, tokens=200):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(K, N, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens, K, generator=generator, dtype=torch.float64)
    inputs @= torch.randn(K, K, generator=generator, dtype=torch.float64)
    hessian = inputs.T @ inputs / tokens
    solution = solver.rtn(weight, group)
    return weight, hessian, solution.codes.double(), solution.scales.double()


def losses(weight, codes, scales, hessian):
    """(n,) eᵀ H e of each output."""
    error = weight - grid.decode(codes, scales.repeat_interleave(K // len(scales), dim=0))
    return (error * (hessian @ error)).sum(dim=0)


@pytest.mark.parametrize("group", [16, 32, K])
def test_refitted_scales_solve_the_least_squares_problem(group):
    weight, hessian, codes, scales = rounded(group)
    found, _ = refine.refit_scales(weight, codes, scales, hessian, 0.0)
    assert torch.equal(found, found.half().double())
    root = torch.linalg.cholesky(hessian).T
    for column in range(N):
        design = torch.zeros(K, K // group, dtype=torch.float64)
        for g in range(K // group):
            rows = slice(g * group, (g + 1) * group)
            design[rows, g] = codes[rows, column] - 8
        best = torch.linalg.lstsq(root @ design, root @ weight[:, column]).solution
        torch.testing.assert_close(found[:, column], best, rtol=2e-3, atol=1e-5)
    after = losses(weight, codes, found, hessian)
    assert (after < losses(weight, codes, scales, hessian)).all()


@pytest.mark.parametrize("damping", [0, 0.01, 10])
def test_the_losses_told_are_those_of_the_scales_found(damping):
    weight, hessian, codes, scales = rounded(32)
    codes[:32, 0] = 8
    shift = damping * hessian.diagonal().mean().item()
    damped = hessian + shift * torch.eye(K, dtype=torch.float64)
    found, lost = refine.refit_scales(weight, codes, scales, damped, shift)
    torch.testing.assert_close(lost, losses(weight, codes, found, hessian))
    assert (found != scales).any() and (found[0, 0] == scales[0, 0])


def test_refitting_some_outputs_at_a_time_changes_nothing(monkeypatch):
    weight, hessian, codes, scales = rounded(32)
    whole, _ = refine.refit_scales(weight, codes, scales, hessian, 0.0)
    monkeypatch.setattr(refine, "SYSTEM_NUMBERS", 2 * (K // 32) ** 2)  # two outputs at a time
    assert torch.equal(refine.refit_scales(weight, codes, scales, hessian, 0.0)[0], whole)


def test_scales_that_would_lose_more_without_damping_are_not_taken():
    weight, hessian, codes, scales = rounded(32)
    best, _ = refine.refit_scales(weight, codes, scales, hessian, 0.0)
    shift = 10 * hessian.diagonal().mean().item()
    damped = hessian + shift * torch.eye(K, dtype=torch.float64)
    pulled, _ = refine.refit_scales(weight, codes, best, damped, 0.0)
    assert not torch.equal(pulled, best)  # the damped system has something else in mind
    assert (losses(weight, codes, pulled, hessian) > losses(weight, codes, best, hessian)).all()
    assert torch.equal(refine.refit_scales(weight, codes, best, damped, shift)[0], best)


def test_groups_of_zeros_keep_their_scale():
    weight, hessian, codes, scales = rounded(32)
    codes[:32, 0] = 8
    codes[:, 1] = 8
    found, _ = refine.refit_scales(weight, codes, scales, hessian, 0.0)
    assert found[0, 0] == scales[0, 0] and torch.equal(found[:, 1], scales[:, 1])
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("group, block", [(32, 32), (32, 16), (K, 32)])
def test_a_sweep_gives_each_code_its_best_given_all_others(group, block):
    weight, hessian, codes, scales = rounded(group)
    found = refine.sweep(weight, codes, scales, hessian, block)
    expected = codes.clone()
    for column in range(N):
        for j in range(K):
            scale = scales[j // group, column]
            candidates = []
            for code in range(16):
                expected[j, column] = code
                loss = losses(weight, expected, scales, hessian)[column].item()
                candidates.append((loss, code))
            expected[j, column] = min(candidates)[1] if scale else 8
    assert torch.equal(found, expected)


def test_sweeps_and_refits_only_ever_help():
    weight, hessian, codes, scales = rounded(32, seed=4)
    before = losses(weight, codes, scales, hessian)
    start = before
    for _ in range(4):
        scales, _ = refine.refit_scales(weight, codes, scales, hessian, 0.0)
        codes = refine.sweep(weight, codes, scales, hessian, 32)
        after = losses(weight, codes, scales, hessian)
        assert (after <= before * (1 + 1e-9)).all()
        before = after
    assert (after < 0.7 * start).all()
