"""Whole checkpoints from one format into another and back, and what else a directory holds."""

import itertools
import json

import by_definition as by
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import marlin
from marlin import formats
from marlin.convert import convert
from marlin.shards import INDEX, CheckpointError, list_tensors
from marlin.sources import open_source

SYMMETRIC = {
    "gptq": (by.gptq, by.gptq_config),
    "gptq_v2": (
        lambda w: by.gptq(w, 2),
        lambda size: by.gptq_config(size, checkpoint_format="gptq_v2"),
    ),
    "awq": (by.awq, by.awq_config),
    "compressed-tensors": (by.compressed_tensors, by.compressed_tensors_config),
}
TARGETS = list(formats.WRITERS)
IDS = torch.arange(20).reshape(2, 10)


def make(directory, kind, group_size=32, weights=None, **more):
    parts_of, config = SYMMETRIC[kind]
    weights = by.llama_weights(group_size) if weights is None else weights
    return by.write_checkpoint(directory, parts_of, weights, config(group_size) | more), weights


def read_all(directory):
    """Every packed layer of a checkpoint, and every other tensor."""
    with open_source(directory) as source:
        layers = {name: source.read(name, source.parts(name)) for name in source.layers}
        return layers, {name: source.tensor(name).clone() for name in source.dense}


def check_layers(layers, weights):
    assert layers.keys() == weights.keys()
    for name, weight in weights.items():
        quantized = layers[name]
        assert np.array_equal(quantized.codes.numpy(), weight.codes), name
        assert torch.equal(quantized.scales, weight.scales), name
        if quantized.zeros is None:
            assert (weight.zeros == 8).all()
        else:
            assert np.array_equal(quantized.zeros.numpy(), weight.zeros), name
        if quantized.g_idx is None:
            assert (np.diff(weight.g_idx) >= 0).all()
        else:
            assert np.array_equal(quantized.g_idx.numpy(), weight.g_idx), name


def check_dense(dense):
    expected = by.llama_dense()
    assert dense.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensor.dtype == dense[name].dtype and torch.equal(tensor, dense[name]), name


def reference_model(weights):
    """The little Llama in float64, with the values that the definition gives the layers."""
    config = transformers.LlamaConfig(**{k: v for k, v in by.LLAMA.items() if k != "dtype"})
    model = transformers.LlamaForCausalLM(config).double()
    state = {name: tensor.double() for name, tensor in by.llama_dense().items()}
    state |= {f"{name}.weight": weight.values().t() for name, weight in weights.items()}
    model.load_state_dict(state)
    return model.eval()


# ---------------------------------------------------------------------------------- exactness


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("source, target", list(itertools.product(SYMMETRIC, TARGETS)))
def test_symmetric_formats_hold_the_same_bits(source, target, group_size, tmp_path):
    directory, weights = make(tmp_path / "source", source, group_size)
    report = convert(directory, tmp_path / "target", target)
    assert report.layers == len(weights) == 14
    layers, dense = read_all(tmp_path / "target")
    check_layers(layers, weights)
    check_dense(dense)
    # And on: into every other format, where again nothing is lost.
    for third in TARGETS:
        convert(tmp_path / "target", tmp_path / third, third)
        layers, dense = read_all(tmp_path / third)
        check_layers(layers, weights)
        check_dense(dense)


@pytest.mark.parametrize("target", TARGETS)
def test_a_way_back_ends_where_it_began(target, tmp_path):
    """GPTQ to another format and back: the files agree tensor by tensor."""
    directory, _ = make(tmp_path / "source", "gptq")
    convert(directory, tmp_path / "there", target)
    convert(tmp_path / "there", tmp_path / "back", "gptq")
    before = {}
    for path in directory.glob("*.safetensors"):
        before |= load_file(path)
    after = load_file(tmp_path / "back" / "model.safetensors")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name


