"""Experts with linears of their own compute what transformers' fused ones do."""

import pytest
import torch

t = pytest.importorskip("transformers")

import marlin  # noqa: E402
from marlin.convert import convert  # noqa: E402
from marlin.experts import LinearExperts, is_fused, put_together, take_apart  # noqa: E402

COMMON = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 100, "max_position_embeddings": 64,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
SMALL = {"moe_intermediate_size": 32, "num_experts_per_tok": 2, "num_experts": 6}
BUILD = {
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**COMMON, num_local_experts=4)),
    "qwen2_moe": lambda: t.Qwen2MoeForCausalLM(
        t.Qwen2MoeConfig(**COMMON, **SMALL, shared_expert_intermediate_size=32)
    ),
    # Transposed, with biases, gate and up interleaved, a gate with limits.
    "gpt_oss": lambda: t.GptOssForCausalLM(
        t.GptOssConfig(**COMMON, num_local_experts=4, num_experts_per_tok=2, head_dim=16)
    ),
    # No gate.
    "nemotron_h": lambda: ungated(),
}


def ungated():
    """transformers has one such class; a model of it needs much else."""
    from transformers.models.nemotron_h import modeling_nemotron_h as nemotron

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            config = t.NemotronHConfig(
                hidden_size=64, moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2
            )
            config._experts_implementation = "eager"
            self.experts = nemotron.NemotronHExperts(config)

        def forward(self, input_ids):
            generator = torch.Generator().manual_seed(0)
            hidden = torch.randn(input_ids.numel(), 64, generator=generator)
            chosen = torch.rand(len(hidden), 4, generator=generator).topk(2)
            return t.utils.ModelOutput(logits=self.experts(hidden, chosen.indices, chosen.values))

    return Model()


def build(name):
    torch.manual_seed(0)
    model = BUILD[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("name", sorted(BUILD))
def test_same_result_taken_apart(name):
    model = build(name)
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        found = take_apart(model)
        torch.testing.assert_close(model(input_ids=ids).logits, expected)
    assert len(found) == (1 if name == "nemotron_h" else 2)
    assert all(isinstance(model.get_submodule(name), LinearExperts) for name in found)
    assert take_apart(model) == []


@pytest.mark.parametrize("name", sorted(BUILD))
def test_put_together_again(name):
    model = build(name)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    take_apart(model)
    put_together(model)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], value) for key, value in before.items())
    ids = torch.randint(100, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, build(name)(input_ids=ids).logits)


def test_packed_experts_stay_apart():
    model = build("mixtral")
    take_apart(model)
    marlin.quantize(model.model.layers[1].mlp, group_size=32)
    put_together(model)
    assert is_fused(model.model.layers[0].mlp.experts)
    assert isinstance(model.model.layers[1].mlp.experts, LinearExperts)


def test_weights_are_views_under_names_of_their_own():
    model = build("mixtral")
    fused = model.model.layers[1].mlp.experts
    weights = {name: parameter.data for name, parameter in fused.named_parameters()}
    take_apart(model)
    experts = model.model.layers[1].mlp.experts
    for index in range(4):
        for part in ("gate_up_proj", "down_proj"):
            linear = model.get_submodule(f"model.layers.1.mlp.experts.{index}.{part}")
            assert torch.equal(linear.weight, weights[part][index])
            storage = linear.weight.untyped_storage()
            assert storage.data_ptr() == weights[part].untyped_storage().data_ptr()
    assert len(experts.state_dict()) == 4 * 2
    with torch.no_grad():  # it is these linears that count
        experts[2].down_proj.weight.zero_()
        token = torch.ones(1, 64)
        assert not experts(token, torch.tensor([[2]]), torch.ones(1, 1)).any()


def test_only_what_a_checkpoint_has_taken_apart():
    model = build("mixtral")
    names = {"model.layers.1.mlp.experts.0.gate_up_proj.B", "model.layers.0.mlp.experts.down_proj"}
    assert take_apart(model, names) == ["model.layers.1.mlp.experts"]


@pytest.mark.parametrize("format", ["marlin", "gptq", "compressed-tensors"])
def test_checkpoints_of_all_formats_are_loaded_onto_them(tmp_path, format):
    model = build("mixtral")
    take_apart(model)
    marlin.quantize(model, group_size=32)
    marlin.save_pretrained(model, tmp_path / "marlin")
    if format != "marlin":
        convert(tmp_path / "marlin", tmp_path / format, format)
    loaded = marlin.load_pretrained(tmp_path / format)
    assert isinstance(loaded.model.layers[0].mlp.experts, LinearExperts)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_experts_of_another_make_are_left_alone():
    config = t.Llama4TextConfig(**COMMON, num_local_experts=4, intermediate_size_mlp=96)
    with torch.device("meta"):
        model = t.Llama4ForCausalLM(config)
    assert take_apart(model) == []
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    assert is_fused(experts)
    experts.extra = torch.nn.Parameter(torch.zeros(1))  # which would be lost
    assert not is_fused(experts)
