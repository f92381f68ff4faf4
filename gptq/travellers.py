"""The calibration samples on their way through a model, whatever happens on it.

Memory that runs out is made: smaller batches, then activations in host memory, then Hessians there.
Samples that become NaN or infinite are named, and left out if that was asked for.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from . import memory
from .collect import Reading, collect, finite_rows, locate
from .plan import Target
from .record import Batch, record_batches
from .visit import Visit

# How much goes through a layer at a time: enough to keep a GPU busy; a CPU is with one sample.
BATCH_TOKENS = {"cuda": 16384, "cpu": 1}
# Activations stay on the GPU if they take no more than this share of its free memory.
ACTIVATIONS_SHARE = 0.4
CPU = torch.device("cpu")


class NonFiniteError(ValueError):
    """NaN or infinite weights or activations."""


class Travellers:
    """Samples between two layers.

    device, dtype: what layers are computed on and in, None for their own type.
    skip_bad: leave out samples that become NaN or infinite instead of raising NonFiniteError;
    on_skip hears the number of each, and where it showed first. products: of ``Hessian``.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype | None,
        skip_bad: bool,
        on_skip: Callable[[int, str], None],
        products: str,
    ) -> None:
        self.device, self.dtype, self.products = device, dtype, products
        self.skip_bad, self.on_skip = skip_bad, on_skip
        self.batches: list[Batch] = []
        # Where activations wait for their turn, and where Hessians are summed up.
        self.activations = self.hessians = device

    def depart(self, model, layers: list[nn.Module], samples: list[Tensor]) -> None:
        """Up to the first layer."""
        inside = {module for layer in layers[1:] for module in layer.modules()}
        outside = [module for module in model.base_model.modules() if module not in inside]
        tokens = BATCH_TOKENS[self.device.type]
        with Visit(outside, self.device, self.dtype) as visit:
            what = "the embeddings and the first layer"
            memory.must_fit(what, self.device, visit.bring, remedy=memory.ON_CPU)
            while not memory.attempt(self._record, model, layers, samples, tokens)[0]:
                self.batches = []
                if tokens > 1:
                    tokens //= 2
                elif not self.spare_memory():
                    raise memory.too_little("the embeddings and one sample", self.device)

    def collect(
        self, layer: nn.Module, name: str, index: int, linears: dict[Target, nn.Module]
    ) -> list[Reading]:
        """What the linears of the index-th layer read; the samples stay before it."""
        for target, linear in linears.items():
            finite, _ = memory.or_on_cpu(
                "checked", _all_finite, linear.weight.detach(), make_room=self.spare_memory
            )
            if not finite:
                raise NonFiniteError(f"{target.name}: expected finite weights, got NaN or Inf")
        while True:
            fits, found = memory.attempt(
                collect, layer, linears, self.batches, index, self.device, self.hessians,
                self.products,
            )  # fmt: skip
            if not fits:
                self._make_room(name)
            elif found.bad_samples:
                bad = memory.must_fit(
                    f"{name} and one sample", self.device,
                    self._locate, found.bad_samples, layer, name, index, linears,
                    make_room=self.spare_memory,
                )  # fmt: skip
                # A sample that is fine when it runs alone was not when it ran with others.
                self._drop(dict.fromkeys(found.bad_samples, name) | bad)
            else:
                return found.readings

    def advance(self, layer: nn.Module, name: str, index: int) -> None:
        """Through the index-th layer."""
        waiting, after, finite = deque(self.batches), [], []

        def run(batch: Batch) -> tuple[Tensor, Tensor]:
            hidden = batch.calls[index].run(layer, batch.hidden.to(self.device))
            return hidden.to(self.activations), finite_rows(hidden)

        while waiting:
            batch = waiting.popleft()
            fits, found = memory.attempt(run, batch)
            if fits:
                after.append(replace(batch, hidden=found[0]))
                finite.append(found[1])
                batch.hidden = found = None
            elif len(batch.samples) > 1:
                waiting.extendleft(reversed(batch.halves()))
                batch.hidden = None
            else:
                waiting.appendleft(batch)
                self.batches = [*after, *waiting]
                if not self.spare_memory():
                    tokens = batch.hidden.shape[1]
                    what = f"{name} and one sample of {tokens} tokens"
                    raise memory.too_little(what, self.device)
        self.batches = after
        samples = [sample for batch in after for sample in batch.samples]
        rows = zip(samples, torch.cat(finite).tolist(), strict=True)
        if bad := {sample: f"{name}, quantized" for sample, fine in rows if not fine}:
            self._drop(bad)
        for batch in self.batches:
            batch.calls[index] = None

    def spare_memory(self) -> bool:
        """Move activations to host memory; whether there was something left to move."""
        if self.activations == CPU:
            return False
        self.activations = CPU
        for batch in self.batches:
            batch.hidden = batch.hidden.cpu()
        torch.cuda.empty_cache()
        return True

    def _record(self, model, layers: list[nn.Module], samples: list[Tensor], tokens: int) -> None:
        self.batches = []
        for batch in record_batches(model, layers, samples, tokens):
            if self.device.type == "cuda" and not self.batches:
                size = batch.hidden.shape[-1] * batch.hidden.element_size()
                free, _ = torch.cuda.mem_get_info(self.device)
                if size * sum(sample.numel() for sample in samples) > ACTIVATIONS_SHARE * free:
                    self.activations = CPU
            batch.hidden = batch.hidden.to(self.activations)
            self.batches.append(batch)

    def _locate(self, bad: set[int], layer, name: str, index: int, linears) -> dict[int, str]:
        rows = [batch.only(bad) for batch in self.batches]
        suspects = [batch for batch in rows if batch.samples]
        return locate(layer, name, linears, suspects, index, self.device)

    def _without(self, bad: dict[int, str]) -> list[Batch]:
        return [b.without(bad) for b in self.batches if not bad.keys() >= set(b.samples)]

    def _make_room(self, name: str) -> None:
        smaller = [half for batch in self.batches for half in batch.halves()]
        if len(smaller) == len(self.batches) and not self.spare_memory():
            if self.hessians == CPU:
                raise memory.too_little(f"{name} and one sample", self.device)
            self.hessians = CPU
        else:
            self.batches = smaller
            torch.cuda.empty_cache()

    def _drop(self, bad: dict[int, str]) -> None:
        """Leave samples out, if going on was asked for."""
        sample, place = min(bad.items())
        what = f"{place}: expected finite activations, got NaN or Inf"
        if not self.skip_bad:
            raise NonFiniteError(
                f"{what} in sample {sample} (--skip-bad-samples goes on without it)"
            )
        kept = memory.must_fit(
            "the other samples", self.device, self._without, bad, make_room=self.spare_memory
        )
        if not kept:
            raise NonFiniteError(f"{what} in every sample")
        self.batches = kept
        for sample, place in sorted(bad.items()):
            self.on_skip(sample, place)


def _all_finite(tensor: Tensor) -> bool:
    return bool(torch.isfinite(tensor).all())