def test_zero_points_where_they_fit(tmp_path):
    weights = by.llama_weights(zeros=(1, 15))
    directory = by.write_checkpoint(tmp_path / "awq", by.awq, weights, by.awq_config())
    for target in TARGETS:
        convert(directory, tmp_path / target, target)
        check_layers(read_all(tmp_path / target)[0], weights)
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["sym"] is False
    weights["model.layers.1.mlp.up_proj"].zeros[0, 0] = 0
    directory = by.write_checkpoint(tmp_path / "awq0", by.awq, weights, by.awq_config())
    convert(directory, tmp_path / "0", "compressed-tensors")
    check_layers(read_all(tmp_path / "0")[0], weights)
    with pytest.raises(CheckpointError, match=r"model.layers.1.mlp.up_proj: GPTQ has no zero"):
        convert(directory, tmp_path / "none", "gptq")
    assert not (tmp_path / "none").exists()


def test_a_zero_point_of_16_is_marlins_alone(tmp_path):
    weights = by.llama_weights(zeros=(1, 16))
    config = by.gptq_config(sym=False)
    directory = by.write_checkpoint(tmp_path / "source", by.gptq, weights, config)
    convert(directory, tmp_path / "marlin", "marlin")
    check_layers(read_all(tmp_path / "marlin")[0], weights)
    for target in ("gptq", "compressed-tensors"):
        with pytest.raises(CheckpointError, match="no zero point"):
            convert(directory, tmp_path / target, target)


@pytest.mark.parametrize("zeros", [None, (1, 15)])
def test_act_order_where_it_fits(zeros, tmp_path):
    weights = by.llama_weights(act_order=True, zeros=zeros)
    config = by.gptq_config(desc_act=True, sym=zeros is None)
    directory = by.write_checkpoint(tmp_path / "source", by.gptq, weights, config)
    convert(directory, tmp_path / "marlin", "marlin")
    check_layers(read_all(tmp_path / "marlin")[0], weights)
    convert(tmp_path / "marlin", tmp_path / "gptq", "gptq")
    check_layers(read_all(tmp_path / "gptq")[0], weights)
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]
    assert config["desc_act"] is True
    with pytest.raises(CheckpointError, match="no longer knows act-order"):
        convert(directory, tmp_path / "none", "compressed-tensors")


@pytest.mark.parametrize("target", TARGETS)
def test_layers_of_different_kinds_in_one_checkpoint(target, tmp_path):
    weights = by.llama_weights()
    weights["model.layers.0.mlp.down_proj"] = by.random_weight(96, 64, 1)
    weights["model.layers.1.mlp.gate_proj"] = by.random_weight(64, 96, 1)
    weights["model.layers.1.mlp.up_proj"] = by.random_weight(64, 96, 2, zeros=(1, 15))
    dynamic = {r"model\.layers\.(0\.mlp\.down|1\.mlp\.gate)_proj": {"group_size": -1}}
    config = by.gptq_config(sym=False, dynamic=dynamic)
    directory = by.write_checkpoint(tmp_path / "source", by.gptq, weights, config)
    convert(directory, tmp_path / "target", target)
    check_layers(read_all(tmp_path / "target")[0], weights)
    # Of gate and up, which differ, no one layer can be made.
    assert "gate_up_proj" not in (tmp_path / "target" / "config.json").read_text()


@pytest.mark.parametrize("target", TARGETS)
def test_notes_on_what_others_make_of_it(target, tmp_path):
    directory, weights = make(tmp_path / "plain", "gptq")
    assert convert(directory, tmp_path / "0", target).notes == []
    weights = by.llama_weights(zeros=(1, 15))
    directory = by.write_checkpoint(tmp_path / "awq", by.awq, weights, by.awq_config())
    notes = convert(directory, tmp_path / "1", target).notes
    assert len(notes) == (target == "gptq") and all("zero points" in note for note in notes)
    weights["model.layers.0.mlp.down_proj"] = by.random_weight(96, 64, 1)
    config = by.gptq_config(sym=False, dynamic={r".*0\.mlp\.down_proj": {"group_size": -1}})
    directory = by.write_checkpoint(tmp_path / "two", by.gptq, weights, config)
    notes = convert(directory, tmp_path / "2", target).notes
    assert len(notes) == 2 * (target == "gptq") and all("group size" in n for n in notes[1:])


