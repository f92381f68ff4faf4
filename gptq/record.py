"""What a model hands its layers, learned without knowing the architecture.

Every layer is short-circuited to pass its input through. One forward pass per batch of samples then
shows what enters the first layer and what all of them get beside it (masks, positions).
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel


@dataclass
class Call:
    """What the model passes to one layer beside the hidden states, for one batch."""

    args: tuple
    kwargs: dict

    def run(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        output = layer(hidden, *self.args, **self.kwargs)
        return output[0] if isinstance(output, tuple) else output

    def map(self, function: Callable[[Tensor], Tensor]) -> "Call":
        """The same with the function applied to every tensor."""
        return Call(_map(self.args, function), _map(self.kwargs, function))


@dataclass
class Batch:
    """Samples of equal length on their way through the layers."""

    samples: list[int]  # which ones, a row each
    hidden: Tensor  # (rows, length, width): what enters the next layer
    calls: list[Call | None]  # by layer; None for those that need it no more

    def rows(self, keep: list[int] | slice) -> "Batch":
        """Some of the samples; a slice of them shares this batch's memory."""
        size = len(self.samples)
        samples = self.samples[keep] if isinstance(keep, slice) else [self.samples[i] for i in keep]

        def cut(tensor: Tensor) -> Tensor:
            # Masks and positions have a row per sample, or one row for all of them.
            return tensor[keep] if tensor.dim() > 1 and tensor.shape[0] == size > 1 else tensor

        return self._map(samples, self.hidden[keep], cut)

    def only(self, samples: Container[int]) -> "Batch":
        return self.rows([row for row, sample in enumerate(self.samples) if sample in samples])

    def without(self, samples: Container[int]) -> "Batch":
        return self.rows([row for row, sample in enumerate(self.samples) if sample not in samples])

    def halves(self) -> list["Batch"]:
        """Two batches of half the rows, or this one if it has a single row."""
        size = len(self.samples)
        if size == 1:
            return [self]
        return [self.rows(slice(size // 2)), self.rows(slice(size // 2, size))]

    def to(self, device: torch.device | str) -> "Batch":
        return self._map(self.samples, self.hidden.to(device), lambda tensor: tensor.to(device))

    def _map(self, samples: list[int], hidden: Tensor, function) -> "Batch":
        done: dict[int, Tensor] = {}  # layers share masks and positions, and go on sharing them

        def once(tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = function(tensor)
            return done[id(tensor)]

        return Batch(samples, hidden, [call and call.map(once) for call in self.calls])


def make_batches(samples: list[Tensor], tokens: int) -> list[list[int]]:
    """Numbers of the samples that go through together: equally long, at most ``tokens`` in all
    unless one sample alone has more."""
    by_length = defaultdict(list)
    for number, sample in enumerate(samples):
        by_length[sample.shape[1]].append(number)
    batches = []
    for length, numbers in sorted(by_length.items()):
        rows = max(1, tokens // length)
        batches += [numbers[start : start + rows] for start in range(0, len(numbers), rows)]
    return batches


def record_batches(
    model: PreTrainedModel, layers: list[nn.Module], samples: list[Tensor], tokens: int = 1
) -> Iterator[Batch]:
    """Batches as they stand before the first layer, wherever the model is.

    samples: int64 (1, length) each. tokens: how many go through together (``make_batches``).
    Raises ValueError for a model that does not run its layers once each and in order.
    """
    # The base model stops short of the output head, whose logits nobody needs here.
    base = model.base_model
    device = base.get_input_embeddings().weight.device
    with _short_circuit(layers) as recorded:
        for numbers in make_batches(samples, tokens):
            recorded.clear()
            batch = torch.cat([samples[number] for number in numbers]).to(device)
            with contextlib.suppress(_Stop):
                base(input_ids=batch)
            order = [index for index, *_ in recorded]
            if order != list(range(len(layers))):
                raise ValueError(
                    f"model: expected {type(base).__name__} to run its {len(layers)} layers once "
                    f"each and in order, got {order}"
                )
            calls = [Call(_map(args), _map(kwargs)) for _, _, args, kwargs in recorded]
            yield Batch(numbers, recorded[0][1], calls)


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


def _map(value, function: Callable[[Tensor], Tensor] = lambda tensor: tensor):
    """``value`` with the function applied to every tensor in it, and caches left out."""
    if isinstance(value, Cache):
        return None  # layers run more than once here, and must not remember
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, function) for item in value)
    if isinstance(value, dict):
        return {key: _map(item, function) for key, item in value.items()}
    return value
