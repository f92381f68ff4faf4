"""Which layers of a model get quantized, decided and said before any work starts."""

import fnmatch
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from marlin.layer import dense_layers, dense_weight, resolve_group_size
from marlin.ops import GROUP_SIZES, TILE_ROWS

PER_COLUMN = -1


class GroupSizeError(ValueError):
    """The group size asked for does not divide some layer's k where another one would."""


@dataclass(frozen=True)
class Target:
    """One linear layer to quantize: k inputs, n outputs."""

    name: str  # dotted, from the model's root
    k: int
    n: int


@dataclass
class Plan:
    group_size: int
    blocks: list[str]  # dotted names of the decoder (or encoder) layers, in order
    targets: list[list[Target]]  # per block
    kept: dict[str, str] = field(default_factory=dict)  # full-precision weights and why

    def all_targets(self) -> list[Target]:
        return [target for block in self.targets for target in block]

    def weights(self) -> int:
        """How many weights will have 4 bits."""
        return sum(target.k * target.n for target in self.all_targets())

    def widest(self) -> int:
        """The most inputs that a layer to quantize has."""
        return max(target.k for target in self.all_targets())

    def kept_by_reason(self) -> dict[str, list[str]]:
        reasons = defaultdict(list)
        for name, reason in self.kept.items():
            reasons[reason].append(name)
        return dict(reasons)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated layers of a model, by dotted name: its heaviest list of modules with linears.

    In a model of several towers this is the largest one; the others stay full precision.
    Raises ValueError when there is no such list.
    """
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and any(True for _ in dense_layers(module))
    }
    if not lists:
        raise ValueError(
            f"model: expected a list of layers that hold linears, found none in "
            f"{type(model).__name__}"
        )
    heaviest = max(lists, key=lambda name: sum(p.numel() for p in lists[name].parameters()))
    return {f"{heaviest}.{i}": layer for i, layer in enumerate(lists[heaviest])}


def make_plan(model: nn.Module, group_size: int, skip: Iterable[str] = ()) -> Plan:
    """Sort the model's weights into those to quantize and those to keep, with the reason.

    Linear layers outside the repeated layers (output head, pooler), embeddings and matrices that
    belong to no linear layer stay full precision, as does a k that no group size divides.
    skip: shell patterns of dotted names to leave alone too.
    Raises GroupSizeError when group_size fails on a layer that another group size would take, and
    ValueError for a pattern that no module's name matches, and when nothing can be quantized.
    """
    if group_size not in (PER_COLUMN, *GROUP_SIZES):
        raise ValueError(f"group_size: expected one of -1, 32, 64, 128, got {group_size}")
    skip = tuple(skip)
    blocks = list(find_blocks(model))
    plan = Plan(group_size, blocks, [[] for _ in blocks])
    misfits: list[Target] = []
    names: dict[nn.Module, str] = {}
    for dense in dense_layers(model):
        if dense.module in names:  # hangs in several places: its first name stands for all
            continue
        names[dense.module] = dense.name
        target = Target(dense.name, *dense_weight(dense.module).shape)
        inside = (i for i, b in enumerate(blocks) if f"{dense.name}.".startswith(f"{b}."))
        block = next(inside, None)
        if block is None:
            plan.kept[target.name] = "outside the decoder layers"
        elif any(fnmatch.fnmatchcase(target.name, pattern) for pattern in skip):
            plan.kept[target.name] = "skipped on request"
        elif fits(target.k, group_size):
            plan.targets[block].append(target)
        elif any(fits(target.k, size) for size in GROUP_SIZES):
            misfits.append(target)
        elif fits(target.k, PER_COLUMN):
            plan.kept[target.name] = f"no group size divides k = {target.k}, only -1 would do"
        else:
            plan.kept[target.name] = f"k = {target.k} is not a multiple of {TILE_ROWS}"
    everything = [name for name, _ in model.named_modules(remove_duplicate=False)]
    for pattern in skip:
        if not fnmatch.filter(everything, pattern):
            raise ValueError(
                f"skip: expected a pattern that some module's name matches, got {pattern!r}"
            )
    if misfits:
        raise GroupSizeError(_misfit_message(group_size, misfits, plan.all_targets()))
    for name, module in model.named_modules():
        if module not in names and any(p.dim() > 1 for p in module.parameters(recurse=False)):
            plan.kept[name] = _why_kept(module)
    if not any(plan.targets):
        reasons = "; ".join(f"{name}: {reason}" for name, reason in plan.kept.items())
        raise ValueError(
            f"model: expected linear layers that can be quantized, found none ({reasons})"
        )
    return plan


def fits(k: int, group_size: int) -> bool:
    """Whether the format takes a layer of k inputs at this group size."""
    try:
        resolve_group_size(k, group_size)
    except ValueError:
        return False
    return True


def _why_kept(module: nn.Module) -> str:
    if isinstance(module, nn.Embedding):
        return "embedding"
    if any(parameter.dim() == 3 for parameter in module.parameters(recurse=False)):
        return "experts in one tensor, of a kind that is not known here"
    return "not a linear layer"


def _misfit_message(group_size: int, misfits: list[Target], rest: list[Target]) -> str:
    named = ", ".join(target.name for target in misfits[:3])
    more = f" and {len(misfits) - 3} more" if len(misfits) > 3 else ""
    which = "; ".join(
        f"for k = {k} " + ", ".join(str(g) for g in [*GROUP_SIZES, PER_COLUMN] if fits(k, g))
        for k in sorted({target.k for target in misfits})
    )
    common = [g for g in GROUP_SIZES if all(fits(t.k, g) for t in misfits + rest)]
    advice = max(common, default=PER_COLUMN)
    return (
        f"group size {group_size} does not divide the inputs of {named}{more}; sizes that would: "
        f"{which}. --group-size {advice} takes every layer; --skip PATTERN leaves layers in full "
        f"precision."
    )
