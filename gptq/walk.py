"""The walk through a model: one decoder layer at a time on the device.

A first pass runs the model with every layer short-circuited, which records what the model hands
each layer (masks, positions) and what enters the first one, without knowing the architecture.
Then, layer by layer: run the samples to collect Hessians, solve, write the rounded weights back,
run the samples again. So every layer is fitted to what the quantized layers before it produce.
"""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from marlin.layer import dense_weight

from . import solver
from .hessian import Hessian
from .plan import Plan, Target


@dataclass(frozen=True)
class Result:
    """One quantized linear layer and how it went."""

    target: Target
    solution: solver.Solution  # on the CPU
    method: str  # "gptq" or "rtn"
    loss: float | None  # share of the output's energy lost, None without calibration
    rtn_loss: float | None  # the same for plain rounding
    tokens: int
    seconds: float


@dataclass
class Call:
    """What the model passes to one layer beside the hidden states, for one sample."""

    args: tuple
    kwargs: dict

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def quantize_rtn(
    model: PreTrainedModel, plan: Plan, *, on_result: Callable[[Result], None] = lambda result: None
) -> Iterator[list[Result]]:
    """Round every target to nearest, in place; yields the results of each decoder layer."""
    for targets in plan.targets:
        results = []
        for target in targets:
            started = time.perf_counter()
            module = model.get_submodule(target.name)
            solution = solver.rtn(dense_weight(module), plan.group_size)
            _set_weight(module, solution)
            seconds = time.perf_counter() - started
            results.append(Result(target, solution, "rtn", None, None, 0, seconds))
            on_result(results[-1])
        yield results


@torch.no_grad()
def quantize_gptq(
    model: PreTrainedModel,
    plan: Plan,
    samples: list[Tensor],
    *,
    device: torch.device | str = "cpu",
    on_result: Callable[[Result], None] = lambda result: None,
    **options,
) -> Iterator[list[Result]]:
    """GPTQ on every target, in place; yields the results of each decoder layer when it is done.

    model: on the CPU, in the dtype to compute in; its layers visit ``device`` one at a time.
    samples: int64 (1, length) each. on_result hears of every linear as it is solved.
    options go to ``solver.gptq`` (clip, damping).
    Raises ValueError naming the layer and the sample when activations are NaN or infinite.
    """
    model.eval()
    layers = [model.get_submodule(name) for name in plan.blocks]
    hidden, calls = record_calls(model, layers, samples, device)
    for index, (layer, name) in enumerate(zip(layers, plan.blocks, strict=True)):
        layer.to(device)
        linears = {target: model.get_submodule(target.name) for target in plan.targets[index]}
        results = []
        for targets, hessian in _collect(layer, name, linears, hidden, calls[index]):
            for result in _solve(targets, linears, hessian, plan.group_size, options):
                _set_weight(linears[result.target], result.solution)
                results.append(result)
                on_result(result)
        if index + 1 < len(layers):  # nobody reads what the last one puts out
            for i, call in enumerate(calls[index]):
                hidden[i] = call.run(layer, hidden[i])
        calls[index] = []
        layer.to("cpu")
        yield results


def record_calls(
    model: PreTrainedModel, layers: list[nn.Module], samples: list[Tensor], device
) -> tuple[list[Tensor], list[list[Call]]]:
    """What enters the first layer for each sample, and what each layer gets beside it.

    Returns hidden states by sample, and calls by layer and sample, all on ``device``.
    Raises ValueError for a model that does not run its layers once each and in order.
    """
    # The base model stops short of the output head, whose logits nobody needs here.
    base = model.base_model
    hidden: list[Tensor] = []
    calls: list[list[Call]] = [[] for _ in layers]
    with _short_circuit(layers) as recorded:
        for sample in samples:
            recorded.clear()
            with contextlib.suppress(_Stop):
                base(input_ids=sample.to(model.device))
            order = [index for index, *_ in recorded]
            if order != list(range(len(layers))):
                raise ValueError(
                    f"model: expected {type(base).__name__} to run its {len(layers)} layers once "
                    f"each and in order, got {order}"
                )
            hidden.append(recorded[0][1].to(device))
            moved: dict[int, Tensor] = {}  # layers share masks and positions: move each once
            for index, _, args, kwargs in recorded:
                calls[index].append(Call(_to(args, device, moved), _to(kwargs, device, moved)))
    return hidden, calls


class _Stop(Exception):
    """Ends a forward pass after the last layer."""


