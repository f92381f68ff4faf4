"""The calibration samples on their way through a model, whatever happens on it.

Memory that runs out is made: smaller batches, then activations in host memory, then Hessians there.
Samples that become NaN or infinite are named, and left out if that was asked for.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .collect import Reading, collect, finite_rows, locate
from .plan import Target
from .record import Batch, record_batches
from .robust import out_of_memory
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
            visit.bring()
            while True:
                try:
                    return self._record(model, layers, samples, tokens)
                except RuntimeError as error:
                    if not out_of_memory(error) or tokens <= 1:
                        raise
                torch.cuda.empty_cache()
                tokens //= 2

    def collect(
        self, layer: nn.Module, name: str, index: int, linears: dict[Target, nn.Module]
    ) -> list[Reading]:
        """What the linears of the index-th layer read; the samples stay before it."""
        for target, linear in linears.items():
            if not torch.isfinite(linear.weight).all():
                raise NonFiniteError(f"{target.name}: expected finite weights, got NaN or Inf")
        while True:
            try:
                found = collect(
                    layer, linears, self.batches, index, self.device, self.hessians, self.products
                )
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                found = None
            if found is None:  # outside the except block, whose error keeps tensors alive
                self._make_room()
            elif found.bad_samples:
                rows = [batch.only(found.bad_samples) for batch in self.batches]
                suspects = [batch for batch in rows if batch.samples]
                bad = locate(layer, name, linears, suspects, index, self.device)
                # A sample that is fine when it runs alone was not when it ran with others.
                self._drop(dict.fromkeys(found.bad_samples, name) | bad)
            else:
                return found.readings

    def advance(self, layer: nn.Module, name: str, index: int) -> None:
        """Through the index-th layer."""
        waiting, after, finite = deque(self.batches), [], []
        while waiting:
            batch = waiting.popleft()
            try:
                hidden = batch.calls[index].run(layer, batch.hidden.to(self.device))
            except RuntimeError as error:
                if not out_of_memory(error) or len(batch.samples) == 1:
                    raise
                hidden = None
            if hidden is None:  # outside the except block, whose error keeps tensors alive
                torch.cuda.empty_cache()
                waiting.extendleft(reversed(batch.halves()))
                batch.hidden = None
                continue
            finite.append(finite_rows(hidden))
            after.append(replace(batch, hidden=hidden.to(self.activations)))
            batch.hidden = None
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

    def _make_room(self) -> None:
        smaller = [half for batch in self.batches for half in batch.halves()]
        if len(smaller) == len(self.batches) and not self.spare_memory():
            if self.hessians == CPU:
                raise ValueError(
                    f"{self.device}: expected memory for one layer and one sample, ran out; "
                    "shorter samples (--seqlen) or --device cpu would do"
                )
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
        kept = [b.without(bad) for b in self.batches if not bad.keys() >= set(b.samples)]
        if not kept:
            raise NonFiniteError(f"{what} in every sample")
        self.batches = kept
        for sample, place in sorted(bad.items()):
            self.on_skip(sample, place)
