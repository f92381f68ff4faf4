"""Saving and loading Hugging Face models with packed layers, and refusing damaged files."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from marlin import shard_writer
from marlin.checkpoint import CheckpointError, load_pretrained, save_pretrained
from marlin.layer import MarlinLinear, PackedModule, quantize
from marlin.published import replace_linear
from marlin.shards import INDEX

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 96}
GPT2 |= {"bos_token_id": 1, "eos_token_id": 2}

MODELS = {
    "llama tied": lambda t: t.LlamaForCausalLM(
        t.LlamaConfig(
            **SMALL, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=LLAMA3_ROPE
        )
    ),
    "mistral": lambda t: t.MistralForCausalLM(t.MistralConfig(**SMALL, num_key_value_heads=2)),
    "qwen2": lambda t: t.Qwen2ForCausalLM(t.Qwen2Config(**SMALL, num_key_value_heads=2)),
    "gemma3": lambda t: t.Gemma3ForCausalLM(
        t.Gemma3TextConfig(**SMALL, num_key_value_heads=2, head_dim=16)
    ),
    "gpt2": lambda t: t.GPT2LMHeadModel(t.GPT2Config(**GPT2)),
    "bert": lambda t: t.BertModel(t.BertConfig(**SMALL)),
    "bert masked": lambda t: t.BertForMaskedLM(t.BertConfig(**SMALL)),
    "albert": lambda t: t.AlbertModel(t.AlbertConfig(**SMALL, embedding_size=32)),
    "mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**SMALL, num_key_value_heads=2)),
}
IDS = torch.arange(20).reshape(2, 10)


def make(name="llama tied", dtype=torch.float32, group_size=32):
    torch.manual_seed(0)
    model = MODELS[name](transformers)
    if dtype != torch.float32:
        model = type(model)._from_config(model.config, dtype=dtype)
    for parameter in model.parameters():  # biases and norms start as zeros and ones
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    quantize(model, group_size)
    return model.eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A sharded Llama, to be copied and damaged."""
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(make(), directory, max_shard_size="30KB")
    return directory


@pytest.fixture
def damaged(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def shard_of(directory, tensor):
    index = json.loads((directory / INDEX).read_text())
    return directory / index["weight_map"][tensor]


def rewrite(directory, tensor, change):
    """Replaces a tensor in its file; None drops it, there and in the index."""
    path = shard_of(directory, tensor)
    tensors = {name: t.clone() for name, t in load_file(path).items()}
    new = change(tensors.pop(tensor))
    if new is not None:
        tensors[tensor] = new
    save_file(tensors, path)
    index = json.loads((directory / INDEX).read_text())
    if new is None:
        del index["weight_map"][tensor]
        (directory / INDEX).write_text(json.dumps(index))


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


# -------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_as_it_was(name, dtype, tmp_path):
    model = make(name, dtype)
    save_pretrained(model, tmp_path / "model", max_shard_size="20KB")
    assert (tmp_path / "model" / INDEX).exists()
    loaded = load_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], model(IDS)[0])
    assert type(loaded) is type(model) and not loaded.training
    assert loaded.dtype == dtype and loaded.config.dtype == dtype
    before, after = model.state_dict(), loaded.state_dict()
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert tensor.dtype == after[key].dtype and torch.equal(tensor, after[key]), key
    # Rotary frequencies and the like are in no file.
    for (key, tensor), (_, other) in zip(
        model.named_buffers(), loaded.named_buffers(), strict=True
    ):
        assert tensor.dtype == other.dtype and torch.equal(tensor, other), key
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in loaded.named_parameters()]
    assert all(p.requires_grad for p in loaded.parameters())


def test_tied_embeddings_are_stored_once_and_stay_tied(saved):
    names = json.loads((saved / INDEX).read_text())["weight_map"]
    assert "model.embed_tokens.weight" in names and "lm_head.weight" not in names
    model = load_pretrained(saved)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    model.model.embed_tokens.weight.data[0, 0] = 5.0
    assert model.lm_head.weight[0, 0] == 5.0


