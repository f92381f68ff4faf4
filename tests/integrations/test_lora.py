"""LoRA of PEFT on models with Marlin layers."""

import pytest
import torch
from tiny_models import IDS, assert_same, build, logits, marlin_layers
from transformers import AutoModelForCausalLM

peft = pytest.importorskip("peft")
from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402

import marlin  # noqa: E402


def load(directory, **kwargs):
    return AutoModelForCausalLM.from_pretrained(directory, **kwargs)


def lora(**kwargs):
    return LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"} | kwargs)


def train(model, steps=8):
    """The losses on one batch, before each step."""
    ids = IDS.to(model.device)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


@pytest.mark.filterwarnings("error:Unsupported layer type")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_lowers_the_loss_and_leaves_the_base(dtype, saved, tmp_path):
    base = load(saved(), dtype=dtype)
    model = get_peft_model(base, lora())
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1
    expected = logits(model.eval())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load(saved(), dtype=dtype), tmp_path)
    assert torch.equal(logits(again), expected)
    assert_same(model.unload(), load(saved(), dtype=dtype))


def test_all_linear_layers_but_the_head():
    base = build("llama")
    marlin.quantize(base, 32, skip=["o_proj"])  # the head is packed too
    model = get_peft_model(base, lora())
    assert len(adapted(model)) == 14  # seven in each of two layers, o_proj by PEFT's own class
    assert not any("lm_head" in name for name in adapted(model))
    model.add_adapter("second", lora())
    first, second = model.peft_config.values()
    assert first.target_modules == second.target_modules
    layers = adapted(model)
    assert len(layers) == 14 and all("second" in layer.lora_A for layer in layers.values())


def adapted(model):
    return {name: m for name, m in model.named_modules() if hasattr(m, "lora_A")}


def test_through_transformers_own_door(saved, tmp_path):
    model = load(saved())
    before = logits(model)
    model.add_adapter(lora(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted = logits(model)
    assert not torch.equal(adapted, before)
    model.disable_adapters()
    assert torch.equal(logits(model), before)
    model.enable_adapters()
    model.save_pretrained(tmp_path)  # the adapter alone
    assert not (tmp_path / "config.json").exists()
    again = load(saved())
    again.load_adapter(tmp_path)
    assert torch.equal(logits(again), adapted)


def test_merging_needs_a_dense_base(saved):
    for name in ("llama", "gpt2"):
        base = load(saved(name))
        model = get_peft_model(base, lora(init_lora_weights=False)).eval()
        adapted = logits(model)
        with pytest.raises(ValueError, match=r"cannot be merged into 4-bit weights.*dequantize"):
            model.merge_and_unload()
        base.dequantize()
        merged = model.merge_and_unload()
        torch.testing.assert_close(logits(merged), adapted, atol=2e-3, rtol=2e-3)
        assert not marlin_layers(merged)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' reads or changes the base"),
        ({"init_lora_weights": "orthogonal"}, "expected True, False, 'gaussian' or 'eva'"),
        ({"use_dora": True}, "variant"),
    ],
)
def test_variants_that_need_a_dense_weight_are_refused(options, message, saved):
    with pytest.raises(ValueError, match=message):
        get_peft_model(load(saved()), lora(**options))


@pytest.mark.gpu
def test_training_on_a_gpu(saved):
    model = get_peft_model(load(saved(), device_map="cuda:0", dtype=torch.bfloat16), lora())
    assert {p.device.type for p in model.parameters()} == {"cuda"}
    losses = train(model)
    assert losses[-1] < losses[0] - 0.1
    reference = load(saved(), device_map="cuda:0", dtype=torch.bfloat16)
    for name, layer in marlin_layers(model.unload()).items():
        assert_same(layer, reference.get_submodule(name))
