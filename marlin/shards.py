"""The files of a checkpoint: safetensors shards, their index, and folders written as a whole."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
REPORTS = ("gptq_report.json", "gptq_report.md")  # how `marlin quantize` made it
BESIDE = ("quantize_config.json", "quant_config.json")  # AutoGPTQ's and GPTQModel's; AutoAWQ's
TOKENIZER = {  # what a tokenizer saves: of an old one nothing may mix with a new one's
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "chat_template.jinja",
    "additional_chat_templates",  # a folder
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
}
SAVING = ".saving-"
LEFT = (SAVING, ".leaving-", ".previous-")  # folders that a save makes, a key of its own behind
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class CheckpointError(ValueError):
    """A checkpoint that cannot be what it says it is."""


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A folder to write into, whose content takes the old checkpoint's place at the end.

    It lies inside target, so that this works on mounted directories too. What a process that was
    killed left there is cleared first: see `recover`.
    """
    made = not target.exists()
    target.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as ours:
        with locked(target):
            clear(target)
            stage = Path(tempfile.mkdtemp(prefix=SAVING, dir=target))
            ours.enter_context(locked(stage))
        try:
            yield stage
            with locked(target):
                install(stage, target)
        finally:
            shutil.rmtree(stage, ignore_errors=True)
            if made and not any(target.iterdir()):
                target.rmdir()


def install(stage: Path, target: Path) -> None:
    """Moves the old checkpoint's files aside, the new ones in, then drops the old.

    config.json goes first and comes last: whoever looks in between finds no checkpoint rather
    than parts of two. Nothing is deleted before everything is in its place. The folder aside is
    called .leaving until all of the old is in it, then .previous: for `clear`.
    """
    new = {path.name for path in stage.iterdir()}
    replaced = {*new, *(TOKENIZER if new & TOKENIZER else ())}
    old = {path.name for path in target.iterdir() if path.name in replaced or belongs(path.name)}
    _, leaving, previous = folders(target, stage.name.removeprefix(SAVING))
    leaving.mkdir()
    moves = [(target / name, leaving / name) for name in sorted(old, key=CONFIG.__ne__)]
    moves.append((leaving, previous))
    moves += [(stage / name, target / name) for name in sorted(new, key=CONFIG.__eq__)]
    done = []
    try:
        for source, destination in moves:
            source.rename(destination)
            done.append((source, destination))
    except BaseException:
        for source, destination in reversed(done):
            destination.rename(source)
        leaving.rmdir()
        raise
    shutil.rmtree(previous)


def recover(target: Path) -> None:
    """Makes a folder whole again in which processes were killed while they wrote a checkpoint.

    If the new one was about to take its place, it has it then; else the old one is there.
    """
    with locked(target):
        clear(target)


def clear(target: Path) -> None:
    """`recover` for who holds the lock on target."""
    left = [path.name.split("-", 1) for path in target.iterdir() if path.name.startswith(LEFT)]
    for key in sorted({key for _, key in left}):
        stage, leaving, previous = folders(target, key)
        if not abandoned(stage):
            continue
        if not (target / CONFIG).exists():
            if leaving.is_dir():  # nothing new has come yet
                move_all(leaving, target)
            elif previous.is_dir():  # nothing old is left
                move_all(stage if (stage / CONFIG).exists() else previous, target)
        for path in (stage, previous):
            shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # if it is empty
            leaving.rmdir()


def folders(target: Path, key: str) -> list[Path]:
    """Where a save puts the new, the old while it leaves, and all of the old."""
    return [target / (prefix + key) for prefix in LEFT]


def move_all(source: Path, target: Path) -> None:
    for name in sorted((path.name for path in source.iterdir()), key=CONFIG.__eq__):
        (source / name).rename(target / name)


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Waits until no other process has a directory, and has it while this one lives; nothing of
    both on file systems without locks."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def abandoned(stage: Path) -> bool:
    """Whether a folder is not there, or nobody's who lives; False where that cannot be known."""
    try:
        handle = os.open(stage, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        return isinstance(error, FileNotFoundError)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    else:
        return True
    finally:
        os.close(handle)


def belongs(filename: str) -> bool:
    """Whether a file is part of a checkpoint, even if a new one has none of that name."""
    weights = filename.startswith("model") and filename.endswith(".safetensors")
    return weights or filename in (INDEX, "generation_config.json", *REPORTS, *BESIDE)


def read_json(path: Path) -> dict:
    """The object in a JSON file, in which no key may come twice."""
    expect_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=without_duplicates)
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(value).__name__}")
    return value


