"""What others wrote, we read; what we write, others read. Bit for bit."""

import json
import logging
from pathlib import Path

import by_definition as by
import for_others
import numpy as np
import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

import marlin
from marlin import formats
from marlin.convert import convert
from marlin.sources import open_source

compressed_tensors = pytest.importorskip("compressed_tensors")

from compressed_tensors.compressors import ModelCompressor  # noqa: E402
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32  # noqa: E402
from compressed_tensors.quantization import (  # noqa: E402
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)

GOLDEN_FOLDER = Path(__file__).parent / "golden"
GOLDEN = sorted(GOLDEN_FOLDER.glob("gptqmodel-*.safetensors"))
CLOSE = 0.002  # of the largest logit: two of its units in the last place of FP16
SCHEMES = {
    "symmetric, groups": {"symmetric": True, "strategy": "group", "group_size": 32},
    "symmetric, channel": {"symmetric": True, "strategy": "channel"},
    "asymmetric, groups": {"symmetric": False, "strategy": "group", "group_size": 32},
    "asymmetric, channel": {"symmetric": False, "strategy": "channel"},
}


def tiny_llama(dtype):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{k: v for k, v in by.LLAMA.items() if k != "dtype"})
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def their_checkpoint(directory, scheme, dtype):
    """A model that compressed-tensors quantized (with scales of our choice) and saved."""
    model = tiny_llama(dtype)
    weights = QuantizationArgs(num_bits=4, type="int", **scheme)
    apply_quantization_config(
        model,
        QuantizationConfig(
            config_groups={"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
            ignore=["lm_head"],
        ),
    )
    generator = torch.Generator().manual_seed(1)
    for _, module in model.named_modules():
        if not hasattr(module, "weight_scale"):
            continue
        k = module.weight.shape[1]
        groups = module.weight_scale.shape[1]
        by_group = module.weight.detach().float().reshape(-1, groups, k // groups)
        scale = (by_group.amax(-1) - by_group.amin(-1)) / 15
        module.weight_scale.data = scale.to(dtype)
        if not scheme["symmetric"]:
            zeros = torch.randint(-8, 8, scale.shape, generator=generator, dtype=torch.int8)
            module.weight_zero_point.data = zeros
    compressor = ModelCompressor.from_pretrained_model(model, "pack-quantized")
    compressor.compress_model(model)
    model.save_pretrained(directory)
    compressor.update_config(directory)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    compressor.decompress_model(model)
    return state, model


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_we_read_what_it_writes(scheme, dtype, tmp_path):
    state, dense = their_checkpoint(tmp_path / "theirs", scheme, dtype)
    with open_source(tmp_path / "theirs") as source:
        assert len(source.layers) == 14
        for name in source.layers:
            weight = source.read(name, source.parts(name))
            shape = state[f"{name}.weight_shape"]
            codes = unpack_from_int32(state[f"{name}.weight_packed"], 4, shape) + 8
            assert torch.equal(weight.codes, codes.t().to(torch.uint8))
            assert torch.equal(weight.scales, state[f"{name}.weight_scale"].t())
            assert (weight.zeros is None) == scheme["symmetric"]
    model = marlin.load_pretrained(tmp_path / "theirs")
    for name, module in dense.named_modules():
        if hasattr(module, "quantization_scheme"):
            # Their product is rounded to the type of the scales, as ours is.
            assert torch.equal(model.get_submodule(name).dequantize(), module.weight)


def we_write(directory, zeros, group_size):
    """directory/ours, in compressed-tensors' format; returns what its layers hold."""
    weights = by.llama_weights(group_size, zeros=zeros)
    config = by.gptq_config(group_size, checkpoint_format="gptq_v2", sym=zeros is None)
    by.write_checkpoint(directory / "gptq", lambda w: by.gptq(w, 2), weights, config)
    convert(directory / "gptq", directory / "ours", "compressed-tensors")
    return weights


def they_load(directory):
    logging.getLogger("transformers").setLevel(logging.ERROR)
    config = transformers.CompressedTensorsConfig(dequantize=True)
    return transformers.AutoModelForCausalLM.from_pretrained(directory, quantization_config=config)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("zeros", [None, (0, 15)])
def test_it_reads_what_we_write(zeros, group_size, tmp_path):
    weights = we_write(tmp_path, zeros, group_size)
    model = they_load(tmp_path / "ours")
    for name, weight in weights.items():
        loaded = model.get_submodule(name).weight
        assert torch.equal(loaded, weight.values().t().to(loaded.dtype)), name
    for name, tensor in by.llama_dense().items():
        assert torch.equal(model.state_dict()[name], tensor)


@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("zeros", [None, (0, 15)])
def test_transformers_runs_what_we_write(zeros, group_size, tmp_path):
    """Its plain `from_pretrained`, which leaves the layers packed, and none of ours in it."""
    weights = we_write(tmp_path, zeros, group_size)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert not any(isinstance(module, marlin.MarlinLinear) for module in model.modules())
    packed = {name for name, _ in model.named_parameters() if name.endswith(".weight_packed")}
    assert packed == {f"{name}.weight_packed" for name in weights}
    with torch.no_grad():
        logits = model(by.TOKENS).logits
        expected = by.llama_model(weights, by.llama_dense())(by.TOKENS).logits
    assert logits.dtype == torch.float16
    assert (logits.float() - expected.float()).abs().max() < CLOSE * expected.abs().max()


def test_it_reads_layers_of_different_kinds(tmp_path):
    weights = by.llama_weights()
    weights["model.layers.0.mlp.down_proj"] = by.random_weight(96, 64, 1)
    weights["model.layers.1.mlp.gate_proj"] = by.random_weight(64, 96, 1)
    weights["model.layers.1.mlp.up_proj"] = by.random_weight(64, 96, 2, zeros=(0, 15))
    name = "model.layers.1.self_attn.o_proj"
    kept = weights.pop(name).values().t().half().contiguous()
    by.write_checkpoint(
        tmp_path / "gptq",
        lambda w: by.gptq(w, 2),
        weights,
        by.gptq_config(
            sym=False,
            checkpoint_format="gptq_v2",
            dynamic={r".*(0\.mlp\.down|1\.mlp\.gate)_proj": {"group_size": -1}},
        ),
        dense=by.llama_dense() | {f"{name}.weight": kept},
    )
    convert(tmp_path / "gptq", tmp_path / "ours", "compressed-tensors")
    model = they_load(tmp_path / "ours")
    for layer, weight in weights.items():
        loaded = model.get_submodule(layer).weight
        assert torch.equal(loaded, weight.values().t().to(loaded.dtype)), layer
    assert torch.equal(model.get_submodule(name).weight, kept)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_our_configuration_has_the_keys_that_its_has(scheme, tmp_path):
    their_checkpoint(tmp_path / "theirs", scheme, torch.float16)
    convert(tmp_path / "theirs", tmp_path / "ours", "compressed-tensors")
    theirs, ours = (
        json.loads((tmp_path / name / "config.json").read_text())["quantization_config"]
        for name in ("theirs", "ours")
    )
    aside = ("version", "sparsity_config", "transform_config", "moe_sparsity_config")
    assert ours == {key: value for key, value in theirs.items() if key not in aside}
    before, after = (open_layers(tmp_path / name) for name in ("theirs", "ours"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key


def open_layers(directory):
    with open_source(directory) as source:
        return {name: source.tensor(name).clone() for name in source.tensors}


def test_the_words_are_its_words():
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    weight = by.random_weight(96, 40, 3, zeros=(0, 15))
    parts = by.compressed_tensors(weight)
    codes = torch.from_numpy(weight.codes.T.astype(np.int8)) - 8
    assert torch.equal(parts["weight_packed"], pack_to_int32(codes, 4))
    zeros = torch.from_numpy(weight.zeros.T.astype(np.int8)) - 8
    assert torch.equal(parts["weight_zero_point"], pack_to_int32(zeros, 4, packed_dim=0))


@pytest.mark.parametrize("shape", [(64, 96, 2), (128, 8, 1)], ids=str)
def test_it_reads_awq_as_we_do(shape):
    from compressed_tensors.entrypoints.convert.converters import AutoAWQConverter

    k, n, groups = shape
    parts = by.awq(by.random_weight(k, n, groups, zeros=(0, 15)))
    config = by.awq_config(k // groups)
    converter = AutoAWQConverter.from_autoawq_config(config)
    codes, scales, zeros = converter._convert_gemm_module(
        parts["qweight"], parts["scales"], parts["qzeros"]
    )
    ours = formats.reader_of({"quantization_config": config}).read("layer", parts)
    assert torch.equal(ours.codes.t().to(torch.int8) - 8, codes)
    assert torch.equal(ours.scales.t(), scales)
    assert torch.equal(ours.zeros.t().to(torch.int8) - 8, zeros)


def test_golden_files_are_there():
    assert len(GOLDEN) == 8


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_layers_that_gptqmodel_packed(path):
    with safe_open(path, "pt") as file:
        config = json.loads(file.metadata()["quantization_config"])
    parts = load_file(path)
    codes, zeros = parts.pop("codes"), parts.pop("zeros")
    weight = formats.reader_of({"quantization_config": config}).read("layer", parts)
    assert torch.equal(weight.codes, codes)
    assert torch.equal(weight.scales, parts["scales"])
    assert (weight.zeros is None) == config["sym"] == bool((zeros == 8).all())
    if weight.zeros is not None:
        assert torch.equal(weight.zeros, zeros)
    assert (weight.g_idx is not None) == config["desc_act"]
    if weight.g_idx is not None:
        assert torch.equal(weight.g_idx, parts["g_idx"])
    if config["checkpoint_format"] == "gptq" and config["sym"]:  # which is what we write
        written = formats.WRITERS["gptq"].write("layer", weight)
        assert written.keys() == parts.keys()
        assert all(torch.equal(written[part], parts[part]) for part in parts)


@pytest.mark.parametrize("kind", for_others.KINDS)
def test_gptqmodel_and_transformers_read_what_we_write(kind, tmp_path):
    """It was given the very tensors that we write today, and got the values that are in them."""
    recorded = json.loads((GOLDEN_FOLDER / "gptqmodel-reads.json").read_text())[kind]
    weights, _ = for_others.write(kind, tmp_path)
    assert for_others.config_of(tmp_path / "gptq") == recorded["quantization_config"]
    tensors = load_file(tmp_path / "gptq" / "model.safetensors")
    assert for_others.digests(tensors) == recorded["given"]
    values = {name: weight.values().half() for name, weight in weights.items()}
    assert for_others.digests(values) == recorded["dequantized"]
    # Zero points it takes from itself only: make_gptqmodel_reads.py says how it was made to.
    notes = formats.WRITERS["gptq"].notes(recorded["quantization_config"])
    assert bool(recorded["refused"]) == any("GPTQModel refuse" in note for note in notes)
    # transformers got the same files. Its plain `from_pretrained` has optimum and GPTQModel load
    # them, and optimum does not know GPTQModel's exceptions.
    plain = recorded["transformers"]
    kept = {name.rpartition(".")[0] for name in plain["missing"]}
    assert kept == set(for_others.KINDS[kind].dense)
    assert bool(kept) == any("transformers does not read" in note for note in notes)
    if kept:
        return
    assert plain["kernels"].keys() == weights.keys()
    assert "Linear" not in plain["kernels"].values()
    assert plain["difference"] < CLOSE * plain["largest"]
    # A kernel for groups of 32 to 256 is chosen on the CPU whatever the groups are.
    assert bool(plain["refused"]) == (kind == "a scale per column")


@pytest.mark.parametrize(
    ("format", "kind"),
    [(f, kind) for f, kinds in for_others.GIVEN_TO_VLLM.items() for kind in kinds],
)
def test_vllm_read_what_we_write(format, kind, tmp_path):
    """As above, with the weights as vLLM's kernel for CPUs dequantizes them."""
    recorded = json.loads((GOLDEN_FOLDER / "vllm-reads.json").read_text())[format][kind]
    weights, dense = for_others.write(kind, tmp_path, format)
    assert for_others.config_of(tmp_path / format) == recorded["quantization_config"]
    tensors = load_file(tmp_path / format / "model.safetensors")
    assert for_others.digests(tensors) == recorded["given"]
    # It takes zero points from compressed-tensors only.
    notes = formats.WRITERS[format].notes(recorded["quantization_config"])
    assert bool(recorded["refused"]) == any("vLLM and GPTQModel refuse" in note for note in notes)
    if recorded["refused"]:
        return
    linear = {name.removesuffix(".weight") for name in dense if "_proj" in name}
    assert recorded["layers"] == {
        name: vllm_scheme(for_others.KINDS[kind], name) if name in weights else None
        for name in weights.keys() | linear
    }
    held = {name: weight.values().half() for name, weight in weights.items()}
    for name, tensor in dense.items():
        layer = name.removesuffix(".weight")
        held |= {layer: tensor.t()} if layer in linear else {name: tensor}
    assert for_others.digests(held) == recorded["held"]


def vllm_scheme(kind, layer):
    size = -1 if layer in kind.per_column else kind.group_size
    return f"{'uint4' if kind.zeros else 'uint4b8'} group_size={size} act_order={kind.act_order}"
