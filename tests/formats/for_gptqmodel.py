"""GPTQ checkpoints as we write them, of each kind that GPTQModel was given to read."""

import hashlib
import json

import by_definition as by
import torch

from marlin.convert import convert

KINDS = {
    "symmetric": {},
    "a scale per column": {"group_size": -1},
    "zero points": {"zeros": (1, 15)},
    "act-order": {"act_order": True},
    "zero points, act-order": {"zeros": (1, 15), "act_order": True},
    "layers of different kinds": {},
}
COLUMN, DENSE = "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj"


def write(kind: str, directory) -> dict[str, by.Weight]:
    """directory/gptq, which `marlin convert` wrote; returns what its layers hold."""
    arguments = KINDS[kind]
    weights, dense, more = by.llama_weights(**arguments), by.llama_dense(), {}
    if kind == "layers of different kinds":
        weights[COLUMN] = by.random_weight(96, 64, 1)
        kept = weights.pop(DENSE).values().t().half().contiguous()
        dense[f"{DENSE}.weight"] = kept
        more["dynamic"] = {COLUMN: {"group_size": -1}}
    config = by.gptq_config(
        arguments.get("group_size", 32),
        checkpoint_format="gptq_v2",
        sym="zeros" not in arguments,
        desc_act="act_order" in arguments,
        **more,
    )
    source = directory / "source"
    by.write_checkpoint(source, lambda w: by.gptq(w, 2), weights, config, dense=dense)
    convert(source, directory / "gptq", "gptq")
    return weights


def config_of(directory) -> dict:
    """What the checkpoint says of its quantization, but for who made it."""
    config = json.loads((directory / "config.json").read_text())["quantization_config"]
    del config["meta"]
    return config


def digest(tensor: torch.Tensor) -> str:
    """Of type, shape and values; both zeros are one."""
    tensor = (tensor + 0).contiguous()
    text = f"{tensor.dtype} {tuple(tensor.shape)} ".encode()
    return hashlib.sha256(text + tensor.numpy().tobytes()).hexdigest()[:32]