@contextlib.contextmanager
def _short_circuit(layers: list[nn.Module]):
    """Let layers hand their input through and record (index, hidden, args, kwargs) of each call."""
    recorded: list[tuple[int, Tensor, tuple, dict]] = []
    wrap: Callable[[Tensor], Tensor | tuple] | None = None  # hidden states as layers return them

    def replace(index: int, layer: nn.Module) -> None:
        original = layer.forward

        def forward(*args, **kwargs):
            nonlocal wrap
            if wrap is None:  # only a real call, the very first, shows whether that is a tuple
                wrap = _wrapper(original(*args, **kwargs))
            hidden, *args = args if args else (kwargs.pop("hidden_states"),)
            recorded.append((index, hidden, tuple(args), kwargs))
            if index + 1 == len(layers):
                raise _Stop
            return wrap(hidden)

        # An instance attribute shadows the method; models still find what they look up on a layer.
        layer.forward = forward

    for index, layer in enumerate(layers):
        replace(index, layer)
    try:
        yield recorded
    finally:
        for layer in layers:
            del layer.forward


def _wrapper(output: Tensor | tuple) -> Callable[[Tensor], Tensor | tuple]:
    """A function that returns other hidden states in the form of a layer's ``output``."""
    if isinstance(output, tuple):
        return lambda hidden: (hidden, *output[1:])
    return lambda hidden: hidden


def _collect(
    layer: nn.Module,
    name: str,
    linears: dict[Target, nn.Module],
    hidden: list[Tensor],
    calls: list[Call],
) -> Iterator[tuple[list[Target], Hessian | None]]:
    """Groups of targets that read one input, with its Hessian; None for targets never called."""
    shared: dict[Target, Target] = {}  # target -> the first one that reads the same input
    hessians: dict[Target, Hessian] = {}
    inputs: dict[int, tuple[Tensor, Target]] = {}  # held, so that no address is used twice

    def hook(target: Target):
        def accumulate(module, args):
            tensor = args[0]
            # Whoever shares in the first sample shares in all of them.
            leader = shared.setdefault(target, inputs.setdefault(id(tensor), (tensor, target))[1])
            if leader is target:
                if target not in hessians:
                    hessians[target] = Hessian(target.k, tensor.device)
                hessians[target].add(tensor)

        return accumulate

    handles = [linear.register_forward_pre_hook(hook(t)) for t, linear in linears.items()]
    try:
        for i, (states, call) in enumerate(zip(hidden, calls, strict=True)):
            if not torch.isfinite(call.run(layer, states)).all():
                raise ValueError(
                    f"{name}: expected finite activations, got NaN or Inf in sample {i}"
                )
            inputs.clear()
    finally:
        for handle in handles:
            handle.remove()
    for leader in hessians:
        yield [target for target in linears if shared.get(target) is leader], hessians[leader]
    if unread := [target for target in linears if target not in shared]:
        yield unread, None


def _solve(
    targets: list[Target],
    linears: dict[Target, nn.Module],
    hessian: Hessian | None,
    group_size: int,
    options: dict,
) -> Iterator[Result]:
    """Solve layers that read one input together: they share the factorization and the loop."""
    started = time.perf_counter()
    weights = [dense_weight(linears[target]) for target in targets]
    if hessian is None:  # no sample came through: nothing better than rounding is known
        for target, weight in zip(targets, weights, strict=True):
            yield Result(target, solver.rtn(weight, group_size), "rtn", None, None, 0, 0.0)
        return
    moments = hessian.mean()
    solution = solver.gptq(torch.cat(weights, dim=1), moments, group_size, **options)
    start = 0
    for target, weight in zip(targets, weights, strict=True):
        part = solution.outputs(start, start + target.n)
        start += target.n
        loss = solver.output_loss(weight, part, moments)
        rtn_loss = solver.output_loss(weight, solver.rtn(weight, group_size), moments)
        seconds = (time.perf_counter() - started) / len(targets)
        yield Result(target, part.cpu(), "gptq", loss, rtn_loss, hessian.tokens, seconds)


def _set_weight(module: nn.Module, solution: solver.Solution) -> None:
    """Overwrite the weight with the values its codes stand for."""
    dense_weight(module).copy_(solution.dequantize())


def _to(value, device, moved: dict[int, Tensor]):
    """``value`` with every tensor in it on ``device``; the same tensor comes out the same."""
    if isinstance(value, Cache):
        return None  # layers run more than once here, and must not remember
    if isinstance(value, Tensor):
        return moved.setdefault(id(value), value.to(device))
    if isinstance(value, (tuple, list)):
        return type(value)(_to(item, device, moved) for item in value)
    if isinstance(value, dict):
        return {key: _to(item, device, moved) for key, item in value.items()}
    return value