@pytest.mark.parametrize("target", TARGETS)
def test_layers_that_stayed_dense(target, tmp_path):
    weights = by.llama_weights()
    name = "model.layers.0.mlp.up_proj"
    kept = weights.pop(name).values().t().half().contiguous()
    dense = by.llama_dense() | {f"{name}.weight": kept}
    directory = by.write_checkpoint(
        tmp_path / "source", by.gptq, weights, by.gptq_config(), dense=dense
    )
    convert(directory, tmp_path / "target", target)
    layers, dense = read_all(tmp_path / "target")
    check_layers(layers, weights)
    assert torch.equal(dense[f"{name}.weight"], kept)
    config = json.loads((tmp_path / "target" / "config.json").read_text())["quantization_config"]
    if target == "marlin":
        assert config["modules_to_not_convert"] == ["lm_head", name]
    elif target == "gptq":
        assert config["dynamic"] == {r"-:^model\.layers\.0\.mlp\.up_proj$": {}}
    else:
        assert config["ignore"] == ["lm_head", name]
    model = marlin.load_pretrained(tmp_path / "target")
    assert torch.equal(model.get_submodule(name).weight, kept)


# ------------------------------------------------------------------------------------ loading


@pytest.mark.parametrize("kind", SYMMETRIC)
def test_load_pretrained_reads_them(kind, tmp_path):
    directory, weights = make(tmp_path / "source", kind)
    model = marlin.load_pretrained(directory, dtype=torch.float32)
    assert all(isinstance(model.get_submodule(name), marlin.MarlinLinear) for name in weights)
    with torch.no_grad():
        expected = reference_model(weights)(IDS).logits
        torch.testing.assert_close(model(IDS).logits.double(), expected, rtol=1e-3, atol=1e-4)
    # What was converted before is the same model.
    convert(directory, tmp_path / "converted", "marlin")
    other = marlin.load_pretrained(tmp_path / "converted", dtype=torch.float32)
    before, after = model.state_dict(), other.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    # And it is saved as a Marlin model.
    marlin.save_pretrained(model, tmp_path / "saved")
    check_layers(read_all(tmp_path / "saved")[0], weights)


def test_load_pretrained_with_zero_points_and_act_order(tmp_path):
    weights = by.llama_weights(act_order=True, zeros=(1, 15))
    config = by.gptq_config(desc_act=True, sym=False)
    directory = by.write_checkpoint(tmp_path / "source", by.gptq, weights, config)
    model = marlin.load_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = reference_model(weights)(IDS).logits
        torch.testing.assert_close(model(IDS).logits.double(), expected, rtol=1e-3, atol=1e-4)


def test_biases_and_what_older_programs_stored(tmp_path):
    dense = by.llama_dense()
    bias = torch.randn(64).half()
    dense |= {
        "model.layers.0.self_attn.q_proj.bias": bias,
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.randn(8),
    }
    directory = by.write_checkpoint(
        tmp_path / "source", by.gptq, by.llama_weights(), by.gptq_config(), dense=dense
    )
    convert(directory, tmp_path / "target", "marlin")
    for place in (directory, tmp_path / "target"):
        model = marlin.load_pretrained(place)
        assert torch.equal(model.model.layers[0].self_attn.q_proj.bias, bias)
        assert model.model.layers[1].self_attn.q_proj.bias is None


# ------------------------------------------------------------------------- files around them


