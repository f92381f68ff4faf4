"""GPTQ against the textbook: one weight at a time, one explicit inverse, in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from losses import output_loss

from gptq import grid, solver
from gptq.hessian import Hessian
from marlin.layer import round_to_nearest


def problem(k, n, seed=0, dtype=torch.float64, tokens=None):
    """A weight with heavy tails and the second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(k, n, generator=generator, dtype=torch.float64)
    weight *= torch.rand(k, 1, generator=generator, dtype=torch.float64) * 2
    mixing = torch.randn(k, k, generator=generator, dtype=torch.float64) / k**0.5
    mixing += torch.diag(torch.rand(k, generator=generator, dtype=torch.float64) * 2)
    inputs = torch.randn(tokens or 2 * k, k, generator=generator, dtype=torch.float64) @ mixing
    return weight.to(dtype), (inputs.T @ inputs / len(inputs)).to(dtype)


def eliminate(inverse, j):
    """The inverse of what is left of H when input j is fixed."""
    return inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]


def nearest(values, scale):
    return (values / scale).round().clamp(-8, 7)


def group_loss(values, scale, rows, hessian, inverse, metric):
    """What a group of one output's weights loses under a scale, as each metric defines it."""
    error = values - scale * nearest(values, scale)
    if metric == "block":
        return error @ hessian[rows, rows] @ error
    if metric == "conditional":
        return error @ torch.linalg.inv(inverse[rows, rows]) @ error
    loss, left = 0.0, values.clone()
    for i, j in enumerate(range(rows.start, rows.stop)):
        if metric == "trial":
            error[i] = left[i] - scale * nearest(left[i], scale)
            left -= inverse[rows, j] * error[i] / inverse[j, j]
        loss += error[i] ** 2 / inverse[j, j]
        inverse = eliminate(inverse, j)
    return loss


