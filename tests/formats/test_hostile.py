"""Damaged and hostile checkpoints: one clear error each, and nothing left behind."""

import itertools
import json
import os
import pickle
import shutil
import struct
import zipfile

import by_definition as by
import pytest
import torch
from safetensors.torch import load_file, save_file

import marlin
from marlin import contents as contents_of
from marlin.convert import convert
from marlin.shards import INDEX, CheckpointError
from marlin.sources import open_source

Q = "model.layers.0.self_attn.q_proj"
FORMATS = {
    "gptq": (by.gptq, by.gptq_config),
    "awq": (by.awq, by.awq_config),
    "compressed-tensors": (by.compressed_tensors, by.compressed_tensors_config),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """One checkpoint of each format, with zero points where there can be some."""
    directory = tmp_path_factory.mktemp("sound")
    weights = by.llama_weights(zeros=(1, 15))
    for name, (parts_of, config) in FORMATS.items():
        more = {"gptq": {"sym": False}, "compressed-tensors": {"symmetric": False}}.get(name, {})
        by.write_checkpoint(directory / name, parts_of, weights, config(**more))
    tiles = {n: by.random_weight(w.codes.shape[0], 64, 2) for n, w in weights.items()}
    tiles = {name: weight for name, weight in tiles.items() if len(weight.codes) == 64}
    by.write_checkpoint(directory / "marlin", by.marlin, tiles, by.marlin_config())
    convert(directory / "gptq", directory / "native", "marlin", shard_bytes=30_000)
    return directory


@pytest.fixture
def copy(sound, tmp_path):
    return lambda name: shutil.copytree(sound / name, tmp_path / "damaged")


def contents(directory):
    return {p.relative_to(directory): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def refuse(directory, message, *, loading=True, config=None):
    """Converting says what is wrong and leaves an existing target as it was, or none."""
    target = directory.parent / "target"
    target.mkdir()
    (target / "config.json").write_text("what was there")
    (target / "model.safetensors").write_text("before")
    before = contents(target)
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(directory, target, "marlin", overwrite=True, config=config)
    assert "\n" not in str(caught.value)
    assert contents(target) == before
    with pytest.raises(CheckpointError, match=message):
        convert(directory, directory.parent / "new", "compressed-tensors", config=config)
    assert not (directory.parent / "new").exists()
    if loading:
        with pytest.raises(CheckpointError, match=message):
            marlin.load_pretrained(directory)


def rewrite(directory, name, change):
    """Changes a tensor; None drops it, from the index too."""
    index = json.loads((directory / INDEX).read_text())
    path = directory / index["weight_map"][name]
    tensors = {key: tensor.clone() for key, tensor in load_file(path).items()}
    new = change(tensors.pop(name))
    if new is None:
        del index["weight_map"][name]
        (directory / INDEX).write_text(json.dumps(index))
    else:
        tensors[name] = new.contiguous()
    save_file(tensors, path)


def edit(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def nan(tensor):
    tensor[-1, -1] = float("nan")
    return tensor


def infinite(tensor):
    tensor[0, 0] = float("inf")
    return tensor


TENSORS = [
    ("gptq", "qweight", lambda t: t[:-1], "g_idx: expected shape|groups"),
    ("gptq", "qweight", lambda t: t[:, :-8], "scales: expected 56 columns"),
    ("gptq", "qweight", lambda t: t[:, :-1], "columns in eights, got 63"),
    ("gptq", "qweight", lambda t: t[:0], "int32 matrix"),
    ("gptq", "qweight", lambda t: t.long(), "int32 matrix, got torch.int64"),
    ("gptq", "qweight", lambda t: t.flatten(), "int32 matrix"),
    ("gptq", "qweight", lambda t: None, rf"missing tensor {Q}.qweight"),
    ("gptq", "qzeros", lambda t: None, rf"missing tensor {Q}.qzeros"),
    ("gptq", "qzeros", lambda t: t[:1], "qzeros: expected shape"),
    ("gptq", "qzeros", lambda t: t.float(), "int32 matrix"),
    ("gptq", "scales", lambda t: None, rf"missing tensor {Q}.scales"),
    ("gptq", "scales", lambda t: t[:1], "expected shape|do not fit group_size=32"),
    ("gptq", "scales", lambda t: t.repeat(2, 1), "expected shape|do not fit group_size=32"),
    ("gptq", "scales", lambda t: t[:0], "scales: expected 64 columns"),
    ("gptq", "scales", lambda t: t[0], "scales: expected 64 columns"),
    ("gptq", "scales", lambda t: t.to(torch.int16), "FP16 or BF16 scales, got torch.int16"),
    ("gptq", "scales", lambda t: t.double(), "FP16 or BF16 scales, got torch.float64"),
    ("gptq", "scales", nan, f"{Q}: scales are not finite"),
    ("gptq", "scales", infinite, f"{Q}: scales are not finite"),
    ("gptq", "g_idx", lambda t: t[:-1], r"g_idx: expected shape \(64,\), got \(63,\)"),
    ("gptq", "g_idx", lambda t: t + 1, "values of 0 to 1, got 1 to 2"),
    ("gptq", "g_idx", lambda t: t - 1, "values of 0 to 1, got -1 to 0"),
    ("gptq", "g_idx", lambda t: t.float(), "g_idx: expected integers"),
    ("gptq", "g_idx", lambda t: t.flip(0), "desc_act=false, but g_idx is not in order"),
    ("awq", "qweight", lambda t: t[:-1], "groups"),
    ("awq", "qweight", lambda t: t[:, :-1], "scales: expected 56 columns"),
    ("awq", "qzeros", lambda t: t[:, :-1], "qzeros: expected shape"),
    ("awq", "qzeros", lambda t: None, "missing tensor"),
    ("awq", "scales", nan, "not finite"),
    ("compressed-tensors", "weight_packed", lambda t: t[:-1], "weight_packed: expected shape"),
    ("compressed-tensors", "weight_packed", lambda t: t[:, :-1], "weight_packed: expected shape"),
    ("compressed-tensors", "weight_packed", lambda t: None, "missing tensor"),
    ("compressed-tensors", "weight_shape", lambda t: t * 2, "weight_packed: expected shape"),
    ("compressed-tensors", "weight_shape", lambda t: -t, "expected positive sizes"),
    ("compressed-tensors", "weight_shape", lambda t: t * 2**40, "weight_packed: expected shape"),
    ("compressed-tensors", "weight_shape", lambda t: t.repeat(2), "weight_shape: expected shape"),
    ("compressed-tensors", "weight_shape", lambda t: t.float(), "expected integers"),
    ("compressed-tensors", "weight_shape", lambda t: None, "missing tensor"),
    ("compressed-tensors", "weight_scale", lambda t: t[:, :1], "expected shape|none of the"),
    ("compressed-tensors", "weight_scale", lambda t: t.flatten(), "expected a matrix"),
    ("compressed-tensors", "weight_scale", nan, "not finite"),
    ("compressed-tensors", "weight_zero_point", lambda t: t[:-1], "zero_point: expected shape"),
    ("compressed-tensors", "weight_zero_point", lambda t: None, "symmetric, are none of the"),
    ("native", "B", lambda t: t[:-1], "expected shape|groups"),
    ("native", "B", lambda t: t[:, :-1], "expected shape|multiple of 128 columns"),
    ("native", "B", lambda t: None, f"missing tensor|no zeros in {Q}"),
    ("native", "s", lambda t: None, "missing tensor"),
    ("native", "s", nan, "not finite"),
    ("native", "zeros", lambda t: t + 17, "0 to 16"),
    ("native", "zeros", lambda t: t.int(), "uint8"),
    ("native", "zeros", lambda t: None, "missing"),
]


@pytest.mark.parametrize("kind, part, change, message", TENSORS)
def test_tensors_that_are_wrong(kind, part, change, message, copy):
    directory = copy(kind)
    rewrite(directory, f"{Q}.{part}", change)
    refuse(directory, message)


@pytest.mark.parametrize(
    "bias", [torch.ones(63), torch.ones(64, 1), torch.ones(64).int(), torch.ones(0)], ids=str
)
def test_a_bias_that_does_not_fit(bias, copy):
    directory = copy("gptq")
    index = json.loads((directory / INDEX).read_text())
    path = directory / index["weight_map"][f"{Q}.qweight"]
    save_file({**load_file(path), f"{Q}.bias": bias}, path)
    edit(directory / INDEX, lambda i: i["weight_map"].update({f"{Q}.bias": path.name}))
    refuse(directory, f"{Q}.bias: expected")


def groups_of(change):
    return lambda c: change(c["config_groups"]["group_0"]["weights"])


PATTERNS = {  # each of which takes Python hours, or for ever
    "+:(.+)+[0-9]!": r"a choice inside of a repeat, as in \(\.\+\)\+, may take very long",
    "+:(?:a|.)*!": "a choice inside",
    "+:(?:.{1,9}){1,9}!": "a choice inside",
    "+:" + "(?:.*)" * 12 + "!": "may take very long on a name of .. letters",
    "-:" + ".?" * 40 + "!": "may take very long on a name",
    "-:(?i)" + "(?:mo|MO|.)" * 40 + "!": "may take very long on a name",
    "(?:(?:){9999}){9999}": "99980001 times",
    "." * 20_000: "at most 10000 letters, got 20000",
    "(" * 5000 + ")" * 5000: "recursion|parenthes",
}
CONFIGURATIONS = [
    ("gptq", lambda c: c.clear(), "not quantized"),
    ("gptq", lambda c: c.pop("bits"), "4 bits per weight, got None"),
    ("gptq", lambda c: c.update(bits=8), "4 bits per weight, got 8"),
    ("gptq", lambda c: c.update(bits="4"), "4 bits per weight, got '4'"),
    ("gptq", lambda c: c.update(group_size=64), "do not fit group_size=64|does not fit"),
    ("gptq", lambda c: c.update(group_size=0), "positive number or -1, got 0"),
    ("gptq", lambda c: c.update(group_size=-2), "positive number or -1, got -2"),
    ("gptq", lambda c: c.update(group_size="32"), "expected an integer, got '32'"),
    ("gptq", lambda c: c.update(sym=True), "sym=true, but qzeros"),
    ("gptq", lambda c: c.update(checkpoint_format="gptq_v3"), "gptq, gptq_v2 or marlin, got 'gptq"),
    ("gptq", lambda c: c.update(checkpoint_format="marlin", sym=True), r"missing tensor|no packed"),
    ("gptq", lambda c: c.update(pack_dtype="int64"), "pack_dtype int32"),
    ("gptq", lambda c: c.update(dynamic=[1]), "dynamic: expected"),
    ("gptq", lambda c: c.update(dynamic={"+:(": {}}), "dynamic"),
    *(
        ("gptq", lambda c, p=p: c.update(dynamic={p: {}}), f"dynamic: .*{message}")
        for p, message in PATTERNS.items()
    ),
    ("gptq", lambda c: c.update(dynamic={"-:.*q_proj": {}}), "packed, but excluded by dynamic"),
    ("gptq", lambda c: c.update(dynamic={".*q_proj": {"bits": 8}}), "4 bits .* got 8"),
    ("gptq", lambda c: c.update(dynamic={".*q_proj": 3}), "expected {}, got 3"),
    (
        "gptq",
        lambda c: c.update(quant_method="bits"),
        "expected a quant_method of gptq, .*'b",
    ),
    ("gptq", lambda c: c.update(quant_method=["gptq"]), "expected a quant_method"),
    ("gptq", lambda c: c.update(quant_method="awq", version="gemv"), "gemm or marlin, got 'gemv'"),
    (
        "gptq",
        lambda c: c.update(quant_method="awq", version="gemm", zero_point=False),
        "zero_point=true",
    ),
    ("awq", lambda c: c.update(group_size=16), "do not fit group_size=16"),
    ("awq", lambda c: c.update(bits=3), "4 bits per weight, got 3"),
    ("compressed-tensors", groups_of(lambda w: w.update(num_bits=8)), "num_bits 4, got"),
    ("compressed-tensors", groups_of(lambda w: w.update(type="float")), "type 'int'"),
    ("compressed-tensors", groups_of(lambda w: w.update(strategy="tensor")), "group or channel"),
    ("compressed-tensors", groups_of(lambda w: w.update(group_size=64)), "none of the config_gr"),
    ("compressed-tensors", groups_of(lambda w: w.update(group_size=None)), "positive group_size"),
    ("compressed-tensors", groups_of(lambda w: w.update(symmetric=True)), "none of the config_gr"),
    ("compressed-tensors", groups_of(lambda w: w.update(actorder="group")), "weight_g_idx"),
    ("compressed-tensors", lambda c: c.update(format="int-quantized"), "'pack-quantized'"),
    ("compressed-tensors", lambda c: c.update(config_groups={}), "no config_groups"),
    ("compressed-tensors", lambda c: c.update(config_groups=[1]), "no config_groups"),
    ("compressed-tensors", lambda c: c.update(config_groups={"a": 1}), "expected weights"),
    (
        "compressed-tensors",
        lambda c: c.update(transform_config={"a": 1}),
        "transform_config",
    ),
    (
        "compressed-tensors",
        lambda c: c.update(kv_cache_scheme={"num_bits": 8}),
        "kv_cache_sch",
    ),
    (
        "compressed-tensors",
        lambda c: c["config_groups"]["group_0"].update(input_activations={"num_bits": 8}),
        "input_activations are quantized too",
    ),
    ("native", lambda c: c.update(format_version=2), "format_version=1, got 2"),
    ("native", lambda c: c.update(bits=8), "bits"),
    ("native", lambda c: c.update(group_size=64), "do not fit group_size=64|does not fit"),
    ("native", lambda c: c.update(sym=True), "no zeros|unexpected tensor"),
    ("native", lambda c: c.update(desc_act=True), "perm missing|missing tensor .*perm"),
]


@pytest.mark.parametrize("kind, change, message", CONFIGURATIONS)
def test_configurations_that_do_not_fit(kind, change, message, copy):
    directory = copy(kind)
    edit(directory / "config.json", lambda c: change(c["quantization_config"]))
    refuse(directory, message)


@pytest.mark.parametrize(
    "change",
    [
        {f"model.layers.0.self_attn.{p}_proj": 64 for p in "kv"},
        {"model.layers.0.self_attn.k_proj": 300},
        {"model.layers.0.self_attn.k_proj": "32"},
        {"model.layers.0.self_attn.k_proj": -1},
    ],
)
def test_widths_that_do_not_fit(change, copy):
    """Only a conversion goes by them: loading has the model to ask."""
    directory = copy("native")
    edit(
        directory / "config.json",
        lambda c: c["quantization_config"]["out_features"].update(change),
    )
    if 64 in change.values():  # as wide as what is stored: another model, but a sound one
        convert(directory, directory.parent / "wide", "marlin")
        with pytest.raises(CheckpointError, match=r"expected a weight|out_features"):
            convert(directory.parent / "wide", directory.parent / "x", "gptq")
            marlin.load_pretrained(directory.parent / "x")
        return
    refuse(directory, "out_features=.* do not make 64 stored columns", loading=False)


def test_widths_that_are_not_told(copy):
    """As in checkpoints of before: a conversion cannot know what is padding."""
    directory = copy("native")
    edit(directory / "config.json", lambda c: c["quantization_config"].pop("out_features"))
    refuse(directory, "may be padding", loading=False)
    marlin.load_pretrained(directory)


def test_two_configurations_that_disagree(copy):
    directory = copy("gptq")
    beside = by.gptq_config(64)
    (directory / "quantize_config.json").write_text(json.dumps(beside))
    refuse(directory, "group_size is 32 in config.json, 64 in the file beside it")


@pytest.mark.parametrize(
    "kind, file, beside, message",
    [
        ("gptq", "quantize_config.json", {"sym": True}, "sym is False in .*, True in"),
        ("gptq", "quantize_config.json", {"desc_act": True}, "desc_act is False in .*, True in"),
        ("gptq", "quantize_config.json", {"bits": 8}, "bits is 4 in .*, 8 in"),
        ("gptq", "quantize_config.json", {"dynamic": {"a": {}}}, "dynamic is {} in .*, {'a': {}} "),
        ("gptq", "quantize_config.json", {"format": "gptq_v2"}, "checkpoint_format is 'gptq' in"),
        ("awq", "quant_config.json", {"w_bit": 8}, "bits is 4 in config.json, 8 in"),
        ("awq", "quant_config.json", {"q_group_size": 64}, "group_size is 32 in .*, 64 in"),
        ("awq", "quant_config.json", {"zero_point": False}, "zero_point is True in .*, False in"),
        ("awq", "quant_config.json", {"version": "GEMV"}, "version is 'gemm' in .*, 'gemv' in"),
    ],
)
def test_each_thing_that_two_configurations_may_disagree_on(kind, file, beside, message, copy):
    directory = copy(kind)
    edit(directory / "config.json", lambda c: c["quantization_config"].setdefault("dynamic", {}))
    (directory / file).write_text(json.dumps(beside))
    refuse(directory, f"quantization_config: {message}")


def test_two_configurations_that_agree_in_other_words(copy):
    directory = copy("awq")
    edit(directory / "config.json", lambda c: c["quantization_config"].update(group_size=None))
    beside = {"w_bit": 4, "q_group_size": 32, "zero_point": True, "version": "GEMM"}
    (directory / "quant_config.json").write_text(json.dumps(beside | {"bits": None, "damp": 1}))
    convert(directory, directory.parent / "target", "marlin")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"num_hidden_layers": 7}, "num_hidden_layers=7, the tensors are of 2 layers"),
        ({"hidden_size": 128}, "hidden_size=128, embeddings and norms have widths of 64"),
        ({"hidden_size": 32}, "hidden_size=32, embeddings and norms have widths of 64"),
        ({"vocab_size": 97}, "vocab_size=97, the embeddings have 96 rows"),
        ({"text_config": {"hidden_size": 65}, "hidden_size": 64}, "hidden_size=65, embeddings"),
        ({"n_layer": 3, "num_hidden_layers": None}, "n_layer=3, the tensors are of 2 layers"),
    ],
)
def test_a_configuration_of_another_model(change, message, copy):
    """Only a conversion says so in these words: loading has the model to ask."""
    directory = copy("gptq")
    edit(directory / "config.json", lambda c: c.update(change))
    refuse(directory, f"config.json says {message}", loading=False)