def test_the_files_of_gptq(tmp_path):
    directory, weights = make(tmp_path / "source", "compressed-tensors")
    convert(directory, tmp_path / "gptq", "gptq")
    config = json.loads((tmp_path / "gptq" / "config.json").read_text())
    beside = json.loads((tmp_path / "gptq" / "quantize_config.json").read_text())
    assert config["quantization_config"] == beside
    assert config["hidden_size"] == 64 and config["architectures"] == ["LlamaForCausalLM"]
    expected = {"quant_method": "gptq", "checkpoint_format": "gptq", "bits": 4, "group_size": 32}
    expected |= {"desc_act": False, "sym": True, "lm_head": False}
    assert {key: beside.get(key) for key in expected} == expected
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    layer = "model.layers.0.mlp.down_proj"
    assert tensors[f"{layer}.qzeros"].shape == (3, 8)
    assert (tensors[f"{layer}.qzeros"] == 0x77777777).all()
    assert tensors[f"{layer}.g_idx"].tolist() == [r // 32 for r in range(96)]
    assert torch.equal(tensors[f"{layer}.qweight"], by.along_rows(weights[layer].codes))


def test_transformers_understands_what_we_say_of_gptq(tmp_path):
    directory, _ = make(tmp_path / "source", "gptq")
    convert(directory, tmp_path / "gptq", "gptq")
    config = transformers.AutoConfig.from_pretrained(tmp_path / "gptq").quantization_config
    read = transformers.GPTQConfig.from_dict(config)
    assert (read.bits, read.group_size, read.sym, read.desc_act) == (4, 32, True, False)
    assert read.format == "gptq"


def test_other_files_come_along(tmp_path):
    directory, _ = make(tmp_path / "source", "gptq")
    (directory / "LICENSE").write_text("free")
    (directory / "extra").mkdir()
    (directory / "extra" / "chat.jinja").write_text("{{ }}")
    for name in ("pytorch_model.bin", "model.gguf", "pytorch_model.bin.index.json", ".gitignore"):
        (directory / name).write_bytes(b"weights")
    (directory / "quantize_config.json").write_text(json.dumps(by.gptq_config()))
    convert(directory, tmp_path / "target", "compressed-tensors")
    assert {str(p.relative_to(tmp_path / "target")) for p in (tmp_path / "target").rglob("*")} == {
        "LICENSE", "config.json", "extra", "extra/chat.jinja", "model.safetensors", "tokenizer.json"
    }  # fmt: skip


def test_shards_and_their_index(tmp_path):
    directory, weights = make(tmp_path / "source", "gptq")
    report = convert(directory, tmp_path / "target", "marlin", shard_bytes=10_000)
    index = json.loads((tmp_path / "target" / INDEX).read_text())
    files = sorted(p.name for p in (tmp_path / "target").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values())) and len(files) > 5
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    sizes = [p.stat().st_size for p in (tmp_path / "target").glob("*.safetensors")]
    assert max(sizes) < 12_288 + 1_000  # the largest tensor and a header
    tensors = list_tensors(tmp_path / "target")
    total = sum(info.bytes for info in tensors.values())
    assert report.bytes_written == total == index["metadata"]["total_size"]
    check_layers(read_all(tmp_path / "target")[0], weights)
    mode = (tmp_path / "target" / "config.json").stat().st_mode
    assert all(p.stat().st_mode == mode for p in (tmp_path / "target").glob("*.safetensors"))


def test_a_directory_that_has_something_is_left_alone(tmp_path):
    directory, weights = make(tmp_path / "source", "gptq")
    convert(directory, tmp_path / "target", "gptq")
    with pytest.raises(ValueError, match="not empty"):
        convert(directory, tmp_path / "target", "marlin")
    for name in ("gptq_report.json", "notes.txt"):
        (tmp_path / "target" / name).write_text("{}")
    convert(directory, tmp_path / "target", "marlin", overwrite=True, shard_bytes=10_000)
    for name in ("quantize_config.json", "model.safetensors", "gptq_report.json"):  # of the old
        assert not (tmp_path / "target" / name).exists()
    assert (tmp_path / "target" / "notes.txt").exists()  # somebody else's
    check_layers(read_all(tmp_path / "target")[0], weights)
    for target in (directory, directory / "inside", tmp_path, directory / "config.json"):
        with pytest.raises(ValueError, match="target: expected a directory"):
            convert(directory, target, "marlin", overwrite=True)
    with pytest.raises(ValueError, match="expected one of marlin, gptq, compressed-tensors"):
        convert(directory, tmp_path / "x", "awq")


