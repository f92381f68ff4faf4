"""From GPTQ down to rounding, one step at a time, and what is said about it."""

import pytest
import torch
from faults import Elsewhere
from losses import output_loss

from gptq import robust, solver


def problem(k=64, n=24, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(k, n, generator=generator)
    inputs = torch.randn(tokens, k, generator=generator)
    return weight, inputs.T @ inputs / tokens


def test_the_usual_case_is_the_solver_with_losses():
    weight, hessian = problem()
    parts = [weight[:, :16], weight[:, 16:]]
    attempts = robust.solve(parts, hessian, 200, 32, clip=False)
    whole = solver.gptq(weight, hessian, 32, clip=False)
    codes = torch.cat([attempt.solution.codes for attempt in attempts], dim=1)
    assert torch.equal(codes, whole.codes)
    for attempt, part in zip(attempts, parts, strict=True):
        assert attempt.method == "gptq" and attempt.note is None
        assert attempt.loss == pytest.approx(output_loss(part, attempt.solution, hessian), rel=1e-5)
        rounded = output_loss(part, solver.rtn(part, 32), hessian)
        assert attempt.rtn_loss == pytest.approx(rounded, rel=1e-5)


def test_many_outputs_are_solved_in_parts(monkeypatch):
    weight, hessian = problem(n=40)
    parts = [weight[:, :8], weight[:, 8:16], weight[:, 16:]]
    expected = robust.solve(parts, hessian, 200, 32)
    sizes = []
    gptq = solver.gptq
    monkeypatch.setattr(
        solver,
        "gptq",
        lambda weight, *a, **o: sizes.append(weight.shape[1]) or gptq(weight, *a, **o),
    )
    monkeypatch.setattr(robust, "MOST_WEIGHTS", 64 * 20)
    attempts = robust.solve(parts, hessian, 200, 32)
    assert sizes == [16, 24]
    for a, b in zip(attempts, expected, strict=True):
        assert torch.equal(a.solution.codes, b.solution.codes)
        assert a.loss == pytest.approx(b.loss, rel=1e-5)


def test_float64_when_no_damping_helps_float32(monkeypatch):
    weight, hessian = problem()
    factor = solver.factor

    def only_float64(matrix, *args):
        if matrix.dtype == torch.float32:
            raise solver.FactorizationError("hessian: not in float32")
        return factor(matrix, *args)

    monkeypatch.setattr(solver, "factor", only_float64)
    (attempt,) = robust.solve([weight], hessian, 200, 32)
    assert attempt.method == "gptq in float64" and attempt.note == "hessian: not in float32"
    assert attempt.solution.scales.dtype == torch.float16
    assert attempt.loss < attempt.rtn_loss


def test_clipped_rounding_when_nothing_helps():
    """By what each input counts, of which a damaged H still has the diagonal."""
    weight, hessian = problem()
    hessian[3, 3] = -3.0  # no second-moment matrix at all
    (attempt,) = robust.solve([weight], hessian, 200, 32)
    assert attempt.method == "clipped rtn"
    assert "with damping 1 of its mean diagonal in torch.float64" in attempt.note
    energy = hessian.diagonal().clamp(min=0)

    def error(**options):
        rounded = solver.rtn(weight, 32, **options).dequantize()
        return (energy @ (weight - rounded.to(weight)).square()).sum()

    chosen = {"clip": True, "full_range": True, "importance": energy}
    assert torch.equal(attempt.solution.codes, solver.rtn(weight, 32, **chosen).codes)
    assert error(**chosen) < error(clip=True, full_range=True) < error(full_range=True) < error()


def test_full_range_rounding_when_tokens_are_few():
    weight, hessian = problem(tokens=7)
    (attempt,) = robust.solve([weight], hessian, 7, 32)
    assert attempt.method == "full-range rtn" and attempt.note == "only 7 tokens for 64 inputs"
    assert robust.solve([weight], hessian, 8, 32)[0].method == "gptq"


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no memory"), RuntimeError("CUSOLVER_STATUS_ALLOC_FAILED, when ...")],
)
def test_cuda_out_of_memory_makes_room_then_goes_to_the_cpu(error, monkeypatch):
    weight, hessian = problem()
    tries = []
    gptq = solver.gptq

    def failing(weight, *args, **options):
        tries.append(weight.device.type)
        if weight.device.type == "cuda":
            raise error
        return gptq(weight, *args, **options)

    monkeypatch.setattr(solver, "gptq", failing)
    cat = torch.cat  # would lose the disguise
    monkeypatch.setattr(
        torch, "cat", lambda tensors, *args, **o: (
            tensors[0] if isinstance(tensors[0], Elsewhere) else cat(tensors, *args, **o)
        ),
    )  # fmt: skip
    rooms = iter([True, False])
    (attempt,) = robust.solve(
        [weight.as_subclass(Elsewhere)],
        hessian.as_subclass(Elsewhere),
        200,
        32,
        make_room=lambda: next(rooms),
    )
    assert tries == ["cuda", "cuda", "cpu"]
    assert attempt.method == "gptq" and attempt.note == "CUDA out of memory: solved on the CPU"


def test_other_errors_are_not_taken_for_a_lack_of_memory(monkeypatch):
    weight, hessian = problem()

    def failing(*args, **options):
        raise RuntimeError("a bug")

    monkeypatch.setattr(solver, "gptq", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        robust.solve([weight.as_subclass(Elsewhere)], hessian.as_subclass(Elsewhere), 200, 32)