def test_a_tied_head_needs_no_mention(damaged):
    edit_json(damaged / "config.json", set_quantization(modules_to_not_convert=[]))
    model = load_pretrained(damaged)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_an_embedding_stored_twice(damaged):
    path = shard_of(damaged, "model.embed_tokens.weight")
    add_tensor(damaged, "lm_head.weight", load_file(path)["model.embed_tokens.weight"])
    model = load_pretrained(damaged)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_bias_that_the_model_would_not_have(damaged):
    add_tensor(damaged, f"{Q}.bias", torch.full((64,), 0.5))
    model = load_pretrained(damaged)
    layer, x = model.get_submodule(Q), torch.randn(3, 64)
    bare = MarlinLinear.from_quantized(layer.quantized().codes, layer.quantized().scales)
    torch.testing.assert_close(layer(x), bare(x) + 0.5)


def test_embeddings_tied_by_hand_are_not_lost(tmp_path):
    model = make("mistral")  # whose configuration does not tie them
    model.lm_head.weight = model.model.embed_tokens.weight
    save_pretrained(model, tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path / "model")(IDS)[0], model(IDS)[0])


def test_a_packed_head_beside_tied_embeddings(tmp_path):
    model = make()
    head = nn.Linear(64, 96, bias=False)
    model.lm_head = MarlinLinear.from_linear(head, 32)
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert isinstance(loaded.lm_head, MarlinLinear)
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], model(IDS)[0])


def test_the_configuration_on_disk(saved):
    config = json.loads((saved / "config.json").read_text())
    assert config["quantization_config"] == {
        "quant_method": "marlin",
        "bits": 4,
        "group_size": 32,
        "sym": True,
        "modules_to_not_convert": ["lm_head"],
        "format_version": 1,
        "out_features": {
            f"model.layers.{i}.self_attn.{name}": 32
            for i in range(2)
            for name in ("k_proj", "v_proj")
        },
    }
    assert config["architectures"] == ["LlamaForCausalLM"] and config["dtype"] == "float32"


def test_one_group_as_wide_as_the_layer_is_no_exception(tmp_path):
    save_pretrained(make(group_size=64), tmp_path / "model")  # hidden_size is 64
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == 64 and "group_size_overrides" not in config


def test_layers_of_several_group_sizes(tmp_path):
    model = make(group_size=-1)
    attention = model.model.layers[1].self_attn
    attention.q_proj = MarlinLinear.from_linear(nn.Linear(64, 64, bias=False), 32)
    save_pretrained(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    assert config["group_size"] == -1
    assert config["group_size_overrides"] == {"model.layers.1.self_attn.q_proj": 32}
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path / "model")(IDS)[0], model(IDS)[0])


def test_shared_modules_and_parameters_named_like_ours(tmp_path, monkeypatch):
    class Odd(transformers.LlamaForCausalLM):
        def __init__(self, config):
            super().__init__(config)
            self.model.layers[1].mlp = self.model.layers[0].mlp
            self.model.norm.B = nn.Parameter(torch.randn(3))

    # transformers replaces its module while it is in use: this is the one that imports find.
    monkeypatch.setattr(sys.modules["transformers"], "Odd", Odd, raising=False)
    model = Odd(make().config)
    quantize(model, 32)
    save_pretrained(model, tmp_path / "model")
    names = load_file(tmp_path / "model" / "model.safetensors").keys()
    assert "model.layers.0.mlp.up_proj.B" in names and "model.norm.B" in names
    assert not any(name.startswith("model.layers.1.mlp") for name in names)
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.model.layers[1].mlp is loaded.model.layers[0].mlp
    assert isinstance(loaded.model.layers[1].mlp.up_proj, MarlinLinear)
    assert torch.equal(loaded.model.norm.B, model.model.norm.B)
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], model.eval()(IDS)[0])


def test_published_layers_save_as_well(tmp_path):
    torch.manual_seed(0)
    config = transformers.Qwen2Config(**SMALL, num_key_value_heads=2)
    model = transformers.Qwen2ForCausalLM._from_config(config, dtype=torch.half).eval()
    dense = {n: m for n, m in model.named_modules() if n.endswith("q_proj")}
    # q_proj only: the k and v projections are too narrow for a layer without padding
    replace_linear(model, lambda name: name in dense, groupsize=32)
    for name, linear in dense.items():
        scales = (linear.weight.detach().view(64, 2, 32).abs().amax(2) / 7.5).half()
        model.get_submodule(name).pack(linear, scales)
    save_pretrained(model, tmp_path / "model")
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.model.layers[0].self_attn.q_proj.bias is not None
    with torch.no_grad():
        assert torch.equal(loaded(IDS)[0], model(IDS)[0])


def test_dtype_casts_all_but_the_scales(saved):
    model = load_pretrained(saved, dtype=torch.bfloat16)
    assert model.dtype == model.config.dtype == torch.bfloat16
    scales = {m.s.dtype for m in model.modules() if isinstance(m, PackedModule)}
    assert scales == {torch.float16}
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model(IDS)[0].dtype == torch.bfloat16


def test_generation_config_and_tokenizer_are_kept(tmp_path):
    class Tokenizer:
        def save_pretrained(self, directory):
            (Path(directory) / "tokenizer.json").write_text("{}")

    model = make()
    model.generation_config.max_new_tokens = 7
    model.generation_config.eos_token_id = [2, 3]
    save_pretrained(model, tmp_path / "model", Tokenizer())
    assert (tmp_path / "model" / "tokenizer.json").exists()
    loaded = load_pretrained(tmp_path / "model")
    assert loaded.generation_config.max_new_tokens == 7
    assert loaded.generation_config.eos_token_id == [2, 3]
    assert loaded.generate(IDS[:1], do_sample=False).shape[1] <= 17


def test_files_have_ordinary_permissions(saved):
    modes = {path.stat().st_mode for path in saved.iterdir()}
    assert len(modes) == 1


def test_save_again_and_load_again(saved, tmp_path):
    save_pretrained(load_pretrained(saved), tmp_path / "again", max_shard_size="30KB")
    for path in saved.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


PEAK = """
import sys, torch, transformers
from marlin.checkpoint import load_pretrained
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
transformers.LlamaForCausalLM  # the imports are not what is measured
before = peak()
model = load_pretrained(sys.argv[1])
total = 0
for tensor in (*model.parameters(), *model.buffers()):
    total += tensor.numel() * tensor.element_size()
    tensor.count_nonzero()  # touch it: pages of a mapped file come lazily
print((peak() - before) * 1024 / total)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_loading_takes_the_memory_of_the_checkpoint_once(tmp_path):
    # Dense, the packed layers alone would be 1.6 times the whole checkpoint.
    config = dict(SMALL, vocab_size=8000, hidden_size=1024, intermediate_size=4096)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**config))
    quantize(model, 128)
    save_pretrained(model, tmp_path / "model", max_shard_size="40MB")
    del model
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "model"], capture_output=True, text=True, check=True
    )
    assert float(run.stdout.split()[-1]) < 1.4


# ------------------------------------------------------------------------- interrupted saving


def contents(directory):
    return {p.name: p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def fail_at(call, function):
    """`function`, but the call of that number is interrupted."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        count += 1
        if count == call:
            raise KeyboardInterrupt
        return function(*args, **kwargs)

    return wrapped


@pytest.mark.parametrize(
    ("size", "expected"), [("5GB", 5 * 10**9), ("1.5 mb", 1_500_000), ("7", 7), (2**33, 2**33)]
)
def test_sizes_of_shards(size, expected):
    assert shard_writer.parse_size(size) == expected


@pytest.mark.parametrize("size", ["", "GB", "-1", "5 GiB", 0, "much"])
def test_sizes_that_are_none(size, tmp_path):
    with pytest.raises(ValueError, match="max_shard_size"):
        save_pretrained(make(), tmp_path / "model", max_shard_size=size)
    assert not (tmp_path / "model").exists()