@pytest.mark.parametrize(
    "change",
    [
        {"num_hidden_layers": 1},  # and one to draft tokens
        {"num_hidden_layers": 4, "num_layers": 2},  # each holds two
        {"vocab_size": 90},  # filled up
        {"hidden_size": "large", "vocab_size": None, "num_hidden_layers": [2], "text_config": 1},
        {"text_config": {"vocab_size": 96}, "hidden_size": 3},
    ],
)
def test_configurations_that_do_not_say_more_than_there_is(change, copy):
    directory = copy("gptq")
    edit(directory / "config.json", lambda c: c.update(change))
    convert(directory, directory.parent / "target", "marlin")


VALUES = [None, [], {}, -1, 0, "", "re:(", 1e308, True, 2**70, [None], {"a": {}}, "DROP"]


def paths(value, path=()):
    """Of everything inside a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
        yield (*path, key)
        if isinstance(inner, dict | list):
            yield from paths(inner, (*path, key))


@pytest.mark.parametrize("kind", [*FORMATS, "native"])
def test_any_value_in_the_configuration(kind, sound, copy):
    """Whatever stands there, the answer is a sound checkpoint, or one clear error."""
    directory = copy(kind)
    whole = json.loads((directory / "config.json").read_text())
    wanted = ("quantization_config", "architectures")
    for path in paths({key: whole[key] for key in wanted}):
        for value in VALUES:
            changed = json.loads(json.dumps(whole))
            inner = changed
            for key in path[:-1]:
                inner = inner[key]
            if value == "DROP":
                del inner[path[-1]]
            else:
                inner[path[-1]] = value
            (directory / "config.json").write_text(json.dumps(changed))
            try:
                contents_of.describe(contents_of.collect(directory))
                with open_source(directory) as source:
                    for layer in list(source.layers)[:2]:
                        source.read(layer, source.parts(layer))
            except CheckpointError as error:
                assert "\n" not in str(error)


CHANGES = [
    lambda t: t.double(), lambda t: t.float(), lambda t: t.to(torch.int8), lambda t: t.long(),
    lambda t: t.bool(), lambda t: t.to(torch.float8_e4m3fn), lambda t: t.to(torch.complex64),
    lambda t: t.t(), lambda t: t.flatten(), lambda t: t.flatten()[0], lambda t: t[:0],
    lambda t: t[None], lambda t: t[..., :0], lambda t: t.repeat(*[2] * t.dim()),
    lambda t: torch.full_like(t, 127),
]  # fmt: skip


@pytest.mark.parametrize("kind", [*FORMATS, "native"])
def test_any_tensor_in_a_layer(kind, sound):
    with open_source(sound / kind) as source:
        whole = source.parts(Q)
        for part, change in itertools.product(whole, CHANGES):
            try:
                changed = change(whole[part])
            except (RuntimeError, NotImplementedError):  # no such change of such a tensor
                continue
            try:
                weight = source.read(Q, {**whole, part: changed.contiguous()})
            except CheckpointError as error:
                assert "\n" not in str(error)
                continue
            assert weight.codes.shape == (64, 64) and weight.codes.max() <= 15


# ---------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("kind", [*FORMATS, "native"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: data[:4],
        lambda data: b"",
        lambda data: struct.pack("<Q", 2**60) + data[8:],
        lambda data: data[:8] + b"[" * (len(data) - 8),
        lambda data: b"\x80\x04" + data,
    ],
)
def test_files_that_are_damaged(kind, damage, copy):
    directory = copy(kind)
    path = sorted(directory.glob("*.safetensors"))[0]
    path.write_bytes(damage(path.read_bytes()))
    refuse(directory, path.name)


@pytest.mark.parametrize(
    "filename",
    ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", "", "a.bin", 3, None],
)
def test_an_index_that_leaves_the_directory(filename, copy):
    directory = copy("gptq")
    shard = next(directory.glob("*.safetensors"))
    shutil.copy(shard, directory.parent / "secret.safetensors")
    edit(directory / INDEX, lambda i: i["weight_map"].update({f"{Q}.qweight": filename}))
    refuse(directory, "bad file name")


def test_names_that_come_twice(copy):
    directory = copy("gptq")
    text = (directory / INDEX).read_text()
    name = f'"{Q}.qweight": '
    start = text.index(name)
    entry = text[start : text.index(",", start) + 1]
    (directory / INDEX).write_text(text.replace(entry, entry + " " + entry))
    refuse(directory, f"keys that come twice: {Q}.qweight")


def test_a_configuration_that_says_two_things(copy):
    directory = copy("gptq")
    text = (directory / "config.json").read_text()
    (directory / "config.json").write_text(text.replace('"bits": 4', '"bits": 4, "bits": 8'))
    refuse(directory, "keys that come twice: bits")


def test_a_header_that_names_a_tensor_twice(copy):
    directory = copy("gptq")
    path = sorted(directory.glob("*.safetensors"))[0]
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    name = next(key for key in header if key != "__metadata__")
    text = json.dumps(header)[:-1] + f", {json.dumps(name)}: {json.dumps(header[name])}}}"
    path.write_bytes(struct.pack("<Q", len(text)) + text.encode() + data[8 + length :])
    refuse(directory, "come twice|duplicate")


def declare(directory, dtype, bits):
    """Adds a tensor of 64 values of a type that may be none of torch's."""
    path = sorted(directory.glob("*.safetensors"))[0]
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header, tensors = json.loads(data[8 : 8 + length]), data[8 + length :] + bytes(8 * bits)
    offsets = [len(tensors) - 8 * bits, len(tensors)]
    header["extra"] = {"dtype": dtype, "shape": [64], "data_offsets": offsets}
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + tensors)
    edit(directory / INDEX, lambda i: i["weight_map"].update(extra=path.name))


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_a_type_that_torch_lacks(dtype, copy):
    directory = copy("gptq")
    declare(directory, dtype, 6)
    refuse(directory, rf"00001-of-00002.safetensors: extra: .*{dtype}", loading=False)


