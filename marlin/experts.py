"""Mixtures of experts with a linear layer for each expert's matrix.

transformers 5 keeps the experts of a layer in 3-D parameters, one for all of them. Marlin layers
stand in for linear layers, so experts are taken apart: ``experts.gate_up_proj`` (e, …) becomes
``experts.0.gate_up_proj`` and so on, which quantizers find, checkpoints name and kernels run.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import nn

UP_NAMES = ("gate_up_proj", "up_proj")
DOWN = "down_proj"


class LinearExperts(nn.Module):
    """What one of transformers' experts modules computes, expert after expert.

    Expert i has ``self[i].gate_up_proj`` (``up_proj`` where there is no gate) and
    ``self[i].down_proj``. Their weights are views of the fused ones; nothing is copied.

    Args:
        fused: a module for which ``is_fused`` holds.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        for name, value in vars(fused).items():  # what the gate reads: limits, factors, config
            if not name.startswith("_") and name not in vars(self):
                setattr(self, name, value)
        for name, child in fused.named_children():  # the activation
            self.add_module(name, child)
        self.fused_class = type(fused)
        self.gate = type(fused)._apply_gate if fused.has_gate else type(self)._activate
        self.up_name = up_name(fused)
        for index in range(fused.num_experts):
            expert = nn.Module()
            expert.add_module(self.up_name, _linear(fused, self.up_name, index))
            expert.add_module(DOWN, _linear(fused, DOWN, index))
            self.add_module(str(index), expert)
        self.train(fused.training)

    def __getitem__(self, index: int) -> nn.Module:
        return self.get_submodule(str(index))

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """(tokens, width), the experts of each token (tokens, k) and their weights -> (tokens,
        width). Experts that no token chose are not called."""
        output = torch.zeros_like(hidden_states)
        for index in range(self.num_experts):
            token, choice = torch.where(top_k_index == index)
            if not len(token):
                continue
            expert = self[index]
            inner = self.gate(self, expert.get_submodule(self.up_name)(hidden_states[token]))
            values = expert.down_proj(inner) * top_k_weights[token, choice, None]
            output.index_add_(0, token, values.to(output.dtype))
        return output

    def _activate(self, inner: torch.Tensor) -> torch.Tensor:
        return self.act_fn(inner)


def is_fused(module: nn.Module) -> bool:
    """Whether a module is one of transformers' experts modules, in the layout that its kernels
    for experts take too, with nothing else in it."""
    flags = ("num_experts", "has_gate", "has_bias", "is_transposed")
    if not all(hasattr(module, flag) for flag in flags) or not hasattr(module, DOWN):
        return False
    parts = (up_name(module), DOWN)
    expected = {*parts, *(f"{part}_bias" for part in parts if module.has_bias)}
    return {name for name, _ in module.named_parameters()} == expected


def up_name(module: nn.Module) -> str:
    return UP_NAMES[0] if module.has_gate else UP_NAMES[1]


def take_apart(model: nn.Module, names: Collection[str] | None = None) -> list[str]:
    """Replace fused experts by ``LinearExperts``, in place; returns their dotted names.

    names: of a checkpoint's tensors; only experts that the checkpoint has taken apart are then.
    """
    found = [name for name, module in model.named_modules() if is_fused(module)]
    if names is not None:
        apart = {name.rpartition(".0.")[0] for name in names if ".0." in name}
        found = [name for name in found if name in apart]
    for name in found:
        model.set_submodule(name, LinearExperts(model.get_submodule(name)))
    return found


def put_together(model: nn.Module) -> None:
    """The inverse of ``take_apart``, for experts whose layers are all dense."""
    found = [name for name, module in model.named_modules() if isinstance(module, LinearExperts)]
    for name in found:
        apart = model.get_submodule(name)
        parts = {
            part: [apart[index].get_submodule(part) for index in range(apart.num_experts)]
            for part in (apart.up_name, DOWN)
        }
        if not all(type(linear) is nn.Linear for linears in parts.values() for linear in linears):
            continue
        with torch.device("meta"):
            fused = apart.fused_class(apart.config)
        for part, linears in parts.items():
            weight = torch.stack([linear.weight.data for linear in linears])
            if fused.is_transposed:
                weight = weight.transpose(1, 2).contiguous()
            setattr(fused, part, nn.Parameter(weight))
            if fused.has_bias:
                bias = torch.stack([linear.bias.data for linear in linears])
                setattr(fused, f"{part}_bias", nn.Parameter(bias))
        model.set_submodule(name, fused.train(apart.training))


def _linear(fused: nn.Module, part: str, index: int) -> nn.Linear:
    weight = getattr(fused, part)
    values = weight.data[index]
    if fused.is_transposed:
        values = values.t()
    # On the meta device: the memory is there already.
    linear = nn.Linear(values.shape[1], values.shape[0], bias=fused.has_bias, device="meta")
    linear.weight = nn.Parameter(values, weight.requires_grad)
    if fused.has_bias:
        bias = getattr(fused, f"{part}_bias")
        linear.bias = nn.Parameter(bias.data[index], bias.requires_grad)
    return linear
