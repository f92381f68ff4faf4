"""Hessians of the linears in one layer, from hooks while the samples run through it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .hessian import Hessian
from .memory import out_of_memory
from .plan import Target
from .record import Batch


@dataclass
class Reading:
    """Linears that read one input, and its second moments; None if no sample reached them."""

    targets: list[Target]
    hessian: Hessian | None


@dataclass
class Collected:
    readings: list[Reading]
    bad_samples: set[int] = field(default_factory=set)  # after which something was NaN or infinite


class _ReadsAnother(Exception):
    """A linear that shared its input with others now does not."""

    def __init__(self, target: Target) -> None:
        self.target = target


def collect(
    layer: nn.Module,
    linears: dict[Target, nn.Module],
    batches: list[Batch],
    index: int,
    device: torch.device | str,
    hessian_device: torch.device | str,
    products: str,
) -> Collected:
    """Run every batch through ``layer``, the index-th, which is on ``device``.

    products: of ``Hessian``.
    """
    apart: set[Target] = set()
    while True:
        try:
            one = _Pass(linears, hessian_device, products, apart)
            return one.run(layer, batches, index, device)
        except _ReadsAnother as error:  # a router may do so; what was summed so far is wrong
            apart.add(error.target)


class _Pass:
    """One pass over the samples."""

    def __init__(
        self, linears: dict[Target, nn.Module], device, products: str, apart: set[Target]
    ) -> None:
        self.linears, self.device, self.apart = linears, device, apart
        self.products = products
        self.leaders: dict[Target, Target] = {}  # target -> the first one that reads the same input
        self.hessians: dict[Target, Hessian] = {}
        # Of this batch: held, so that no address is used twice.
        self.inputs: dict[int, tuple[Tensor, Target]] = {}

    def run(self, layer: nn.Module, batches: list[Batch], index: int, device) -> Collected:
        handles = [
            linear.register_forward_pre_hook(self._hook(target))
            for target, linear in self.linears.items()
        ]
        finite = []
        try:
            for batch in batches:
                finite.append(finite_rows(batch.calls[index].run(layer, batch.hidden.to(device))))
                self.inputs.clear()
        finally:
            for handle in handles:
                handle.remove()
        samples = [sample for batch in batches for sample in batch.samples]
        rows = torch.cat(finite).tolist()  # the only wait for the GPU
        bad = {sample for sample, fine in zip(samples, rows, strict=True) if not fine}
        if not bad and not all(_finite(hessian) for hessian in self.hessians.values()):
            # A layer's output need not show it: something later may have swallowed it.
            bad = set(locate(layer, "", self.linears, batches, index, device))
        readings = [
            Reading([t for t in self.linears if self.leaders.get(t) is leader], hessian)
            for leader, hessian in self.hessians.items()
        ]
        if unread := [target for target in self.linears if target not in self.leaders]:
            readings.append(Reading(unread, None))
        return Collected(readings, bad)

    def _hook(self, target: Target):
        def accumulate(module, args):
            tensor = args[0]
            _, first = self.inputs.setdefault(id(tensor), (tensor, target))
            if target in self.apart:
                first = target
            leader = self.leaders.setdefault(target, first)
            if leader is not first and leader is not target:
                raise _ReadsAnother(target)
            if leader is target:
                if target not in self.hessians:
                    self.hessians[target] = _new_hessian(target.k, self.device, self.products)
                hessian = self.hessians[target]
                hessian.add(tensor.to(hessian.sum.device))

        return accumulate


def locate(
    layer: nn.Module,
    name: str,
    linears: dict[Target, nn.Module],
    batches: list[Batch],
    index: int,
    device: torch.device | str,
) -> dict[int, str]:
    """Samples after which something is NaN or infinite, and where first: a linear's input, or
    what the layer called ``name`` puts out. One sample at a time, so this is slow."""
    found: dict[int, str] = {}
    sample = -1

    def hook(target: Target):
        def check(module, args):
            if sample not in found and not torch.isfinite(args[0]).all():
                found[sample] = f"{target.name}: input"

        return check

    handles = [linear.register_forward_pre_hook(hook(t)) for t, linear in linears.items()]
    try:
        for batch in batches:
            for row, sample in enumerate(batch.samples):
                single = batch.rows([row])
                output = single.calls[index].run(layer, single.hidden.to(device))
                if sample not in found and not torch.isfinite(output).all():
                    found[sample] = f"{name}: output"
    finally:
        for handle in handles:
            handle.remove()
    return found


def finite_rows(hidden: Tensor) -> Tensor:
    """For each sample of (rows, length, width) whether all its values are finite."""
    return torch.isfinite(hidden).flatten(1).all(dim=1)


def _finite(hessian: Hessian) -> bool:
    return bool(torch.isfinite(hessian.sum.diagonal()).all())  # squares: they show everything


def _new_hessian(k: int, device, products: str) -> Hessian:
    try:
        return Hessian(k, device, products=products)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
    return Hessian(k, "cpu", products=products)
