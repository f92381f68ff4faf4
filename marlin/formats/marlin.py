"""Marlin's own format, and two dialects of it that others wrote.

  native             B, s, zeros, perm: the buffers of `MarlinLinear`
  AutoGPTQ           B, s               checkpoint_format "marlin", or is_marlin_format
  AutoAWQ            qweight, scales    version "marlin": B and s under other names
The columns of a native layer are padded to a multiple of 64; `out_features` of the configuration
has the number of those that are not whole.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from marlin import ops
from marlin.layer import MarlinLinear, padded
from marlin.quantized import Quantized, row_groups
from marlin.shards import CheckpointError

from .base import LayerSummary, Reader, check_bits, check_group_size, integer, usual_group_size
from .weight import check_scales, expect_shape, expect_words, narrowed, normalized

NAME = "marlin"
FORMAT_VERSION = 1


class WordsReader(Reader):
    """Words and scales in Marlin's order, without zero points."""

    group_size: int | None

    def read(self, layer: str, parts: dict[str, Tensor]) -> Quantized:
        words, s = parts[self.main], parts[self.needed[0]]
        k, n = self.shape(layer, words)
        groups = check_scales(layer, s, n)
        check_group_size(layer, self.size_of(layer), k, groups)
        return normalized(layer, ops.unpack_scales(narrowed(layer, s)), None, None, k, n)._replace(
            codes=ops.unpack(words)
        )

    def outline(self, shapes):
        (rows, columns), (groups, _) = shapes[self.main], shapes[self.needed[0]]
        return rows * ops.TILE_ROWS, columns // 2, groups

    def symmetric(self, parts):
        return "zeros" not in parts

    def size_of(self, layer: str) -> int | None:
        return self.group_size

    def shape(self, layer: str, words: Tensor) -> tuple[int, int]:
        """(k, n) as stored."""
        expect_words(f"{layer}.{self.main}", words)
        k, n = words.shape[0] * ops.TILE_ROWS, words.shape[1] // 2
        if words.shape[1] % (2 * ops.TILE_COLUMNS):
            raise CheckpointError(
                f"{layer}.{self.main}: expected a multiple of {2 * ops.TILE_COLUMNS} columns, "
                f"got {words.shape[1]}"
            )
        return k, n


@dataclass(frozen=True)
class AutoGPTQMarlinReader(WordsReader):
    group_size: int | None

    name = "marlin, of AutoGPTQ"
    main = "B"
    needed = ("s",)
    optional = ()

    @classmethod
    def from_config(cls, config: dict) -> AutoGPTQMarlinReader:
        check_bits(config.get("bits"))
        if config.get("sym") is False:
            raise CheckpointError("quantization_config: AutoGPTQ's marlin format is symmetric only")
        if config.get("desc_act"):
            raise CheckpointError("quantization_config: AutoGPTQ's marlin format has no desc_act")
        return cls(integer(config, "group_size"))


@dataclass(frozen=True)
class AutoAWQMarlinReader(WordsReader):
    group_size: int | None

    name = "marlin, of AutoAWQ"
    main = "qweight"
    needed = ("scales",)
    optional = ()

    @classmethod
    def from_config(cls, config: dict) -> AutoAWQMarlinReader:
        check_bits(config.get("bits", config.get("w_bit")))
        if config.get("zero_point"):
            raise CheckpointError("quantization_config: AutoAWQ's marlin version is symmetric only")
        key = "group_size" if "group_size" in config else "q_group_size"
        return cls(integer(config, key))


@dataclass(frozen=True)
class StateDictReader(WordsReader):
    """A state dict of the published package's layers: nothing but the tensors says anything."""

    group_size: int | None = None

    name = "marlin, a state dict"
    main = "B"
    needed = ("s",)
    optional = ()


