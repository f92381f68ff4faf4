"""What `marlin info DIR` tells of a checkpoint: format, layers and sizes, from headers alone."""

from __future__ import annotations

from collections import Counter, defaultdict
from pathlib import Path

from marlin import formats
from marlin.shards import CONFIG, CheckpointError, TensorInfo, list_tensors, read_json, some
from marlin.sources import read_beside


def collect(directory: Path) -> dict:
    """The report as plain values.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one in a format that is not read.
    """
    if not directory.is_dir():
        raise CheckpointError(f"{directory}: expected the directory of a checkpoint")
    config = read_json(directory / CONFIG)
    tensors = list_tensors(directory)
    report = {
        "directory": str(directory),
        "architecture": architecture(config),
        "files": len({info.file for info in tensors.values()}),
        "bytes": sum(info.bytes for info in tensors.values()),
    }
    beside = read_beside(directory)
    if not any(map(config.get, formats.KEYS)) and not beside:
        check_not_packed(directory, tensors)
        return report | {"format": None, "packed": None, "dense": dense_report(tensors)}
    reader = formats.reader_of(config, beside)
    layers = reader.layers(tensors)
    parts = {name for layer in layers.values() for name in layer.values()}
    dense = {name: info for name, info in tensors.items() if name not in parts}
    return report | {
        "format": reader.name,
        "packed": packed_report(reader, layers, tensors),
        "dense": dense_report(dense),
    }


def check_not_packed(directory: Path, tensors: dict[str, TensorInfo]) -> None:
    """Raises CheckpointError for words of packed layers without a configuration to read them by."""
    packed = [
        name
        for name, info in tensors.items()
        if name.rpartition(".")[2] in formats.MAIN_PARTS and info.dtype == "I32"
    ]
    if packed:
        raise CheckpointError(
            f"{directory}: holds packed tensors ({some(packed)}), but no quantization_config "
            f"in {CONFIG} that says how to read them"
        )


def architecture(config: dict) -> str:
    named = config.get("architectures")
    if isinstance(named, list) and named:
        return str(named[0])
    return str(config.get("model_type", "unknown"))


def packed_report(reader: formats.Reader, layers: dict, tensors: dict[str, TensorInfo]) -> dict:
    outlines, symmetric, weights, size = {}, Counter(), 0, 0
    for layer, parts in layers.items():
        try:
            shapes = {part: tensors[name].shape for part, name in parts.items()}
            k, n, groups = reader.outline(shapes)
        except ValueError:  # not two dimensions
            k = n = groups = 0
        if not k * n * groups:
            raise CheckpointError(f"{layer}: tensors of unexpected shapes")
        outlines[layer] = k, groups
        weights += k * n
        symmetric[reader.symmetric(parts)] += 1
        size += sum(tensors[name].bytes for name in parts.values())
    scales = {tensors[parts[scale_part(reader)]].dtype for parts in layers.values()}
    sizes = Counter(formats.group_sizes(outlines).values())
    return {
        "layers": len(layers),
        "bits": 4,
        "weights": weights,
        "bytes": size,
        "bits_per_weight": round(size * 8 / weights, 3) if weights else None,
        "group_sizes": {str(size): count for size, count in sizes.most_common()},
        "scales": sorted(scales),
        "with_zero_points": None if symmetric[None] else symmetric[False],
    }


def scale_part(reader: formats.Reader) -> str:
    return next(part for part in reader.needed if part in ("s", "scales", "weight_scale"))


def dense_report(tensors: dict[str, TensorInfo]) -> dict:
    sizes = defaultdict(int)
    for info in tensors.values():
        sizes[info.dtype] += info.bytes
    return {"tensors": len(tensors), "bytes": sum(sizes.values()), "by_type": dict(sizes)}


def describe(report: dict) -> str:
    """The report as lines for people."""
    packed, dense = report["packed"], report["dense"]
    files = f"{report['files']} file" + "s" * (report["files"] > 1)
    lines = [
        ("checkpoint", report["directory"]),
        ("model", report["architecture"]),
        ("format", report["format"] or "full precision: `marlin quantize` makes it 4 bits"),
        ("size", f"{megabytes(report['bytes'])} in {files}"),
    ]
    if packed:
        groups = ", ".join(
            ("one scale per column" if size == "-1" else f"groups of {size}")
            + (f" ({count})" if len(packed["group_sizes"]) > 1 else "")
            for size, count in packed["group_sizes"].items()
        )
        lines += [
            (
                "packed",
                f"{packed['layers']} linear layers, {packed['weights'] / 1e6:.1f} M weights",
            ),
            ("", f"{megabytes(packed['bytes'])}, {packed['bits_per_weight']} bits per weight"),
            ("groups", f"{groups}; scales {', '.join(packed['scales'])}"),
            ("zero points", zero_points(packed)),
        ]
    types = ", ".join(f"{dtype} {megabytes(size)}" for dtype, size in dense["by_type"].items())
    lines.append(("dense", f"{dense['tensors']} tensors: {types}"))
    return "\n".join(f"{name:<12}{text}" for name, text in lines)


def zero_points(packed: dict) -> str:
    count = packed["with_zero_points"]
    if count is None:
        return "not said by the configuration"
    return f"{count} of {packed['layers']} layers" if count else "none (symmetric)"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB" if size < 1e9 else f"{size / 1e9:.2f} GB"