WRITES = (shard_writer.StreamedFile, "write")


@pytest.mark.parametrize("where", [(shard_writer, "save_file"), WRITES, (Path, "rename")])
def test_an_interrupted_save_destroys_nothing(where, damaged, monkeypatch):
    before = contents(damaged)
    monkeypatch.setattr(shard_writer, "HELD", 0 if where == WRITES else 10**6)
    other = make(group_size=64)
    for call in range(1, 100):
        with monkeypatch.context() as patch:
            patch.setattr(*where, fail_at(call, getattr(*where)))
            try:
                save_pretrained(other, damaged, max_shard_size="10KB")
            except KeyboardInterrupt:
                assert contents(damaged) == before
            else:
                break  # there are no more calls to interrupt
    assert 5 < call < 100
    assert torch.equal(load_pretrained(damaged)(IDS)[0], other(IDS)[0])


def test_an_interrupted_first_save_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_writer, "save_file", fail_at(1, save_file))
    with pytest.raises(KeyboardInterrupt):
        save_pretrained(make(), tmp_path / "deep" / "model")
    assert not (tmp_path / "deep" / "model").exists()


def test_saving_over_a_checkpoint_replaces_it_and_spares_other_files(damaged):
    (damaged / "notes.txt").write_text("mine")
    (damaged / "plots").mkdir()
    save_pretrained(make(group_size=64), damaged)
    names = sorted(path.name for path in damaged.iterdir())
    expected = ["config.json", "generation_config.json", "model.safetensors", "notes.txt", "plots"]
    assert names == expected
    assert load_pretrained(damaged).config.quantization_config["group_size"] == 64


@pytest.mark.parametrize("with_tokenizer", [True, False])
def test_a_new_tokenizer_takes_the_whole_old_ones_place(damaged, with_tokenizer):
    class Tokenizer:
        def save_pretrained(self, directory):
            (Path(directory) / "tokenizer.json").write_text("new")

    for name in ("tokenizer.json", "chat_template.jinja", "notes.txt"):
        (damaged / name).write_text("old")
    (damaged / "additional_chat_templates").mkdir()
    (damaged / "additional_chat_templates" / "tool_use.jinja").write_text("old")
    save_pretrained(make(group_size=64), damaged, Tokenizer() if with_tokenizer else None)
    assert (damaged / "notes.txt").read_text() == "old"
    assert (damaged / "tokenizer.json").read_text() == ("new" if with_tokenizer else "old")
    for name in ("chat_template.jinja", "additional_chat_templates"):
        assert (damaged / name).exists() == (not with_tokenizer)


def test_loading_survives_a_save_over_its_files(damaged):
    model = load_pretrained(damaged)
    expected = model(IDS)[0].clone()
    save_pretrained(make(group_size=64), damaged)
    assert torch.equal(model(IDS)[0], expected)


def test_saving_refuses_what_is_not_quantized_or_empty(tmp_path):
    model = MODELS["qwen2"](transformers)
    with pytest.raises(ValueError, match="no Marlin layers"):
        save_pretrained(model, tmp_path / "model")
    model.lm_head = MarlinLinear(64, 96, group_size=32)
    with pytest.raises(ValueError, match="lm_head: scales are not finite"):
        save_pretrained(model, tmp_path / "model")
    model.lm_head = MarlinLinear.from_linear(nn.Linear(64, 96, bias=False), 32)
    model.model.norm.to("meta")
    with pytest.raises(ValueError, match=r"model\.norm\.weight is on the meta device"):
        save_pretrained(model, tmp_path / "model")
    assert not (tmp_path / "model").exists()


# ----------------------------------------------------------------- damaged and hostile files

