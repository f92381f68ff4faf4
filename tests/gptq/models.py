"""Small randomly initialised models of every architecture the walk must know, and a tokenizer."""

from pydoc_data.topics import topics

import torch
import transformers as t

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
    model.save_pretrained(directory)
    tokenizer().save_pretrained(directory)
    return model