@dataclass(frozen=True)
class MarlinReader(WordsReader):
    group_size: int
    group_size_overrides: dict[str, int]
    out_features: dict[str, int] | None  # None: written before there was this key
    zeros: bool  # layers have them, those of `without_zeros` aside
    perm: bool
    without_zeros: frozenset[str]
    without_perm: frozenset[str]

    name = NAME
    main = "B"
    needed = ("s",)
    optional = ("zeros", "perm")

    @classmethod
    def from_config(cls, config: dict) -> MarlinReader:
        check_bits(config.get("bits"))
        if config.get("format_version") != FORMAT_VERSION:
            raise CheckpointError(
                f"quantization_config: expected format_version={FORMAT_VERSION}, "
                f"got {config.get('format_version')!r}"
            )

        def value(key, kind, default):
            if not isinstance(found := config.get(key, default), kind):
                raise CheckpointError(f"quantization_config: {key}: expected {kind}, got {found!r}")
            return found

        return cls(
            group_size=value("group_size", int, None),
            group_size_overrides=value("group_size_overrides", dict, {}),
            out_features=value("out_features", dict | None, None),
            zeros=not value("sym", bool, None),
            perm=value("desc_act", bool, False),
            without_zeros=frozenset(map(str, value("modules_without_zeros", list, []))),
            without_perm=frozenset(map(str, value("modules_without_perm", list, []))),
        )

    def size_of(self, layer: str) -> int:
        return self.group_size_overrides.get(layer, self.group_size)

    def read(self, layer: str, parts: dict[str, Tensor]) -> Quantized:
        words, s = parts["B"], parts["s"]
        k, n = self.shape(layer, words)
        groups = check_scales(layer, s, n)
        check_group_size(layer, self.size_of(layer), k, groups)
        zeros, order = (self.part(layer, name, parts) for name in ("zeros", "perm"))
        g_idx = None
        if zeros is not None:
            expect_shape(f"{layer}.zeros", zeros, (groups, n))
            if zeros.dtype is not torch.uint8 or bool((zeros > 16).any()):
                raise CheckpointError(f"{layer}.zeros: expected uint8 values of 0 to 16")
            zeros = ops.unpack_scales(zeros)
        if order is not None:
            check_permutation(layer, order, k)
            g_idx = torch.empty_like(order)
            g_idx[order.long()] = row_groups(k, groups, order.device).to(order.dtype)
        width = self.width(layer, n)
        scales = ops.unpack_scales(narrowed(layer, s))[:, :width].contiguous()
        zeros = None if zeros is None else zeros[:, :width].contiguous()
        outline = normalized(layer, scales, zeros, g_idx, k, width)
        codes = ops.unpack(words)[:, :width].contiguous()
        if self.out_features is None and looks_padded(codes, scales):
            raise CheckpointError(
                f"{layer}: some columns may be padding, and the configuration has no out_features "
                "to tell: load the model and save it again"
            )
        if order is not None:
            codes = codes.index_select(0, order.long().argsort())
        return outline._replace(codes=codes)

    def part(self, layer: str, part: str, parts: dict[str, Tensor]) -> Tensor | None:
        """Words whose zeros got lost would still look like a layer, so the configuration tells."""
        claimed = getattr(self, part) and layer not in getattr(self, f"without_{part}")
        if claimed != (part in parts):
            problem = "missing" if claimed else "unexpected"
            raise CheckpointError(f"{layer}: {problem} tensor {layer}.{part}, by the configuration")
        return parts.get(part)

    def width(self, layer: str, stored: int) -> int:
        """The layer's number of columns, of the stored ones."""
        width = (self.out_features or {}).get(layer, stored)
        if not isinstance(width, int) or width <= 0 or padded(width) != stored:
            raise CheckpointError(
                f"{layer}: out_features={width!r} in the configuration do not make "
                f"{stored} stored columns"
            )
        return width


def looks_padded(codes: Tensor, scales: Tensor) -> bool:
    """Whether the last column is one that `MarlinLinear` adds."""
    return bool((codes[:, -1] == ops.CODE_ZERO).all() and (scales[:, -1] == 0).all())


def check_permutation(layer: str, perm: Tensor, k: int) -> None:
    expect_shape(f"{layer}.perm", perm, (k,))
    in_order = torch.arange(k, dtype=torch.int32, device=perm.device)
    if perm.dtype is not torch.int32 or not torch.equal(perm.sort().values, in_order):
        raise CheckpointError(f"{layer}.perm: expected each of 0 to {k - 1} once, int32")


def write(layer: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of a layer by part. Raises CheckpointError for what the format cannot hold."""
    try:
        packed = MarlinLinear.from_quantized(
            weight.codes, weight.scales, None, weight.zeros, weight.g_idx
        )
    except ValueError as error:
        raise CheckpointError(f"{layer}: Marlin's format cannot hold it: {error}") from error
    return dict(packed.state_dict())


def config(layers: dict[str, LayerSummary], dense: list[str]) -> dict:
    """The `quantization_config`. dense: names of layers that are not packed."""
    usual, others = usual_group_size(layers)
    zeros = {name for name, layer in layers.items() if layer.zeros}
    perm = {name for name, layer in layers.items() if layer.ordered}
    values = {
        "quant_method": NAME,
        "bits": 4,
        "group_size": usual,
        "sym": not zeros,
        "modules_to_not_convert": sorted(dense),
        "format_version": FORMAT_VERSION,
    }
    if others:
        values["group_size_overrides"] = others
    if perm:
        values["desc_act"] = True
    for part, having in ("zeros", zeros), ("perm", perm):
        if 0 < len(having) < len(layers):
            values[f"modules_without_{part}"] = sorted(layers.keys() - having)
    narrow = {name: layer.n for name, layer in layers.items() if padded(layer.n) != layer.n}
    return values | {"out_features": narrow}


def notes(config: dict) -> list[str]:
    """As in gptq.py: nothing is known."""
    return []
