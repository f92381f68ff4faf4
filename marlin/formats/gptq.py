"""GPTQ, versions 1 and 2, as AutoGPTQ and GPTQModel write them.

qweight  int32 (k / 8, n)       nibble j of row i is the code of row 8 i + j
qzeros   int32 (groups, n / 8)  nibble j of word i belongs to column 8 i + j;
                                version 1 stores zero point - 1, version 2 the zero point
scales   (groups, n)
g_idx    int32 (k,)             the group of every row; not sorted: "act-order"
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor

import marlin
from marlin.ops import CODE_ZERO
from marlin.quantized import Quantized, row_groups
from marlin.shards import CheckpointError

from .base import (
    LayerSummary,
    Reader,
    boolean,
    check_bits,
    check_group_size,
    integer,
    usual_group_size,
)
from .nibbles import pack_columns, pack_rows, unpack_columns, unpack_rows
from .patterns import match
from .weight import check_scales, expect_shape, expect_words, normalized

NAME = "gptq"
VERSIONS = {"gptq": 1, "gptq_v2": 2}
# vLLM makes one layer of those that read one input, and asks `dynamic` about that one's name.
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


@dataclass(frozen=True)
class GPTQReader(Reader):
    version: int
    group_size: int | None
    sym: bool | None
    desc_act: bool | None
    dynamic: dict  # GPTQModel's exceptions: {"+:regex": {"group_size": 64}, "-:regex": {}}
    word_wise: bool  # GPTQModel takes 1 from a whole word of zero points, with borrow

    name = NAME
    main = "qweight"
    needed = ("qzeros", "scales")
    optional = ("g_idx",)

    @classmethod
    def from_config(cls, config: dict) -> GPTQReader:
        check_bits(config.get("bits"))
        kind = config.get("checkpoint_format", config.get("format", "gptq"))
        if not isinstance(kind, str) or kind not in VERSIONS:
            raise CheckpointError(
                f"quantization_config: checkpoint_format: expected {', '.join(VERSIONS)} "
                f"or marlin, got {kind!r}"
            )
        if config.get("pack_dtype", "int32") != "int32":
            raise CheckpointError("quantization_config: expected pack_dtype int32")
        dynamic = config.get("dynamic") or {}
        if not isinstance(dynamic, dict):
            raise CheckpointError(f"quantization_config: dynamic: expected {{}}, got {dynamic!r}")
        meta = config.get("meta")
        makers = meta.get("quantizer") if isinstance(meta, dict) else None
        return cls(
            version=VERSIONS[kind],
            group_size=integer(config, "group_size"),
            sym=boolean(config, "sym"),
            desc_act=boolean(config, "desc_act"),
            dynamic=dynamic,
            word_wise="gptqmodel" in str(makers).lower(),
        )

    def read(self, layer: str, parts: dict[str, Tensor]) -> Quantized:
        qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        expect_words(f"{layer}.qweight", qweight)
        expect_words(f"{layer}.qzeros", qzeros)
        k, n = qweight.shape[0] * 8, qweight.shape[1]
        if n % 8:
            raise CheckpointError(f"{layer}.qweight: expected columns in eights, got {n}")
        groups = check_scales(layer, scales, n)
        expect_shape(f"{layer}.qzeros", qzeros, (groups, n // 8))
        size = self.exception(layer).get("group_size", self.group_size)
        check_group_size(layer, size, k, groups)
        outline = normalized(layer, scales, self.zeros(qzeros), parts.get("g_idx"), k, n)
        if self.sym and outline.zeros is not None:
            raise CheckpointError(
                f"{layer}: the configuration says sym=true, but qzeros hold other zero points "
                f"than {CODE_ZERO} (as version {self.version} of the format stores them)"
            )
        if self.desc_act is False and outline.g_idx is not None:
            raise CheckpointError(
                f"{layer}: the configuration says desc_act=false, but g_idx is not in order"
            )
        return outline._replace(codes=unpack_rows(qweight))

    def outline(self, shapes):
        (rows, n), (groups, _) = shapes["qweight"], shapes["scales"]
        return rows * 8, n, groups

    def symmetric(self, parts):
        return self.sym

    def zeros(self, qzeros: Tensor) -> Tensor:
        """Zero points uint8 (groups, n)."""
        if self.version == 2:
            return unpack_columns(qzeros)
        if self.word_wise:
            return unpack_columns(qzeros + 0x11111111)
        return unpack_columns(qzeros) + 1

    def exception(self, layer: str) -> dict:
        """What `dynamic` says of a layer; the first pattern that matches counts."""
        for pattern, values in self.dynamic.items():
            where = f"quantization_config: dynamic: {pattern[:100]!r}"
            try:
                matches = match(pattern.removeprefix("+:").removeprefix("-:"), layer)
            except re.error as error:
                raise CheckpointError(f"{where}: {error}") from error
            if not matches:
                continue
            if pattern.startswith("-:"):
                raise CheckpointError(f"{layer}: packed, but excluded by dynamic {pattern!r}")
            if not isinstance(values, dict):
                raise CheckpointError(f"{where}: expected {{}}, got {values!r}")
            check_bits(values.get("bits", 4))
            return values
        return {}


def write(layer: str, weight: Quantized) -> dict[str, Tensor]:
    """The tensors of a layer by part, version 1. Raises CheckpointError for what it cannot hold."""
    (k, n), groups = weight.codes.shape, len(weight.scales)
    if k % 8 or n % 8 or k % groups:
        raise CheckpointError(
            f"{layer}: GPTQ holds k and n that are multiples of 8 and k of the groups, "
            f"got k={k}, n={n}, {groups} groups"
        )
    zeros = weight.zeros
    if zeros is None:
        zeros = torch.full((groups, n), CODE_ZERO, dtype=torch.uint8, device=weight.codes.device)
    elif not bool(((zeros >= 1) & (zeros <= 15)).all()):
        # Stored as 15, both 0 and 16: some programs read one, some the other.
        raise CheckpointError(
            f"{layer}: GPTQ has no zero point 0 or 16 that every reader understands; "
            "compressed-tensors holds 0"
        )
    g_idx = weight.g_idx
    if g_idx is None:
        g_idx = row_groups(k, groups, weight.codes.device)
    return {
        "qweight": pack_rows(weight.codes),
        "qzeros": pack_columns(zeros - 1),
        "scales": weight.scales,
        "g_idx": g_idx.to(torch.int32),
    }


def config(layers: dict[str, LayerSummary], dense: list[str]) -> dict:
    """The `quantization_config`, which also is all of quantize_config.json.

    dense: names of matrices that are not packed.
    """
    usual, others = usual_group_size(layers)
    # Readers go by the decoder's layers: embeddings and heads need no mention.
    dynamic = {f"-:^{re.escape(name)}$": {} for name in dense if re.search(r"\.\d+\.", name)}
    others |= fused(others)
    dynamic |= {f"+:^{re.escape(name)}$": {"group_size": size} for name, size in others.items()}
    values = {
        "quant_method": "gptq",
        "checkpoint_format": "gptq",
        "bits": 4,
        "group_size": usual,
        "desc_act": any(layer.ordered for layer in layers.values()),
        "sym": not any(layer.zeros for layer in layers.values()),
        "lm_head": any(name.rpartition(".")[2] == "lm_head" for name in layers),
        "pack_dtype": "int32",
        "meta": {"quantizer": [f"marlin:{marlin.__version__}"]},
    }
    return values | {"dynamic": dynamic} if dynamic else values


def notes(config: dict) -> list[str]:
    """What programs that read the format are known to make of a checkpoint with this
    configuration, as far as it is not what one expects."""
    found = []
    if not config["sym"]:
        found.append(
            "it has zero points: vLLM and GPTQModel refuse those of a GPTQ checkpoint (GPTQModel "
            "takes its own); --format compressed-tensors has them for vLLM, but no act-order"
        )
    if "dynamic" in config:
        found.append(
            "some layers are not packed or have a group size of their own: transformers does not "
            "read that of GPTQ, and gives such layers made-up weights; vLLM and GPTQModel read it"
        )
    return found


def fused(sizes: dict[str, int]) -> dict[str, int]:
    """The layers that vLLM makes of those named, where all that go into one have one size."""
    found = {}
    for parent in dict.fromkeys(name.rpartition(".")[0] for name in sizes):
        for one, members in FUSED.items():
            values = {sizes.get(f"{parent}.{member}") for member in members}
            if len(values) == 1 and None not in values:
                found[f"{parent}.{one}"] = values.pop()
    return found
