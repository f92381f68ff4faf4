"""Tiny models with what the format allows, and how to compare two of them."""

import torch
import transformers as t

import marlin
from marlin.layer import MarlinLinear

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": 100,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DECODER = {**SMALL, "num_key_value_heads": 2}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": 100}
BUILD = {
    "llama": lambda: t.LlamaForCausalLM(
        t.LlamaConfig(**DECODER, tie_word_embeddings=True, attention_bias=True)
    ),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**DECODER)),
    "mistral_wide": lambda: t.MistralForCausalLM(  # every layer a multiple of 64 wide
        t.MistralConfig(**SMALL, num_key_value_heads=4)
    ),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**DECODER, num_local_experts=2)),
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SMALL)),
}
IDS = torch.arange(3, 23).reshape(2, 10)


def build(name, dtype=torch.float32):
    """A dense model, with biases and norms that are not what they start as."""
    torch.manual_seed(0)
    model = BUILD[name]()
    if dtype != torch.float32:  # unlike a cast, this leaves rotary frequencies alone
        model = type(model)._from_config(model.config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.02)
    return model.eval()


def make(name, dtype=torch.float32):
    """Quantized, with what the format allows: groups of two sizes, a padded and a dense layer."""
    model = build(name, dtype)
    if name == "llama":  # k and v projections have 32 outputs: these are padded too
        model.model.layers[1].mlp.down_proj = MarlinLinear.from_linear(
            model.model.layers[1].mlp.down_proj, 64, torch.bfloat16
        )
        marlin.quantize(model, 32, skip=["lm_head", "model.layers.0.self_attn.o_proj"])
    else:
        marlin.quantize(model, 32)
    return model.eval()


def marlin_layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, MarlinLinear)}


def logits(model):
    with torch.no_grad():
        return model(IDS.to(model.device)).logits


def assert_same(model, other):
    """The same tensors of the same types under the same names, buffers that are not stored too."""
    ours, theirs = dict(model.state_dict()), dict(other.state_dict())
    ours.update(model.named_buffers())
    theirs.update(other.named_buffers())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert tensor.dtype == theirs[name].dtype, name
        assert torch.equal(tensor, theirs[name]), name
