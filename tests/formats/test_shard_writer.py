"""Files that are written while their tensors come: what safetensors reads in them, and memory."""

import json
import subprocess
import sys

import by_definition as by
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from marlin import shard_writer
from marlin.convert import convert
from marlin.shard_writer import ShardWriter
from marlin.shards import INDEX, CheckpointError, list_tensors, read_header

BASE = torch.arange(1000, dtype=torch.float32)
TENSORS = {
    "double": torch.randn(3, 5, dtype=torch.float64),
    "odd bytes": torch.randint(0, 255, (3, 7), dtype=torch.uint8),
    "words": torch.randint(-(2**31), 2**31, (16, 48), dtype=torch.int32),
    "odd halves": torch.randn(3).half(),
    "bfloat16": torch.randn(2, 3, 4).bfloat16(),
    "flag": torch.tensor(True),
    "flags": torch.tensor([True, False] * 12),
    "odd float": torch.tensor(1.5),
    "nothing": torch.empty(0, 4),
    "long": torch.tensor([40, 3]),
    "short": torch.arange(8, dtype=torch.int16),
    "eight bits": torch.randn(4, 4).to(torch.float8_e4m3fn),
    "complex": torch.randn(3, dtype=torch.complex64),
    "part of a storage": BASE[100:300],
    "the same part": BASE[100:300],
    "columns": BASE.reshape(10, 100)[:, ::2],
    'a "name" — with \\ and ü': torch.ones(2),
    "last": torch.randn(33),
}


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "config.json").chmod(0o640)
    return tmp_path


def write(stage, tensors, limit):
    with ShardWriter(stage, limit) as shards:
        for name, tensor in tensors.items():
            shards.add(name, tensor)
        shards.finish()
    return sorted(stage.glob("*.safetensors"))


def check(files, tensors):
    """Every file is what safetensors reads, with each tensor once and where its type may lie."""
    found = {}
    for path in files:
        content = path.read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        with safe_open(path, "pt") as file:
            assert file.metadata() == {"format": "pt"}
            names = file.keys()
            assert found.keys().isdisjoint(names)
            for name in names:
                found[name] = file.get_tensor(name)
                begin = 8 + length + header[name]["data_offsets"][0]
                assert begin % found[name].element_size() == 0, name
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape, name
        same = found[name].contiguous().reshape(-1).view(torch.uint8)
        assert torch.equal(same, tensor.contiguous().reshape(-1).view(torch.uint8)), name


def was_streamed(path):
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        return (8 + length) % shard_writer.PAGE == 0 and file.read(length).endswith(b" " * 100)


@pytest.mark.parametrize("held", [0, 100, 1000, 5000, 10**6])
@pytest.mark.parametrize("limit", [300, 4000, 10**6, 10**12])
def test_files_are_what_safetensors_reads(held, limit, stage, monkeypatch):
    monkeypatch.setattr(shard_writer, "HELD", held)
    files = write(stage, TENSORS, limit)
    check(files, TENSORS)
    assert all(path.stat().st_mode & 0o777 == 0o640 for path in files)
    assert {path.name for path in files} == {i.file for i in list_tensors(stage).values()}
    for path in files:
        sizes = [info.bytes for info in read_header(path).values()]
        assert len(sizes) == 1 or sum(sizes) <= limit
        assert was_streamed(path) == (sum(sizes) > held)
    assert (stage / INDEX).exists() == (len(files) > 1)
    assert not list(stage.glob("shard-*"))


def test_a_file_ends_when_its_header_is_full(stage, monkeypatch):
    monkeypatch.setattr(shard_writer, "HELD", 0)
    tensors = {f"{'x' * 150}.{i}": torch.full((4,), i) for i in range(100)}
    tensors["y" * 10_000] = torch.ones(8)
    tensors |= {f"ü{i}": torch.full((4,), i) for i in range(50)}
    files = write(stage, tensors, 10**5)
    assert len(files) > 5
    check(files, tensors)


@pytest.mark.parametrize("held", [0, 10**6])
def test_two_numbers_to_a_byte(held, stage, monkeypatch):
    monkeypatch.setattr(shard_writer, "HELD", held)
    codes = torch.arange(16, dtype=torch.uint8).view(2, 8)
    (file,) = write(stage, {"x": codes.view(torch.float4_e2m1fn_x2)}, 10**6)
    info = read_header(file)["x"]
    assert (info.dtype, info.shape) == ("F4", (2, 16))
    with safe_open(file, "pt") as shard:
        assert torch.equal(shard.get_tensor("x").view(torch.uint8), codes)


def test_a_header_that_does_not_describe_the_data_is_noticed(stage, monkeypatch):
    monkeypatch.setattr(shard_writer, "HELD", 0)
    monkeypatch.setattr(shard_writer, "type_name", lambda dtype: "F64")
    with pytest.raises(CheckpointError, match="shard-1"):
        write(stage, {"x": torch.ones(4)}, 10**6)


def test_a_conversion_is_the_same_if_it_is_streamed(tmp_path, monkeypatch):
    weights = by.llama_weights()
    by.write_checkpoint(tmp_path / "source", by.gptq, weights, by.gptq_config())
    tensors = {}
    for held in (10**9, 0):
        monkeypatch.setattr(shard_writer, "HELD", held)
        convert(tmp_path / "source", tmp_path / str(held), "marlin", shard_bytes=20_000)
        files = sorted((tmp_path / str(held)).glob("*.safetensors"))
        assert len(files) > 2 and all(was_streamed(path) == (held == 0) for path in files)
        tensors[held] = {path.name: load_file(path) for path in files}
    assert tensors[0].keys() == tensors[10**9].keys()
    for name, expected in tensors[10**9].items():
        check([tmp_path / "0" / name], expected)


MEMORY = """
import sys, torch, resource
from pathlib import Path
from marlin.shard_writer import ShardWriter
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
torch.ones(10)
before = peak()
with ShardWriter(Path(sys.argv[1]), 10**9) as shards:
    for i in range(60):
        shards.add(f"x{i}", torch.full((10**6,), i))
    shards.finish()
print(peak() - before)
"""


def test_memory_does_not_grow_with_the_file(stage):
    run = [sys.executable, "-c", MEMORY, stage]
    grown = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert (stage / "model.safetensors").stat().st_size > 480 * 10**6
    assert grown < 3 * shard_writer.HELD
