"""The walk through a model: one decoder layer at a time on the device.

Layer by layer: run the samples to collect Hessians, solve, write the rounded weights back, run the
samples again. So every layer is fitted to what the quantized layers before it produce.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from marlin.layer import dense_weight, is_conv1d

from . import robust, solver
from .collect import Reading, collect, finite_rows, locate
from .phases import phase
from .plan import Plan, Target
from .record import Batch, record_batches
from .visit import Visit, read_ahead

# How much goes through a layer at a time: enough to keep a GPU busy; a CPU is with one sample.
BATCH_TOKENS = {"cuda": 16384, "cpu": 1}
# Activations stay on the GPU if they take no more than this share of its free memory.
ACTIVATIONS_SHARE = 0.4
CPU = torch.device("cpu")


class NonFiniteError(ValueError):
    """NaN or infinite weights or activations."""


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
    seconds: float = 0.0
    peak_bytes: int | None = None  # of GPU memory since the linears before it were done
    note: str | None = None  # why it is not GPTQ on the device asked for


@dataclass(frozen=True)
class Done:
    """Blocks quantized in an earlier run: how many, and what gives the results of each."""

    count: int
    results: Callable[[int], list[Result]]


def _ignore(*args) -> None:
    pass


@dataclass
class _Way:
    """How to go, and what it takes to get through."""

    device: torch.device
    on_result: Callable[[Result], None]
    skip_bad_samples: bool = False
    on_skip: Callable[[int, str], None] = _ignore
    # Where activations wait for their turn, and where Hessians are summed up.
    activations: torch.device = CPU
    hessians: torch.device = CPU

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> torch.dtype | None:
        # Half precision is slow on CPUs, and rounding would add up over the layers.
        return None if self.on_gpu else torch.float32

    def spare_memory(self, batches: list[Batch]) -> bool:
        """Move what can wait in host memory there; whether there was something left to move."""
        if self.activations.type == "cpu":
            return False
        self.activations = CPU
        for batch in batches:
            batch.hidden = batch.hidden.cpu()
        torch.cuda.empty_cache()
        return True


@torch.no_grad()
def quantize_rtn(
    model: PreTrainedModel,
    plan: Plan,
    *,
    device: torch.device | str = "cpu",
    on_result: Callable[[Result], None] = _ignore,
    done: Done | None = None,
) -> Iterator[list[Result]]:
    """Round every target to nearest, in place; yields the results of each decoder layer."""
    for index, name in enumerate(plan.blocks):
        if done and index < done.count:
            results = done.results(index)
            for result in results:
                on_result(result)
            yield results
            continue
        layer = model.get_submodule(name)
        with Visit(layer.modules(), device) as visit:
            with phase("load"):
                visit.bring()
            results = []
            for target in plan.targets[index]:
                started = time.perf_counter()
                module = model.get_submodule(target.name)
                with phase("solve"), _naming(target.name):
                    solution = solver.rtn(dense_weight(module), plan.group_size)
                    _set_weight(visit, module, solution)
                seconds = time.perf_counter() - started
                results.append(Result(target, solution, robust.RTN, seconds=seconds))
                on_result(results[-1])
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
    skip_bad_samples: bool = False,
    on_skip: Callable[[int, str], None] = _ignore,
    done: Done | None = None,
    **options,
) -> Iterator[list[Result]]:
    """GPTQ on every target, in place; yields the results of each decoder layer when it is done.

    While results are in the caller's hands the layer is still on the device; linears that the
    caller replaces then cost no copy back.

    model: on the CPU. samples: int64 (1, length) each.
    device: where layers are worked on, one after the other. On the CPU they compute in FP32, on
        a GPU in their own type.
    on_result: hears of every linear as it is solved.
    skip_bad_samples: leave out samples that lead to NaN or infinite activations instead of
        stopping; on_skip hears the number of each, and where it showed first.
    options: for ``solver.gptq``.
    Raises NonFiniteError naming the layer, and the sample if it is not the weights' fault.
    """
    model.eval()
    device = torch.device(device)
    way = _Way(device, on_result, skip_bad_samples, on_skip, device, device)
    layers = [model.get_submodule(name) for name in plan.blocks]
    if done and done.count == len(layers):  # nobody needs the activations
        for index in range(len(layers)):
            yield _heard(way, done.results(index))
        return
    batches = _record(model, layers, samples, way)
    ahead = None
    for index, (layer, name) in enumerate(zip(layers, plan.blocks, strict=True)):
        last = index + 1 == len(layers)
        with Visit(layer.modules(), way.device, way.dtype) as visit:
            with phase("load"):
                visit.bring(ahead)
            ahead = read_ahead(layers[index + 1].modules()) if way.on_gpu and not last else None
            linears = {target: model.get_submodule(target.name) for target in plan.targets[index]}
            if done and index < done.count:
                results = _heard(way, done.results(index))
                for result in results:
                    _set_weight(visit, linears[result.target], result.solution)
            else:
                results = []
                readings, batches = _collect(layer, name, linears, batches, index, way)
                while readings:  # each Hessian goes as soon as it has served
                    solving = _solve(
                        readings.pop(0), linears, plan.group_size, way, batches, options
                    )
                    for result in solving:
                        _set_weight(visit, linears[result.target], result.solution)
                        results.append(result)
                        way.on_result(result)
            if not last:  # nobody reads what the last one puts out
                with phase("forward"):
                    batches = _advance(layer, name, batches, index, way)
            yield results
            visit.forget_all_but(layer.parameters())


def _record(model, layers: list[nn.Module], samples: list[Tensor], way: _Way) -> list[Batch]:
    """What enters the first layer, and what each gets beside it."""
    inside = {module for layer in layers[1:] for module in layer.modules()}
    outside = [module for module in model.base_model.modules() if module not in inside]
    tokens = BATCH_TOKENS[way.device.type]
    with phase("forward"), Visit(outside, way.device, way.dtype) as visit:
        visit.bring()
        while True:
            try:
                return _record_visiting(model, layers, samples, tokens, way)
            except RuntimeError as error:
                if not robust.out_of_memory(error) or tokens <= 1:
                    raise
            torch.cuda.empty_cache()
            tokens //= 2


def _record_visiting(model, layers, samples, tokens: int, way: _Way) -> list[Batch]:
    batches = []
    for batch in record_batches(model, layers, samples, tokens):
        if way.on_gpu and not batches:
            size = batch.hidden.shape[-1] * batch.hidden.element_size()
            free, _ = torch.cuda.mem_get_info(way.device)
            if size * sum(sample.numel() for sample in samples) > ACTIVATIONS_SHARE * free:
                way.activations = CPU
        batch.hidden = batch.hidden.to(way.activations)
        batches.append(batch)
    return batches


def _collect(layer, name, linears, batches, index, way: _Way):
    """Hessians of a layer's linears, and the batches as they could be run."""
    for target, linear in linears.items():
        if not torch.isfinite(linear.weight).all():
            raise NonFiniteError(f"{target.name}: expected finite weights, got NaN or Inf")
    while True:
        try:
            with phase("forward"):
                found = collect(layer, linears, batches, index, way.device, way.hessians)
        except RuntimeError as error:
            if not robust.out_of_memory(error):
                raise
            found = None
        if found is None:  # outside the except block, whose error keeps tensors alive
            batches = _make_room(batches, way)
        elif found.bad_samples:
            rows = [batch.only(found.bad_samples) for batch in batches]
            suspects = [batch for batch in rows if batch.samples]
            bad = locate(layer, name, linears, suspects, index, way.device)
            # A sample that is fine when it runs alone was not when it ran with others.
            batches = _drop(batches, dict.fromkeys(found.bad_samples, name) | bad, way)
        else:
            return found.readings, batches


