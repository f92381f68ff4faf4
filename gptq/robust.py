"""A solution for every layer, whatever happens, and a record of how it came about.

GPTQ in FP32 raises its damping as far as it may (``solver.factor``); if H has no factor even then,
it is tried in FP64, and after that the weights are rounded under clipped scales of either sign, an
input's error weighted by its energy, H's diagonal. What does not fit on the GPU is solved on the
CPU.

Layers that saw too few tokens for their H to mean anything (experts that the router starved) are
rounded too, under scales of either sign that do not clip: whole models rounded so lose 5 to 44 %
less than with plain scales, while clipping without H, which has the least squared error, can cost a
language model twice as much (``bench quality``).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from . import memory, solver
from .phases import phase

GPTQ, GPTQ_FP64 = "gptq", "gptq in float64"
RTN, FULL_RANGE_RTN, CLIPPED_RTN = "rtn", "full-range rtn", "clipped rtn"

# Fewer tokens than an eighth of the inputs, and GPTQ may do more harm than good. Measured on
# SmolLM2-135M, loss on other tokens by that of plain rounding: with a sixth as many tokens as
# inputs 0.27 to 0.91 in five layers; with a 24th 6.0 in a layer that has a few huge activations,
# as long as none of them is among the tokens.
STARVED = 8
# Solved together: the solver holds a dozen FP32 tensors of this size, a gigabyte each.
MOST_WEIGHTS = 2**28


@dataclass(frozen=True)
class Attempt:
    """A solution and how it came about."""

    solution: solver.Solution
    method: str
    loss: float | None = None  # share of the output's energy lost, None without calibration
    rtn_loss: float | None = None  # the same for plain rounding
    note: str | None = None  # why it is not GPTQ on the device asked for


def starved(tokens: int, k: int) -> str | None:
    """Why so few tokens are not enough for a layer of k inputs; None if they are."""
    if tokens == 0:
        return "no token reached it"
    return f"only {tokens} tokens for {k} inputs" if tokens * STARVED < k else None


def unreached(
    weight: Tensor, group_size: int, make_room: Callable[[], bool] = memory.never
) -> Attempt:
    """For a weight (k, n) of which no token shows what matters. make_room: as for ``solve``."""
    solution, note = memory.or_on_cpu(
        "rounded", lambda weight: solver.rtn(weight, group_size, full_range=True), weight,
        make_room=make_room,
    )  # fmt: skip
    return Attempt(solution, FULL_RANGE_RTN, note=memory.both(note, starved(0, len(weight))))


def solve(
    weights: list[Tensor],
    hessian: Tensor,
    tokens: int,
    group_size: int,
    *,
    make_room: Callable[[], bool] = memory.never,
    **options,
) -> list[Attempt]:
    """GPTQ of layers that read one input, or the next best thing.

    weights: (k, n) each, on one device. hessian: (k, k) anywhere, the mean over ``tokens``.
    make_room: see ``memory.attempt``. If there is no room on the GPU the CPU takes over, and the
    results are in its memory then.
    options go to ``solver.gptq``. Raises ValueError for input that no method can take.
    """
    attempts, note = memory.or_on_cpu(
        "solved",
        lambda weights, hessian: _solve(weights, hessian, tokens, group_size, options),
        weights, hessian, make_room=make_room,
    )  # fmt: skip
    return [replace(attempt, note=memory.both(note, attempt.note)) for attempt in attempts]


def _solve(
    weights: list[Tensor], hessian: Tensor, tokens: int, group_size: int, options: dict
) -> list[Attempt]:
    attempts = []
    hessian = hessian.to(weights[0].device)  # where its sum may have found no room; now?
    for together in _parts(weights):
        side_by_side = torch.cat(together, dim=1)  # they share the factorization and the loop
        if reason := starved(tokens, len(hessian)):
            solution = solver.rtn(side_by_side, group_size, full_range=True)
            whole = Attempt(solution, FULL_RANGE_RTN, note=reason)
        else:
            widths = [weight.shape[1] for weight in together]
            whole = _escalate(side_by_side, hessian, group_size, {**options, "widths": widths})
        del side_by_side
        start = 0
        for weight in together:
            solution = whole.solution.outputs(start, start + weight.shape[1])
            start += weight.shape[1]
            rounded = solver.rtn(weight, group_size)
            with phase("loss"):
                loss, rtn_loss = solver.output_losses(weight, [solution, rounded], hessian)
            attempts.append(replace(whole, solution=solution, loss=loss, rtn_loss=rtn_loss))
    return attempts


def _parts(weights: list[Tensor]) -> Iterator[list[Tensor]]:
    """The weights in runs that are small enough to be solved together."""
    run: list[Tensor] = []
    for weight in weights:
        if run and sum(w.numel() for w in run) + weight.numel() > MOST_WEIGHTS:
            yield run
            run = []
        run.append(weight)
    yield run


def _escalate(weight: Tensor, hessian: Tensor, group_size: int, options: dict) -> Attempt:
    try:
        return Attempt(solver.gptq(weight, hessian, group_size, **options), GPTQ)
    except solver.FactorizationError as error:
        reason = str(error)
    try:
        solution = solver.gptq(weight.double(), hessian.double(), group_size, **options)
        return Attempt(solution, GPTQ_FP64, note=reason)
    except solver.FactorizationError as error:
        # Rounded so as a whole, SmolLM2 and MiniLM lose 23 to 40 % less than unclipped (LOG.md).
        energy = hessian.diagonal().clamp(min=0)
        solution = solver.rtn(weight, group_size, clip=True, full_range=True, importance=energy)
        return Attempt(solution, CLIPPED_RTN, note=str(error))
