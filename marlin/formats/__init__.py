"""Checkpoint formats: one file each, all read into and written from `marlin.quantized.Quantized`.

    reader = formats.reader_of(read_json(directory / "config.json"))
    for layer, names in reader.layers(all_tensor_names).items():
        weight = reader.read(layer, {part: load(name) for part, name in names.items()})

`WRITERS` has for each format that is written a module with `write(layer, weight) -> parts` and
`config(layers, dense) -> quantization_config`.
"""

from __future__ import annotations

from marlin.shards import CheckpointError

from . import awq, compressed_tensors, gptq, marlin
from .base import LayerSummary, Reader, group_sizes

WRITERS = {module.NAME: module for module in (marlin, gptq, compressed_tensors)}
READABLE = "gptq, awq (gemm), compressed-tensors (pack-quantized) and marlin"

__all__ = [
    "READABLE",
    "WRITERS",
    "CheckpointError",
    "LayerSummary",
    "Reader",
    "group_sizes",
    "reader_of",
]


def reader_of(config: dict, beside: dict | None = None) -> Reader:
    """The reader for a checkpoint.

    Args:
        config: of the model (config.json).
        beside: quantize_config.json, which AutoGPTQ and GPTQModel put beside it, or AutoAWQ's
            quant_config.json. It fills in what config leaves out.

    Raises:
        CheckpointError: no quantization, one that is not read, or two that disagree.
    """
    main = config.get("quantization_config") or config.get("compression_config")  # older name
    values = merged(main, beside)
    if not values:
        raise CheckpointError("config.json has no quantization_config: the model is not quantized")
    method = str(values.get("quant_method", "gptq" if beside else None)).lower()
    legacy = values.get("is_marlin_format") is True
    if method == "marlin" and not legacy:
        return marlin.MarlinReader.from_config(values)
    if method in ("gptq", "marlin") and (legacy or values.get("checkpoint_format") == "marlin"):
        return marlin.AutoGPTQMarlinReader.from_config(values)
    if method == "gptq":
        return gptq.GPTQReader.from_config(values)
    if method == "awq" or (beside and "w_bit" in values):
        is_marlin = awq.version_of(values) == "marlin"
        kind = marlin.AutoAWQMarlinReader if is_marlin else awq.AWQReader
        return kind.from_config(values)
    if method == "compressed-tensors":
        return compressed_tensors.CompressedTensorsReader.from_config(values)
    raise CheckpointError(
        f"quantization_config: expected a quant_method of {READABLE}, got {method!r}"
    )


def merged(main, beside) -> dict:
    """Both configurations in one; what they both say has to be the same."""
    for values in (main, beside):
        if values is not None and not isinstance(values, dict):
            raise CheckpointError(f"quantization_config: expected an object, got {values!r}")
    main, beside = main or {}, beside or {}
    for key in ("bits", "group_size", "checkpoint_format", "quant_method"):
        if key in main and key in beside and main[key] != beside[key]:
            raise CheckpointError(
                f"quantization_config: {key} is {main[key]!r} in config.json, "
                f"{beside[key]!r} in the file beside it"
            )
    return {**beside, **main}