def test_a_tensor_in_two_files(copy):
    directory = copy("gptq")
    first, second = sorted(directory.glob("*.safetensors"))
    tensors = load_file(second)
    name, tensor = next(iter(load_file(first).items()))
    save_file({**tensors, name: tensor}, second)
    refuse(directory, f"{name} is in two files")


def test_an_index_and_files_that_disagree(copy):
    directory = copy("gptq")
    edit(directory / INDEX, lambda i: i["weight_map"].pop(f"{Q}.g_idx"))
    refuse(directory, f"index and files disagree on {Q}.g_idx")


def test_files_that_are_missing(copy):
    directory = copy("gptq")
    sorted(directory.glob("*.safetensors"))[0].unlink()
    refuse(directory, "no model-00001-of-00002.safetensors")


def test_several_files_and_no_index(copy):
    directory = copy("gptq")
    (directory / INDEX).unlink()
    refuse(directory, "but no model.safetensors.index.json that lists them")


def test_a_single_file_of_any_name(sound, tmp_path):
    weights = by.llama_weights()
    directory = by.write_checkpoint(tmp_path / "a", by.gptq, weights, by.gptq_config(), shards=1)
    (directory / "model.safetensors").rename(directory / "gptq_model-4bit-32g.safetensors")
    convert(directory, tmp_path / "b", "marlin")