def textbook(weight, hessian, group_size, *, clip, metric="block", full_range=False, order=False):
    """Optimal brain quantization, as one would write it on a blackboard.

    After each input is fixed its row and column are eliminated from the inverse; nothing is
    blocked, nothing is factored.
    """
    k, n = weight.shape
    group = k if group_size == -1 else group_size
    permutation = list(range(k))
    if order:
        importance = hessian.diagonal().tolist()
        groups = [range(g, g + group) for g in range(0, k, group)]
        groups.sort(key=lambda rows: -sum(importance[j] for j in rows))
        permutation = [j for rows in groups for j in sorted(rows, key=lambda j: -importance[j])]
    weight, hessian = weight[permutation], hessian[permutation][:, permutation]
    damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(k, dtype=hessian.dtype)
    inverse = torch.linalg.inv(damped)
    codes = torch.zeros(k, n, dtype=torch.uint8)
    scales = torch.zeros(k // group, n, dtype=torch.float64)
    for j in range(k):
        g = permutation[j] // group
        if j % group == 0:
            rows = slice(j, j + group)
            for column in range(n):
                values, best = weight[rows, column], (float("inf"), 0.0)
                full = values.abs().max() / 7.5
                ratios = torch.linspace(
                    1.0, grid.SMALLEST_RATIO, grid.CANDIDATES, dtype=torch.float64
                ).tolist()
                ratios += [7.5 / 8] if full_range else []
                signs = (1, -1) if full_range else (1,)
                for sign, ratio in itertools.product(signs, ratios if clip else [1.0]):
                    scale = (full * ratio * sign).half().double()
                    cost = group_loss(values, scale, rows, hessian, inverse, metric)
                    best = min(best, (float(cost), scale.item()), key=lambda pair: pair[0])
                scales[g, column] = best[1]
        level = nearest(weight[j], scales[g])
        codes[permutation[j]] = (level + 8).to(torch.uint8)
        error = weight[j] - level * scales[g]
        weight -= torch.outer(inverse[:, j], error / inverse[j, j])
        inverse = eliminate(inverse, j)
    return codes, scales.half()


PLAIN = dict(solver.PUBLISHED)


@pytest.mark.parametrize("options", [
    {"clip": False},
    {"clip": True, "metric": "block"},
    {"clip": True, "metric": "conditional"},
    {"clip": True, "metric": "diagonal"},
    {"clip": True, "metric": "trial"},
    {"clip": True, "metric": "trial", "full_range": True},
    {"clip": True, "metric": "diagonal", "full_range": True, "order": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("k, n, group_size, block", [(64, 8, 32, 128), (128, 6, 64, 64)])
def test_same_codes_and_scales_as_the_textbook(k, n, group_size, block, options):
    weight, hessian = problem(k, n, seed=k + n)
    codes, scales = textbook(weight, hessian, group_size, **options)
    solution = solver.gptq(weight, hessian, group_size, block=block, **{**PLAIN, **options})
    assert torch.equal(solution.scales, scales)
    assert torch.equal(solution.codes, codes)


@pytest.mark.parametrize("k, block", [(96, 96), (96, 32), (80, 128)])
@pytest.mark.parametrize("options", [
    {"clip": False, "order": True},
    {"clip": True, "metric": "diagonal", "full_range": True, "order": True},
], ids=str)  # fmt: skip
def test_one_group_for_all_inputs_too(k, block, options):
    weight, hessian = problem(k, 4, seed=k)
    codes, scales = textbook(weight, hessian, -1, **options)
    solution = solver.gptq(weight, hessian, -1, block=block, **{**PLAIN, **options})
    assert torch.equal(solution.scales, scales)
    assert torch.equal(solution.codes, codes)


def test_float32_is_as_good_as_float64():
    weight, hessian = problem(512, 96, seed=5)
    exact = solver.gptq(weight, hessian, 64)
    single = solver.gptq(weight.float(), hessian.float(), 64)
    assert (exact.codes == single.codes).float().mean() > 0.97
    losses = [output_loss(weight, s, hessian.float()) for s in (exact, single)]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    groups=st.integers(1, 4),
    group_size=st.sampled_from([32, 64, 128]),
    n=st.integers(1, 9),
)
def test_blocks_are_only_an_order_of_computation(seed, groups, group_size, n):
    weight, hessian = problem(groups * group_size, n, seed)
    one_block = solver.gptq(weight, hessian, group_size, block=weight.shape[0])
    blocks = solver.gptq(weight, hessian, group_size, block=group_size)
    assert torch.equal(one_block.codes, blocks.codes)
    assert torch.equal(one_block.scales, blocks.scales)


def test_layers_side_by_side_are_solved_as_if_alone():
    weight, hessian = problem(128, 40, seed=1)
    together = solver.gptq(weight, hessian, 64)
    for part in (slice(0, 24), slice(24, 40)):
        alone = solver.gptq(weight[:, part], hessian, 64)
        cut = together.outputs(part.start, part.stop)
        assert torch.equal(alone.codes, cut.codes)
        assert torch.equal(alone.scales, cut.scales)


@pytest.mark.parametrize("group_size", [32, 64, 128, -1])
def test_every_addition_loses_less(group_size):
    """On one problem, one more each time: first all that the default has, then what it leaves."""
    weight, hessian = problem(256, 64, seed=2, dtype=torch.float32, tokens=300)
    steps = [
        {"clip": True, "metric": "block"},
        {"full_range": True},
        {"order": True},
        {"refit": True},
        {"guard": True},
        {"metric": "trial"},
        {"sweeps": 3},
    ]
    options, losses = dict(PLAIN), []
    for step in [{}, *steps]:
        options |= step
        solution = solver.gptq(weight, hessian, group_size, **options)
        losses.append(output_loss(weight, solution, hessian))
    default = solver.gptq(weight, hessian, group_size)
    assert output_loss(weight, default, hessian) == losses[5]
    rtn = output_loss(weight, solver.rtn(weight, group_size), hessian)
    assert losses[0] < 0.6 * rtn
    assert losses[-1] < 0.75 * losses[0]
    assert all(after <= before * 1.01 for before, after in itertools.pairwise(losses))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    group_size=st.sampled_from([32, 64, -1]),
    spread=st.floats(0, 3),
    tail=st.floats(1, 30),
)
def test_never_worse_than_the_published_algorithm(seed, group_size, spread, tail):
    """Inputs of very unequal size, weights with outliers: over all outputs the default wins."""
    weight, hessian = problem(128, 24, seed)
    generator = torch.Generator().manual_seed(seed)
    sizes = (spread * torch.randn(128, generator=generator, dtype=torch.float64)).exp()
    hessian = hessian * sizes[:, None] * sizes
    weight[torch.rand(128, 24, generator=generator) < 0.01] *= tail
    weight, hessian = weight.float(), hessian.float()
    losses = [
        output_loss(weight, solver.gptq(weight, hessian, group_size, **options), hessian)
        for options in ({}, PLAIN)
    ]
    assert losses[0] <= losses[1]


@pytest.mark.parametrize("refit", [False, True])
@pytest.mark.parametrize("outputs", [256, 4])  # looked at in a layer: all of them, or some first
def test_layers_that_the_published_algorithm_serves_better_get_its_solution(
    refit, outputs, monkeypatch
):
    monkeypatch.setattr(solver, "GUARD_OUTPUTS", outputs)
    weight, hessian = problem(128, 64, seed=7, dtype=torch.float32)
    searched = {**PLAIN, "clip": True, "metric": "block", "order": True, "refit": refit}
    widths = [16, 8, 24, 16]

    def solve(options):
        solution = solver.gptq(weight, hessian, 32, **options)
        error = weight - solution.dequantize()
        return solution, ((hessian @ error) * error).sum(dim=0)

    (with_plain, lost), (without, found) = solve(PLAIN), solve(searched)
    # Layers of outputs that lose less one way or the other.
    sorted_outputs = (lost / found).argsort()
    weight = weight[:, sorted_outputs]
    (with_plain, lost), (without, found) = solve(PLAIN), solve(searched)
    sums = [[part.sum() for part in losses.split(widths)] for losses in (lost, found)]
    better = [plain < ours for plain, ours in zip(*sums, strict=True)]
    assert better[0] and not better[-1]
    guarded, least = solve({**searched, "guard": True, "widths": widths})
    torch.testing.assert_close(
        torch.stack([part.sum() for part in least.split(widths)]),
        torch.stack([min(pair) for pair in zip(*sums, strict=True)]),
    )
    taken_from = torch.tensor(better).repeat_interleave(torch.tensor(widths))
    for field in ("codes", "scales"):
        taken = torch.where(taken_from, getattr(with_plain, field), getattr(without, field))
        assert torch.equal(getattr(guarded, field), taken)


def test_the_guard_looks_at_a_part_of_a_large_layer_first(monkeypatch):
    solved = []

    def watched(weight, *args, _gptq=solver._gptq, **options):
        solved.append(weight.shape[1])
        return _gptq(weight, *args, **options)

    monkeypatch.setattr(solver, "_gptq", watched)
    weight, hessian = problem(64, 1024, seed=3, dtype=torch.float32)
    solver.gptq(weight, hessian, 32)
    assert solved == [1024, 256]


def test_with_white_inputs_gptq_is_rounding():
    weight, _ = problem(64, 16)
    white = solver.gptq(weight, torch.eye(64), 32, **PLAIN)
    rounded = solver.rtn(weight, 32)
    assert torch.equal(white.codes, rounded.codes)
    assert torch.equal(white.scales, rounded.scales)


def test_without_any_data_gptq_is_rounding():
    weight, _ = problem(64, 16)
    blind = solver.gptq(weight, torch.zeros(64, 64), 32, **PLAIN)
    assert torch.equal(blind.codes, solver.rtn(weight, 32).codes)


@pytest.mark.parametrize("clip", [True, False])
def test_inputs_without_data_keep_their_rounded_weights(clip):
    weight, hessian = problem(128, 16, seed=4)
    dead = torch.tensor([0, 5, 63, 64, 127])
    hessian[dead] = 0
    hessian[:, dead] = 0
    solution = solver.gptq(weight, hessian, 64, clip=clip)
    scales = solution.scales.double().repeat_interleave(64, dim=0)
    assert torch.equal(
        solution.codes[dead], grid.encode(weight[dead], scales[dead]).to(torch.uint8)
    )
    assert (solution.codes[dead] != 8).any()  # rounded, not zeroed


def test_damping_grows_until_the_factorization_holds():
    weight, _ = problem(64, 8)
    direction = torch.randn(64, 1, generator=torch.Generator().manual_seed(0))
    singular = direction @ direction.T
    solution = solver.gptq(weight.float(), singular, 32, damping=0.0)
    assert solution.damping == solver.DAMPING
    assert torch.isfinite(solution.scales).all()
    # Not quite a second-moment matrix: rounding made one eigenvalue clearly negative.
    broken = torch.eye(64)
    broken[0, 0] = -3.0
    with pytest.raises(solver.FactorizationError, match="with damping 1 of its mean diagonal"):
        solver.factor(broken)
    broken[0, 0] = -0.5
    assert solver.factor(broken)[1] == 1.0  # 0.01 and 0.1 are not enough
    assert solver.factor(torch.eye(64))[1] == solver.DAMPING


def test_factor_is_the_factor_of_the_inverse():
    _, hessian = problem(80, 1)
    upper, damping = solver.factor(hessian)
    damped = hessian + damping * hessian.diagonal().mean() * torch.eye(80)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(80, dtype=torch.float64))
    assert torch.equal(upper, upper.triu())


def test_rounding_agrees_with_the_layers_own():
    weight, _ = problem(256, 33, dtype=torch.float32)
    for group_size in (32, 64, 128, -1):
        solution = solver.rtn(weight, group_size)
        codes, scales = round_to_nearest(weight, group_size, torch.float16)
        assert torch.equal(solution.codes, codes)
        assert torch.equal(solution.scales, scales)


def test_solution_stands_for_codes_minus_eight_times_scale():
    weight, hessian = problem(64, 4)
    solution = solver.gptq(weight, hessian, 32)
    assert solution.codes.dtype == torch.uint8 and solution.codes.max() <= 15
    assert solution.scales.dtype == torch.float16 and solution.scales.shape == (2, 4)
    for row, column in ((0, 0), (31, 3), (32, 1), (63, 2)):
        value = (int(solution.codes[row, column]) - 8) * solution.scales[row // 32, column].item()
        assert solution.dequantize()[row, column].item() == pytest.approx(value, rel=1e-6)


def test_weights_of_zero_and_beyond_fp16_stay_finite():
    weight, hessian = problem(64, 4, dtype=torch.float32)
    weight[:, 0] = 0
    weight[:, 1] = 1e-9
    weight[:, 2] *= 1e7
    solution = solver.gptq(weight, hessian, 32)
    assert torch.isfinite(solution.dequantize()).all()
    assert (solution.codes[:, 0] == 8).all()


def test_output_losses_are_shares_of_the_outputs_energy():
    weight, _ = problem(32, 8, dtype=torch.float32)
    inputs = torch.randn(500, 32, generator=torch.Generator().manual_seed(9))
    hessian = Hessian(32)
    hessian.add(inputs)
    solutions = [solver.rtn(weight, 32), solver.gptq(weight, hessian.mean(), 32)]
    assert solutions[0].lost is None and solutions[1].lost is not None
    energy = (inputs @ weight).square().sum()
    lost = [(inputs @ (weight - s.dequantize())).square().sum() for s in solutions]
    told = solver.output_losses(weight, solutions, hessian.mean())
    assert told == pytest.approx([(loss / energy).item() for loss in lost], rel=1e-3)


@pytest.mark.parametrize(
    "weight, hessian, group_size, message",
    [
        (torch.zeros(64, 8), torch.eye(63), 32, r"hessian: expected \(64, 64\), got \(63, 63\)"),
        (torch.zeros(64, 8), torch.full((64, 64), torch.nan), 32, "hessian: .* NaN or Inf"),
        (torch.full((64, 8), torch.inf), torch.eye(64), 32, "weight: .* NaN or Inf"),
        (torch.zeros(64, 8), torch.eye(64), 48, "divisor of k = 64, got 48"),
        (torch.zeros(64, 8), torch.eye(64), 0, "divisor of k = 64, got 0"),
        (torch.zeros(64), torch.eye(64), 32, r"expected a floating \(k, n\) matrix"),
        (torch.zeros(64, 8).int(), torch.eye(64), 32, "got torch.int32"),
    ],
)
def test_bad_input_is_refused(weight, hessian, group_size, message):
    with pytest.raises(ValueError, match=message):
        solver.gptq(weight, hessian, group_size)


@pytest.mark.parametrize("wrong", [torch.ones(32), -torch.ones(64), torch.full((64,), torch.nan)])
def test_importance_is_one_number_an_input(wrong):
    with pytest.raises(ValueError, match=r"importance: expected \(64,\) numbers from 0 on, got"):
        solver.rtn(torch.randn(64, 8), 32, clip=True, importance=wrong)
