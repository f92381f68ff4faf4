"""From one checkpoint format into another, layer by layer: `marlin convert`."""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from marlin import formats
from marlin.companions import check, companions, copy_companions
from marlin.shard_writer import ShardWriter
from marlin.shards import BESIDE, CONFIG, SAVING, CheckpointError, recover, staged
from marlin.sources import DTYPES, Source, StateDictSource, open_source

SHARD_BYTES = 10**9
EMBEDDING = re.compile(r"(.*\.)?(wte|wpe|shared|embed_in|embed_(tokens|positions)|\w*embeddings?)")
TOKENS = re.compile(r"(.*\.)?(wte|shared|embed_in|embed_tokens|(word|tok)_embeddings?)\.weight")
LAYER = re.compile(r"((?:.*?\.)?(?:layers?|blocks?|h))\.(\d+)\.")
DEPTHS = ("num_hidden_layers", "num_layers", "n_layer", "n_layers")


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    source: str  # format
    target: str
    layers: int
    bytes_read: int
    bytes_written: int
    seconds: float
    notes: list[str]  # what programs that are known to read the format make of it


def convert(
    source: Path | str,
    target: Path | str,
    format: str,
    *,
    config: Path | str | None = None,
    device: torch.device | str = "cpu",
    shard_bytes: int = SHARD_BYTES,
    overwrite: bool = False,
    progress: Callable[[list], Iterable] = iter,
) -> Report:
    """Writes a checkpoint in another format. Codes, scales and zero points stay what they are.

    Everything is written beside the target's content and renamed into place at the end: whatever
    goes wrong, the target is as it was. In memory are a few layers that are being worked on or on
    their way to the disk, however large the files; those of the source are mapped. Tokenizer and
    other files are copied.

    Args:
        source: a directory in any format that is read, or a state dict that the published GPTQ
            script saved with torch.save.
        target: a directory, new or empty.
        format: "marlin", "gptq" or "compressed-tensors".
        config: for a state dict, the directory of the model's config.json, if not beside it.
        device: where the work is done.
        shard_bytes: a file holds no more, unless one tensor alone does.
        overwrite: replace the checkpoint that target has.
        progress: wraps the list of steps (tqdm does).

    Raises:
        CheckpointError: a source that is damaged or not read, whose configuration is of another
            model, which has links that lead out of it, or which holds what format cannot.
        ValueError: a target that is not empty, a device that is none or has too little memory.
    """
    source, target = Path(source), Path(target)
    if format not in formats.WRITERS:
        known = ", ".join(formats.WRITERS)
        raise ValueError(f"format: expected one of {known}, got {format!r}")
    check_device(device)
    check_target(source, target, overwrite)
    started = time.perf_counter()
    writer = formats.WRITERS[format]
    with (
        memory_errors(device),
        open_source(source, config and Path(config), device) as opened,
        staged(target) as stage,
    ):
        for path in opened.files():
            check(path, opened.directory)
        check_model(opened)
        beside = companions(opened.directory)
        written, quantization = write_all(opened, writer, stage, shard_bytes, progress)
        copy_companions(opened.directory, beside, stage)
    return Report(
        opened.reader.name,
        format,
        len(opened.layers),
        sum(info.bytes for info in opened.tensors.values()),
        written,
        time.perf_counter() - started,
        writer.notes(quantization),
    )


@contextlib.contextmanager
def memory_errors(device: torch.device | str) -> Iterator[None]:
    """Says in terms of `convert` that a GPU's memory is not enough."""
    try:
        yield
    except torch.cuda.OutOfMemoryError as error:
        raise ValueError(
            f"device: {device} has too little memory free for the layers that are worked on at "
            "once; --device cpu does the same in the machine's own"
        ) from error


def check_device(name: torch.device | str) -> None:
    """Raises ValueError for a device that is none to work on, or not here."""
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device: expected cpu, cuda or cuda:N, got {str(name)!r}")
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        here = f"{count} CUDA devices" if count else "no CUDA device"
        raise ValueError(f"device: {name}, but torch sees {here}; `marlin info` says more")


def check_target(source: Path, target: Path, overwrite: bool) -> None:
    inner, outer = target.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or (outer.is_dir() and inner in outer.parents):
        raise ValueError(f"target: expected a directory apart from the source, got {target}")
    if target.exists() and not target.is_dir():
        raise ValueError(f"target: expected a directory, {target} is a file")
    if target.is_dir():
        recover(target)
        names = {path.name for path in target.iterdir()}
        if names and not overwrite:
            writing = all(name.startswith(SAVING) for name in names)
            raise ValueError(
                f"target: {target} is "
                + ("being written by another process" if writing else "not empty")
            )


