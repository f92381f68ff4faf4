"""Which tensors a checkpoint's files hold, and where."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from marlin import shards
from marlin.shards import WEIGHTS, CheckpointError, check_index, open_shard, read_json

INDEXES = "*.safetensors.index*.json"  # a variant has its name in there
DTYPES = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "U8": torch.uint8,
}


class Header(NamedTuple):
    """A tensor in a file. `dtype` is safetensors' own name where no packed layer has such."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype | str

    def read(self) -> torch.Tensor:
        with torch.device("cpu"), open_shard(self.file) as shard:
            return shard.get_tensor(self.name)


def read_headers(files: Iterable[str | Path] | None, source: str) -> dict[str, Header]:
    """Every tensor of a checkpoint's files, by name.

    Args:
        files: as transformers found them. It joins the directory and what the index names, without
            a look at that.
        source: what it was asked for: a directory, the name of a model on the hub, or a file.

    Raises:
        CheckpointError: no safetensors files, damaged ones, ones outside of the checkpoint, a
            tensor that is in two, or an index that disagrees with the files.
    """
    paths = [Path(file) for file in files or ()]
    for path in paths:
        if path.suffix != ".safetensors":
            raise CheckpointError(f"expected safetensors files, got {path.name}")
    check_places(paths, source)
    found = shards.read_headers(paths)
    if not found:
        raise CheckpointError("expected a checkpoint in safetensors files, got none")
    folder = paths[0].parent
    loaded = {path.name for path in paths}
    for index in folder.glob(INDEXES) if loaded != {WEIGHTS} else ():  # which is taken without one
        claimed = read_json(index).get("weight_map")
        # Else it is of other files beside, or what lies there by mistake.
        if isinstance(claimed, dict) and loaded == {str(name) for name in claimed.values()}:
            check_index(folder, claimed, found)
    return {
        name: Header(folder / info.file, name, info.shape, DTYPES.get(info.dtype, info.dtype))
        for name, info in found.items()
    }


def check_places(files: list[Path], source: str) -> None:
    """Raises CheckpointError for files that are not in one folder, which is the source's.

    It goes by names: in the hub's cache, every file is a link.
    """
    for file in files:
        root = root_of(file, source)
        inside = root in (file, *file.parents) and ".." not in file.relative_to(root).parts
        if not inside or file.parent != files[0].parent:
            raise CheckpointError(f"{source}: the index has a bad file name: {file}")


def root_of(file: Path, source: str) -> Path:
    """What transformers was asked for, or the revision of it that is in the hub's cache."""
    if not Path(source).exists():
        cache = f"models--{source.replace('/', '--')}/snapshots"
        for folder in reversed(file.parents):
            if folder.parent.match(cache):
                return folder
    return Path(source)
