"""compressed-tensors, format "pack-quantized": what llm-compressor writes and vLLM reads.

  weight_packed      int32 (n, ceil(k / 8))       nibble j of word i is the code of row 8 i + j
  weight_scale       (n, groups)
  weight_shape       int64 (2,): n, k
  weight_zero_point  int32 (ceil(n / 8), groups)  nibble j of word i belongs to column 8 i + j
  weight_g_idx       int32 (k,)                   only in checkpoints of versions before 0.18
So the words are those of GPTQ version 2, transposed.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from marlin.quantized import Quantized
from marlin.shards import CheckpointError

from .base import LayerSummary, Reader, group_sizes
from .nibbles import pack_rows, unpack_rows
from .weight import check_scales, expect_integers, expect_shape, expect_words, normalized

NAME = "compressed-tensors"
FORMAT = "pack-quantized"


@dataclass(frozen=True)
class CompressedTensorsReader(Reader):
    schemes: frozenset[tuple[bool, int]]  # (symmetric, group size) that layers may have
    ordered: bool  # groups follow weight_g_idx

    name = NAME
    main = "weight_packed"
    needed = ("weight_scale", "weight_shape")
    optional = ("weight_zero_point", "weight_g_idx")

    @classmethod
    def from_config(cls, config: dict) -> CompressedTensorsReader:
        for key in ("sparsity_config", "transform_config", "kv_cache_scheme"):
            value = config.get(key)
            if value and not (isinstance(value, dict) and value.get("format") == "dense"):
                raise CheckpointError(f"quantization_config: {key} is not supported: {value!r}")
        groups = config.get("config_groups")
        if not isinstance(groups, dict) or not groups:
            raise CheckpointError("quantization_config: no config_groups")
        found = [scheme_of(name, group, config.get("format")) for name, group in groups.items()]
        return cls(
            frozenset((symmetric, size) for symmetric, size, _ in found),
            any(ordered for _, _, ordered in found),
        )

    def outline(self, shapes):
        (n, words), (_, groups) = shapes["weight_packed"], shapes["weight_scale"]
        return words * 8, n, groups

    def symmetric(self, parts):
        return "weight_zero_point" not in parts

    def read(self, layer: str, parts: dict[str, Tensor]) -> Quantized:
        packed, scale = parts["weight_packed"], parts["weight_scale"]
        expect_words(f"{layer}.weight_packed", packed)
        n, k = read_shape(layer, parts["weight_shape"])
        expect_shape(f"{layer}.weight_packed", packed, (n, -(-k // 8)))
        if scale.dim() != 2:
            raise CheckpointError(
                f"{layer}.weight_scale: expected a matrix, got {tuple(scale.shape)}"
            )
        scales = scale.t().contiguous()
        groups = check_scales(layer, scales, n)
        zeros = None
        if "weight_zero_point" in parts:
            words = parts["weight_zero_point"]
            expect_words(f"{layer}.weight_zero_point", words)
            expect_shape(f"{layer}.weight_zero_point", words, (-(-n // 8), groups))
            zeros = unpack_rows(words)[:n].t().contiguous()
        self.check_scheme(layer, zeros is None, k, groups)
        g_idx = parts.get("weight_g_idx")
        if g_idx is None and self.ordered:
            raise CheckpointError(f"{layer}: missing tensor {layer}.weight_g_idx (actorder)")
        if g_idx is not None and bool((g_idx == -1).all()):
            g_idx = None  # llm-compressor's way to say that there is none
        outline = normalized(layer, scales, zeros, g_idx, k, n)
        return outline._replace(codes=unpack_rows(packed.t().contiguous())[:k])

    def check_scheme(self, layer: str, symmetric: bool, k: int, groups: int) -> None:
        sizes = {size for is_symmetric, size in self.schemes if is_symmetric == symmetric}
        if not any(groups * (k if size == -1 else size) == k for size in sizes):
            kind = "symmetric" if symmetric else "with zero points"
            raise CheckpointError(
                f"{layer}: {groups} groups of k={k} rows, {kind}, are none of the "
                f"config_groups, which have (symmetric, group_size) of {sorted(self.schemes)}"
            )


def scheme_of(name: str, group, usual_format) -> tuple[bool, int, bool]:
    """Of an entry of config_groups: symmetric, group size or -1, and whether it has a g_idx."""
    where = f"quantization_config: config_groups: {name}"
    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"{where}: expected weights, got {weights!r}")
    for key in ("input_activations", "output_activations"):
        if group.get(key):
            raise CheckpointError(f"{where}: {key} are quantized too, which is not supported")
    kind = group.get("format") or usual_format
    if kind != FORMAT or weights.get("type", "int") != "int" or weights.get("num_bits") != 4:
        raise CheckpointError(
            f"{where}: expected format {FORMAT!r}, type 'int', num_bits 4, "
            f"got {kind!r}, {weights.get('type')!r}, {weights.get('num_bits')!r}"
        )
    size, strategy = weights.get("group_size"), weights.get("strategy")
    if strategy not in ("group", "channel"):
        raise CheckpointError(f"{where}: expected strategy group or channel, got {strategy!r}")
    if strategy == "group" and (not isinstance(size, int) or size <= 0):
        raise CheckpointError(f"{where}: expected a positive group_size, got {size!r}")
    ordered = weights.get("actorder") in (True, "group", "dynamic")
    return bool(weights.get("symmetric", True)), size if strategy == "group" else -1, ordered


def read_shape(layer: str, tensor: Tensor) -> tuple[int, int]:
    expect_shape(f"{layer}.weight_shape", tensor, (2,))
    expect_integers(f"{layer}.weight_shape", tensor)
    n, k = tensor.tolist()
    if n <= 0 or k <= 0:
        raise CheckpointError(f"{layer}.weight_shape: expected positive sizes, got {[n, k]}")
    return n, k


def write(layer: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of a layer by part. Raises CheckpointError for what the format cannot hold."""
    if weight.g_idx is not None:
        raise CheckpointError(
            f"{layer}: compressed-tensors no longer knows act-order (weight_g_idx); GPTQ does"
        )
    parts = {
        "weight_packed": pack_rows(in_eights(weight.codes)).t().contiguous(),
        "weight_scale": weight.scales.t().contiguous(),
        "weight_shape": torch.tensor(weight.codes.t().shape),
    }
    if weight.zeros is not None:
        if bool((weight.zeros > 15).any()):
            raise CheckpointError(f"{layer}: compressed-tensors has no zero point 16")
        rows = in_eights(weight.zeros.t().contiguous())
        parts["weight_zero_point"] = pack_rows(rows)
    return parts


def in_eights(values: Tensor) -> Tensor:
    """With rows of zeros up to a multiple of 8."""
    return F.pad(values, (0, 0, 0, -len(values) % 8))


def config(layers: dict[str, LayerSummary], dense: list[str]) -> dict:
    """The `quantization_config`. dense: names of matrices that are not packed."""
    sizes = group_sizes({name: (layer.k, layer.groups) for name, layer in layers.items()})
    kinds = defaultdict(list)
    for name, layer in layers.items():
        kinds[sizes[name], not layer.zeros].append(name)
    most_common_last = sorted(kinds, key=lambda kind: len(kinds[kind]))
    groups = {}
    for kind in reversed(most_common_last):
        size, symmetric = kind
        groups[f"group_{len(groups)}"] = {
            # vLLM would take "Linear" for all that it makes one layer of, such as gate and up.
            "targets": kinds[kind] if len(kinds) > 1 else ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": symmetric,
                "group_size": None if size == -1 else size,
                "strategy": "channel" if size == -1 else "group",
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
            "format": FORMAT,
        }
    return {
        "quant_method": NAME,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": dense,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def notes(config: dict) -> list[str]:
    """As in gptq.py: nothing is known."""
    return []
