"""Checkpoints as each format's definition has them: slow, one nibble at a time, to be read.

Nothing here comes from marlin: what this writes, an implementation of its own has written.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
import transformers
from safetensors.torch import save_file

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass
class Weight:
    codes: np.ndarray  # (k, n), 0 to 15
    scales: torch.Tensor  # (groups, n)
    zeros: np.ndarray  # (groups, n)
    g_idx: np.ndarray  # (k,)

    def values(self) -> torch.Tensor:
        """float64 (k, n), row by row."""
        scales = self.scales.double().numpy()
        rows = [
            (self.codes[r].astype(float) - self.zeros[g]) * scales[g]
            for r, g in enumerate(self.g_idx)
        ]
        return torch.from_numpy(np.stack(rows))


def random_weight(
    k, n, groups, *, zeros=None, act_order=False, dtype=torch.float16, seed=0
) -> Weight:
    """zeros: (least, most), None for symmetric."""
    rng = np.random.default_rng([seed, k, n, groups])
    scales = torch.from_numpy(rng.uniform(-0.02, 0.02, (groups, n))).to(dtype)
    g_idx = np.arange(k) // (k // groups)
    if act_order:
        g_idx = rng.permutation(g_idx)
    low, high = zeros or (8, 8)
    return Weight(
        rng.integers(0, 16, (k, n)), scales, rng.integers(low, high + 1, (groups, n)), g_idx
    )


def words(nibbles: np.ndarray) -> torch.Tensor:
    """(..., 8) values of four bits, lowest first -> (...) int32."""
    value = np.zeros(nibbles.shape[:-1], dtype=np.uint64)
    for j in range(8):
        assert nibbles[..., j].min() >= 0 and nibbles[..., j].max() <= 15
        value |= nibbles[..., j].astype(np.uint64) << np.uint64(4 * j)
    return torch.from_numpy(value.astype(np.uint32).view(np.int32))


def along_rows(codes: np.ndarray) -> torch.Tensor:
    k, n = codes.shape
    nibbles = np.zeros((-(-k // 8), n, 8), dtype=np.int64)
    for r in range(k):
        nibbles[r // 8, :, r % 8] = codes[r]
    return words(nibbles)


def along_columns(codes: np.ndarray, order=range(8)) -> torch.Tensor:
    rows, n = codes.shape
    nibbles = np.zeros((rows, n // 8, 8), dtype=np.int64)
    for j, column in enumerate(order):
        nibbles[:, :, j] = codes[:, column::8]
    return words(nibbles)


def gptq(weight: Weight, version=1) -> dict[str, torch.Tensor]:
    return {
        "qweight": along_rows(weight.codes),
        "qzeros": along_columns(weight.zeros - (version == 1)),
        "scales": weight.scales,
        "g_idx": torch.from_numpy(weight.g_idx).to(torch.int32),
    }


def awq(weight: Weight) -> dict[str, torch.Tensor]:
    return {
        "qweight": along_columns(weight.codes, AWQ_ORDER),
        "qzeros": along_columns(weight.zeros, AWQ_ORDER),
        "scales": weight.scales,
    }


def compressed_tensors(weight: Weight) -> dict[str, torch.Tensor]:
    k, n = weight.codes.shape
    parts = {
        "weight_packed": along_rows(weight.codes).t().contiguous(),
        "weight_scale": weight.scales.t().contiguous(),
        "weight_shape": torch.tensor([n, k]),
    }
    if (weight.zeros != 8).any():
        parts["weight_zero_point"] = along_rows(weight.zeros.T)
    if (np.diff(weight.g_idx) < 0).any():
        parts["weight_g_idx"] = torch.from_numpy(weight.g_idx).to(torch.int32)
    return parts


def marlin(weight: Weight) -> dict[str, torch.Tensor]:
    """B and s of a symmetric weight; k % 16 and n % 64 are 0."""
    k, n = weight.codes.shape
    nibbles = np.zeros((k // 16, n // 64, 32, 4, 8), dtype=np.int64)
    for lane in range(32):
        g, t = lane // 4, lane % 4
        places = [(2 * t, g), (2 * t + 8, g), (2 * t, g + 8), (2 * t + 8, g + 8)]
        places += [(row + 1, column) for row, column in places]
        for j in range(4):
            for nibble, (row, column) in enumerate(places):
                nibbles[:, :, lane, j, nibble] = weight.codes[row::16, 16 * j + column :: 64]
    order = np.arange(n)
    if len(weight.scales) > 1:
        order = order.reshape(-1, 8, 8).transpose(0, 2, 1).reshape(-1)
    else:
        pattern = np.array([0, 1, 8, 9, 16, 17, 24, 25])
        within = np.concatenate([2 * i + pattern for i in range(4)])
        order = (np.arange(0, n, 32)[:, None] + within).reshape(-1)
    return {
        "B": words(nibbles).reshape(k // 16, -1),
        "s": weight.scales[:, torch.from_numpy(order)].contiguous(),
    }


def autoawq_marlin(weight: Weight) -> dict[str, torch.Tensor]:
    parts = marlin(weight)
    return {"qweight": parts["B"], "scales": parts["s"]}


def gptq_config(group_size=32, **more) -> dict:
    values = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "desc_act": False}
    return values | {"sym": True, "checkpoint_format": "gptq"} | more


def awq_config(group_size=32, **more) -> dict:
    values = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True}
    return values | {"version": "gemm"} | more


def compressed_tensors_config(group_size=32, symmetric=True, **more) -> dict:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": symmetric,
        "strategy": "channel" if group_size == -1 else "group",
        "group_size": None if group_size == -1 else group_size,
        "dynamic": False,
    } | more
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }


def marlin_config(group_size=32, **more) -> dict:
    values = {"quant_method": "marlin", "bits": 4, "group_size": group_size, "sym": True}
    return values | {"modules_to_not_convert": ["lm_head"], "format_version": 1} | more


LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "dtype": "float16",
}
TOKENS = torch.arange(40)[None]
LAYERS = {  # (k, n), of which some n are no multiples of 64
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 96),
    "mlp.up_proj": (64, 96),
    "mlp.down_proj": (96, 64),
}


def llama_weights(group_size=32, **kinds) -> dict[str, Weight]:
    """Random packed layers of the little Llama."""
    weights = {}
    for index in range(2):
        for layer, (k, n) in LAYERS.items():
            groups = 1 if group_size == -1 else k // group_size
            name = f"model.layers.{index}.{layer}"
            weights[name] = random_weight(k, n, groups, seed=len(weights), **kinds)
    return weights


def llama_dense(dtype=torch.float16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)

    def random(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {"model.embed_tokens.weight": random(96, 64), "lm_head.weight": random(96, 64)}
    for norm in ("input_layernorm", "post_attention_layernorm"):
        tensors |= {f"model.layers.{i}.{norm}.weight": random(64) for i in range(2)}
    return tensors | {"model.norm.weight": random(64)}


def llama_model(weights, dense):
    """The little Llama of transformers, float16, with the values of the weights in its layers."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA)).half().eval()
    values = {f"{name}.weight": weight.values().t().half() for name, weight in weights.items()}
    model.load_state_dict(dense | values)
    return model


def write_checkpoint(directory, parts_of, weights, config, *, shards=2, dense=None, model=LLAMA):
    """A directory with packed layers, dense tensors, an index, and a tokenizer's file."""
    directory.mkdir(parents=True)
    tensors = dict(llama_dense() if dense is None else dense)
    for name, weight in weights.items():
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts_of(weight).items()}
    (directory / "config.json").write_text(json.dumps(model | {"quantization_config": config}))
    (directory / "tokenizer.json").write_text('{"a": "tokenizer"}')
    if shards == 1:
        save_file(tensors, directory / "model.safetensors")
        return directory
    weight_map = {}
    for shard in range(shards):  # dealt like cards: parts of a layer lie in different files
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        mine = {name: tensors[name] for name in sorted(tensors)[shard::shards]}
        save_file(mine, directory / file)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory
