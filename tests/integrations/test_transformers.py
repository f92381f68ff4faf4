"""Native Marlin checkpoints in transformers: loading, saving, devices, compiling, refusals."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import BUILD, IDS, assert_same, build, logits, make, marlin_layers
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
)

import marlin
from marlin import CheckpointError, MarlinConfig, MarlinLinear, load_pretrained
from marlin.integrations import transformers as integration

AUTO = {name: AutoModelForCausalLM for name in BUILD} | {"bert": AutoModelForMaskedLM}
TYPES = [torch.float32, torch.float16, torch.bfloat16]
Q = "model.layers.0.self_attn.q_proj"


def load(directory, **kwargs):
    return AutoModelForCausalLM.from_pretrained(directory, **kwargs)


def quantization(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


# -------------------------------------------------------------------------- loading and saving


@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("name", BUILD)
def test_loads_what_marlin_wrote_and_back(name, dtype, saved, tmp_path):
    model = AUTO[name].from_pretrained(saved(name, dtype))
    reference = load_pretrained(saved(name, dtype))
    assert_same(model, reference)
    assert torch.equal(logits(model), logits(reference))
    assert type(model) is type(reference) and not model.training and model.dtype == dtype
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert quantization(tmp_path) == quantization(saved(name, dtype))
    assert_same(load_pretrained(tmp_path), reference)
    assert_same(AUTO[name].from_pretrained(tmp_path), reference)


def test_the_checkpoint_has_what_the_format_allows(saved):
    model = load(saved())
    layers = marlin_layers(model)
    assert {layer.group_size for layer in layers.values()} == {32, 64}
    assert {layer.s.dtype for layer in layers.values()} == {torch.float16, torch.bfloat16}
    assert layers["model.layers.0.self_attn.k_proj"].out_features == 32
    assert layers[Q].bias is not None and layers[Q].bias.dtype == torch.float16
    assert type(model.model.layers[0].self_attn.o_proj) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.config.quantization_config, MarlinConfig)
    assert model.is_quantized and model.quantization_method == "marlin"


def test_dtype_casts_all_but_packed_layers(saved):
    model = load(saved("qwen2"), dtype=torch.bfloat16)
    reference = load_pretrained(saved("qwen2"))
    assert model.dtype == model.config.dtype == torch.bfloat16
    for name, layer in marlin_layers(model).items():
        other = reference.get_submodule(name)
        assert torch.equal(layer.s, other.s) and layer.s.dtype == torch.float16
        assert layer.bias is None or torch.equal(layer.bias, other.bias)
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model).float(), logits(reference), atol=0.1, rtol=0.1)


def test_models_that_keep_modules_in_fp32_keep_the_scales(saved, monkeypatch):
    monkeypatch.setattr(transformers.LlamaForCausalLM, "_keep_in_fp32_modules", ["_proj"])
    model = load(saved(), dtype=torch.float16)
    assert model.model.layers[0].self_attn.o_proj.weight.dtype == torch.float32
    assert_same(marlin_layers(model)[Q], load_pretrained(saved()).get_submodule(Q))


def test_dense_weights_never_exist(saved, monkeypatch):
    seen = []
    before = integration.MarlinQuantizer._process_model_before_weight_loading

    def look(self, model, **kwargs):
        result = before(self, model, **kwargs)
        seen.extend((*model.parameters(), *marlin_layers(model)[Q].buffers()))
        return result

    name = "_process_model_before_weight_loading"
    monkeypatch.setattr(integration.MarlinQuantizer, name, look)
    load(saved())
    assert {tensor.device.type for tensor in seen} == {"meta"}


def test_a_packed_head_of_tied_embeddings(tmp_path):
    model = build("llama")
    marlin.quantize(model, 32, skip=[])
    marlin.save_pretrained(model, tmp_path / "model")
    loaded = load(tmp_path / "model")
    assert isinstance(loaded.lm_head, MarlinLinear) and loaded.lm_head.out_features == 100
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert_same(load_pretrained(tmp_path / "again"), model)


def test_the_base_of_a_model_and_back(saved, tmp_path):
    base = AutoModel.from_pretrained(saved("qwen2"))
    whole = load(saved("qwen2"))
    assert_same(base, whole.model)
    base.save_pretrained(tmp_path)
    assert "lm_head" not in str(quantization(tmp_path))
    assert_same(AutoModel.from_pretrained(tmp_path), base)


def test_a_new_head_on_a_quantized_base(saved):
    model = AutoModelForSequenceClassification.from_pretrained(saved("qwen2"), num_labels=3)
    assert_same(model.model, AutoModel.from_pretrained(saved("qwen2")))
    assert torch.isfinite(model.score.weight).all() and model.score.weight.shape == (3, 64)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dense_models_are_rounded_after_loading(name, tmp_path):
    dense = build(name)
    dense.save_pretrained(tmp_path / "dense")
    config = MarlinConfig(group_size=64)
    model = load(tmp_path / "dense", quantization_config=config)
    kept = marlin.quantize(dense, 64)
    assert_same(model, dense)
    model.save_pretrained(tmp_path / "packed")
    assert quantization(tmp_path / "packed")["modules_to_not_convert"] == sorted(kept)
    assert_same(load(tmp_path / "packed"), dense)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_models_that_came_by_their_layers_otherwise_are_saved_too(name, saved, tmp_path):
    for model in (make(name), load_pretrained(saved(name))):
        model.save_pretrained(tmp_path / "model")
        assert quantization(tmp_path / "model") == quantization(saved(name))
        assert_same(load(tmp_path / "model"), model)
        expected = logits(model)
        model.dequantize().save_pretrained(tmp_path / "dense")
        dense = load(tmp_path / "dense")
        torch.testing.assert_close(logits(dense), expected, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------------- without Marlin


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_dequantize(name, saved, tmp_path):
    model = load(saved(name))
    expected = logits(model)
    marlin.quantize(model, 32, skip=["lm_head", "o_proj"])  # finds nothing left to do
    dense = model.dequantize()
    assert not marlin_layers(dense)
    assert not dense.is_quantized and not hasattr(dense.config, "quantization_config")
    torch.testing.assert_close(logits(dense), expected, atol=1e-3, rtol=1e-3)
    dense.save_pretrained(tmp_path)  # an ordinary checkpoint: GPT-2's layers are Conv1D again
    assert_same(AutoModelForCausalLM.from_pretrained(tmp_path), dense)


def test_dequantize_to_another_type(saved):
    model = load(saved()).dequantize(torch.bfloat16)
    layer = model.get_submodule(Q)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16


# --------------------------------------------------------------------------------- refusals


@pytest.fixture
def damaged(saved, tmp_path):
    return shutil.copytree(saved(), tmp_path / "copy")


def rewrite(directory, tensor, change):
    """Replaces a tensor in its file; None drops it, a new name is added beside the final norm."""
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    path = directory / index["weight_map"].get(tensor, index["weight_map"]["model.norm.weight"])
    tensors = {name: value.clone() for name, value in load_file(path).items()}
    new = change(tensors.pop(tensor, None))
    index["weight_map"].pop(tensor, None)
    if new is not None:
        tensors[tensor] = new
        index["weight_map"][tensor] = path.name
    save_file(tensors, path, metadata={"format": "pt"})
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


NORM = "model.norm.weight"
DAMAGES = {
    "no B": (f"{Q}.B", lambda t: None, f"{Q}: missing tensor {Q}.B"),
    "no s": (f"{Q}.s", lambda t: None, rf"missing tensors: {Q}\.s$"),
    "no bias": (f"{Q}.bias", lambda t: None, rf"missing tensors: {Q}\.bias$"),
    "no weight": (NORM, lambda t: None, rf"missing tensors: {NORM}$"),
    "shape of B": (f"{Q}.B", lambda t: t[:2].clone(), r"q_proj\.B: expected shape \(4, 128\)"),
    "shape of s": (f"{Q}.s", lambda t: t[:1].clone(), r"q_proj\.s: expected shape \(2, 64\)"),
    "shape of weight": (NORM, lambda t: t[:5].clone(), r"norm\.weight: expected shape \(64,\)"),
    "type of B": (f"{Q}.B", lambda t: t.float(), r"q_proj\.B: expected torch.int32"),
    "type of s": (f"{Q}.s", lambda t: t.float(), r"q_proj\.s: expected torch.float16 or"),
    "NaN": (f"{Q}.s", lambda t: t.index_fill(0, torch.tensor(0), torch.nan), "not finite"),
    "unknown weight": ("model.surprise", lambda t: torch.zeros(3), "tensors: model.surprise"),
    "unknown layer": ("model.norm.B", lambda t: torch.zeros(3), "no linear layer: model.norm"),
    "packed and not": ("lm_head.B", lambda t: torch.zeros(3), "in modules_to_not_convert: lm_head"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_tensors(damage, damaged):
    tensor, change, message = DAMAGES[damage]
    rewrite(damaged, tensor, change)
    with pytest.raises(CheckpointError, match=message):
        load(damaged)


def test_a_packed_tensor_is_missed_under_a_new_head_too(damaged):
    rewrite(damaged, f"{Q}.s", lambda t: None)
    with pytest.raises(CheckpointError, match=r"missing tensors: model.layers.0.self_attn.q_proj"):
        AutoModelForSequenceClassification.from_pretrained(damaged)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"bits": 8}, "expected bits=4, got 8"),
        ({"format_version": 7}, "expected format_version=1, got 7"),
        ({"group_size": "32"}, "group_size must be"),
        ({"group_size": 64}, r"\.s: expected shape"),
        ({"modules_to_not_convert": []}, r"o_proj: missing tensor .*\.o_proj\.B"),
    ],
)
def test_configurations_that_do_not_fit(change, message, damaged):
    config = json.loads((damaged / "config.json").read_text())
    config["quantization_config"].update(change)
    (damaged / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=message):
        load(damaged)


def test_pickles_are_refused(saved, tmp_path):
    (tmp_path / "config.json").write_text((saved() / "config.json").read_text())
    torch.save({"weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match=r"expected safetensors files, got pytorch_model\.bin"
    ):
        load(tmp_path)


# --------------------------------------------------------------------------------- devices


def test_offloading_to_disk(saved, tmp_path):
    devices = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    devices |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    model = load(saved(), device_map=devices, offload_folder=tmp_path, offload_buffers=True)
    layers = marlin_layers(model)
    assert {t.device.type for t in layers["model.layers.1.mlp.up_proj"].buffers()} == {"meta"}
    reference = load_pretrained(saved())
    assert torch.equal(logits(model), logits(reference))
    with pytest.warns(UserWarning, match="offloaded"):
        model.save_pretrained(tmp_path / "again")
    assert_same(load_pretrained(tmp_path / "again"), reference)
    with pytest.raises(ValueError, match="offloaded model cannot be dequantized"):
        model.dequantize()


def test_device_map_auto(saved):
    model = load(saved(), device_map="auto", max_memory={"cpu": "1GB"})
    assert_same(model, load_pretrained(saved()))


@pytest.mark.parametrize("device_map", [{"": "cuda:0"}, {"model.layers.0": 0, "": "cpu"}])
def test_cuda_that_cannot_run_says_why(device_map, monkeypatch):
    monkeypatch.setattr(integration.ops, "why_no_cuda", lambda: "no CUDA library")
    with pytest.raises(RuntimeError, match=r"cuda.* cannot run: no CUDA library"):
        integration.MarlinQuantizer(MarlinConfig()).validate_environment(device_map=device_map)


def test_gpus_that_are_too_old_say_so(monkeypatch):
    monkeypatch.setattr(integration.ops, "why_no_cuda", lambda: None)
    monkeypatch.setattr(integration, "why_no_gpu", lambda: None)
    monkeypatch.setattr(integration, "describe_gpu", lambda i, b: {"why_not": f"GPU {i} is old"})
    with pytest.raises(RuntimeError, match=r"cuda:1.*GPU 1 is old"):
        integration.MarlinQuantizer(MarlinConfig()).validate_environment(device_map={"": "cuda:1"})


def test_other_devices_and_old_versions_are_refused(monkeypatch):
    quantizer = integration.MarlinQuantizer(MarlinConfig())
    with pytest.raises(ValueError, match="run on cpu and cuda, but device_map asks for mps"):
        quantizer.validate_environment(device_map={"": torch.device("mps")})
    monkeypatch.setattr(integration.importlib.metadata, "version", lambda name: "4.57.1")
    with pytest.raises(ImportError, match=r"needs transformers 5\.14 or newer, this is 4\.57\.1"):
        quantizer.validate_environment()


def test_tensor_parallelism_is_refused(saved):
    config = transformers.AutoConfig.from_pretrained(saved())
    config.distributed_config = {"tp_size": 2}
    with pytest.raises(ValueError, match="not split among processes"):
        load(saved(), config=config)


# ------------------------------------------------------------------- generating, compiling


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_generate_with_a_static_cache_and_compile(saved):
    model = load(saved("mistral"))
    arguments = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(IDS)}
    expected = model.generate(IDS, **arguments)
    assert model._valid_auto_compile_criteria.__name__ and model.hf_quantizer.is_compileable
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    compiled = model.generate(IDS, **arguments, cache_implementation="static")
    assert torch.equal(compiled, expected)


# ------------------------------------------------------------------------------------- GPUs


@pytest.mark.gpu
@pytest.mark.parametrize("device_map", ["cuda:0", "auto"])
def test_device_map_onto_a_gpu(device_map, saved, tmp_path):
    model = load(saved(), device_map=device_map, dtype=torch.float16)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    expected = logits(load(saved(), dtype=torch.float16))
    torch.testing.assert_close(logits(model).cpu(), expected, atol=2e-2, rtol=2e-2)
    model.save_pretrained(tmp_path)
    assert_same(load(tmp_path), load(saved(), dtype=torch.float16))
    dense = logits(model.dequantize()).cpu()
    torch.testing.assert_close(dense, expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_layers_on_a_gpu_and_beside_it(saved, tmp_path):
    devices = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu"}
    devices |= {"model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    model = load(saved(), device_map=devices, dtype=torch.float16, offload_buffers=True)
    expected = logits(load(saved(), dtype=torch.float16))
    torch.testing.assert_close(logits(model).cpu(), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_generate_compiled_on_a_gpu(tmp_path):
    config = transformers.LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, vocab_size=1000, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).half()
    marlin.quantize(model)
    marlin.save_pretrained(model, tmp_path)
    model = load(tmp_path, device_map="cuda:0")
    model.generation_config.eos_token_id = None  # all rows go on to the end
    ids = IDS.cuda()
    arguments = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    # transformers compiles by itself, with CUDA graphs, where the cache is static.
    compiled = model.generate(ids, **arguments, cache_implementation="static")
    assert hasattr(model, "_compiled_call")
    # Sums in another order may turn a tie, and all that follows. So each token is judged by what an
    # eager call makes of those before it: none scores higher, but for rounding.
    with torch.inference_mode():
        scores = model(compiled[:, :-1]).logits[:, ids.shape[1] - 1 :].float()
    new = compiled[:, ids.shape[1] :, None]
    behind = scores.amax(-1) - scores.gather(-1, new).squeeze(-1)
    assert new.shape[1] == 24 and behind.max() < 0.05 * scores.std()