Q = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"
DAMAGED_TENSORS = {
    "no B": (f"{Q}.B", lambda t: None, f"{Q}: missing tensor {Q}.B"),
    "no s": (f"{Q}.s", lambda t: None, rf"missing tensors: {Q}\.s$"),
    "no weight": (NORM, lambda t: None, rf"missing tensors: {NORM}$"),
    "shape of B": (f"{Q}.B", lambda t: t[:2].clone(), r"q_proj\.B: expected shape \(4, 128\)"),
    "shape of s": (f"{Q}.s", lambda t: t[:1].clone(), r"q_proj\.s: expected shape \(2, 64\)"),
    "shape of weight": (NORM, lambda t: t[:5].clone(), r"norm\.weight: expected shape \(64,\)"),
    "type of B": (f"{Q}.B", lambda t: t.float(), r"q_proj\.B: expected torch.int32"),
    "int64 B": (f"{Q}.B", lambda t: t.long(), r"q_proj\.B: expected torch.int32"),
    "type of s": (f"{Q}.s", lambda t: t.float(), r"q_proj\.s: expected FP16 or BF16"),
    "type of weight": (NORM, lambda t: t.int(), r"norm\.weight: expected floating point"),
    "NaN": (f"{Q}.s", lambda t: t.index_fill(0, torch.tensor(0), torch.nan), "not finite"),
    "Inf": (f"{Q}.s", lambda t: t.index_fill(1, torch.tensor(3), torch.inf), "not finite"),
}


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_damaged_tensors(damage, damaged):
    tensor, change, message = DAMAGED_TENSORS[damage]
    rewrite(damaged, tensor, change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(damaged)


def add_tensor(directory, name, tensor):
    path = shard_of(directory, NORM)
    save_file({**load_file(path), name: tensor}, path)
    edit_json(directory / INDEX, lambda i: i["weight_map"].update({name: path.name}))


@pytest.mark.parametrize(
    "name, message",
    [
        ("model.surprise", "unexpected tensors: model.surprise"),
        ("model.norm.B", "packed weights for what is no linear layer: model.norm"),
        ("lm_head.B", "packed, but in modules_to_not_convert: lm_head"),
        ("lm_head.weight", "tied and stored twice"),
        (f"{Q}.bias", f"{Q}.bias: expected shape"),
    ],
)
def test_tensors_that_do_not_belong(name, message, damaged):
    add_tensor(damaged, name, torch.zeros(96, 64))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(damaged)


@pytest.mark.parametrize(
    "filename",
    [
        "../model.safetensors",
        "/etc/passwd",
        "sub/model.safetensors",
        "..\\model.safetensors",
        "model.bin",
        "",
        "..",
        7,
        None,
    ],
)
def test_an_index_cannot_name_other_files(filename, damaged):
    outside = damaged.parent / "model.safetensors"
    save_file({NORM: torch.ones(64)}, outside)
    edit_json(damaged / INDEX, lambda i: i["weight_map"].update({NORM: filename}))
    with pytest.raises(CheckpointError, match="bad file name"):
        load_pretrained(damaged)


def test_an_index_that_disagrees_with_the_files(damaged):
    other = shard_of(damaged, f"{Q}.B").name
    assert other != shard_of(damaged, NORM).name
    edit_json(damaged / INDEX, lambda i: i["weight_map"].update({NORM: other}))
    with pytest.raises(CheckpointError, match=r"index and files disagree on model\.norm"):
        load_pretrained(damaged)


def test_a_tensor_in_two_files(damaged):
    path = shard_of(damaged, f"{Q}.B")
    save_file({**load_file(path), NORM: torch.ones(64)}, path)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight is in two files"):
        load_pretrained(damaged)


def test_a_missing_or_cut_file(damaged):
    path = shard_of(damaged, NORM)
    data = path.read_bytes()
    for cut in (0, 4, 60, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(CheckpointError, match=path.name):
            load_pretrained(damaged)
    path.unlink()
    with pytest.raises(CheckpointError, match=f"no {path.name}"):
        load_pretrained(damaged)
    (damaged / INDEX).unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load_pretrained(damaged)


@pytest.mark.parametrize("name", [INDEX, "config.json"])
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"weight_map": []}', "\x00", "\udc80"])
def test_broken_json(name, text, damaged):
    (damaged / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError):
        load_pretrained(damaged)


def set_quantization(**values):
    return lambda config: config["quantization_config"].update(values)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.pop("quantization_config"), "not quantized"),
        (set_quantization(quant_method="gptq"), r"missing tensor .*\.qweight|no packed layers"),
        (set_quantization(quant_method="fp8"), "expected a quant_method of gptq, .*got 'fp8'"),
        (set_quantization(bits=8), "expected bits=4, got 8"),
        (set_quantization(sym=False), "zeros missing in model.layers.0"),
        (set_quantization(format_version=2), "expected format_version=1, got 2"),
        (set_quantization(group_size=64), r"\.s: expected shape \(1, 64\), got \(2, 64\)"),
        (set_quantization(group_size=48), "group_size=48 does not fit"),
        (set_quantization(group_size="32"), "group_size must be"),
        (set_quantization(modules_to_not_convert=None), "modules_to_not_convert must be"),
        (set_quantization(modules_to_not_convert=["lm_head", Q]), f"packed, but .* {Q}"),
        (set_quantization(group_size_overrides={Q: "x"}), "q_proj"),
        (lambda c: c.update(architectures=["Nothing"]), "no model 'Nothing'"),
        (lambda c: c.update(architectures=["AutoConfig"]), "no model 'AutoConfig'"),
        (lambda c: c.update(architectures=[]), "no model"),
        (lambda c: c.update(architectures="__name__"), None),
        (lambda c: c.update(architectures=[["x"]]), None),
        (lambda c: c.update(architectures=["BertModel"]), None),
        (lambda c: c.update(model_type="surprise"), "surprise"),
        (lambda c: c.pop("model_type"), "config.json"),
        (lambda c: c.update(hidden_size=32), "expected shape"),
        (lambda c: c.update(hidden_size=-64), "config.json"),
        (lambda c: c.update(num_hidden_layers=1), "no linear layer: model.layers.1"),
        (lambda c: c.update(num_hidden_layers=3), "missing tensor model.layers.2"),
        (lambda c: c.update(vocab_size="many"), "config.json"),
        (lambda c: c.update(dtype="nonsense"), None),
    ],
)
def test_configurations_that_do_not_fit(change, message, damaged):
    edit_json(damaged / "config.json", change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(damaged)


def test_code_beside_a_checkpoint_is_not_run(damaged):
    (damaged / "evil.py").write_text("raise SystemExit('run')\n")
    entry = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    edit_json(damaged / "config.json", lambda c: c.update(auto_map=entry))
    assert type(load_pretrained(damaged)).__name__ == "LlamaForCausalLM"
    edit_json(damaged / "config.json", lambda c: c.update(model_type="evil"))
    with pytest.raises(CheckpointError):
        load_pretrained(damaged)


def test_a_directory_that_is_none(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_pretrained(tmp_path / "nowhere")


def test_importing_marlin_imports_no_transformers():
    code = "import sys, marlin.checkpoint; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 0


@pytest.mark.gpu
def test_loading_onto_a_gpu(saved, tmp_path):
    model = load_pretrained(saved, "cuda", torch.float16)
    assert {t.device.type for t in (*model.parameters(), *model.buffers())} == {"cuda"}
    cpu = load_pretrained(saved, dtype=torch.float16)
    torch.testing.assert_close(model(IDS.cuda())[0].cpu(), cpu(IDS)[0], atol=2e-2, rtol=2e-2)
    moved = load_pretrained(saved, dtype=torch.float16).to("cuda")
    assert torch.equal(moved(IDS.cuda())[0], model(IDS.cuda())[0])
    save_pretrained(model, tmp_path / "model")
    assert torch.equal(
        load_pretrained(tmp_path / "model", "cuda")(IDS.cuda())[0], model(IDS.cuda())[0]
    )
