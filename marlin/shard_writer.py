"""The files of a checkpoint as they are written: safetensors shards and their index."""

from __future__ import annotations

import functools
import json
import re
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import safetensors.torch
import torch
from safetensors.torch import save_file

from marlin.shards import CONFIG, INDEX, WEIGHTS, CheckpointError, open_shard

HELD = 64 * 10**6  # bytes that wait for the disk, and bytes that wait to see how long a file gets
METADATA = {"format": "pt"}
PAGE = 4096
MOST_ROOM = 2**24  # for a header: 100,000 names; the library takes 100 MB at most


class ShardWriter:
    """Puts tensors into files of a limited size, and holds little of them however large those are.

    A file of at most HELD bytes is saved whole. A longer one is written while its tensors come,
    which the library cannot do: see `StreamedFile`. A thread writes while the next tensors are
    made; `add` waits for it when it is more than HELD bytes behind. Tensors that were added must
    stay as they are until `finish`.
    """

    def __init__(self, stage: Path, limit: int):
        self.stage, self.limit = stage, limit
        self.sizes: dict[str, int] = {}
        self.files: list[list[str]] = [[]]  # the names in each, the last of which is being filled
        self.bytes = self.header_bytes = 0  # of the last
        self.pending: dict[str, torch.Tensor] = {}  # all of the last, until it is streamed
        self.storages: set[int] = set()  # of the pending
        self.stream: StreamedFile | None = None
        self.pool = ThreadPoolExecutor(max_workers=1)
        self.queue: deque[tuple[Future, int]] = deque()  # what it has to do, and the bytes in that
        self.queued_bytes = 0

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(self, *_) -> None:
        self.pool.shutdown(wait=True, cancel_futures=True)
        if self.stream is not None:
            self.stream.file.close()

    def add(self, name: str, tensor: torch.Tensor) -> None:
        if name in self.sizes:
            raise CheckpointError(f"two tensors would be called {name}")
        tensor = tensor.cpu().contiguous()
        size = self.sizes[name] = tensor.numel() * tensor.element_size()
        entry = longest_entry(name, tensor)
        full = self.bytes + size > self.limit
        if self.stream is not None and self.header_bytes + entry > self.stream.room:
            full = True
        if self.files[-1] and full:
            self.flush()
        self.files[-1].append(name)
        self.bytes += size
        self.header_bytes += entry
        if self.stream is None:
            self.hold(name, tensor)
        else:
            self.submit(size, self.stream.append, name, tensor)

    def hold(self, name: str, tensor: torch.Tensor) -> None:
        if (storage := tensor.untyped_storage().data_ptr()) in self.storages:
            tensor = tensor.clone()  # the library refuses two views of one storage
        self.storages.add(storage)
        self.pending[name] = tensor
        if self.bytes > HELD:
            # Enough for tensors of 100 kB; if they are smaller, the file ends before its limit.
            room = max(min(self.limit // 500, MOST_ROOM), 2 * self.header_bytes)
            self.stream = StreamedFile(self.path(), room)
            for name, tensor in self.take_pending().items():
                self.submit(self.sizes[name], self.stream.append, name, tensor)

    def take_pending(self) -> dict[str, torch.Tensor]:
        pending, self.pending, self.storages = self.pending, {}, set()
        return pending

    def path(self) -> Path:
        return self.stage / f"shard-{len(self.files)}"

    def flush(self) -> None:
        """Ends the last file and begins one."""
        if self.stream is None:
            self.submit(self.bytes, save_file, self.take_pending(), self.path(), METADATA)
        else:
            self.submit(0, self.stream.close)
        self.stream = None
        self.files.append([])
        self.bytes = self.header_bytes = 0

    def submit(self, size: int, function, *arguments) -> None:
        self.queue.append((self.pool.submit(function, *arguments), size))
        self.queued_bytes += size
        while self.queued_bytes > HELD:
            self.wait_for_one()

    def wait_for_one(self) -> None:
        future, size = self.queue.popleft()
        future.result()
        self.queued_bytes -= size

    def finish(self) -> None:
        """Writes what is left, names the files as they are many, and writes their index."""
        self.flush()
        while self.queue:
            self.wait_for_one()
        files = self.files[:-1]
        count = len(files)
        weight_map = {}
        for number, names in enumerate(files, 1):
            name = WEIGHTS if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
            (self.stage / f"shard-{number}").rename(self.stage / name)
            # safetensors keeps its files to their owner; a checkpoint is like any other file.
            (self.stage / name).chmod((self.stage / CONFIG).stat().st_mode)
            weight_map |= dict.fromkeys(names, name)
        if count > 1:
            metadata = {"total_size": sum(self.sizes.values())}
            index = {"metadata": metadata, "weight_map": weight_map}
            (self.stage / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


class StreamedFile:
    """A safetensors file whose tensors are written as they come.

    The format: eight bytes with the header's length, the header (JSON), the tensors without gaps.
    `safetensors.serialize_file` wants all tensors at once, since the header comes first and its
    length is not known before. Here it is written at the end, into room that was left for it,
    and filled up with spaces, which the format allows.
    """

    def __init__(self, path: Path, room: int):
        """room: bytes that the header may take; data begins at the next page."""
        self.path = path
        self.room = -(-(8 + room) // PAGE) * PAGE - 8
        self.header = {"__metadata__": METADATA}
        self.end = 0  # of the data
        self.odd: list[tuple[str, torch.Tensor]] = []
        self.file = path.open("wb")
        self.file.seek(8 + self.room)

    def append(self, name: str, tensor: torch.Tensor) -> None:
        if tensor.numel() * tensor.element_size() % 8:
            self.odd.append((name, tensor))  # for the end: behind it others would not be aligned
        else:
            self.write(name, tensor)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        begin = self.end
        self.end += self.file.write(tensor.reshape(-1).view(torch.uint8).numpy())
        self.header[name] = {
            "dtype": type_name(tensor.dtype),
            "shape": numbers(tensor),
            "data_offsets": [begin, self.end],
        }

    def close(self) -> None:
        for name, tensor in sorted(self.odd, key=lambda odd: -odd[1].element_size()):
            self.write(name, tensor)
        header = json.dumps(self.header, separators=(",", ":")).encode()
        if len(header) > self.room:
            raise AssertionError(f"{self.path}: {len(header)} bytes of header, {self.room} of room")
        self.file.seek(0)
        self.file.write(self.room.to_bytes(8, "little") + header.ljust(self.room))
        self.file.close()
        with open_shard(self.path):  # the library checks that header and data fit
            pass


def numbers(tensor: torch.Tensor) -> list[int]:
    """Its shape in the format, which counts F4's numbers: two of them are an element in torch."""
    if tensor.dtype != torch.float4_e2m1fn_x2:
        return list(tensor.shape)
    return [*tensor.shape[:-1], 2 * tensor.shape[-1]]


def longest_entry(name: str, tensor: torch.Tensor) -> int:
    """No fewer bytes than a header needs for a tensor, wherever it comes to lie."""
    return len(json.dumps([name, *tensor.shape])) + 100


@functools.cache
def type_name(dtype: torch.dtype) -> str:
    """The library's name of a type: F16, I32... Raises what it raises for one that it lacks."""
    file = safetensors.torch.save({"x": torch.empty(0, dtype=dtype)})
    return json.loads(file[8:])["x"]["dtype"]


def write_shards(tensors: dict[str, torch.Tensor], stage: Path, max_shard_size: int | str) -> None:
    """All of a model's tensors beside its config.json. max_shard_size: bytes, or "5GB" say."""
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    with ShardWriter(stage, min(parse_size(max_shard_size), total)) as shards:
        for name, tensor in tensors.items():
            shards.add(name, tensor.detach())
        shards.finish()


def parse_size(size: int | str) -> int:
    """Bytes. Raises ValueError for what is neither a number of them nor like "5GB"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) *([KMGT]?)B?", str(size).upper())
    if not found or not (count := int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))):
        raise ValueError(f"max_shard_size: expected bytes, or a text like '5GB', got {size!r}")
    return count