def check_model(source: Source) -> None:
    """Raises CheckpointError if the configuration is of a larger model than the tensors.

    Goes by sizes that all decoders have, since a model that is to be built has to be known. There
    may be more layers than the configuration says, to draft tokens, and more embeddings.
    """
    text = source.config.get("text_config")  # of a model of text and images, say
    config = text if isinstance(text, dict) else source.config
    said = {key: value for key, value in config.items() if isinstance(value, int)}

    stacks = defaultdict(set)
    for found in filter(None, map(LAYER.match, source.tensors)):
        stacks[found[1]].add(found[2])
    layers = max(map(len, stacks.values()), default=None)
    depth, key = min(((said[key], key) for key in DEPTHS if key in said), default=(0, ""))
    if layers is not None and layers < depth:
        raise CheckpointError(f"config.json says {key}={depth}, the tensors are of {layers} layers")

    shapes = {name: source.tensors[name].shape for name in source.dense}
    embeddings = [s for name, s in shapes.items() if len(s) == 2 and TOKENS.fullmatch(name)]
    rows = max((shape[0] for shape in embeddings), default=None)
    if rows is not None and rows < said.get("vocab_size", 0):
        raise CheckpointError(
            f"config.json says vocab_size={said['vocab_size']}, the embeddings have {rows} rows"
        )
    # Norms have that length also where embeddings are of another.
    widths = {shape[-1] for shape in embeddings + [s for s in shapes.values() if len(s) == 1]}
    if widths and said.get("hidden_size", min(widths)) not in widths:
        raise CheckpointError(
            f"config.json says hidden_size={said['hidden_size']}, embeddings and norms have "
            f"widths of {', '.join(map(str, sorted(widths)))}"
        )


def write_all(source: Source, writer, stage: Path, shard_bytes: int, progress) -> tuple[int, dict]:
    """Every tensor and the configuration; the tensors' number of bytes, and what the configuration
    says of the quantization."""
    summaries = {}
    steps = tasks(source, writer, progress)
    # Closed, a progress bar ends before an error is printed.
    with ShardWriter(stage, shard_bytes) as shards, contextlib.closing(steps):
        for name, summary, tensors in run_ahead(steps):
            if summary is not None:
                summaries[name] = summary
            for tensor_name, tensor in tensors.items():
                shards.add(tensor_name, tensor)
        quantization = writer.config(summaries, dense_layers(source))
        values = new_config(source, quantization)
        write_json(stage / CONFIG, values)
        shards.finish()
    reader = formats.reader_of(values)
    if reader.layers(shards.sizes).keys() != source.layers.keys():
        raise CheckpointError(f"{source.directory}: tensors that {writer.NAME} would misread")
    if writer.NAME == "gptq":
        write_json(stage / BESIDE[0], quantization)
    return sum(shards.sizes.values()), quantization


def tasks(source: Source, writer, progress) -> Iterator[Callable]:
    """What is to be done, a function for each packed layer and each tensor that is copied.

    Files are opened and closed here, by one thread; the work is left to the functions.
    """
    file = None
    for step in progress(steps_by_file(source)):
        if file not in (None, step.file):
            source.release(file)
        file = step.file
        if step.packed:
            yield partial(converted, source, writer, step.name, source.parts(step.name))
        else:
            yield partial(copied, step.name, source.tensor(step.name))


def copied(name: str, tensor: Tensor):
    return name, None, {name: tensor.cpu()}


def converted(source: Source, writer, layer: str, parts: dict[str, Tensor]):
    """(layer, summary, the tensors that it is written as)."""
    weight = source.read(layer, parts)
    written = writer.write(layer, weight)
    tensors = {f"{layer}.{part}": tensor.cpu() for part, tensor in written.items()}
    return layer, formats.LayerSummary.of(weight), tensors


def run_ahead(functions: Iterable[Callable]) -> Iterator:
    """Results in order, from a few threads that are a few functions ahead.

    One thread per layer scales better than all threads on one layer after another: the operations
    are short, and on a busy machine those threads would wait for each other.
    """
    workers = min(4, len(os.sched_getaffinity(0)))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    pool, queue = ThreadPoolExecutor(workers), deque()
    try:
        for function in functions:
            queue.append(pool.submit(function))
            if len(queue) > workers:
                yield queue.popleft().result()
        while queue:
            yield queue.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


class Step(NamedTuple):
    file: str
    name: str  # of a packed layer, or of a tensor that is copied
    packed: bool


def steps_by_file(source: Source) -> list[Step]:
    """All there is to do, so that each file is needed once (but for layers split over two)."""
    main = source.reader.main
    steps = [Step(source.tensors[name].file, name, False) for name in source.dense]
    for layer, parts in source.layers.items():
        steps.append(Step(source.tensors[parts[main]].file, layer, True))
    return sorted(steps, key=lambda step: (step.file, natural(step.name)))


def natural(name: str) -> list:
    """A key that sorts layers.2 before layers.10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def dense_layers(source: Source) -> list[str]:
    """Names of the matrices that may be linear layers and are not packed.

    The output head is among them even if it is not stored: it may be tied to the embeddings.
    """
    names = {
        name.removesuffix(".weight")
        for name in source.dense
        if name.endswith(".weight")
        and len(source.tensors[name].shape) == 2
        and source.tensors[name].dtype in DTYPES.values()
    }
    heads = set() if "lm_head" in source.layers else {"lm_head"}
    return sorted(heads | {name for name in names if not EMBEDDING.fullmatch(name)})


def new_config(source: Source, quantization: dict) -> dict:
    """The model's configuration with the new format's."""
    values = dict(source.config)
    values.pop("compression_config", None)
    if isinstance(source, StateDictSource):  # of the original model, not of what was saved
        kinds = Counter(source.state[name].dtype for name in source.dense)
        kept = [dtype for dtype, _ in kinds.most_common() if dtype in DTYPES]
        if kept:
            values.pop("torch_dtype", None)
            values["dtype"] = str(kept[0]).removeprefix("torch.")
    return values | {"quantization_config": quantization}


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