@pytest.mark.parametrize(
    "config", ["", "{", "[]", "null", '{"quantization_config": 3}', "[" * 9999]
)
def test_configurations_that_are_no_configurations(config, copy):
    directory = copy("gptq")
    (directory / "config.json").write_text(config)
    refuse(directory, "config")


def with_a_companion(directory, make):
    (directory / "more").mkdir()
    (directory / "more" / "licence.txt").write_text("free")
    make(directory / "more" / "x")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: path.symlink_to("/etc/passwd"), "leads out of the checkpoint, to /etc/passw"),
        (lambda path: path.symlink_to("../../secret"), "leads out of the checkpoint, to /.*secret"),
        (lambda path: path.symlink_to("nowhere"), "a link that leads to none"),
        (lambda path: path.symlink_to("x"), "a link that leads to none"),
        (lambda path: path.symlink_to("../more"), "a link that leads to none"),
        (lambda path: path.symlink_to("/etc"), "a link that leads to none"),
        (os.mkfifo, "expected a file or a folder"),
    ],
)
def test_companions_that_are_no_files_of_the_checkpoint(make, message, copy):
    directory = copy("gptq")
    (directory.parent / "secret").write_text("secret")
    with_a_companion(directory, make)
    refuse(directory, f"more/x: .*{message}", loading=False)


