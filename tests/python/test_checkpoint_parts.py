"""The native checkpoint of layers with zero points and with rows in an order of their own."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from marlin.checkpoint import CheckpointError, load_pretrained, save_pretrained
from marlin.layer import MarlinLinear, dense_layers, quantize

CONFIG = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 96,
          "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
          "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}  # fmt: skip
IDS = torch.arange(20).reshape(2, 10)
Q = "model.layers.0.self_attn.q_proj"


def make(zeros, order):
    """A small Llama; `zeros(name)` and `order(name)` say which layers have them."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG)).eval()
    for dense in list(dense_layers(model)):
        if dense.attribute == "lm_head":
            continue
        n, k = dense.module.weight.shape
        groups = k // 32
        layer = MarlinLinear.from_quantized(
            torch.randint(0, 16, (k, n), dtype=torch.uint8),
            (torch.rand(groups, n) * 0.02).half(),
            None,
            torch.randint(0, 17, (groups, n), dtype=torch.uint8) if zeros(dense.name) else None,
            torch.randperm(k) % groups if order(dense.name) else None,
        )
        dense.replace(layer)
    return model


def always(name):
    return True


def never(name):
    return False


def in_first_layer(name):
    return name.startswith("model.layers.0.")


def quantization(directory):
    return json.loads((directory / "config.json").read_text())["quantization_config"]


@pytest.mark.parametrize("zeros", [always, never, in_first_layer])
@pytest.mark.parametrize("order", [always, never, in_first_layer])
def test_a_model_comes_back_as_it_was(zeros, order, tmp_path):
    model = make(zeros, order)
    save_pretrained(model, tmp_path, max_shard_size="20KB")
    config = quantization(tmp_path)
    assert config["sym"] == (zeros is never)
    assert config.get("desc_act", False) == (order is not never)
    for part, has in (("zeros", zeros), ("perm", order)):
        without = config.get(f"modules_without_{part}", [])
        assert (len(without) == 7) == (has is in_first_layer) and not any(map(has, without))
    for device_dtype in (None, torch.bfloat16):
        loaded = load_pretrained(tmp_path, dtype=device_dtype)
        before, after = model.state_dict(), loaded.state_dict()
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            if name.endswith((".B", ".s", ".zeros", ".perm")):
                assert tensor.dtype == after[name].dtype and torch.equal(tensor, after[name]), name
    with torch.no_grad():
        assert torch.equal(load_pretrained(tmp_path)(IDS)[0], model(IDS)[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("saved") / "model"
    save_pretrained(make(always, always), directory)
    return directory


@pytest.fixture
def damaged(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def rewrite(directory, name, change):
    """Replaces a tensor in the file; None drops it."""
    tensors = load_file(directory / "model.safetensors")
    tensors[name] = change(tensors.pop(name))
    kept = {n: t.clone() for n, t in tensors.items() if t is not None}
    save_file(kept, directory / "model.safetensors")


@pytest.mark.parametrize(
    "part, change, message",
    [
        ("zeros", lambda t: None, f"by the configuration, zeros missing in {Q}$"),
        ("zeros", lambda t: t.int(), r"q_proj\.zeros: expected torch.uint8, got torch.int32"),
        ("zeros", lambda t: t[:1], r"q_proj\.zeros: expected shape \(2, 64\), got \(1, 64\)"),
        ("zeros", lambda t: t + 16, r"q_proj\.zeros: expected values 0 to 16, got"),
        ("perm", lambda t: None, f"by the configuration, perm missing in {Q}$"),
        ("perm", lambda t: t.long(), r"q_proj\.perm: expected torch.int32, got torch.int64"),
        ("perm", lambda t: t[:9], r"q_proj\.perm: expected shape \(64,\), got \(9,\)"),
        ("perm", lambda t: t - 1, r"q_proj\.perm: expected each of 0 to 63 once"),
        ("perm", lambda t: t + 2**30, r"q_proj\.perm: expected each of 0 to 63 once"),
        ("perm", lambda t: t.clamp(max=62), r"q_proj\.perm: expected each of 0 to 63 once"),
    ],
)
def test_damaged_parts(part, change, message, damaged):
    rewrite(damaged, f"{Q}.{part}", change)
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(damaged)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"sym": True}, "by the configuration, no zeros in model.layers.0"),
        ({"desc_act": False}, "by the configuration, no perm in model.layers.0"),
        ({"modules_without_zeros": [Q]}, f"by the configuration, no zeros in {Q}$"),
        ({"modules_without_perm": [Q]}, f"by the configuration, no perm in {Q}$"),
        ({"modules_without_perm": Q}, "modules_without_perm must be"),
        ({"sym": None}, "sym must be"),
        ({"sym": 0}, "sym must be"),
        ({"desc_act": "yes"}, "desc_act must be"),
    ],
)
def test_a_configuration_that_disagrees(values, message, damaged):
    raw = json.loads((damaged / "config.json").read_text())
    raw["quantization_config"].update(values)
    (damaged / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=message):
        load_pretrained(damaged)


def test_zeros_are_asked_for_where_files_have_none(tmp_path):
    """sym: false over a symmetric checkpoint: what got lost cannot be told from what never was."""
    model = make(never, never)
    save_pretrained(model, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    raw["quantization_config"]["sym"] = False
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match=r"zeros missing in model\.layers\.0"):
        load_pretrained(tmp_path)
    dense = transformers.LlamaForCausalLM(transformers.LlamaConfig(**CONFIG))
    quantize(dense, 32)
    save_pretrained(dense, tmp_path)  # saving again mends it
    assert load_pretrained(tmp_path).config.quantization_config["sym"] is True
