"""Linear layers whose weight stays packed in 4 bits."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from marlin import integrations, ops
from marlin.ops import TILE_COLUMNS, call_inference
from marlin.packed import SCALE_DTYPES, PackedModule, mark_empty, padded, resolve_group_size
from marlin.quantized import Quantized


class MarlinLinear(PackedModule):
    """`y = x W + bias` with `W` (in_features, out_features) in 4 bits.

    Buffers, and so the state dict, are `B` int32 (k/16, 2n), `s` FP16 or BF16 (groups, n) and,
    if there is one, `bias` (out_features,). There n is out_features rounded up to a multiple of
    64, since the format has whole tiles only; results are cut back to out_features.

    A weight is (code - 8) * scale; with `zeros`, uint8 (groups, n) in the order of `s`, it is
    (code - zero) * scale. With `perm`, int32 (k,), row i of `B` is row perm[i] of the weight:
    rows of a group need not be neighbours ("act-order"), and the activations are gathered.

    A new layer is empty: its scales are NaN until a state dict is loaded. `from_quantized` and
    `from_linear` make full ones.

    Activations are FP16 or BF16, on the CPU FP32 too, in any number of leading dimensions; the
    result has their type. Under autocast they are cast as `nn.Linear`'s are. FP32 activations
    on a GPU are computed in the type of the scales and the result is cast back, so a model
    that was sent through `.float()` still works, at that type's precision.

    Args:
        in_features: k, a multiple of group_size.
        out_features: any.
        bias: whether there is one.
        group_size: rows that share a scale: 32, 64, 128, or -1 for one scale per column.
        zeros: whether there are zero points.
        act_order: whether rows are stored in an order of their own.
        dtype: of scales and bias, torch.float16 or torch.bfloat16.
        device: of the buffers.

    Raises:
        ValueError: sizes or dtype the format does not have.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        *,
        group_size: int = 128,
        zeros: bool = False,
        act_order: bool = False,
        dtype: torch.dtype = torch.float16,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        if out_features <= 0:
            raise ValueError(f"out_features must be positive, got {out_features}")
        if dtype not in SCALE_DTYPES:
            raise ValueError(f"dtype must be torch.float16 or torch.bfloat16, got {dtype}")
        self.in_features = in_features
        self.out_features = out_features
        self.group_size = resolve_group_size(in_features, group_size)
        stored = padded(out_features)
        groups = in_features // self.group_size
        self._register(
            torch.empty(in_features // 16, 2 * stored, dtype=torch.int32, device=device),
            torch.empty(groups, stored, dtype=dtype, device=device),
            torch.empty(out_features, dtype=dtype, device=device) if bias else None,
        )
        if zeros:
            self.zeros = torch.empty(groups, stored, dtype=torch.uint8, device=device)
        if act_order:
            self.perm = torch.empty(in_features, dtype=torch.int32, device=device)
        mark_empty(self)

    @classmethod
    def from_quantized(
        cls,
        codes: torch.Tensor,
        scales: torch.Tensor,
        bias: torch.Tensor | None = None,
        zeros: torch.Tensor | None = None,
        g_idx: torch.Tensor | None = None,
    ) -> MarlinLinear:
        """A layer whose weight is `(codes - 8) * scales`, or `(codes - zeros) * scales`.

        Args:
            codes: uint8 (k, n), values 0 to 15.
            scales: FP16 or BF16 (groups, n); groups divide k.
            bias: (n,), or None; stored in the type of the scales.
            zeros: uint8 (groups, n), values 0 to 16, or None.
            g_idx: int32 or int64 (k,), the group of each row, as many rows in one as in another;
                None for runs of k / groups rows.

        Raises:
            ValueError: shapes, types or values that do not fit.
        """
        weight = Quantized(codes, scales, zeros, g_idx)
        weight.check()
        k, n = codes.shape
        if bias is not None and bias.shape != (n,):
            raise ValueError(f"bias must be ({n},), got {tuple(bias.shape)}")
        # Everything is about to be replaced: build the frame without memory.
        size = k // scales.shape[0]
        layer = cls(k, n, bias is not None, group_size=size, dtype=scales.dtype, device="meta")
        if (order := weight.row_order()) is not None:
            codes = codes.index_select(0, order)
            layer.perm = order.to(torch.int32)
        extra = padded(n) - n
        if extra:
            codes = F.pad(codes, (0, extra), value=ops.CODE_ZERO)
            scales = F.pad(scales, (0, extra))
            zeros = None if zeros is None else F.pad(zeros, (0, extra), value=ops.CODE_ZERO)
        layer.B = ops.pack(codes.contiguous())
        layer.s = ops.pack_scales(scales.contiguous())
        if zeros is not None:
            layer.zeros = ops.pack_scales(zeros.contiguous())
        if bias is not None:
            layer.bias = bias.detach().to(codes.device, scales.dtype, copy=True)
        return layer

    @classmethod
    def from_linear(
        cls, linear: nn.Module, group_size: int = 128, dtype: torch.dtype | None = None
    ) -> MarlinLinear:
        """Rounds a dense layer to the nearest 4-bit values (see `round_to_nearest`).

        Args:
            linear: an `nn.Linear`, or the transposed `Conv1D` of GPT-2.
            group_size: rows that share a scale, or -1.
            dtype: of the scales; by default the weight's own if it is FP16 or BF16, else FP16.

        Raises:
            ValueError: no group of that size, or weights that are not finite.
        """
        weight = dense_weight(linear)
        if dtype is None:
            dtype = weight.dtype if weight.dtype in SCALE_DTYPES else torch.float16
        codes, scales = round_to_nearest(weight, group_size, dtype)
        return cls.from_quantized(codes, scales, linear.bias)

    @property
    def columns(self) -> int:
        return self.out_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in_features) -> (..., out_features), of x's type."""
        # Inference, with nothing to do around the operator. Without a device's name, a module's
        # attributes that are not its own, like its buffers, and other calls of Python: together
        # they would take the host as long as a quarter of the operator.
        buffers = self._buffers
        if (
            torch.is_grad_enabled()
            or torch._C._is_any_autocast_enabled()
            or x.dtype is torch.float32
            or is_dynamo_compiling()
            or self.out_features % TILE_COLUMNS
            or buffers["perm"] is not None
            or buffers["zeros"] is not None
        ):
            return self._forward_any(x)
        # It may have become a parameter; only then, as a module's attribute, it is slow to reach.
        bias = buffers["bias"] if "bias" in buffers else self.bias  # noqa: SIM401
        if bias is None:
            return call_inference(x, buffers["B"], buffers["s"])
        return call_inference(x, buffers["B"], buffers["s"], bias)

    def _forward_any(self, x: torch.Tensor) -> torch.Tensor:
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            x = x.to(torch.get_autocast_dtype(kind))
        if x.dtype is torch.float32 and kind == "cuda":
            return self._product(x.to(self.s.dtype)).to(torch.float32)
        return self._product(x)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        s, perm, bias = self.s, self.perm, self.bias
        if perm is not None and x.shape[-1:] == perm.shape:  # if not, the operator says so
            x = x.index_select(-1, perm)
        extra = s.shape[1] - self.out_features
        if bias is not None and extra:
            bias = F.pad(bias, (0, extra))
        y = ops.matmul(x, self.B, s, bias, None, self.zeros)
        return y[..., : self.out_features].contiguous() if extra else y

    def dequantize(self) -> torch.Tensor:
        """The dense weight (out_features, in_features), as `nn.Linear` holds it."""
        weight = ops.dequantize(self.B, self.s, zeros=self.zeros)
        return self._natural_rows(weight[:, : self.out_features]).t().contiguous()

    def extra_repr(self) -> str:
        group = -1 if self.group_size == self.in_features else self.group_size
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, group_size={group}, dtype={self.s.dtype}"
            + (", zeros=True" if self.zeros is not None else "")
            + (", act_order=True" if self.perm is not None else "")
        )


