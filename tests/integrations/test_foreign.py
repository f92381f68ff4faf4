"""GPTQ, AWQ, compressed-tensors and old Marlin checkpoints onto Marlin layers, in transformers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import assert_same, build, logits, marlin_layers
from transformers import AutoModel, AutoModelForCausalLM

import marlin
from marlin import CheckpointError, MarlinConfig, MarlinLinear, formats, load_pretrained
from marlin.formats.awq import ORDER
from marlin.formats.nibbles import pack_columns
from marlin.layer import dense_layers

Q = "model.layers.0.self_attn.q_proj"


def model_with(zeros=False, act_order=False, group_size=32, name="qwen2"):
    """A model whose layers have random codes, in some of them with zero points and act-order."""
    model = build(name, torch.float16)
    generator = torch.Generator().manual_seed(1)
    for count, (path, parent, attribute, linear) in enumerate(dense_layers(model)):
        if path == "lm_head":
            continue
        k, n = linear.in_features, linear.out_features
        groups = 1 if group_size == -1 else k // group_size
        draw = lambda shape, low, high: torch.randint(  # noqa: E731
            low, high, shape, generator=generator
        )
        scales = (torch.rand(groups, n, generator=generator) * 0.02 + 0.005).half()
        rows = torch.arange(k) // (k // groups)
        layer = MarlinLinear.from_quantized(
            draw((k, n), 0, 16).to(torch.uint8),
            scales,
            linear.bias,
            draw((groups, n), 1, 16).to(torch.uint8) if zeros and count % 3 else None,
            rows[torch.randperm(k, generator=generator)] if act_order and count % 2 else None,
        )
        setattr(parent, attribute, layer.eval())
    return model


def write_gptq(layers):
    summaries = {name: formats.LayerSummary.of(weight) for name, weight in layers.items()}
    parts = {name: formats.WRITERS["gptq"].write(name, weight) for name, weight in layers.items()}
    return parts, formats.WRITERS["gptq"].config(summaries, ["lm_head"])


def write_gptq_v2(layers):
    parts, config = write_gptq(layers)
    for tensors in parts.values():
        tensors["qzeros"] = tensors["qzeros"] + 0x11111111
    return parts, config | {"checkpoint_format": "gptq_v2"}


def write_compressed_tensors(layers):
    writer = formats.WRITERS["compressed-tensors"]
    summaries = {name: formats.LayerSummary.of(weight) for name, weight in layers.items()}
    parts = {name: writer.write(name, weight) for name, weight in layers.items()}
    return parts, writer.config(summaries, ["lm_head"])


def write_awq(layers):
    parts = {}
    for name, weight in layers.items():
        zeros = weight.zeros
        if zeros is None:
            zeros = torch.full(weight.scales.shape, 8, dtype=torch.uint8)
        parts[name] = {
            "qweight": pack_columns(weight.codes, ORDER),
            "qzeros": pack_columns(zeros, ORDER),
            "scales": weight.scales,
        }
    return parts, {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}


def words(weight):
    return marlin.pack(weight.codes), marlin.pack_scales(weight.scales)


def write_old_marlin(layers):
    parts = {}
    for name, weight in layers.items():
        parts[name] = dict(zip(("B", "s"), words(weight), strict=True))
    config = {"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "marlin"}
    return parts, config


def write_awq_marlin(layers):
    parts = {}
    for name, weight in layers.items():
        parts[name] = dict(zip(("qweight", "scales"), words(weight), strict=True))
    return parts, {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "marlin"}


FORMATS = {
    "gptq": (write_gptq, {}),
    "gptq per column": (write_gptq, {"group_size": -1}),
    "gptq with zero points": (write_gptq, {"zeros": True}),
    "gptq act-order": (write_gptq, {"act_order": True, "zeros": True}),
    "gptq v2": (write_gptq_v2, {"zeros": True, "act_order": True}),
    "awq": (write_awq, {"zeros": True}),
    "compressed-tensors": (write_compressed_tensors, {}),
    "compressed-tensors with zero points": (write_compressed_tensors, {"zeros": True}),
    "marlin of AutoGPTQ": (write_old_marlin, {"name": "mistral_wide"}),
    "marlin of AutoAWQ": (write_awq_marlin, {"name": "mistral_wide"}),
}


@pytest.fixture
def foreign(tmp_path):
    """foreign(format) is a model and the directory of that format that holds it."""

    def save(kind):
        writer, features = FORMATS[kind]
        model = model_with(**features)
        layers = {name: layer.quantized() for name, layer in marlin_layers(model).items()}
        parts, quantization = writer(layers)
        state = model.state_dict()
        tensors = {n: t for n, t in state.items() if n.rpartition(".")[0] not in layers}
        for name, tensors_of_layer in parts.items():
            tensors |= {f"{name}.{part}": t for part, t in tensors_of_layer.items()}
            if f"{name}.bias" in state:
                tensors[f"{name}.bias"] = state[f"{name}.bias"]
        directory = tmp_path / "foreign"
        model.config.architectures = [type(model).__name__]
        model.config.save_pretrained(directory)
        edit(directory, lambda config: config.update(quantization_config=quantization))
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return model, directory

    return save


def edit(directory, change):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def rewrite(directory, changes):
    path = directory / "model.safetensors"
    tensors = {name: t.clone() for name, t in load_file(path).items()} | changes
    tensors = {name: t for name, t in tensors.items() if t is not None}
    save_file(tensors, path, metadata={"format": "pt"})


def load(directory, cls=AutoModelForCausalLM, **kwargs):
    return cls.from_pretrained(directory, quantization_config=MarlinConfig(), **kwargs)


@pytest.mark.parametrize("kind", FORMATS)
def test_loads_exactly_and_is_saved_as_marlin(kind, foreign, tmp_path):
    model, directory = foreign(kind)
    loaded = load(directory)
    assert_same(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    described = loaded.config.quantization_config.to_dict()
    loaded.save_pretrained(tmp_path / "native")
    config = json.loads((tmp_path / "native" / "config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "marlin" and config["modules_to_not_convert"] == ["lm_head"]
    assert described == config
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path / "native"), model)
    assert_same(load_pretrained(tmp_path / "native"), model)


def test_the_models_dtype_leaves_packed_layers_alone(foreign):
    model, directory = foreign("gptq with zero points")
    loaded = load(directory, dtype=torch.bfloat16)
    assert loaded.model.norm.weight.dtype == torch.bfloat16
    for name, layer in marlin_layers(loaded).items():
        assert_same(layer, model.get_submodule(name))


def test_biases_keep_their_type_and_may_be_more_than_the_model_has(foreign):
    _, directory = foreign("gptq")
    o_proj = "model.layers.0.self_attn.o_proj"  # has none in this architecture
    biases = {f"{name}.bias": torch.randn(64) for name in (Q, o_proj)}
    rewrite(directory, biases)
    loaded = load(directory)
    for name, bias in biases.items():
        stored = loaded.get_buffer(name)
        assert stored.dtype == torch.float32 and torch.equal(stored, bias)


def test_the_base_of_a_model(foreign):
    model, directory = foreign("awq")
    assert_same(load(directory, AutoModel), model.model)


def test_offloading_to_disk(foreign, tmp_path):
    model, directory = foreign("gptq act-order")
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    offload = {"offload_folder": tmp_path / "offload", "offload_buffers": True}
    loaded = load(directory, device_map=devices, **offload)
    assert {t.device.type for t in marlin_layers(loaded)[Q].buffers()} == {"meta"}
    assert torch.equal(logits(loaded), logits(model))
    with pytest.warns(UserWarning, match="offloaded"):
        loaded.save_pretrained(tmp_path / "native")
    assert_same(load_pretrained(tmp_path / "native"), model)


PARTS = ("qweight", "qzeros", "scales")
ONE = torch.zeros(1, dtype=torch.int32)
DAMAGES = {
    "no scales": ({f"{Q}.scales": None}, f"{Q}: missing tensor {Q}.scales"),
    "no qweight": ({f"{Q}.qweight": None}, f"{Q}: missing tensor {Q}.qweight"),
    "no layer": (dict.fromkeys(f"{Q}.{p}" for p in (*PARTS, "g_idx")),
                 f"missing tensors: {Q}.weight"),
    "no bias": ({f"{Q}.bias": None}, f"missing tensors: {Q}.bias"),
    "shape": ({f"{Q}.qweight": torch.zeros(8, 32, dtype=torch.int32)}, f"{Q}"),
    "shape of bias": ({f"{Q}.bias": torch.zeros(3)}, f"{Q}.bias: expected"),
    "NaN": ({f"{Q}.scales": torch.full((2, 64), torch.nan).half()}, f"{Q}.*not finite"),
    "a layer too many": ({f"model.norm.{p}": ONE.clone() for p in PARTS},
                         "packed weights for what is no linear layer: model.norm"),
    "a tensor too many": ({"model.surprise": ONE}, "unexpected tensors: model.surprise"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_checkpoints(damage, foreign):
    changes, message = DAMAGES[damage]
    _, directory = foreign("gptq")
    rewrite(directory, changes)
    with pytest.raises(CheckpointError, match=message):
        load(directory)


def test_a_layer_of_another_shape(foreign):
    _, directory = foreign("gptq")
    tensors = load_file(directory / "model.safetensors")
    narrow = Q.replace("q_proj", "k_proj")
    rewrite(directory, {f"{Q}.{p}": tensors[f"{narrow}.{p}"].clone() for p in (*PARTS, "g_idx")})
    with pytest.raises(CheckpointError, match=r"q_proj: expected .* = \(64, 64\), got \(64, 32\)"):
        load(directory)


def test_formats_that_are_not_read(foreign):
    _, directory = foreign("gptq")
    edit(directory, lambda config: config["quantization_config"].update(bits=8))
    with pytest.raises(CheckpointError, match="expected 4 bits per weight, got 8"):
        load(directory)
    edit(directory, lambda c: c.update(quantization_config={"quant_method": "bitnet"}))
    with pytest.raises(CheckpointError, match=r"expected a quant_method of gptq.* got 'bitnet'"):
        load(directory)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["gptq act-order", "awq", "compressed-tensors"])
def test_straight_onto_a_gpu(kind, foreign):
    model, directory = foreign(kind)
    loaded = load(directory, device_map="cuda:0")
    assert {t.device.type for t in (*loaded.parameters(), *loaded.buffers())} == {"cuda"}
    for name, layer in marlin_layers(loaded).items():
        assert_same(layer.to("cpu"), model.get_submodule(name))
