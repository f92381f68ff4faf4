"""Where packed layers come from: a checkpoint directory, or what the published script saved."""

from __future__ import annotations

import contextlib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from marlin import formats
from marlin.formats.marlin import StateDictReader
from marlin.quantized import Quantized
from marlin.shards import (
    BESIDE,
    CONFIG,
    INDEX,
    CheckpointError,
    TensorInfo,
    list_tensors,
    open_shard,
    read_json,
)

DTYPES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}


class Source:
    """A checkpoint that is being read: its configuration, tensors, and packed layers."""

    def __init__(self, directory: Path, config: dict, reader: formats.Reader, tensors: dict):
        self.directory = directory  # of config.json, and of the tokenizer
        self.config = config
        self.reader = reader
        self.tensors: dict[str, TensorInfo] = tensors
        self.layers = reader.layers(tensors)
        parts = {name for parts in self.layers.values() for name in parts.values()}
        self.dense = [name for name in tensors if name not in parts]

    def tensor(self, name: str) -> Tensor:
        raise NotImplementedError

    def parts(self, layer: str) -> dict[str, Tensor]:
        """The tensors of a packed layer, for `read`."""
        return {part: self.tensor(name) for part, name in self.layers[layer].items()}

    def read(self, layer: str, parts: dict[str, Tensor]) -> Quantized:
        """A packed layer, checked. Raises CheckpointError."""
        weight = self.reader.read(layer, parts)
        self.check_bias(layer, weight.codes.shape[1])
        return weight

    def check_bias(self, layer: str, n: int) -> None:
        bias = self.tensors.get(f"{layer}.bias")
        if bias is not None and (bias.shape != (n,) or bias.dtype not in DTYPES.values()):
            raise CheckpointError(
                f"{layer}.bias: expected ({n},), floating point, got {bias.shape}, {bias.dtype}"
            )

    def files(self) -> list[Path]:
        """What is read of its directory."""
        return [self.directory / CONFIG]

    def release(self, file: str) -> None:
        """Nothing more is asked of this file (it may be opened again)."""


class DirectorySource(Source):
    """A directory with config.json and safetensors."""

    def __init__(self, directory: Path, device: torch.device | str = "cpu"):
        config = read_json(directory / CONFIG)
        reader = formats.reader_of(config, read_beside(directory))
        super().__init__(directory, config, reader, list_tensors(directory))
        self.device = str(device)
        self.shards = {}  # file -> (its context, the open file)

    def tensor(self, name: str) -> Tensor:
        file = self.tensors[name].file
        if file not in self.shards:
            context = contextlib.ExitStack()
            path = self.directory / file
            self.shards[file] = context, context.enter_context(open_shard(path, self.device))
        try:
            return self.shards[file][1].get_tensor(name)
        except SafetensorError as error:  # a type that torch lacks, say
            raise CheckpointError(f"{self.directory / file}: {name}: {error}") from error

    def files(self) -> list[Path]:
        shards = {info.file for info in self.tensors.values()}
        paths = (self.directory / name for name in (CONFIG, INDEX, *BESIDE, *sorted(shards)))
        return [path for path in paths if path.is_file()]

    def release(self, file: str) -> None:
        if file in self.shards:
            self.shards.pop(file)[0].close()


class StateDictSource(Source):
    """What the published GPTQ script saved with torch.save: `*.B`, `*.s`, and what stayed dense.

    The only pickle that is ever read, without running any of its code, and only if it holds such
    layers.
    """

    def __init__(self, path: Path, config: Path | None, device: torch.device | str = "cpu"):
        directory = path.parent if config is None else config
        if directory.is_file():
            directory = directory.parent
        if not (directory / CONFIG).is_file():
            raise CheckpointError(
                f"{path}: needs the model's config.json: beside it, or named by --config"
            )
        self.state = load_state_dict(path)
        tensors = {
            name: TensorInfo(
                path.name,
                DTYPES.get(tensor.dtype, str(tensor.dtype)),
                tuple(tensor.shape),
                tensor.numel() * tensor.element_size(),
            )
            for name, tensor in self.state.items()
        }
        values = read_json(directory / CONFIG)
        values.pop("quantization_config", None)
        super().__init__(directory, values, StateDictReader(), tensors)
        self.device = device

    def tensor(self, name: str) -> Tensor:
        return self.state[name].to(self.device)


def load_state_dict(path: Path) -> dict[str, Tensor]:
    if not zipfile.is_zipfile(path):
        raise CheckpointError(f"{path}: expected a directory, or what torch.save wrote")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # whatever a damaged or a hostile pickle makes of it
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path}: not a plain state dict: {reason}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: expected a state dict, got {type(state).__name__}")
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or not is_plain(tensor):
            raise CheckpointError(f"{path}: {name!r}: expected names of plain tensors")
    if not any(name.endswith(".B") for name in state):
        raise CheckpointError(
            f"{path}: a pickle without Marlin layers (*.B): pickles are not read, safetensors are"
        )
    return {name: tensor.detach() for name, tensor in state.items()}


def is_plain(tensor: Tensor) -> bool:
    """Neither sparse nor expanded: no more values than there are bytes for."""
    if tensor.layout is not torch.strided or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def read_beside(directory: Path) -> dict | None:
    for name in BESIDE:
        if (directory / name).is_file():
            return read_json(directory / name)
    return None


@contextlib.contextmanager
def open_source(
    path: Path, config: Path | None = None, device: torch.device | str = "cpu"
) -> Iterator[Source]:
    """Opens a checkpoint directory, or a file that torch.save wrote. Raises CheckpointError.

    config: for a file, where the model's config.json is, if not beside it.
    """
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.is_file():
        if path.suffix == ".safetensors":
            raise CheckpointError(f"{path}: expected its directory, which has config.json too")
        source = StateDictSource(path, config, device)
    elif config is not None:
        raise CheckpointError(f"--config is for a single file; {path} has a config.json of its own")
    else:
        source = DirectorySource(path, device)
    try:
        yield source
    finally:
        for file in {info.file for info in source.tensors.values()}:
            source.release(file)