def round_to_nearest(
    weight: torch.Tensor, group_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes uint8 (k, n) and scales (groups, n) of the values nearest to weight (k, n).

    The scale of a group is its largest magnitude / 7.5, so that it spends all 16 codes.
    """
    k, n = weight.shape
    size = resolve_group_size(k, group_size)
    groups = weight.detach().float().reshape(k // size, size, n)
    # Rounded first: the codes must suit the scale that is stored.
    scales = (groups.abs().amax(1, keepdim=True) / 7.5).to(dtype)
    if not torch.isfinite(scales).all():
        raise ValueError(f"weights are not finite, or too large for scales in {dtype}")
    scales[scales == 0] = 1  # nothing but zeros (or nearly): code 8 says so with any scale
    codes = (groups / scales.float()).round_().add_(8).clamp_(0, 15).to(torch.uint8)
    return codes.reshape(k, n), scales.reshape(-1, n)


class DenseLayer(NamedTuple):
    """Where a dense layer hangs in a model: `getattr(parent, attribute)`."""

    name: str
    parent: nn.Module
    attribute: str
    module: nn.Module

    def replace(self, module: nn.Module) -> None:
        setattr(self.parent, self.attribute, module)


def is_conv1d(module: nn.Module) -> bool:
    # By name: transformers is not imported for the sake of one class.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")


def dense_weight(linear: nn.Module) -> torch.Tensor:
    """The weight as (in_features, out_features)."""
    return linear.weight if is_conv1d(linear) else linear.weight.t()


def dense_layers(model: nn.Module, prefix: str = "") -> Iterator[DenseLayer]:
    """Every `nn.Linear` and `Conv1D` inside model, containers included, with its dotted name.

    One that hangs in several places comes up once for each. The projection inside
    `nn.MultiheadAttention` does not: that module reads its weight without calling it.
    """
    for path, parent in list(model.named_modules(prefix=prefix, remove_duplicate=False)):
        for attribute, child in list(parent._modules.items()):
            is_linear = isinstance(child, nn.Linear)
            if isinstance(child, NonDynamicallyQuantizableLinear):
                continue
            if is_linear or (child is not None and is_conv1d(child)):
                yield DenseLayer(f"{path}.{attribute}".lstrip("."), parent, attribute, child)


def conv1d_names(model: nn.Module) -> list[str]:
    return [dense.name for dense in dense_layers(model) if is_conv1d(dense.module)]


def quantize(
    model: nn.Module,
    group_size: int = 128,
    *,
    dtype: torch.dtype | None = None,
    skip: Collection[str] = ("lm_head",),
) -> list[str]:
    """Rounds every dense layer of a model to 4 bits, in place, without calibration.

    Quick, and a baseline for `marlin quantize`, which loses less.

    Args:
        model: anything with `nn.Linear` or `Conv1D` layers.
        group_size: rows that share a scale, or -1.
        dtype: of the scales, see `MarlinLinear.from_linear`.
        skip: dotted names, or last parts of them, to leave alone.

    Returns:
        The names of the layers that stay dense: the skipped, and those group_size does not fit.
    """
    kept, done = [], {}
    transposed = conv1d_names(model)
    for dense in dense_layers(model):
        name, linear = dense.name, dense.module
        fits = True
        try:
            resolve_group_size(dense_weight(linear).shape[0], group_size)
        except ValueError:
            fits = False
        if not fits or name in skip or name.rpartition(".")[2] in skip:
            kept.append(name)
            continue
        if linear not in done:  # shared layers stay shared
            done[linear] = MarlinLinear.from_linear(linear, group_size, dtype)
        dense.replace(done[linear].train(linear.training))
    integrations.adopt(model, transposed)
    return kept
