"""The walk through a model: one decoder layer at a time on the device.

Layer by layer: run the samples to collect Hessians, solve, write the rounded weights back, run the
samples again. So every layer is fitted to what the quantized layers before it produce.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from marlin.layer import dense_weight, is_conv1d

from . import memory, robust, solver
from .collect import Reading
from .hessian import Hessian
from .phases import phase
from .plan import Plan, Target
from .travellers import Travellers
from .visit import Visit, read_ahead


@dataclass(frozen=True)
class Result:
    """One quantized linear layer and how it went."""

    target: Target
    solution: solver.Solution  # on the device where it was found
    method: str  # see robust.py
    loss: float | None = None  # share of the output's energy lost, None without calibration
    rtn_loss: float | None = None  # the same for plain rounding
    tokens: int = 0
    dead_inputs: int = 0  # inputs that were zero for every token
    seconds: float = 0.0  # of what is solved together, its share by outputs
    peak_bytes: int | None = None  # of GPU memory since the linears before it were done
    note: str | None = None  # why it is not GPTQ on the device asked for
    peak_host_bytes: int | None = None  # of the process's memory since it began, see memory.py


@dataclass(frozen=True)
class Done:
    """Blocks quantized in an earlier run: how many, and what gives the results of each."""

    count: int
    results: Callable[[int], list[Result]]


def _ignore(*args) -> None:
    pass


@torch.no_grad()
def quantize_rtn(
    model: PreTrainedModel,
    plan: Plan,
    *,
    device: torch.device | str = "cpu",
    on_result: Callable[[Result], None] = _ignore,
    on_layer: Callable[[int, list[Result]], None] = _ignore,
    done: Done | None = None,
) -> Iterator[list[Result]]:
    """Round every target to nearest, in place; yields the results of each decoder layer.

    Arguments as for ``quantize_gptq``. What does not fit on the device is rounded on the CPU.
    """
    device = torch.device(device)
    for index, name in enumerate(plan.blocks):
        if done and index < done.count:
            yield _heard(on_result, done.results(index))
            continue
        layer = model.get_submodule(name)
        with Visit(layer.modules(), device) as visit:
            with phase("load"):
                arrived, _ = memory.attempt(visit.bring)
            results = []
            for target in plan.targets[index]:
                started = time.perf_counter()
                module = model.get_submodule(target.name)
                with phase("solve"), _naming(target.name):
                    solution, note = memory.or_on_cpu(
                        "rounded", solver.rtn, dense_weight(module), plan.group_size
                    )
                    if not arrived:
                        note = memory.note("rounded")
                    result = Result(target, solution, robust.RTN, note=note)
                    result = _written(visit, module, result)
                seconds = time.perf_counter() - started
                peak, host = memory.peaks(device)
                results.append(
                    replace(result, seconds=seconds, peak_bytes=peak, peak_host_bytes=host)
                )
                on_result(results[-1])
            on_layer(index, results)
            yield results
            visit.forget_all_but(layer.parameters())


@torch.no_grad()
def quantize_gptq(
    model: PreTrainedModel,
    plan: Plan,
    samples: list[Tensor],
    *,
    device: torch.device | str = "cpu",
    on_result: Callable[[Result], None] = _ignore,
    on_layer: Callable[[int, list[Result]], None] = _ignore,
    skip_bad_samples: bool = False,
    on_skip: Callable[[int, str], None] = _ignore,
    done: Done | None = None,
    products: str = "own",
    **options,
) -> Iterator[list[Result]]:
    """GPTQ on every target, in place; yields the results of each decoder layer when it is done.

    While results are in the caller's hands the layer is still on the device; linears that the
    caller replaces then cost no copy back.

    model: on the CPU. samples: int64 (1, length) each.
    device: where layers are worked on, one after the other. On the CPU they compute in FP32, on
        a GPU in their own type.
    on_result: hears of every linear as it is solved. on_layer: of every decoder layer's number and
        results that are not done before, when the samples have yet to go through it.
    skip_bad_samples: leave out samples that lead to NaN or infinite activations instead of
        stopping; on_skip hears the number of each, and where it showed first.
    products: what second moments are multiplied in, see ``Hessian``. options: for ``solver.gptq``.
    Raises NonFiniteError naming the layer, and the sample if it is not the weights' fault.
    """
    model.eval()
    device = torch.device(device)
    layers = [model.get_submodule(name) for name in plan.blocks]
    if done and done.count == len(layers):  # nobody needs the activations
        for index in range(len(layers)):
            yield _heard(on_result, done.results(index))
        return
    # Half precision is slow on CPUs, and rounding would add up over the layers.
    dtype = torch.float32 if device.type == "cpu" else None
    travellers = Travellers(device, dtype, skip_bad_samples, on_skip, products)
    with phase("forward"):
        travellers.depart(model, layers, samples)
    ahead = None
    for index, (layer, name) in enumerate(zip(layers, plan.blocks, strict=True)):
        last = index + 1 == len(layers)
        with Visit(layer.modules(), device, dtype) as visit:
            with phase("load"):
                memory.must_fit(
                    name, device, visit.bring, ahead,
                    make_room=travellers.spare_memory, remedy=memory.ON_CPU,
                )  # fmt: skip
            ahead = None
            if device.type == "cuda" and not last:
                ahead = read_ahead(layers[index + 1].modules())
            linears = {target: model.get_submodule(target.name) for target in plan.targets[index]}
            if done and index < done.count:
                results = _heard(on_result, done.results(index))
                for result in results:
                    _written(visit, linears[result.target], result)
            else:
                results = []
                with phase("forward"):
                    readings = travellers.collect(layer, name, index, linears)
                while readings:  # each Hessian goes as soon as it has served
                    reading = readings.pop(0)
                    for result in _solve(reading, linears, plan.group_size, travellers, options):
                        module = linears[result.target]
                        results.append(_written(visit, module, result, travellers.spare_memory))
                        on_result(results[-1])
                on_layer(index, results)
            if not last:  # nobody reads what the last one puts out
                with phase("forward"):
                    travellers.advance(layer, name, index)
            yield results
            visit.forget_all_but(layer.parameters())


def _solve(
    reading: Reading,
    linears: dict[Target, nn.Module],
    group_size: int,
    travellers: Travellers,
    options: dict,
) -> Iterator[Result]:
    """Solve layers that read one input together."""
    targets, make_room = reading.targets, travellers.spare_memory
    weights = [dense_weight(linears[target]) for target in targets]
    started = time.perf_counter()
    tokens, dead, note = 0, 0, None
    with phase("solve"), _naming(", ".join(target.name for target in targets)):
        if reading.hessian is None:  # nothing is known but the weights
            attempts = [robust.unreached(weight, group_size, make_room) for weight in weights]
        else:
            tokens = reading.hessian.tokens
            (moments, dead), note = memory.or_on_cpu(
                "second moments averaged", _mean, reading.hessian, make_room=make_room
            )
            reading.hessian = None
            attempts = robust.solve(
                weights, moments, tokens, group_size, make_room=make_room, **options
            )
    seconds = time.perf_counter() - started
    outputs = sum(target.n for target in targets)
    peak, host = memory.peaks(travellers.device)
    for target, attempt in zip(targets, attempts, strict=True):
        yield Result(
            target, attempt.solution, attempt.method, attempt.loss, attempt.rtn_loss,
            tokens, dead, seconds * target.n / outputs, peak, memory.both(note, attempt.note), host,
        )  # fmt: skip


def _mean(hessian: Hessian) -> tuple[Tensor, int]:
    """Of the second moments, and how many inputs were zero for every token."""
    moments = hessian.mean()
    return moments, int((moments.diagonal() == 0).sum())


def _written(
    visit: Visit, module: nn.Module, result: Result, make_room: Callable[[], bool] = memory.never
) -> Result:
    """Overwrite the weight with the values its codes stand for; the result, with a note if the
    CPU had to do it."""

    def write(solution: solver.Solution) -> None:
        values = solution.dequantize()
        visit.change(module.weight, values if is_conv1d(module) else values.t().contiguous())

    with phase("solve"):
        _, note = memory.or_on_cpu("weight set", write, result.solution, make_room=make_room)
    return replace(result, note=memory.both(result.note, note))


def _heard(on_result: Callable[[Result], None], results: list[Result]) -> list[Result]:
    for result in results:
        on_result(result)
    return results


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """What the solver has to say against its input, with the layer's name."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"{name}: {error}") from error
