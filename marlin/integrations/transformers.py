"""Marlin in transformers: `from_pretrained`, `save_pretrained`, `dequantize`.

Importing this file tells transformers of the quantization method "marlin"; `import marlin` sees to
it that this happens as soon as transformers can use it. transformers does the loading itself: onto
devices, from several files, to disk. What is added are the layers to load into, the conversion of
other formats, and the checks that transformers leaves out for quantized models.
"""

from __future__ import annotations

import copy
import importlib.metadata
from collections.abc import Iterable

import torch
from packaging.version import Version
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    AutoHfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from marlin import ops
from marlin.checkpoint import FORMAT_VERSION, check_quantization, describe_layers
from marlin.experts import put_together
from marlin.info import describe_gpu, why_no_gpu
from marlin.integrations.foreign import ReadPacked
from marlin.integrations.headers import read_headers
from marlin.integrations.loading import (
    check_after_loading,
    insert_native,
    marlin_layers,
    untie_packed,
)
from marlin.layer import MarlinLinear, conv1d_names, quantize

OLDEST = "5.14"  # before, what is offloaded to disk came back wrong
PLACEMENTS = ("auto", "balanced", "balanced_low_0", "sequential", "disk", "meta")


@register_quantization_config("marlin")
class MarlinConfig(QuantizationConfigMixin):
    """What `config.json` says of a Marlin checkpoint, under `quantization_config`.

    Marlin checkpoints bring their own. Pass one to `from_pretrained`
    - to load a GPTQ, AWQ or compressed-tensors checkpoint onto Marlin layers: arguments are not
      needed, what the checkpoint says counts;
    - to have the layers of a dense model rounded to 4 bits after loading, without calibration.

    Args:
        group_size: rows that share a scale: 32, 64, 128, or -1 for one scale per column.
        modules_to_not_convert: dotted names, or last parts of them, of layers that stay dense.
    """

    source: dict | None = None  # another format's configuration, until its weights are converted

    def __init__(self, group_size: int = 128, modules_to_not_convert: Iterable[str] = ("lm_head",)):
        self.quant_method = "marlin"
        self.bits = 4
        self.group_size = group_size
        self.sym = True
        self.modules_to_not_convert = list(modules_to_not_convert)
        self.format_version = FORMAT_VERSION

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        """As `config.json` has it. Raises CheckpointError for what this version cannot read."""
        check_quantization(copy.deepcopy(config_dict), "config.json")
        config = super().from_dict({}, **kwargs)
        vars(config).update(copy.deepcopy(config_dict))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict:
        return {key: value for key, value in super().to_dict().items() if key != "source"}


@register_quantizer("marlin")
class MarlinQuantizer(HfQuantizer):
    """Puts Marlin layers into a model before its weights are loaded, and checks what came."""

    requires_calibration = False
    is_trainable = True  # adapters on top are; the packed weights are not
    is_compileable = True
    reader: ReadPacked | None = None  # of another format
    transposed: frozenset[str] = frozenset()  # layers that were a GPT-2 `Conv1D`

    def is_serializable(self, *args, **kwargs) -> bool:
        return True

    def validate_environment(self, *args, device_map=None, **kwargs) -> None:
        if Version(version := importlib.metadata.version("transformers")) < Version(OLDEST):
            raise ImportError(f"marlin needs transformers {OLDEST} or newer, this is {version}")
        devices = device_map.values() if isinstance(device_map, dict) else [device_map]
        for device in devices:
            check_device(device)

    # ------------------------------------------------------------------------------- loading

    def _process_model_before_weight_loading(self, model, checkpoint_files=None, **kwargs):
        if getattr(model.config, "distributed_config", None) is not None:
            raise ValueError("Marlin layers are not split among processes: use device_map instead")
        self.transposed = frozenset(conv1d_names(model))
        if self.pre_quantized:
            headers = read_headers(checkpoint_files, model.config.name_or_path)
            if self.quantization_config.source is None:
                insert_native(model, self.quantization_config.to_dict(), headers)
            else:
                self.reader = ReadPacked(self, self.quantization_config.source, headers)
                self.reader.insert(model)
            untie_packed(model)
        check_after_loading(model, lambda: self.reader and self.reader.failure)

    def get_weight_conversions(self) -> list:
        return [self.reader.converter()] if self.reader else []

    def _process_model_after_weight_loading(self, model, **kwargs):
        if not self.pre_quantized:
            config = self.quantization_config
            quantize(model, config.group_size, skip=config.modules_to_not_convert)
        if self.reader is not None:  # from now on it is a Marlin model, and saved as such
            model._weight_conversions = [
                c for c in model._weight_conversions if self.reader not in operations(c)
            ]
            self.reader = None
        self.describe(model)
        return model

    # -------------------------------------------------------------------------------- saving

    def get_state_dict_and_metadata(self, model):
        if not getattr(model, "_hf_peft_config_loaded", False):  # then only adapters are saved
            self.describe(model)
        return None, {}

    def describe(self, model) -> None:
        """Brings the configuration up to date with the layers that the model has now."""
        if layers := marlin_layers(model):
            self.quantization_config = MarlinConfig.from_dict(describe_layers(model, layers))
            model.config.quantization_config = self.quantization_config

    def _dequantize(self, model, dtype=None):
        for name, layer in marlin_layers(model).items():
            transposed = name.removesuffix(".base_layer") in self.transposed  # under an adapter
            replace_module(model, name, dense(layer, transposed, dtype))
        put_together(model)  # as transformers has experts, else it could not load what it saves
        return model


