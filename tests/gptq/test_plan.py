"""What gets quantized, what does not, and what is said about it."""

import pytest
import torch
import transformers as t
from models import COMMON, DECODER, build
from torch import nn

from gptq.plan import GroupSizeError, find_blocks, make_plan
from marlin.experts import take_apart


def llama(**changes):
    with torch.device("meta"):
        return t.LlamaForCausalLM(t.LlamaConfig(**{**DECODER, **changes}))


@pytest.mark.parametrize(
    "name, blocks",
    [
        ("llama", "model.layers"),
        ("gemma3", "model.layers"),
        ("gpt2", "transformer.h"),
        ("bert", "encoder.layer"),
        ("mixtral", "model.layers"),
    ],
)
def test_blocks_are_the_models_layers(name, blocks):
    assert list(find_blocks(build(name))) == [f"{blocks}.{i}" for i in range(3)]


def test_the_heaviest_tower_is_the_one_to_quantize():
    model = nn.Module()
    model.vision = nn.ModuleList(nn.Linear(32, 32) for _ in range(8))
    model.text = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
    assert list(find_blocks(model)) == [f"text.{i}" for i in range(4)]
    plan = make_plan(model, 32)
    assert plan.kept["vision.0"] == "outside the decoder layers"


def test_head_embeddings_and_poolers_stay():
    kept = make_plan(build("llama"), 32).kept
    assert kept == {
        "lm_head": "outside the decoder layers",
        "model.embed_tokens": "embedding",
    }
    assert make_plan(build("bert"), 32).kept["pooler.dense"] == "outside the decoder layers"


def test_experts_are_taken_apart_and_what_is_not_is_named():
    with torch.device("meta"):
        model = t.MixtralForCausalLM(t.MixtralConfig(**DECODER, num_local_experts=4))
    plan = make_plan(model, 32)
    assert plan.kept["model.layers.0.mlp.experts"].startswith("experts in one tensor")
    assert plan.kept["model.layers.0.mlp.gate"] == "not a linear layer"
    attention = {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {target.name.split(".")[-1] for target in plan.all_targets()} == attention
    take_apart(model)
    plan = make_plan(model, 32)
    assert "model.layers.0.mlp.experts" not in plan.kept
    assert len(plan.all_targets()) == 3 * (4 + 4 * 2)


def test_a_group_size_that_divides_no_k_says_which_would():
    with pytest.raises(GroupSizeError) as caught:
        make_plan(llama(), 128)
    message = str(caught.value)
    assert "group size 128 does not divide the inputs of model.layers.0.self_attn.q_proj" in message
    assert "and 18 more" in message  # 21 in all, three named
    assert "for k = 64 32, 64, -1; for k = 160 32, -1" in message
    assert "--group-size 32 takes every layer" in message


def test_advice_is_the_largest_size_that_every_layer_takes():
    with pytest.raises(GroupSizeError, match="--group-size 64 takes"):
        make_plan(llama(hidden_size=192, head_dim=48, intermediate_size=320), 128)
    # 192 would take 64 too, but the down projection's 160 would not.
    with pytest.raises(GroupSizeError, match="--group-size 32 takes"):
        make_plan(llama(hidden_size=192, head_dim=48), 128)
    # 544 = 17 * 32: the other layer's 128 is not to be recommended.
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(128, 8), nn.Linear(544, 8)])
    with pytest.raises(GroupSizeError, match="--group-size 32 takes"):
        make_plan(model, 128)
    assert len(make_plan(model, -1).all_targets()) == 2


def test_k_that_no_group_size_divides_stays_full_precision():
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(128, 8), nn.Linear(80, 8), nn.Linear(100, 8)])
    plan = make_plan(model, 64)
    assert [target.name for target in plan.all_targets()] == ["layers.0"]
    assert plan.kept == {
        "layers.1": "no group size divides k = 80, only -1 would do",
        "layers.2": "k = 100 is not a multiple of 16",
    }
    assert [target.name for target in make_plan(model, -1).all_targets()] == [
        "layers.0",
        "layers.1",
    ]


def test_skipped_layers_stay_and_unblock_a_group_size():
    plan = make_plan(llama(), 64, skip=["*.down_proj", "model.layers.0.*"])
    assert len(plan.all_targets()) == 2 * 6
    assert plan.kept["model.layers.1.mlp.down_proj"] == "skipped on request"
    assert plan.kept["model.layers.0.self_attn.q_proj"] == "skipped on request"


def test_a_pattern_that_matches_nothing_is_an_error():
    """Also where the layer that was meant fits no group size; what stays anyway may be named."""
    for skip in (["*.down_proj", "*.dwn_proj"], ["*.dwn_proj"]):
        with pytest.raises(ValueError, match=r"^skip: .* got '\*\.dwn_proj'$"):
            make_plan(llama(), 64, skip=skip)
    for skip in ("lm_head", "model.embed_tokens", "*.input_layernorm"):
        assert len(make_plan(llama(), 32, skip=[skip]).all_targets()) == 3 * 7


def test_a_layer_that_hangs_in_two_places_is_one_target():
    model = build("llama")
    model.model.layers[1].mlp.gate_proj = model.model.layers[0].mlp.gate_proj
    names = [target.name for target in make_plan(model, 32).all_targets()]
    assert "model.layers.0.mlp.gate_proj" in names
    assert "model.layers.1.mlp.gate_proj" not in names


def test_nothing_to_quantize_is_an_error():
    with pytest.raises(ValueError, match="found none in Linear"):
        make_plan(nn.Linear(64, 64), 32)
    with pytest.raises(ValueError, match=r"found none \(.*lm_head: outside"):
        make_plan(build("llama"), 32, skip=["*layers*"])
    with pytest.raises(ValueError, match="expected one of -1, 32, 64, 128, got 100"):
        make_plan(build("llama"), 100)


def test_planning_needs_no_weights():
    with torch.device("meta"):
        model = t.BertModel(t.BertConfig(**COMMON))
    assert len(make_plan(model, 32).all_targets()) == 18