def _make_room(batches: list[Batch], way: _Way) -> list[Batch]:
    """Smaller batches; then activations in host memory; then Hessians; then no more ideas."""
    smaller = [half for batch in batches for half in batch.halves()]
    if len(smaller) == len(batches) and not way.spare_memory(smaller):
        if way.hessians.type == "cpu":
            raise ValueError(
                f"{way.device}: expected memory for one layer and one sample, ran out; "
                "shorter samples (--seqlen) or --device cpu would do"
            )
        way.hessians = CPU
    if way.on_gpu:
        torch.cuda.empty_cache()
    return smaller


def _drop(batches: list[Batch], bad: dict[int, str], way: _Way) -> list[Batch]:
    """The batches without the samples in ``bad``, if going on was asked for."""
    sample, place = min(bad.items())
    what = f"{place}: expected finite activations, got NaN or Inf"
    if not way.skip_bad_samples:
        raise NonFiniteError(f"{what} in sample {sample} (--skip-bad-samples goes on without it)")
    kept = [batch.without(bad) for batch in batches if not bad.keys() >= set(batch.samples)]
    if not kept:
        raise NonFiniteError(f"{what} in every sample")
    for sample, place in sorted(bad.items()):
        way.on_skip(sample, place)
    return kept


def _advance(layer, name, batches, index, way: _Way) -> list[Batch]:
    """What enters the next layer."""
    waiting, after, finite = deque(batches), [], []
    while waiting:
        batch = waiting.popleft()
        try:
            hidden = batch.calls[index].run(layer, batch.hidden.to(way.device))
        except RuntimeError as error:
            if not robust.out_of_memory(error) or len(batch.samples) == 1:
                raise
            hidden = None
        if hidden is None:  # outside the except block, whose error keeps tensors alive
            torch.cuda.empty_cache()
            waiting.extendleft(reversed(batch.halves()))
            batch.hidden = None
            continue
        finite.append(finite_rows(hidden))
        after.append(replace(batch, hidden=hidden.to(way.activations)))
        batch.hidden = None
    samples = [sample for batch in after for sample in batch.samples]
    rows = zip(samples, torch.cat(finite).tolist(), strict=True)
    if bad := {sample: f"{name}, quantized" for sample, fine in rows if not fine}:
        after = _drop(after, bad, way)
    for batch in after:
        batch.calls[index] = None
    return after