def operations(conversion) -> list:
    return getattr(conversion, "operations", [])


def check_device(device) -> None:
    """Raises where Marlin layers could not run on a device of a `device_map`, and says why."""
    if device is None or device in PLACEMENTS:
        return
    device = torch.device(device)
    if device.type == "cuda":
        reason = ops.why_no_cuda() or why_no_gpu()
        reason = reason or describe_gpu(device.index or 0, ops.build_report())["why_not"]
        if reason:
            raise RuntimeError(
                f"device_map asks for {device}, where Marlin layers cannot run: {reason}"
            )
    elif device.type not in ("cpu", "meta"):
        raise ValueError(f"Marlin layers run on cpu and cuda, but device_map asks for {device}")


# ------------------------------------------------------------------------------ other formats

merge_configurations = AutoHfQuantizer.merge_quantization_configs


def take_over_or_merge(quantization_config, quantization_config_from_args):
    """A checkpoint's configuration and the caller's in one: where the caller asks for Marlin
    layers, whatever the checkpoint's format."""
    stored, asked = quantization_config, quantization_config_from_args
    if isinstance(asked, MarlinConfig):
        source = stored.to_dict() if isinstance(stored, QuantizationConfigMixin) else stored
        if source.get("quant_method") != "marlin" or source.get("is_marlin_format"):
            merged = MarlinConfig()
            merged.source = copy.deepcopy(source)
            return merged
    return merge_configurations(stored, asked)


AutoHfQuantizer.merge_quantization_configs = staticmethod(take_over_or_merge)


# --------------------------------------------------------------------------------- dense again


def dense(layer: MarlinLinear, transposed: bool, dtype: torch.dtype | str) -> nn.Module:
    """An `nn.Linear`, or GPT-2's `Conv1D`, with a Marlin layer's weight."""
    if layer.s.is_meta:
        raise ValueError("an offloaded model cannot be dequantized: load it without offloading")
    dtype = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    weight, bias = layer.dequantize().to(dtype), layer.bias
    if transposed:
        linear = Conv1D(layer.out_features, layer.in_features)
        weight = weight.t().contiguous()
        bias = weight.new_zeros(layer.out_features) if bias is None else bias
    else:
        linear = nn.Linear(
            layer.in_features, layer.out_features, bias is not None, device="meta", dtype=dtype
        )
    linear.weight = nn.Parameter(weight)
    if bias is not None:
        linear.bias = nn.Parameter(bias.to(dtype))
    return linear.train(layer.training)


def replace_module(model, name: str, new: nn.Module) -> None:
    """Puts a module in the place of another, with the hook that accelerate may have on it."""
    old = model.get_submodule(name)
    if hasattr(old, "_hf_hook"):
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(new, old._hf_hook)
    model.set_submodule(name, new)
