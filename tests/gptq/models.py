"""Small randomly initialised models of every architecture the walk must know, and a tokenizer."""

import json
from pydoc_data.topics import topics

import torch
import transformers as t

from marlin.experts import is_fused, take_apart

HIDDEN, MLP, VOCABULARY = 64, 160, 300
COMMON = {
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 96,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
DECODER = {**COMMON, "num_key_value_heads": 2}
GPT2 = {"n_embd": HIDDEN, "n_inner": MLP, "n_layer": 3, "n_head": 4, "n_positions": 96}


def gemma3():
    # Local and global layers get different masks and different rotary embeddings.
    config = t.Gemma3TextConfig(
        **DECODER,
        head_dim=16,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    return t.Gemma3ForCausalLM(config)


BUILD = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**DECODER, tie_word_embeddings=True)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**DECODER, sliding_window=8)),
    "qwen2": lambda: t.Qwen2ForCausalLM(t.Qwen2Config(**DECODER)),
    "gemma3": gemma3,
    "gpt2": lambda: t.GPT2LMHeadModel(
        t.GPT2Config(**GPT2, vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2)
    ),
    # Four experts per layer, two for each token; transformers keeps them in one tensor.
    "mixtral": lambda: t.MixtralForCausalLM(t.MixtralConfig(**DECODER, num_local_experts=4)),
    "bert": lambda: t.BertModel(t.BertConfig(**COMMON)),
}


def build(name, seed=0):
    """A model whose weights are large enough for every layer to matter, in FP32."""
    torch.manual_seed(seed)
    model = BUILD[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(3)
            else:  # biases start at zero and norms at one, which would hide a lost one
                parameter.add_(0.1 * torch.randn_like(parameter))
    take_apart(model)
    return model


def token_samples(lengths=(24, 9, 40, 17), seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (1, n), generator=generator) for n in lengths]


def tokenizer():
    """A byte-pair tokenizer of 300 tokens that puts <s> before every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    special = ["<pad>", "<s>", "</s>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([topics["for"], topics["class"]], trainer)
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return t.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def save(name, directory):
    """A model directory as people have them: config, weights, tokenizer."""
    model = build(name)
    fused = BUILD[name]()
    if mixture := [path for path, module in fused.named_modules() if is_fused(module)]:
        fused.load_state_dict(fuse(model.state_dict(), mixture))
        fused.save_pretrained(directory)
    else:
        model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return model


def fuse(state, paths):
    """The state dict with experts in one tensor each, as transformers has them."""
    fused = {}
    for name, tensor in state.items():
        path = next((path for path in paths if name.startswith(f"{path}.")), None)
        if path is None:
            fused[name] = tensor
        else:
            _, part, _ = name.removeprefix(f"{path}.").split(".")
            fused.setdefault(f"{path}.{part}", []).append(tensor)
    return {
        name: torch.stack(value) if isinstance(value, list) else value
        for name, value in fused.items()
    }


def save_gguf(path):
    """A llama of the same size as a GGUF file, the way llama.cpp's converter would write it."""
    import gguf

    model, core = build("llama"), tokenizer()
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)

    vocabulary = core.get_vocab()
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(sorted(vocabulary, key=vocabulary.get))
    writer.add_token_types([3] * 3 + [1] * (len(vocabulary) - 3))
    merges = json.loads(core.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    names = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    for i, layer in enumerate(model.model.layers):
        for ours, theirs in names.items():
            weight = layer.get_submodule(ours).weight.detach()
            if theirs in ("attn_q", "attn_k"):  # llama.cpp interleaves the halves of each head
                heads = weight.shape[0] // config.head_dim
                weight = weight.unflatten(0, (heads, 2, config.head_dim // 2))
                weight = weight.transpose(1, 2).flatten(0, 2)
            writer.add_tensor(f"blk.{i}.{theirs}.weight", weight.contiguous().numpy())
    writer.add_tensor("token_embd.weight", model.model.embed_tokens.weight.detach().numpy())
    writer.add_tensor("output_norm.weight", model.model.norm.weight.detach().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model
