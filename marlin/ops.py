"""The operators: their two libraries, shapes for tracing, the gradient, and thin functions.

The only module that touches ``torch.ops.marlin``. Every precondition is checked in
``csrc/torch/checks.cpp``; a violated one is a ``RuntimeError`` that names the argument, what was
expected and what came.
"""

import torch
from torch import Tensor

from marlin import libraries
from marlin.libraries import build_report

TILE_ROWS = 16  # rows (k) and columns (n) of a tile of the packed weight
TILE_COLUMNS = 64
CODE_ZERO = 8  # the code of zero, where a weight has no zero points
GROUP_SIZES = (32, 64, 128)  # beside one group for all of k ("per column")


def why_no_cuda() -> str | None:
    """Why the CUDA operators are not there, in a sentence; None if they are."""
    return _why_no_cuda


def _load_cuda() -> str | None:
    if not (libraries.HERE / "_ops_cuda.so").exists():
        return build_report().get("why_no_cuda") or "this build has no CUDA library"
    try:
        libraries.load("_ops_cuda")
    except ImportError as error:
        return str(error).removeprefix("marlin: ")
    return None


libraries.load("_ops")
_why_no_cuda = _load_cuda()
_ops = torch.ops.marlin
_mul = _ops.mul.default
mul_inference = _ops.mul_inference.default  # `matmul` where nothing needs a gradient
# What that calls in turn, if torch has it under that name; torch.compile cannot trace it.
call_inference = getattr(mul_inference, "_op", mul_inference)


def _refuse_cuda(name: str):
    def refuse(*args, **kwargs):
        raise RuntimeError(f"marlin::{name}: no CUDA operators: {_why_no_cuda}")

    return refuse


OPERATORS = ("mul", "mul.out", "mul_inference", "pack", "unpack", "pack_scales", "unpack_scales",
             "dequantize", "quantize_columns", "trial_losses")  # fmt: skip
if _why_no_cuda is not None:
    for _name in OPERATORS:
        torch.library.impl(f"marlin::{_name}", "CUDA", _refuse_cuda(_name))


# Shapes for FakeTensors, torch.compile and export. Sizes may be symbolic, so what they must satisfy
# goes through torch._check; types and devices are checked by the real operators.