# -------------------------------------------------------------- what the published script saved


def published_state(group_size=32):
    """Whole tiles of columns, as the published package needs them."""
    weights = {
        name: by.random_weight(*weight.codes.shape, len(weight.scales), seed=7)
        for name, weight in by.llama_weights(group_size).items()
        if weight.codes.shape[1] % 64 == 0
    }
    state = by.llama_dense()
    for name, weight in by.llama_weights(group_size).items():
        if name not in weights:
            state[f"{name}.weight"] = weight.values().t().half()
    for name, weight in weights.items():
        state |= {f"{name}.{part}": tensor for part, tensor in by.marlin(weight).items()}
    return state, weights


@pytest.fixture
def original(tmp_path):
    """The full-precision model's directory, as far as it matters."""
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "config.json").write_text(json.dumps(by.LLAMA | {"dtype": "bfloat16"}))
    (tmp_path / "original" / "tokenizer.json").write_text("{}")
    (tmp_path / "original" / "model.safetensors").write_bytes(b"not to be copied")
    return tmp_path / "original"


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("target", TARGETS)
def test_a_state_dict_of_the_published_script(target, group_size, original, tmp_path):
    state, weights = published_state(group_size)
    torch.save(state, tmp_path / "model.pt")
    report = convert(tmp_path / "model.pt", tmp_path / "target", target, config=original)
    assert report.layers == len(weights)
    layers, dense = read_all(tmp_path / "target")
    check_layers(layers, weights)
    assert all(torch.equal(tensor, state[name]) for name, tensor in dense.items())
    config = json.loads((tmp_path / "target" / "config.json").read_text())
    assert config["dtype"] == "float16"  # of the tensors, not of the model they came from
    assert sorted(p.name for p in (tmp_path / "target").iterdir() if "quantize" not in p.name) == [
        "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    assert marlin.load_pretrained(tmp_path / "target").dtype == torch.float16


def test_a_state_dict_beside_its_config(original, tmp_path):
    state, weights = published_state()
    torch.save(state, original / "marlin.pt")
    convert(original / "marlin.pt", tmp_path / "target", "marlin")
    check_layers(read_all(tmp_path / "target")[0], weights)
    (original / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"needs the model's config\.json"):
        convert(original / "marlin.pt", tmp_path / "other", "marlin")


def test_tied_tensors_of_a_state_dict(original, tmp_path):
    state, _ = published_state()
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    state["model.norm.weight"] = state["model.embed_tokens.weight"].flatten()[:64]  # a view
    torch.save(state, original / "marlin.pt")
    convert(original / "marlin.pt", tmp_path / "target", "marlin")
    for name, tensor in read_all(tmp_path / "target")[1].items():
        assert torch.equal(tensor, state[name])


def test_the_older_name_of_the_configuration(tmp_path):
    directory, weights = make(tmp_path / "source", "compressed-tensors")
    config = json.loads((directory / "config.json").read_text())
    config["compression_config"] = config.pop("quantization_config")
    (directory / "config.json").write_text(json.dumps(config))
    convert(directory, tmp_path / "target", "gptq")
    check_layers(read_all(tmp_path / "target")[0], weights)
    assert "compression_config" not in json.loads((tmp_path / "target/config.json").read_text())


@pytest.mark.gpu
def test_on_the_gpu_the_same_files(tmp_path):
    directory, _ = make(tmp_path / "source", "gptq")
    for target in TARGETS:
        convert(directory, tmp_path / f"cpu-{target}", target)
        convert(directory, tmp_path / f"cuda-{target}", target, device="cuda")
        for path in (tmp_path / f"cpu-{target}").iterdir():
            assert path.read_bytes() == (tmp_path / f"cuda-{target}" / path.name).read_bytes()