def expect_file(path: Path) -> None:
    """Opening a pipe, say, would wait for ever."""
    if not path.is_file():
        raise CheckpointError(f"{path.parent}: no {path.name}")


def without_duplicates(pairs: list[tuple[str, object]]) -> dict:
    """Of two equal keys a parser takes one or the other: readers would see different files."""
    value = dict(pairs)
    if len(value) < len(pairs):
        twice = {key for key, count in Counter(key for key, _ in pairs).items() if count > 1}
        raise ValueError(f"keys that come twice: {some(twice)}")
    return value


class TensorInfo(NamedTuple):
    """What a file's header says of a tensor."""

    file: str
    dtype: str  # safetensors' name of it: F16, BF16, I32...
    shape: tuple[int, ...]
    bytes: int


def list_tensors(directory: Path) -> dict[str, TensorInfo]:
    """Every tensor of a checkpoint, from the index and from the files themselves.

    Without an index there has to be one safetensors file, of any name.

    Raises:
        CheckpointError: files that are missing, truncated or oversized, names that come twice,
            an index that names other directories or disagrees with the files.
    """
    claimed = read_index(directory)
    if claimed is None:
        return read_headers([directory / only_shard(directory)])
    found = read_headers(directory / filename for filename in sorted(set(claimed.values())))
    check_index(directory, claimed, found)
    return found


def read_headers(files: Iterable[Path]) -> dict[str, TensorInfo]:
    """The tensors of all of some files of one directory."""
    found = {}
    for file in files:
        for name, info in read_header(file).items():
            if name in found:
                raise CheckpointError(f"{file.parent}: {name} is in two files")
            found[name] = info
    return found


def read_index(directory: Path) -> dict[str, str] | None:
    """Each tensor's file as the index has it, None if there is no index."""
    path = directory / INDEX
    if not path.is_file():
        return None
    claimed = read_json(path).get("weight_map")
    if not isinstance(claimed, dict) or not claimed:
        raise CheckpointError(f"{path}: no weight_map")
    for filename in claimed.values():
        # An index comes with the download: it may name files of this directory only.
        plain = isinstance(filename, str) and filename == Path(filename).name
        if not plain or not filename.endswith(".safetensors") or "\\" in filename:
            raise CheckpointError(f"{path}: bad file name {filename!r}")
    return claimed


def check_index(directory: Path, claimed: dict[str, str], found: dict[str, TensorInfo]) -> None:
    files = {name: info.file for name, info in found.items()}
    wrong = [name for name in claimed | files if claimed.get(name) != files.get(name)]
    if wrong:
        raise CheckpointError(f"{directory}: index and files disagree on {some(wrong)}")


def only_shard(directory: Path) -> str:
    if (directory / WEIGHTS).is_file():
        return WEIGHTS
    others = sorted(path.name for path in directory.glob("*.safetensors"))
    if len(others) == 1:
        return others[0]
    if others:
        raise CheckpointError(f"{directory}: {some(others)}, but no {INDEX} that lists them")
    pickles = [path.name for kind in PICKLES for path in directory.glob(kind)]
    refused = f"; {some(pickles)}: pickles are not read" if pickles else ""
    raise CheckpointError(f"{directory}: no {WEIGHTS}{refused}")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """The tensors of a safetensors file, which are checked to fill it exactly."""
    with open_shard(path):  # the library checks the header, for all but names that come twice
        pass
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length), object_pairs_hook=without_duplicates)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from error
    header.pop("__metadata__", None)
    return {
        name: TensorInfo(
            path.name,
            entry["dtype"],
            tuple(entry["shape"]),
            entry["data_offsets"][1] - entry["data_offsets"][0],
        )
        for name, entry in header.items()
    }


@contextlib.contextmanager
def open_shard(path: Path, device: str = "cpu") -> Iterator[safe_open]:
    expect_file(path)
    try:
        with safe_open(path, framework="pt", device=device) as shard:
            yield shard
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: {error}") from error


def some(names) -> str:
    """A few of many names, for a message."""
    names = sorted(names)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