@pytest.mark.parametrize("name", ["config.json", INDEX, "model-00001-of-00002.safetensors"])
def test_pipes_in_the_place_of_files(name, copy):
    directory = copy("gptq")
    (directory / name).unlink()
    os.mkfifo(directory / name)
    refuse(directory, "no config.json|no model.*safetensors")


@pytest.mark.parametrize(
    "name", ["config.json", INDEX, "quantize_config.json", "model-00001-of-00002.safetensors"]
)
def test_files_that_are_links_out_of_the_checkpoint(name, copy):
    """What is read of them would end in the new checkpoint; loading copies nothing."""
    directory = copy("gptq")
    (directory / "quantize_config.json").write_text("{}")
    shutil.move(directory / name, directory.parent / "elsewhere")
    (directory / name).symlink_to("../elsewhere")
    refuse(directory, f"{name}: a link that leads out of the checkpoint", loading=False)
    marlin.load_pretrained(directory)


@pytest.mark.parametrize("subfolder", ["", "4bit"])
def test_links_that_are_as_they_should_be(subfolder, copy):
    """Within the checkpoint, and into the blobs of the hub's cache, of which snapshots are made."""
    directory = copy("gptq")
    with_a_companion(directory, lambda path: path.symlink_to("licence.txt"))
    cache = directory.parent / "models--a--b"
    (cache / "snapshots").mkdir(parents=True)
    shutil.move(directory, cache / "blobs")
    snapshot = cache / "snapshots" / "1a2b" / subfolder
    for path in (path for path in (cache / "blobs").rglob("*") if path.is_file()):
        link = snapshot / path.relative_to(cache / "blobs")
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(path, link.parent))
    convert(snapshot, directory.parent / "target", "marlin")
    for name in ("x", "licence.txt"):
        path = directory.parent / "target" / "more" / name
        assert path.read_text() == "free" and not path.is_symlink()


