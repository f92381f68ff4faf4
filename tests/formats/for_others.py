"""Checkpoints as we write them, of each kind that GPTQModel and vLLM were given to read."""

import hashlib
import json
from dataclasses import dataclass

import by_definition as by
import torch

from marlin.convert import convert

FIRST, SECOND = "model.layers.0", "model.layers.1"
ATTENTION = tuple(f"{SECOND}.self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj"))
SAME_INPUT = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


@dataclass(frozen=True)
class Kind:
    group_size: int = 32
    zeros: tuple[int, int] | None = None
    act_order: bool = False
    per_column: tuple[str, ...] = ()  # layers with a scale per column among others in groups
    dense: tuple[str, ...] = ()  # layers that are not packed


KINDS = {
    "symmetric": Kind(),
    "a scale per column": Kind(group_size=-1),
    "zero points": Kind(zeros=(1, 15)),
    "act-order": Kind(act_order=True),
    "zero points, act-order": Kind(zeros=(1, 15), act_order=True),
    "layers of different kinds": Kind(
        per_column=(f"{FIRST}.mlp.down_proj",), dense=(f"{SECOND}.self_attn.o_proj",)
    ),
    # vLLM makes one layer of those that read one input.
    "fused layers of different kinds": Kind(
        per_column=(f"{FIRST}.mlp.gate_proj", f"{FIRST}.mlp.up_proj"), dense=ATTENTION
    ),
}
GIVEN_TO_VLLM = {
    "gptq": list(KINDS),
    "compressed-tensors": [name for name, kind in KINDS.items() if not kind.act_order],
}


def write(name: str, directory, format: str = "gptq"):
    """directory/format, which `marlin convert` wrote.

    Returns what its packed layers hold, {name: by.Weight}, and its other tensors by name.
    """
    kind = KINDS[name]
    weights = by.llama_weights(kind.group_size, zeros=kind.zeros, act_order=kind.act_order)
    for layer, weight in weights.items():  # as GPTQ has it: rows are in the order of the inputs
        parent, _, leaf = layer.rpartition(".")
        weight.g_idx = weights[f"{parent}.{SAME_INPUT.get(leaf, leaf)}"].g_idx
    for seed, layer in enumerate(kind.per_column):
        weights[layer] = by.random_weight(*weights[layer].codes.shape, 1, seed=seed)
    dense = by.llama_dense()
    for layer in kind.dense:
        dense[f"{layer}.weight"] = weights.pop(layer).values().t().half().contiguous()
    config = by.gptq_config(
        kind.group_size,
        checkpoint_format="gptq_v2",
        sym=kind.zeros is None,
        desc_act=kind.act_order,
        dynamic={layer: {"group_size": -1} for layer in kind.per_column},
    )
    source = directory / "source"
    by.write_checkpoint(source, lambda w: by.gptq(w, 2), weights, config, dense=dense)
    convert(source, directory / format, format)
    return weights, dense


def config_of(directory) -> dict:
    """What the checkpoint says of its quantization, but for who made it."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    config.pop("meta", None)
    return config


def digest(tensor: torch.Tensor) -> str:
    """Of type, shape and values; both zeros are one."""
    tensor = (tensor + 0).contiguous()
    text = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(text + tensor.numpy().tobytes()).hexdigest()[:32]


def digests(tensors: dict[str, torch.Tensor]) -> dict[str, str]:
    return {name: digest(tensor) for name, tensor in tensors.items()}
