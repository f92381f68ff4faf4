"""Marlin: mixed-precision linear kernels for LLM inference.

``matmul`` multiplies by a packed 4-bit weight; ``MarlinLinear`` is the layer around it;
``quantize`` replaces a model's layers; ``save_pretrained`` and ``load_pretrained`` keep whole
models on disk. ``MarlinConfig`` is for `from_pretrained` of transformers.
``Layer``, ``mul`` and ``replace_linear`` are the names of the published package, as it had them.
"""

import sys

__version__ = "0.2.0"

try:
    from marlin import ops  # noqa: F401
except ImportError:
    from marlin import cli

    if not cli.is_running():
        raise
    sys.exit(cli.main())  # `marlin info` says why, the other commands end with the error's line

from marlin import integrations
from marlin.checkpoint import CheckpointError, load_pretrained, save_pretrained
from marlin.layer import MarlinLinear, quantize
from marlin.ops import (
    dequantize,
    matmul,
    matmul_out,
    pack,
    pack_scales,
    unpack,
    unpack_scales,
    why_no_cuda,
)
from marlin.published import Layer, mul, replace_linear

__all__ = [
    "CheckpointError",
    "Layer",
    "MarlinLinear",
    "dequantize",
    "load_pretrained",
    "matmul",
    "matmul_out",
    "mul",
    "pack",
    "pack_scales",
    "quantize",
    "replace_linear",
    "save_pretrained",
    "unpack",
    "unpack_scales",
    "why_no_cuda",
]

integrations.install()


def __getattr__(name: str):
    if name == "MarlinConfig":  # its base class is transformers', which is slow, if there at all
        from marlin.integrations.transformers import MarlinConfig

        return MarlinConfig
    raise AttributeError(f"module 'marlin' has no attribute {name!r}")