def test_links_into_the_hubs_cache(copy):
    """As older clients left them in the directory of `--local-dir`, for large files."""
    directory = copy("gptq")
    blobs = directory.parent / "models--a--b" / "blobs"
    blobs.mkdir(parents=True)
    for path in directory.glob("*.safetensors"):
        shutil.move(path, blobs / path.name)
        path.symlink_to(blobs / path.name)
    convert(directory, directory.parent / "target", "marlin")


def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        convert(tmp_path / "nothing", tmp_path / "target", "marlin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no config.json"):
        convert(tmp_path / "empty", tmp_path / "target", "marlin")
    assert not (tmp_path / "target").exists()


def test_dense_tensors_with_the_target_formats_names(copy):
    """A GPTQ checkpoint with a tensor X.B beside: the result would be read as something else."""
    directory = copy("gptq")
    index = json.loads((directory / INDEX).read_text())
    name = "model.norm.weight"
    path = directory / index["weight_map"][name]
    extra = "model.norm.B"
    save_file({**load_file(path), extra: torch.zeros(4)}, path)
    edit(directory / INDEX, lambda i: i["weight_map"].update({extra: path.name}))
    with pytest.raises(CheckpointError, match=r"missing tensor model.norm.s|misread"):
        convert(directory, directory.parent / "target", "marlin")
    assert not (directory.parent / "target").exists()


