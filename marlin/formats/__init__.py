"""Checkpoint formats: one file each, all read into and written from `marlin.quantized.Quantized`.

    reader = formats.reader_of(read_json(directory / "config.json"))
    for layer, names in reader.layers(all_tensor_names).items():
        weight = reader.read(layer, {part: load(name) for part, name in names.items()})

`WRITERS` has for each format that is written a module with `write(layer, weight) -> parts`,
`config(layers, dense) -> quantization_config` and `notes(quantization_config)`, for people.
"""

from __future__ import annotations

from marlin.shards import CheckpointError

from . import awq, compressed_tensors, gptq, marlin
from .base import LayerSummary, Reader, group_sizes

# What readers go by and two files may say, with the other names that programs have for it.
SAID = (
    ("quant_method",),
    ("checkpoint_format", "format"),
    ("is_marlin_format",),
    ("version",),
    ("bits", "w_bit"),
    ("group_size", "q_group_size"),
    ("sym",),
    ("zero_point",),
    ("desc_act",),
    ("dynamic",),
    ("pack_dtype",),
)
KEYS = ("quantization_config", "compression_config")  # of config.json; the second is an older name
WRITERS = {module.NAME: module for module in (marlin, gptq, compressed_tensors)}
MAIN_PARTS = {
    reader.main
    for reader in (
        awq.AWQReader,
        compressed_tensors.CompressedTensorsReader,
        gptq.GPTQReader,
        marlin.MarlinReader,
    )
}
READABLE = "gptq, awq (gemm), compressed-tensors (pack-quantized) and marlin"

__all__ = [
    "KEYS",
    "MAIN_PARTS",
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
    main = next(filter(None, map(config.get, KEYS)), None)
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
    for names in SAID:
        ours, theirs = said(main, names), said(beside, names)
        if None not in (ours, theirs) and ours != theirs:
            raise CheckpointError(
                f"quantization_config: {names[0]} is {ours!r} in config.json, "
                f"{theirs!r} in the file beside it"
            )
    return main | {key: value for key, value in beside.items() if main.get(key) is None}


def said(values: dict, names: tuple[str, ...]):
    """What a configuration says under one of some names; None for nothing."""
    value = next((values[name] for name in names if values.get(name) is not None), None)
    return value.lower() if isinstance(value, str) else value  # AutoAWQ's GEMM is gemm elsewhere