def _solve(
    reading: Reading,
    linears: dict[Target, nn.Module],
    group_size: int,
    way: _Way,
    batches: list[Batch],
    options: dict,
) -> Iterator[Result]:
    """Solve layers that read one input together."""
    targets, hessian = reading.targets, reading.hessian
    weights = [dense_weight(linears[target]) for target in targets]
    started = time.perf_counter()
    tokens, dead = 0, 0
    with phase("solve"), _naming(", ".join(target.name for target in targets)):
        if hessian is None:  # nothing is known but the weights
            note = robust.starved(0, targets[0].k)
            solutions = [solver.rtn(weight, group_size, clip=True) for weight in weights]
            attempts = [robust.Attempt(s, robust.CLIPPED_RTN, note=note) for s in solutions]
        else:
            tokens = hessian.tokens
            moments = hessian.mean()
            reading.hessian = hessian = None
            dead = int((moments.diagonal() == 0).sum())
            if moments.device != weights[0].device:  # its sum found no room on the GPU; now?
                moments, weights = _together(moments, weights)
            attempts = robust.solve(
                weights, moments, tokens, group_size,
                make_room=lambda: way.spare_memory(batches), **options,
            )  # fmt: skip
    seconds = (time.perf_counter() - started) / len(targets)
    peak = None
    if way.on_gpu:
        peak = torch.cuda.max_memory_allocated(way.device)
        torch.cuda.reset_peak_memory_stats(way.device)
    for target, attempt in zip(targets, attempts, strict=True):
        yield Result(
            target, attempt.solution, attempt.method, attempt.loss, attempt.rtn_loss,
            tokens, dead, seconds, peak, attempt.note,
        )  # fmt: skip


def _together(moments: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Hessian and weights on the GPU if it has room, else in host memory."""
    try:
        return moments.to(weights[0].device), weights
    except RuntimeError as error:
        if not robust.out_of_memory(error):
            raise
    return moments, [weight.cpu() for weight in weights]


def _set_weight(visit: Visit, module: nn.Module, solution: solver.Solution) -> None:
    """Overwrite the weight with the values its codes stand for."""
    with phase("solve"):
        values = solution.dequantize()
    visit.change(module.weight, values if is_conv1d(module) else values.t().contiguous())


def _heard(way: _Way, results: list[Result]) -> list[Result]:
    for result in results:
        way.on_result(result)
    return results


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """What the solver has to say against its input, with the layer's name."""
    try:
        yield
    except ValueError as error:
        raise type(error)(f"{name}: {error}") from error
