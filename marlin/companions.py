"""What a conversion copies beside weights and configuration: tokenizer, licence and the like."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from marlin.shards import BESIDE, CONFIG, PICKLES, CheckpointError

# Not copied: what the new checkpoint has of its own, and weights in formats that are not read.
WEIGHTS = ("*.safetensors", "*.index.json", *PICKLES, "*.gguf", "*.onnx*", "*.h5", "*.msgpack")
LEFT_OUT = (CONFIG, *BESIDE, *WEIGHTS, ".*")


def companions(source: Path) -> list[Path]:
    """The files to copy, from source on.

    Raises CheckpointError for what is no plain file, and for links that lead out of the source:
    a download must not get at what else is on this machine.
    """
    left_out = shutil.ignore_patterns(*LEFT_OUT)
    found = []
    for folder, folders, files in os.walk(source, onerror=fail):
        ignored = left_out(folder, folders + files)
        folders[:] = sorted(set(folders) - ignored)
        paths = [Path(folder, name) for name in sorted(set(files) - ignored)]
        for path in paths + [Path(folder, name) for name in folders]:
            check(path, source)
        found += [path.relative_to(source) for path in paths]
    return found


def check(path: Path, source: Path) -> None:
    """Of what a conversion reads too: that ends in the new checkpoint. Loading copies nothing, and
    follows every link."""
    if not path.is_symlink():
        if not (path.is_file() or path.is_dir()):
            raise CheckpointError(f"{path}: expected a file or a folder")
        return
    if not path.is_file():
        raise CheckpointError(f"{path}: expected a file, got a link that leads to none")
    target = path.resolve()
    # Of the hub's cache, snapshots are all links to blobs, and older copies have some.
    in_cache = any(
        folder.name == "blobs" and folder.parent.name.startswith("models--")
        for folder in target.parents
    )
    if not in_cache and not target.is_relative_to(source.resolve()):
        raise CheckpointError(
            f"{path}: a link that leads out of the checkpoint, to {target}; put a copy of that in "
            "its place, or remove it"
        )


def fail(error: OSError) -> None:
    raise error


def copy_companions(source: Path, names: list[Path], stage: Path) -> None:
    for name in names:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, stage / name)
