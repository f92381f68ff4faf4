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
    roots = [source.resolve()]
    for folder in (roots[0], *roots[0].parents):
        if folder.parent.name == "snapshots":  # of the hub's cache: all its files are links
            roots.append((folder.parents[1] / "blobs").resolve())
    cached = path.resolve().parent
    cached = cached.name == "blobs" and cached.parent.name.startswith("models--")  # `--local-dir`
    if not cached and not any(path.resolve().is_relative_to(root) for root in roots):
        raise CheckpointError(
            f"{path}: a link that leads out of the checkpoint, to {path.resolve()}; put a copy of "
            "that in its place, or remove it"
        )


def fail(error: OSError) -> None:
    raise error


def copy_companions(source: Path, names: list[Path], stage: Path) -> None:
    for name in names:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / name, stage / name)
