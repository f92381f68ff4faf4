"""What layers with packed weights have in common: sizes, buffers, moves, loading, the way back."""

from __future__ import annotations

import torch
from torch import nn

from marlin import ops
from marlin.quantized import Quantized, row_groups

SCALE_DTYPES = (torch.float16, torch.bfloat16)


def resolve_group_size(in_features: int, group_size: int) -> int:
    """The number of rows that share a scale; -1 stands for all of them.

    Raises ValueError where the format cannot hold the layer, and says which sizes it could.
    """
    size = in_features if group_size == -1 else group_size
    if in_features <= 0 or in_features % ops.TILE_ROWS:
        raise ValueError(
            f"in_features must be a positive multiple of {ops.TILE_ROWS}, got {in_features}"
        )
    fitting = [g for g in ops.GROUP_SIZES if in_features % g == 0]
    if size in fitting or size == in_features:
        return size
    raise ValueError(
        f"group_size={group_size} does not fit in_features={in_features}; sizes that do: "
        + ", ".join(map(str, [*fitting, "-1 (one scale per column)"]))
    )


def padded(columns: int) -> int:
    """The stored width of a layer of that many output columns."""
    return -(-columns // ops.TILE_COLUMNS) * ops.TILE_COLUMNS


class PackedModule(nn.Module):
    """What every layer with packed weights shares: buffers `B` (words) and `s` (scales).

    Two more are None unless a `MarlinLinear` has them, and then in the state dict too: `zeros`
    (zero points) and `perm` (the order in which `B` holds the rows of the weight).

    Casting a model (`.half()`, `.bfloat16()`, `.float()`, `.to(dtype)`) leaves `s` alone. The
    kernels take FP16 and BF16 scales whatever the activations are, a cast would only round
    them, and FP32 scales would be useless. Moves between devices work as for any module.
    """

    B: torch.Tensor
    s: torch.Tensor
    bias: torch.Tensor | None
    zeros: torch.Tensor | None
    perm: torch.Tensor | None

    def _register(self, B: torch.Tensor, s: torch.Tensor, bias: torch.Tensor | None) -> None:
        """What there may not be comes last: torch.export of a module counts on it (2.11)."""
        for name, buffer in (("B", B), ("s", s), ("bias", bias), ("zeros", None), ("perm", None)):
            self.register_buffer(name, buffer)

    @property
    def qweight(self) -> torch.Tensor:
        """`B`, by the name under which PEFT looks for the device of packed weights."""
        return self.B

    def _apply(self, fn, recurse=True):
        dtype, was_meta = self.s.dtype, self.s.is_meta
        # fn may cast floating-point tensors: show it the scales as integers of the same size.
        self._buffers["s"] = self.s.view(torch.int16)
        try:
            super()._apply(fn, recurse)
        finally:
            self._buffers["s"] = self.s.view(dtype)
        if was_meta and not self.s.is_meta:  # to_empty(): memory nobody has written
            mark_empty(self)
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args, **kwargs):
        # A layer keeps its checkpoint's scales: take over their type rather than round them.
        loaded = state_dict.get(prefix + "s")
        dtype = loaded.dtype if torch.is_tensor(loaded) else None
        if dtype in SCALE_DTYPES and dtype != self.s.dtype:
            self._buffers["s"] = torch.empty_like(self.s, dtype=dtype)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        # Codes mean something else without the zeros and the order they came with, so not even
        # strict=False leaves those out.
        error_msgs = kwargs["error_msgs"] if "error_msgs" in kwargs else args[-1]
        for name in ("zeros", "perm"):
            given, had = prefix + name in state_dict, self._buffers[name] is not None
            if prefix + "B" in state_dict and given != had:
                error_msgs.append(
                    f"{prefix + name} is in the state dict, but not in the layer"
                    if given
                    else f"{prefix + name} is in the layer, but not in the state dict"
                )

    @property
    def columns(self) -> int:
        """Output features; `B` and `s` may hold more."""
        return self.s.shape[1]

    def quantized(self) -> Quantized:
        """The weight as `MarlinLinear.from_quantized` takes it: exact, without padding."""
        n, zeros, g_idx = self.columns, None, None
        if self.zeros is not None:
            zeros = ops.unpack_scales(self.zeros)[:, :n].contiguous()
        if self.perm is not None:
            stored = row_groups(self.perm.numel(), self.s.shape[0], self.perm.device)
            g_idx = self._natural_rows(stored).to(torch.int32)
        codes = self._natural_rows(ops.unpack(self.B)[:, :n]).contiguous()
        return Quantized(codes, ops.unpack_scales(self.s)[:, :n].contiguous(), zeros, g_idx)

    def _natural_rows(self, stored: torch.Tensor) -> torch.Tensor:
        """Rows in the order of `B`, brought into the weight's own."""
        return stored if self.perm is None else stored.index_select(0, self.perm.argsort())


def mark_empty(layer: PackedModule) -> None:
    """NaN scales and bias, so that forgetting to load can never look like a result."""
    layer.s.fill_(float("nan"))
    if layer.bias is not None:
        layer.bias.fill_(float("nan"))
    if layer.zeros is not None:
        layer.zeros.fill_(ops.CODE_ZERO)
    if layer.perm is not None:
        layer.perm.copy_(torch.arange(layer.perm.numel()))  # any valid order
