"""What the formats share: which tensors make up a layer, and what a writer has to know of all."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from marlin.quantized import Quantized
from marlin.shards import CheckpointError


class Reader:
    """A format with what the checkpoint's configuration says of it.

    The weight of a layer X is made of tensors `X.<part>`: `main`, `needed` and `optional` ones,
    which no other layer has.
    """

    name: ClassVar[str]
    main: ClassVar[str]  # the part by which a packed layer is known
    needed: ClassVar[tuple[str, ...]]
    optional: ClassVar[tuple[str, ...]]

    def layers(self, names: Iterable[str]) -> dict[str, dict[str, str]]:
        """The packed layers among a checkpoint's tensor names: for each, {part: tensor name}.

        Raises CheckpointError for a layer of which a part is missing.
        """
        own = {self.main, *self.needed, *self.optional}
        found = defaultdict(dict)
        for name in names:
            layer, _, part = name.rpartition(".")
            if part in own:
                found[layer][part] = name
        for layer, parts in found.items():
            for part in (self.main, *self.needed):
                if part not in parts:
                    raise CheckpointError(f"{layer}: missing tensor {layer}.{part}")
        if not found:
            raise CheckpointError(f"no packed layers: expected tensors *.{self.main} ({self.name})")
        return dict(found)

    def outline(self, shapes: dict[str, tuple[int, ...]]) -> tuple[int, int, int]:
        """(k, n, groups) of a layer, as far as the shapes of its parts tell.

        Only for a report: k and n may be rounded up to what the format stores.
        """
        raise NotImplementedError

    def symmetric(self, parts: Collection[str]) -> bool | None:
        """Whether a layer with these parts has zero points 8 only; None if only values tell."""
        raise NotImplementedError

    def read(self, layer: str, parts: dict[str, Tensor]) -> Quantized:
        """The weight of one layer, on the device of its tensors.

        Raises CheckpointError for tensors that do not fit each other or the configuration.
        """
        raise NotImplementedError


def check_group_size(layer: str, expected, k: int, groups: int) -> None:
    """Against what the configuration says: rows per scale, -1 for all of them, None for nothing."""
    if expected is None:
        return
    if not isinstance(expected, int) or (expected <= 0 and expected != -1):
        raise CheckpointError(
            f"{layer}: group_size: expected a positive number or -1, got {expected!r}"
        )
    if expected == -1 or k <= expected:
        expected = k
    if groups * expected != k:
        raise CheckpointError(
            f"{layer}: k={k} rows and {groups} groups of scales do not fit "
            f"group_size={expected} of the configuration"
        )


def integer(config: dict, key: str, default=None) -> int | None:
    value = config.get(key, default)
    if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
        raise CheckpointError(f"quantization_config: {key}: expected an integer, got {value!r}")
    return value


def boolean(config: dict, key: str) -> bool | None:
    value = config.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"quantization_config: {key}: expected true or false, got {value!r}")
    return value


def check_bits(bits) -> None:
    if bits != 4:
        raise CheckpointError(f"quantization_config: expected 4 bits per weight, got {bits!r}")


@dataclass(frozen=True)
class LayerSummary:
    """What a writer's configuration says of a layer."""

    k: int
    n: int
    groups: int
    zeros: bool  # has zero points other than 8
    ordered: bool  # its groups are not runs of rows

    @classmethod
    def of(cls, weight: Quantized) -> LayerSummary:
        return cls(
            *weight.codes.shape,
            len(weight.scales),
            weight.zeros is not None,
            weight.g_idx is not None,
        )


def group_sizes(shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """For layers {name: (k, groups)} the rows that share a scale; -1 for one scale per column.

    One group of all k rows is both: it counts as the size that other layers have, if it is k.
    """
    grouped = Counter(k // groups for k, groups in shapes.values() if groups > 1)
    usual = max(grouped, key=grouped.get, default=-1)
    return {
        name: -1 if groups == 1 and k != usual else k // groups
        for name, (k, groups) in shapes.items()
    }


def usual_group_size(layers: dict[str, LayerSummary]) -> tuple[int, dict[str, int]]:
    """The group size most layers have, and that of the others by name."""
    sizes = group_sizes({name: (layer.k, layer.groups) for name, layer in layers.items()})
    usual = Counter(sizes.values()).most_common(1)[0][0]
    return usual, {name: size for name, size in sizes.items() if size != usual}