@pytest.mark.parametrize("held", [10**6, 0])  # files that are saved whole, and streamed
def test_a_disk_that_is_full(held, copy, monkeypatch):
    directory = copy("gptq")
    target = directory.parent / "target"

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("marlin.shard_writer.HELD", held)
    where = "StreamedFile.write" if held == 0 else "save_file"
    monkeypatch.setattr(f"marlin.shard_writer.{where}", full)
    with pytest.raises(OSError, match="No space left"):
        convert(directory, target, "marlin", shard_bytes=10_000)
    assert not target.exists()


@pytest.mark.parametrize(
    "where",
    ["formats.gptq.GPTQReader.read", "formats.marlin.write", "sources.DirectorySource.tensor"],
)
def test_a_gpu_that_is_full(where, copy, monkeypatch):
    directory = copy("gptq")

    def full(*args):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate\n2.00 MiB.")

    monkeypatch.setattr(f"marlin.{where}", full)
    with pytest.raises(ValueError, match=r"^device: cpu has too little memory .*--device cpu"):
        convert(directory, directory.parent / "target", "marlin")
    assert not (directory.parent / "target").exists()


@pytest.mark.parametrize("where", ["marlin.convert.copy_companions", "marlin.shards.install"])
def test_an_interrupted_conversion(where, copy, monkeypatch):
    directory = copy("gptq")
    target = directory.parent / "target"
    convert(directory, target, "gptq")
    before = contents(target)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(where, interrupt)
    with pytest.raises(KeyboardInterrupt):
        convert(directory, target, "marlin", overwrite=True)
    assert contents(target) == before


