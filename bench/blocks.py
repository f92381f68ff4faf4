"""The linear layers of decoder blocks, in the order and with the data flow of real ones."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.compare import fused_layers
from bench.pools import PackedWeight
from marlin.testing.shapes import MODELS
from marlin.testing.timing import ROTATE_BYTES, group_count, packed_bytes, rotation_count

BLOCK = -1  # as a source: what the block itself gets


@dataclass(frozen=True)
class Step:
    """One linear layer. Its input is the first k columns of what step `source` wrote."""

    name: str
    k: int
    n: int
    source: int


def block_steps(model: str, fused: bool) -> list[Step]:
    """A block's layers; fused: q, k, v are one layer, gate and up another."""
    layers = fused_layers(model) if fused else MODELS[model]
    sources = {"o": "qkv", "gate_up": "o", "down": "gate_up"} if fused else {
        "o": "q", "gate": "o", "up": "o", "down": "gate"}  # fmt: skip
    order = list(layers)
    return [
        Step(name, k, n, order.index(sources[name]) if name in sources else BLOCK)
        for name, (k, n) in layers.items()
    ]


class BlockWeights:
    """Random weights for several blocks of a model, sized so that activations keep their size."""

    def __init__(
        self, model: str, group_size: int, dtype, device="cuda", rotate_bytes=ROTATE_BYTES
    ):
        generator = torch.Generator(device).manual_seed(2)
        self.group_size, self.dtype, self.device = group_size, dtype, device
        self.generator, self.rotate_bytes = generator, rotate_bytes
        block_bytes = sum(packed_bytes(s.k, s.n) for s in block_steps(model, True))
        self.blocks = rotation_count(block_bytes, rotate_bytes)

    def packed(self, steps: list[Step]) -> list[list[PackedWeight]]:
        return [[self._packed(s.k, s.n) for s in steps] for _ in range(self.blocks)]

    def dense(self, steps: list[Step], transposed: bool) -> list[list[torch.Tensor]]:
        return [[self._dense(s.k, s.n, transposed) for s in steps] for _ in range(self.blocks)]

    def _packed(self, k: int, n: int) -> PackedWeight:
        b = torch.empty(k // 16, 2 * n, dtype=torch.int32, device=self.device)
        b.random_(-(2**31), 2**31, generator=self.generator)
        # The squares of codes - 8 are 21.5 in the mean, those of uniform 0.5 … 1.5 are 13/12.
        scale = (21.5 * 13 / 12 * k) ** -0.5
        s = torch.empty(group_count(k, self.group_size), n, device=self.device)
        s.uniform_(0.5 * scale, 1.5 * scale, generator=self.generator)
        # The codes' mean is -0.5. With scales of one sign every layer would amplify the mean of its
        # input by sqrt(k) / 10, and a few layers on nothing would be finite.
        s *= torch.empty_like(s).uniform_(-1, 1, generator=self.generator).sign()
        return PackedWeight(b, s.to(self.dtype))

    def _dense(self, k: int, n: int, transposed: bool) -> torch.Tensor:
        shape = (n, k) if transposed else (k, n)
        w = torch.empty(shape, dtype=self.dtype, device=self.device)
        w.normal_(0, k**-0.5, generator=self.generator)
        return w.t() if transposed else w

    def rows(self, m: int, hidden: int) -> torch.Tensor:
        x = torch.empty(m, hidden, dtype=self.dtype, device=self.device)
        return x.normal_(generator=self.generator)


@dataclass(frozen=True)
class Launch:
    """What one launch read and wrote, for the check."""

    x: Tensor
    weight: object
    y: Tensor


class Chain:
    """Several blocks one after another, every layer with a weight of its own.

    Args:
        steps: of one block.
        weights: per block and step.
        x: the first block's input (m, hidden).
        multiply: (x, weight, out) launches one layer.
        neighbours: put what a real block has between its layers: norms, an elementwise stand-in
            for attention, activation, residual sums. They are PyTorch's own kernels.
    """

    def __init__(
        self,
        steps: list[Step],
        weights: list[list],
        x: Tensor,
        multiply: Callable[[Tensor, object, Tensor], object],
        neighbours: bool,
    ):
        self.steps, self.weights, self.x, self.multiply = steps, weights, x, multiply
        self.neighbours = neighbours
        # Every layer keeps its output, so that all of them can be checked after a replay.
        self.outputs = [[x.new_empty(len(x), step.n) for step in steps] for _ in weights]
        self.launched: list[Launch] = []

    def poison(self) -> None:
        for y in (y for block in self.outputs for y in block):
            y.fill_(float("nan"))

    def launch(self) -> None:
        """All blocks once; `launched` then names what this run read and wrote."""
        self.launched = []
        x = self.x
        for weights, outputs in zip(self.weights, self.outputs, strict=True):
            run = self._run_real_block if self.neighbours else self._run_bare_block
            x = run(x, weights, outputs)

    def _multiply(self, x: Tensor, weight, y: Tensor) -> None:
        self.multiply(x, weight, y)
        self.launched.append(Launch(x, weight, y))

    def _run_bare_block(self, x: Tensor, weights: list, outputs: list[Tensor]) -> Tensor:
        for step, weight, y in zip(self.steps, weights, outputs, strict=True):
            source = x if step.source == BLOCK else outputs[step.source][:, : step.k]
            self._multiply(source, weight, y)
        return outputs[-1]

    def _run_real_block(self, x: Tensor, weights: list, outputs: list[Tensor]) -> Tensor:
        by_name = {
            step.name: (weight, y)
            for step, weight, y in zip(self.steps, weights, outputs, strict=True)
        }

        def apply(names, source):
            for name in names:
                self._multiply(source, *by_name[name])
            return [by_name[name][1] for name in names]

        hidden = x.shape[1]
        normed = F.rms_norm(x, (hidden,))
        if "qkv" in by_name:
            (qkv,) = apply(["qkv"], normed)
            key_width = (qkv.shape[1] - hidden) // 2
            q, k, v = qkv.split([hidden, key_width, key_width], 1)
        else:
            q, k, v = apply(["q", "k", "v"], normed)
        (o,) = apply(["o"], attention_stand_in(q, k, v))
        x = x + o
        normed = F.rms_norm(x, (hidden,))
        if "gate_up" in by_name:
            gate, up = apply(["gate_up"], normed)[0].chunk(2, 1)
        else:
            gate, up = apply(["gate", "up"], normed)
        (down,) = apply(["down"], F.silu(gate) * up)
        return x + down


def attention_stand_in(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Reads q, k, v and writes something of q's shape that depends on all: q + k · v / 10."""
    heads = (-1, k.shape[1])  # a kv head serves several q heads
    result = torch.addcmul(q.unflatten(1, heads), k.unsqueeze(1), v.unsqueeze(1), value=0.1)
    return result.flatten(1)
