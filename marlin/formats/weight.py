"""What readers check, and how they leave out of a weight what says nothing.

Every format is read into `marlin.quantized.Quantized` and written from it. Two formats agree on a
weight tensor by tensor: zero points that are all 8 and groups that are runs of rows are left out.
A layer's bias is no part of this: `X.bias` is the same tensor in every format.
"""

from __future__ import annotations

import torch
from torch import Tensor

from marlin.layer import SCALE_DTYPES
from marlin.ops import CODE_ZERO
from marlin.quantized import Quantized, row_groups
from marlin.shards import CheckpointError


def normalized(
    layer: str, scales: Tensor, zeros: Tensor | None, g_idx: Tensor | None, k: int, n: int
) -> Quantized:
    """A weight (k, n) that still lacks its codes, checked.

    Separate from the codes, because they take time and whatever is wrong should be told before.
    Raises CheckpointError, which names the layer.
    """
    groups = check_scales(layer, scales, n)
    if zeros is not None:
        expect_shape(f"{layer}: zero points", zeros, (groups, n))
        if bool((zeros == CODE_ZERO).all()):
            zeros = None
    if g_idx is not None:
        g_idx = check_order(layer, g_idx, k, groups)
    if k % groups:
        raise CheckpointError(f"{layer}: {groups} groups of scales do not divide k={k}")
    if g_idx is not None and torch.equal(g_idx.long(), row_groups(k, groups, g_idx.device)):
        g_idx = None
    return Quantized(None, narrowed(layer, scales), zeros, g_idx)


def check_scales(layer: str, scales: Tensor, n: int) -> int:
    """The number of groups of finite floating-point scales (groups, n)."""
    if scales.dim() != 2 or scales.shape[1] != n or not len(scales):
        raise CheckpointError(
            f"{layer}: scales: expected {n} columns, got shape {tuple(scales.shape)}"
        )
    if scales.dtype not in (*SCALE_DTYPES, torch.float32):
        raise CheckpointError(f"{layer}: expected FP16 or BF16 scales, got {scales.dtype}")
    if not bool(torch.isfinite(scales).all()):
        raise CheckpointError(f"{layer}: scales are not finite")
    return len(scales)


def check_order(layer: str, g_idx: Tensor, k: int, groups: int) -> Tensor:
    """int32 (k,), each row's group."""
    expect_shape(f"{layer}: g_idx", g_idx, (k,))
    expect_integers(f"{layer}: g_idx", g_idx)
    least, most = (int(bound) for bound in g_idx.aminmax())
    if least < 0 or most >= groups:
        raise CheckpointError(
            f"{layer}: g_idx: expected values of 0 to {groups - 1}, got {least} to {most}"
        )
    return g_idx.to(torch.int32)


def narrowed(layer: str, scales: Tensor) -> Tensor:
    """Scales in a 16-bit type, if one holds them exactly."""
    if scales.dtype in SCALE_DTYPES:
        return scales
    for dtype in SCALE_DTYPES:
        if torch.equal((narrow := scales.to(dtype)).to(scales.dtype), scales):
            return narrow
    raise CheckpointError(f"{layer}: scales are FP32 and fit neither FP16 nor BF16 exactly")


def expect_shape(what: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{what}: expected shape {shape}, got {tuple(tensor.shape)}")


def expect_words(what: str, tensor: Tensor) -> None:
    """Packed words: a matrix of int32 that is not empty."""
    if tensor.dtype is not torch.int32 or tensor.dim() != 2 or not tensor.numel():
        raise CheckpointError(
            f"{what}: expected an int32 matrix, got {tensor.dtype} {tuple(tensor.shape)}"
        )


def expect_integers(what: str, tensor: Tensor) -> None:
    if tensor.dtype not in (torch.int32, torch.int64, torch.int16, torch.int8, torch.uint8):
        raise CheckpointError(f"{what}: expected integers, got {tensor.dtype}")