def _fake_mul(a, b, s, bias=None, config=None, zeros=None, weight_type=None):
    torch._check(a.dim() > 0, lambda: "marlin::mul: a: expected (..., k), got a scalar")
    torch._check(
        a.shape[-1] == b.shape[0] * TILE_ROWS,
        lambda: (
            f"marlin::mul: a: expected (..., k) with k = 16 · {b.shape[0]} like b, "
            f"got {tuple(a.shape)}"
        ),
    )
    return a.new_empty((*a.shape[:-1], b.shape[1] // 2))


torch.library.register_fake("marlin::mul", _fake_mul)
torch.library.register_fake("marlin::mul_inference", _fake_mul)


@torch.library.register_fake("marlin::mul.out")
def _fake_mul_out(a, b, s, bias=None, config=None, zeros=None, weight_type=None, *, out):
    _fake_mul(a, b, s, bias, config, zeros, weight_type)


@torch.library.register_fake("marlin::pack")
def _fake_pack(codes):
    k, n = codes.shape
    return codes.new_empty((k // TILE_ROWS, 2 * n), dtype=torch.int32)


@torch.library.register_fake("marlin::unpack")
def _fake_unpack(b):
    return b.new_empty((b.shape[0] * TILE_ROWS, b.shape[1] // 2), dtype=torch.uint8)


@torch.library.register_fake("marlin::pack_scales")
def _fake_pack_scales(scales):
    return torch.empty_like(scales)


@torch.library.register_fake("marlin::unpack_scales")
def _fake_unpack_scales(s):
    return torch.empty_like(s)


@torch.library.register_fake("marlin::dequantize")
def _fake_dequantize(b, s, dtype=None, zeros=None, weight_type=None):
    return b.new_empty((b.shape[0] * TILE_ROWS, b.shape[1] // 2), dtype=dtype or s.dtype)


@torch.library.register_fake("marlin::quantize_columns")
def _fake_quantize_columns(work, coupling, scale, current=None):
    return torch.empty_like(work), torch.empty_like(work)


@torch.library.register_fake("marlin::trial_losses")
def _fake_trial_losses(work, coupling, weights, scales):
    return torch.empty_like(scales)


# The gradient: Y = a · W + bias is linear, and W is frozen.


def _save_for_backward(ctx, inputs, output):
    _a, b, s, bias, _config, zeros, _weight_type = inputs
    ctx.save_for_backward(b, s, zeros)
    ctx.bias_dtype = bias.dtype if bias is not None and bias.requires_grad else None


def _backward(ctx, grad):
    b, s, zeros = ctx.saved_tensors
    grad_a = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_a = grad @ _ops.dequantize(b, s, grad.dtype, zeros).t()
    if ctx.bias_dtype is not None:
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return grad_a, None, None, grad_bias, None, None, None


torch.library.register_autograd("marlin::mul", _backward, setup_context=_save_for_backward)


def matmul(
    a: Tensor,
    b: Tensor,
    s: Tensor,
    bias: Tensor | None = None,
    config: str | None = None,
    zeros: Tensor | None = None,
    weight_type: str | None = None,
) -> Tensor:
    """``a · W + bias`` with the packed weight ``W``, differentiable in ``a`` and ``bias``.

    Args:
        a: activations (..., k), float16 or bfloat16, on the CPU also float32. Any strides; rows
            that are not contiguous and 16-byte aligned are copied.
        b: packed words, int32 (k / 16, 2 n), contiguous; k a multiple of 16, n of 64.
        s: scales in Marlin's order (``pack_scales``), float16 or bfloat16 (groups, n): one group,
            or groups of 32, 64 or 128 rows.
        bias: (n,) in any of the three types, or None.
        config: name of a kernel configuration, for tests; the best is chosen without.
        zeros: uint8 (groups, n) in the order of ``s`` (``pack_scales`` takes them too), values 0 to
            16: a weight is (code - zero) · scale. Without, every zero is 8. On CUDA only the simple
            kernel and the net know them.
        weight_type: "uint4" with zeros, "uint4b8" without; follows from them where it is not said.

    Returns:
        (..., n) of a's dtype, accumulated in float32.

    Raises:
        RuntimeError: naming the argument, what was expected and what came.
    """
    # A registered gradient costs a call microseconds even where none is needed, and every argument
    # that is passed a tenth of one.
    needs_grad = a.requires_grad or (bias is not None and bias.requires_grad)
    operator = _mul if needs_grad and torch.is_grad_enabled() else mul_inference
    if config is None and zeros is None and weight_type is None:
        return operator(a, b, s) if bias is None else operator(a, b, s, bias)
    return operator(a, b, s, bias, config, zeros, weight_type)


def matmul_out(
    a: Tensor,
    b: Tensor,
    s: Tensor,
    out: Tensor,
    bias: Tensor | None = None,
    config: str | None = None,
    zeros: Tensor | None = None,
    weight_type: str | None = None,
) -> None:
    """Like `matmul`, written to ``out`` (..., n): contiguous, of a's dtype. Not differentiable."""
    _ops.mul.out(a, b, s, bias, config, zeros, weight_type, out=out)


def pack(codes: Tensor) -> Tensor:
    """Packs codes uint8 (k, n), values 0..15, into words int32 (k / 16, 2 n); k % 16, n % 64 = 0.

    On CUDA, values above 15 are cut to their low four bits (telling would mean to wait for the
    device); on the CPU they are an error.
    """
    return _ops.pack.default(codes)


def unpack(b: Tensor) -> Tensor:
    """The codes uint8 (k, n) of words int32 (k / 16, 2 n): the inverse of `pack`."""
    return _ops.unpack.default(b)


def pack_scales(scales: Tensor) -> Tensor:
    """Reorders scales, or zero points (uint8), (groups, n) from column order into Marlin's.

    One group is "per column", which has an order of its own.
    """
    return _ops.pack_scales.default(scales)


def unpack_scales(s: Tensor) -> Tensor:
    """Reorders scales or zero points (uint8) (groups, n) from Marlin's order into column order."""
    return _ops.unpack_scales.default(s)


def dequantize(
    b: Tensor,
    s: Tensor,
    dtype: torch.dtype | None = None,
    zeros: Tensor | None = None,
    weight_type: str | None = None,
) -> Tensor:
    """The weight (k, n) = (code - zero) · scale, rounded to ``dtype`` (default: that of ``s``).

    ``zeros`` and ``weight_type`` are `matmul`'s: without zeros, all are 8.
    """
    return _ops.dequantize.default(b, s, dtype, zeros, weight_type)


def quantize_columns(
    work: Tensor, coupling: Tensor, scale: Tensor, current: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """GPTQ's column loop over a segment, one fused kernel: see ``gptq.columns``, which explains it.

    work: float32 (rows ≤ 128, n), contiguous. coupling: (rows, rows). scale: (n,). current: like
    work, or None. Returns (codes, moved), float32 (rows, n) each.
    """
    return _ops.quantize_columns.default(work, coupling, scale, current)


def trial_losses(work: Tensor, coupling: Tensor, weights: Tensor, scales: Tensor) -> Tensor:
    """What that loop would lose under each of ``scales`` (candidates, n): float32 of that shape."""
    return _ops.trial_losses.default(work, coupling, weights, scales)
