"""Marlin: mixed-precision linear kernels for LLM inference."""

from marlin.ops import dequantize, matmul, pack, pack_scales, unpack, unpack_scales

__all__ = ["dequantize", "matmul", "pack", "pack_scales", "unpack", "unpack_scales"]
