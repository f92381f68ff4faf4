"""Which tensors a checkpoint's files hold, and where."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from marlin.shards import CheckpointError, open_shard, read_header

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


def read_headers(files: Iterable[str | Path] | None) -> dict[str, Header]:
    """Every tensor of a checkpoint's files, by name.

    Raises:
        CheckpointError: no safetensors files, damaged ones, or a tensor that is in two.
    """
    headers = {}
    for file in map(Path, files or ()):
        if file.suffix != ".safetensors":
            raise CheckpointError(f"expected safetensors files, got {file.name}")
        for name, info in read_header(file).items():
            if name in headers:
                raise CheckpointError(f"{name} is in two files: {file}, {headers[name].file}")
            headers[name] = Header(file, name, info.shape, DTYPES.get(info.dtype, info.dtype))
    if not headers:
        raise CheckpointError("expected a checkpoint in safetensors files, got none")
    return headers
