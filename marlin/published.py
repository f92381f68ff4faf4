"""The face of the published `marlin` package (0.1.1): code written for it runs unchanged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from marlin import ops
from marlin.layer import PackedModule, dense_layers, mark_empty, resolve_group_size

# The two (thread_k, thread_n) its kernels came in. Here they select nothing.
TILES = ((128, 128), (64, 256))


def mul(
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    s: torch.Tensor,
    workspace: torch.Tensor,
    thread_k: int = -1,
    thread_n: int = -1,
    sms: int = -1,
    max_par: int = 16,
) -> None:
    """Writes `A @ W` into C, for W packed in B with scales s.

    Args:
        A: half (m, k).
        B: int32 (k/16, 2n); or those words as a flat tensor, or in another integer type.
        C: half (m, n), overwritten.
        s: half (groups, n); one group means one scale per column.
        workspace: at least n / 128 * max_par entries; checked, not used.
        thread_k, thread_n: (128, 128), (64, 256) or -1; checked, not used.
        sms: not used.
        max_par: what the workspace was made for.

    Raises:
        RuntimeError: groups that do not divide k, a workspace that is too small, tiles that do
            not exist or do not divide the problem, operands that do not fit together.
    """
    if A.dim() != 2 or C.dim() != 2 or s.dim() != 2:
        raise RuntimeError(
            "A, C, s: expected matrices (m, k), (m, n), (groups, n), "
            f"got {tuple(A.shape)}, {tuple(C.shape)}, {tuple(s.shape)}"
        )
    k, n, groups = A.shape[1], C.shape[1], s.shape[0]
    if groups == 0 or k % groups:
        raise RuntimeError(f"s: k={k} is not compatible with {groups} groups")
    if workspace.numel() < n // 128 * max_par:
        raise RuntimeError(
            f"workspace: expected at least {n // 128 * max_par} entries, got {workspace.numel()}"
        )
    if thread_k != -1 and thread_n != -1:
        if (thread_k, thread_n) not in TILES:
            raise RuntimeError(
                f"no kernel for thread_k={thread_k}, thread_n={thread_n}; "
                "there are (128, 128), (64, 256) and -1"
            )
        if k % thread_k or n % thread_n:
            raise RuntimeError(
                f"thread_k={thread_k}, thread_n={thread_n} do not divide k={k}, n={n}"
            )
    ops.matmul_out(A, words(B, k, n), s, C)


def words(B: torch.Tensor, k: int, n: int) -> torch.Tensor:
    """B as int32 (k/16, 2n), whatever type and shape its bytes came in."""
    if B.dtype == torch.int32 and B.shape == (k // 16, 2 * n):
        return B
    needed = k // 16 * 2 * n
    if not B.is_contiguous():
        raise RuntimeError("B: expected contiguous memory, got a strided view")
    have = B.numel() * B.itemsize // 4
    # A flat buffer may be longer than the weights (random int64 made to serve as int32 is
    # twice as long), but a matrix of words that differs in number belongs to another layer.
    if have < needed or (B.dtype == torch.int32 and B.dim() > 1 and have != needed):
        raise RuntimeError(
            f"B: expected int32 {(k // 16, 2 * n)} for k={k}, n={n}, got {B.dtype} {tuple(B.shape)}"
        )
    return B.flatten().view(torch.int32)[:needed].view(k // 16, 2 * n)


class Layer(PackedModule):
    """A linear layer without bias, packed; the published package's only one.

    Its state dict is `B` int32 (infeatures/16, 2 * outfeatures) and `s` half (groups,
    outfeatures), plus `bias` where `replace_linear` found one to keep. It starts empty, with
    NaN scales: load a state dict, or `pack`. `k`, `n`, `groupsize` are plain attributes.

    Args:
        infeatures: k, a multiple of groupsize.
        outfeatures: n, a multiple of 64.
        groupsize: 32, 64, 128, or -1 for one scale per column.

    Raises:
        ValueError: sizes the format does not have.
    """

    def __init__(self, infeatures: int, outfeatures: int, groupsize: int = -1):
        super().__init__()
        groupsize = resolve_group_size(infeatures, groupsize)
        if outfeatures <= 0 or outfeatures % ops.TILE_COLUMNS:
            raise ValueError(
                f"outfeatures must be a positive multiple of {ops.TILE_COLUMNS}, got {outfeatures}"
            )
        self.k = infeatures
        self.n = outfeatures
        self.groupsize = groupsize
        groups = infeatures // groupsize
        # Nothing here reads it: callers pass it to `mul`.
        self.register_buffer(
            "workspace", torch.zeros(outfeatures // 128 * 16, dtype=torch.int32), persistent=False
        )
        self._register(
            torch.empty(infeatures // 16, 2 * outfeatures, dtype=torch.int32),
            torch.empty(groups, outfeatures, dtype=torch.half),
            None,
        )
        mark_empty(self)

    def forward(self, A: torch.Tensor) -> torch.Tensor:
        """A (..., k) -> (..., n)."""
        return ops.matmul(A, words(self.B, A.shape[-1], self.s.shape[1]), self.s, self.bias)

    def pack(self, linear: nn.Module, scales: torch.Tensor) -> None:
        """Fills the layer with the codes nearest to a weight.

        Args:
            linear: has `weight`, half (n, k), normally of dequantized values. Its bias is not
                taken.
            scales: half (n, groups).

        Raises:
            ValueError: the weight is not half, or a shape is not that of the layer.
        """
        weight = linear.weight.detach()
        if weight.dtype != torch.half:
            raise ValueError(f"linear.weight must be torch.half, got {weight.dtype}")
        size = self.k if self.groupsize == -1 else self.groupsize
        groups = self.k // size
        if weight.shape != (self.n, self.k) or scales.shape != (self.n, groups):
            raise ValueError(
                f"expected weight {(self.n, self.k)} and scales {(self.n, groups)}, "
                f"got {tuple(weight.shape)} and {tuple(scales.shape)}"
            )
        s = scales.detach().t().to(weight.device, torch.half)
        # The quotient of two halves is itself a half, and only then rounded to an integer (to
        # even): the published package decided so, and a few codes depend on it.
        quotient = weight.t().reshape(groups, size, self.n) / s[:, None]
        codes = quotient.round().nan_to_num(nan=0.0).clamp(-8, 7) + 8  # 0 / 0 is 0
        codes = codes.to(torch.uint8).reshape(self.k, self.n)
        self.B.copy_(ops.pack(codes.contiguous()).view(self.B.shape))
        self.s.copy_(ops.pack_scales(s.contiguous()))


def replace_linear(
    module: nn.Module,
    name_filter: Callable[[str], bool] = lambda n: True,
    groupsize: int = -1,
    name: str = "",
) -> None:
    """Puts an empty `Layer` in the place of every `nn.Linear` below module, biases kept.

    Args:
        module: changed in place; containers (Sequential, ModuleList, ModuleDict) included.
        name_filter: is asked with each dotted name; False leaves that Linear alone.
        groupsize: of the new layers.
        name: what dotted names start with.

    Raises:
        ValueError: a Linear that the format cannot hold, named; nothing is replaced then.
    """
    found = [
        dense
        for dense in dense_layers(module, name)
        if isinstance(dense.module, nn.Linear) and name_filter(dense.name)
    ]
    layers = {}
    for dense in found:
        if dense.module not in layers:  # shared Linears stay shared
            try:
                layers[dense.module] = empty_layer(dense.module, groupsize)
            except ValueError as error:
                raise ValueError(f"{dense.name}: {error}") from None
    for dense in found:
        dense.replace(layers[dense.module])


def empty_layer(linear: nn.Linear, groupsize: int) -> Layer:
    layer = Layer(linear.in_features, linear.out_features, groupsize)
    bias = linear.bias
    if not linear.weight.is_meta:
        layer.to(linear.weight.device)
    # From the meta device (a model made without memory) comes a layer with memory, as it
    # always has: callers load a state dict into it next. Only the bias is missing.
    if bias is not None and bias.is_meta:
        layer.bias = torch.full_like(bias, float("nan"), dtype=torch.half, device=layer.s.device)
    elif bias is not None:
        layer.bias = bias.detach().to(torch.half, copy=True)
    return layer