# ---------------------------------------------------------------------------------- pickles


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def state_of(sound):
    return load_file(sorted((sound / "marlin").glob("*.safetensors"))[0])


@pytest.mark.parametrize("save", ["torch", "legacy", "pickle"])
def test_a_pickle_that_runs_code(save, sound, tmp_path):
    trap, path = tmp_path / "trap", tmp_path / "model.pt"
    state = state_of(sound) | {"x": Evil(trap)}
    if save == "pickle":
        path.write_bytes(pickle.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=save == "torch")
    (tmp_path / "config.json").write_text(json.dumps(by.LLAMA))
    with pytest.raises(CheckpointError, match=r"not a plain state dict|what torch\.save wrote"):
        convert(path, tmp_path / "target", "marlin")
    assert not trap.exists() and not (tmp_path / "target").exists()


@pytest.mark.parametrize(
    "state, message",
    [
        ([1, 2], "expected a state dict, got list"),
        ({}, "pickles are not read"),
        ({"a.weight": torch.zeros(2)}, "pickles are not read"),
        ({"a.B": 3}, "expected names of plain tensors"),
        ({3: torch.zeros(2)}, "expected names of plain tensors"),
        ({"a.B": torch.zeros(1).expand(2**40)}, "expected names of plain tensors"),
        ({"a.B": torch.zeros(4).to_sparse()}, "expected names of plain tensors"),
        ({"a.B": torch.zeros(2, device="meta")}, "expected names of plain tensors"),
        ({"a.B": torch.zeros(4, 128).int()}, "missing tensor a.s"),
        ({"a.B": torch.zeros(4, 128), "a.s": torch.ones(1, 64).half()}, "int32 matrix"),
        ({"a.B": torch.zeros(4, 100).int(), "a.s": torch.ones(1, 50).half()}, "128 columns"),
        ({"a.B": torch.zeros(4, 128).int(), "a.s": torch.ones(3, 64).half()}, "do not divide"),
        ({"a.B": torch.zeros(4, 128).int(), "a.s": torch.ones(1, 64) / 0}, "not finite"),
    ],
)
def test_state_dicts_of_something_else(state, message, tmp_path):
    torch.save(state, tmp_path / "model.pt")
    (tmp_path / "config.json").write_text(json.dumps(by.LLAMA))
    with pytest.raises(CheckpointError, match=message):
        convert(tmp_path / "model.pt", tmp_path / "target", "marlin")
    assert not (tmp_path / "target").exists()


def test_archives_that_are_damaged(sound, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(by.LLAMA))
    path = tmp_path / "model.pt"
    torch.save(state_of(sound), path)
    whole = path.read_bytes()
    for data in (whole[: len(whole) // 2], whole[:100], b"", whole.replace(b"storage", b"torsage")):
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"model\.pt"):
            convert(path, tmp_path / "target", "marlin")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello", "world")
    with pytest.raises(CheckpointError, match="not a plain state dict"):
        convert(path, tmp_path / "target", "marlin")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth"])
def test_directories_of_pickles(name, copy):
    directory = copy("gptq")
    for path in [*directory.glob("*.safetensors"), directory / INDEX]:
        path.unlink()
    torch.save({"a": torch.zeros(3)}, directory / name)
    refuse(directory, f"{name}: pickles are not read")


def test_single_files_that_are_no_state_dicts(copy):
    directory = copy("gptq")
    shard = sorted(directory.glob("*.safetensors"))[0]
    with pytest.raises(CheckpointError, match="expected its directory"):
        convert(shard, directory.parent / "target", "marlin")
    with pytest.raises(CheckpointError, match=r"expected a directory, or what torch\.save"):
        convert(directory / "config.json", directory.parent / "target", "marlin")
    with pytest.raises(CheckpointError, match="--config is for a single file"):
        convert(directory, directory.parent / "target", "marlin", config=directory)
