"""AWQ as AutoAWQ's "gemm" version has it.

qweight  int32 (k, n / 8)       nibble j of word i is the code of column 8 i + ORDER[j]
qzeros   int32 (groups, n / 8)  zero points, in the same order
scales   (groups, n)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from marlin.quantized import Quantized
from marlin.shards import CheckpointError

from .base import Reader, check_bits, check_group_size, integer
from .nibbles import unpack_columns
from .weight import check_scales, expect_shape, expect_words, normalized

NAME = "awq"
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def version_of(config: dict) -> str:
    """AutoAWQ calls it version, GPTQModel format; "" where neither is said."""
    keys = ("version", "checkpoint_format", "format")
    return str(next((config[key] for key in keys if config.get(key)), "")).lower()


@dataclass(frozen=True)
class AWQReader(Reader):
    group_size: int | None

    name = NAME
    main = "qweight"
    needed = ("qzeros", "scales")
    optional = ()

    @classmethod
    def from_config(cls, config: dict) -> AWQReader:
        check_bits(config.get("bits", config.get("w_bit")))
        version = version_of(config) or "gemm"
        if version != "gemm":
            raise CheckpointError(
                f"quantization_config: AWQ version: expected gemm or marlin, got {version!r}"
            )
        if config.get("zero_point", True) is not True:
            raise CheckpointError("quantization_config: AWQ gemm: expected zero_point=true")
        key = "group_size" if "group_size" in config else "q_group_size"
        return cls(integer(config, key))

    def outline(self, shapes):
        (k, words), (groups, _) = shapes["qweight"], shapes["scales"]
        return k, words * 8, groups

    def symmetric(self, parts):
        return False

    def read(self, layer: str, parts: dict[str, Tensor]) -> Quantized:
        qweight, qzeros, scales = parts["qweight"], parts["qzeros"], parts["scales"]
        expect_words(f"{layer}.qweight", qweight)
        expect_words(f"{layer}.qzeros", qzeros)
        k, n = qweight.shape[0], qweight.shape[1] * 8
        groups = check_scales(layer, scales, n)
        expect_shape(f"{layer}.qzeros", qzeros, (groups, n // 8))
        check_group_size(layer, self.group_size, k, groups)
        outline = normalized(layer, scales, unpack_columns(qzeros, ORDER), None, k, n)
        return outline._replace(codes=unpack_columns(qweight, ORDER))
