"""Models in and out: from a directory, the hub or a GGUF file, and to a Marlin checkpoint."""

import copy
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from marlin.checkpoint import load_pretrained, save_pretrained
from marlin.layer import MarlinLinear, dense_layers

from .plan import Plan
from .walk import Result

REPORT = "gptq_report.json"


class ModelError(ValueError):
    """A model or tokenizer that cannot be loaded for this purpose."""


def load_config(source: str):
    """The configuration of a directory, hub id or .gguf file. Raises ModelError."""
    try:
        return AutoConfig.from_pretrained(**_location(source))
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{source}: expected a model directory, a hub id or a .gguf file; {_first_line(error)}"
        ) from error


def stored_dtype(config) -> torch.dtype:
    """The 16-bit type that a checkpoint's weights have, else FP16."""
    return config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.float16


def longest_input(config) -> int | None:
    """How many tokens the model takes at once, if its configuration says."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def skeleton(source: str, config) -> PreTrainedModel:
    """The model without its weights (on the meta device): enough to plan with, at once.

    Raises ModelError for what is quantized already or unknown to transformers.
    """
    method = quant_method(config)
    if method not in (None, "gguf"):  # transformers dequantizes GGUF while reading
        raise ModelError(f"{source}: expected a full-precision model, got quant_method {method!r}")
    cls = _model_class(source, config)
    with torch.device("meta"):
        make = cls.from_config if cls is AutoModelForCausalLM else cls._from_config
        return make(copy.deepcopy(config)).eval()


def load_model(source: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model on the CPU, in ``dtype`` or as stored, ready for inference. Raises ModelError."""
    cls = _model_class(source, load_config(source))
    try:
        return cls.from_pretrained(**_location(source), dtype=dtype or "auto").eval()
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{source}: {_first_line(error)}") from error


def load_any(source: str, device: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """For evaluation: a 4-bit checkpoint with Marlin layers, anything else as ``load_model``."""
    if quant_method(load_config(source)) in ("marlin", "gptq", "awq", "compressed-tensors"):
        return load_pretrained(source, device=device, dtype=dtype)
    return load_model(source, dtype).to(device)


def load_tokenizer(source: str):
    """The model's tokenizer. Raises ModelError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(**_location(source))
    except (OSError, ValueError, ImportError) as error:
        raise ModelError(f"{source}: no tokenizer; {_first_line(error)}") from error
    if "gguf_file" in _location(source):
        # Of a GGUF file's special tokens, transformers gets the configuration's right but may
        # give the tokenizer the begin token as its end token.
        config = load_config(source)
        for name in ("bos", "eos", "pad"):
            token = getattr(config, f"{name}_token_id", None)
            if isinstance(token, int):
                setattr(tokenizer, f"{name}_token", tokenizer.convert_ids_to_tokens(token))
    return tokenizer


def quant_method(config) -> str | None:
    """How a checkpoint is quantized, None for full precision."""
    quantization = getattr(config, "quantization_config", None)
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return str(quantization.get("quant_method", "an unknown method"))


def install(model: nn.Module, results: Iterable[Result]) -> None:
    """Replace quantized linears by Marlin layers, wherever in the model they hang."""
    places = {}
    for dense in dense_layers(model):
        places.setdefault(dense.module, []).append(dense)
    for result in results:
        linear = model.get_submodule(result.target.name)
        solution = result.solution
        layer = MarlinLinear.from_quantized(solution.codes, solution.scales, linear.bias)
        for dense in places[linear]:
            dense.replace(layer.train(linear.training))


def save(model: PreTrainedModel, tokenizer, directory: Path, report: dict) -> None:
    """Write the Marlin checkpoint and, beside it, the report of how it was made."""
    save_pretrained(model, directory, tokenizer)
    (directory / REPORT).write_text(json.dumps(report, indent=1) + "\n")


def module_report(plan: Plan, results: Iterable[Result]) -> dict:
    """What became of every weight, ready for JSON."""
    modules = [
        {
            **asdict(result.target),
            "method": result.method,
            "loss": result.loss,
            "rtn_loss": result.rtn_loss,
            "damping": result.solution.damping,
            "tokens": result.tokens,
            "seconds": round(result.seconds, 4),
        }
        for result in results
    ]
    return {"modules": modules, "full_precision": plan.kept}


def _model_class(source: str, config):
    """The class that a configuration names, else a causal language model. Raises ModelError."""
    if not config.architectures:  # a GGUF file does not say
        return AutoModelForCausalLM
    cls = getattr(transformers, config.architectures[0], None)
    if cls is None:
        raise ModelError(f"{source}: transformers has no model {config.architectures[0]!r}")
    return cls


def _location(source: str) -> dict:
    """Keyword arguments for from_pretrained; a GGUF file is named apart from its directory."""
    path = Path(source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise ModelError(f"{source}: expected a .gguf file, found none there")
        return {
            "pretrained_model_name_or_path": str(path.parent),
            "gguf_file": path.name,
        }
    return {"pretrained_model_name_or_path": source}


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0] or type(error).__name__
