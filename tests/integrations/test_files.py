"""Which files transformers may be led to, and which it has to be allowed to read."""

import json
import os
import shutil

import pytest
import torch
from tiny_models import assert_same
from transformers import AutoModelForCausalLM

import marlin
from marlin import CheckpointError, MarlinConfig
from marlin.convert import convert
from marlin.shards import INDEX

KINDS = {"marlin": {}, "gptq": {"quantization_config": MarlinConfig()}}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(params=KINDS)
def sharded(request, saved, tmp_path):
    """A checkpoint in several files, and what `from_pretrained` needs beside its name."""
    directory = tmp_path / "checkpoint"
    convert(saved("qwen2", torch.float16), directory, request.param, shard_bytes=30_000)
    assert (directory / INDEX).exists()
    return directory, KINDS[request.param]


def load(source, **arguments):
    return AutoModelForCausalLM.from_pretrained(source, **arguments)


def weight_map(directory):
    return json.loads((directory / INDEX).read_text())["weight_map"]


def write_index(directory, weight_map):
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (directory / INDEX).write_text(text)


def move(directory, prefix, files):
    """Moves files to where a name with this prefix leads, which the index then has."""
    (directory / prefix).mkdir(exist_ok=True)
    for file in files:
        shutil.copy(directory / file, os.path.join(directory, prefix + file))
        (directory / file).unlink()
    names = weight_map(directory).items()
    write_index(directory, {n: prefix + f if f in files else f for n, f in names})


def into_cache(directory, cache):
    """As the hub's client has a checkpoint "a/b": links to blobs. Returns the folder of links."""
    snapshot = cache / "models--a--b" / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.move(directory, snapshot.parents[1] / "blobs")
    for path in (snapshot.parents[1] / "blobs").iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(snapshot.name)
    return snapshot


@pytest.mark.parametrize("files", ["one", "all"])
@pytest.mark.parametrize("prefix", ["../out/", "{absolute}/"])
def test_an_index_that_leaves_the_directory(prefix, files, sharded, tmp_path):
    directory, arguments = sharded
    names = sorted(set(weight_map(directory).values()))
    names = names[:1] if files == "one" else names
    move(directory, prefix.format(absolute=tmp_path / "elsewhere"), names)
    for loader in (load, lambda source, **_: marlin.load_pretrained(source)):
        with pytest.raises(CheckpointError, match="bad file name"):
            loader(directory, **arguments)


def test_one_file_elsewhere_that_looks_like_a_checkpoints(saved, tmp_path):
    directory = tmp_path / "checkpoint"
    convert(saved("qwen2", torch.float16), directory, "marlin")
    write_index(directory, dict.fromkeys(["a"], "model.safetensors"))
    move(directory, "../out/", ["model.safetensors"])
    with pytest.raises(CheckpointError, match="bad file name"):
        load(directory)


def test_an_index_that_names_a_folder_within(sharded):
    directory, arguments = sharded
    move(directory, "sub/", sorted(set(weight_map(directory).values()))[:1])
    with pytest.raises(CheckpointError, match="bad file name"):
        load(directory, **arguments)


@pytest.mark.parametrize("change", ["another shard", "no shard"])
def test_an_index_that_disagrees_with_the_files(change, sharded):
    directory, arguments = sharded
    names = weight_map(directory)
    shards = sorted(set(names.values()))
    norm = "model.norm.weight"
    other = shards[shards.index(names.pop(norm)) - 1]
    write_index(directory, names | ({norm: other} if change == "another shard" else {}))
    with pytest.raises(CheckpointError, match=f"index and files disagree on {norm}"):
        load(directory, **arguments)


def test_the_hubs_cache(sharded, tmp_path):
    directory, arguments = sharded
    expected = load(directory, **arguments)
    snapshot = into_cache(directory, tmp_path / "cache")
    from_hub = {"cache_dir": tmp_path / "cache", **arguments}
    assert_same(load("a/b", **from_hub), expected)
    assert_same(load(snapshot, **arguments), expected)
    (tmp_path / "cache" / "out").mkdir()
    index = (snapshot / INDEX).read_text()
    (snapshot / INDEX).unlink()
    (snapshot / INDEX).write_text(index)
    move(snapshot, "../../../out/", sorted(set(weight_map(snapshot).values()))[:1])
    with pytest.raises(CheckpointError, match="bad file name"):
        load("a/b", **from_hub)


def test_a_single_file_in_the_hubs_cache(saved, tmp_path):
    convert(saved("qwen2", torch.float16), tmp_path / "checkpoint", "marlin")
    expected = load(tmp_path / "checkpoint")
    into_cache(tmp_path / "checkpoint", tmp_path / "cache")
    assert_same(load("a/b", cache_dir=tmp_path / "cache"), expected)


def test_paths_as_people_write_them(sharded, tmp_path, monkeypatch):
    directory, arguments = sharded
    expected = load(directory, **arguments)
    assert_same(load(tmp_path, subfolder=directory.name, **arguments), expected)
    monkeypatch.chdir(directory)
    for source in (".", "./", f"../{directory.name}/", f"{tmp_path}//{directory.name}"):
        assert_same(load(source, **arguments), expected)


def test_variants(saved, tmp_path):
    model = load(saved("qwen2"))
    for size in ("30KB", "1GB"):
        model.save_pretrained(tmp_path / size, variant="fp16", max_shard_size=size)
        assert_same(load(tmp_path / size, variant="fp16"), model)
    index = next((tmp_path / "30KB").glob("*index*"))
    index.write_text(index.read_text().replace('"model.norm.weight"', '"model.other.weight"'))
    with pytest.raises(CheckpointError, match="index and files disagree"):
        load(tmp_path / "30KB", variant="fp16")


@pytest.mark.parametrize("text", ['{"weight_map": {"x": "fp32/a.safetensors"}}', "{}"])
def test_indexes_of_other_files_are_let_be(sharded, text):
    directory, arguments = sharded
    (directory / "model.safetensors.index.old.json").write_text(text)
    load(directory, **arguments)
