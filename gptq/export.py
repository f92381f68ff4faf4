"""Models in and out: from a directory, the hub or a GGUF file, and to a Marlin checkpoint."""

import copy
import json
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from marlin.checkpoint import load_pretrained, save_pretrained
from marlin.experts import take_apart
from marlin.layer import MarlinLinear, dense_layers
from marlin.shards import CONFIG, PICKLES, WEIGHTS, read_index, read_json, some

from . import memory
from . import report as report_of
from .resume import pack, write_whole
from .walk import Result

ADAPTER, ADAPTER_CONFIG = "adapter_model.bin", "adapter_config.json"
SAFETENSORS = "expected weights in safetensors files"
CONVERT = "pickles are not read: convert them to safetensors first"


class ModelError(ValueError):
    """A model or tokenizer that cannot be loaded for this purpose."""


def load_config(source: str):
    """The configuration of a directory, hub id or .gguf file. Raises ModelError."""
    location = _location(source)
    path = Path(source) / CONFIG
    try:
        if path.is_file():
            read_json(path)  # says of a bad one what is wrong with it
        return AutoConfig.from_pretrained(**location)
    except Exception as error:  # whatever a configuration class makes of a bad file
        raise ModelError(
            f"{source}: expected a model directory, a hub id or a .gguf file; {_reason(error)}"
        ) from error


def stored_dtype(config) -> torch.dtype:
    """The 16-bit type that a checkpoint's weights have, else FP16."""
    return config.dtype if config.dtype in (torch.float16, torch.bfloat16) else torch.float16


def longest_input(config) -> int | None:
    """How many tokens the model takes at once, if its configuration says."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def skeleton(source: str, config) -> PreTrainedModel:
    """The model without its weights (on the meta device): enough to plan with, at once. Experts
    are taken apart, as in ``load_model(..., apart=True)``.

    Raises ModelError for what is quantized already, is unknown to transformers, or, in a directory,
    has an adapter beside it, which transformers would put around the layers.
    """
    if _names(Path(_location(source)["pretrained_model_name_or_path"]), ADAPTER_CONFIG):
        raise ModelError(
            f"{source}: expected a model by itself, found an adapter ({ADAPTER_CONFIG}); merge it "
            "into the model, with peft's merge_and_unload(), or move it elsewhere"
        )
    method = quant_method(config)
    if method not in (None, "gguf"):  # transformers dequantizes GGUF while reading
        raise ModelError(f"{source}: expected a full-precision model, got quant_method {method!r}")
    cls = _model_class(source, config)
    make = cls.from_config if cls is AutoModelForCausalLM else cls._from_config
    try:
        with torch.device("meta"):
            model = make(copy.deepcopy(config)).eval()
    except Exception as error:  # likewise
        raise ModelError(
            f"{source}: config.json does not describe a {cls.__name__}: {_reason(error)}"
        ) from error
    take_apart(model)
    return model


def load_model(
    source: str, dtype: torch.dtype | None = None, *, apart: bool = False
) -> PreTrainedModel:
    """A model on the CPU, in ``dtype`` or as stored, ready for inference.

    As stored, the weights of a safetensors checkpoint stay in their files until they are touched.
    apart: give each expert of a mixture linear layers of its own, to quantize.
    Raises ModelError for files that are damaged, that lack weights or have some of other shapes
    than the configuration says, and for pickles.
    """
    config = load_config(source)
    cls = _model_class(source, config)
    _refuse_pickles(source, config)
    try:
        model, told = cls.from_pretrained(
            **_location(source),
            dtype=dtype or "auto",
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # told of like missing ones, rather than raised
        )
    except Exception as error:  # a dozen unrelated types, of safetensors and the model's class too
        # Of a hub's repository without safetensors files, it says to leave out that argument.
        reason = f"{SAFETENSORS}; {CONVERT}" if "use_safetensors" in str(error) else _reason(error)
        raise ModelError(f"{source}: {reason}") from error
    _refuse_other_weights(source, told)
    model.eval()
    if apart:
        take_apart(model)
    return model


def load_any(source: str, device: str, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """For evaluation: a 4-bit checkpoint with Marlin layers, anything else as ``load_model``."""
    if quant_method(load_config(source)) in ("marlin", "gptq", "awq", "compressed-tensors"):
        return load_pretrained(source, device=device, dtype=dtype)
    return load_model(source, dtype).to(device)


def load_tokenizer(source: str):
    """The model's tokenizer. Raises ModelError."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(**_location(source))
    except Exception as error:  # of the tokenizers package too, which has no type for its own
        raise ModelError(f"{source}: no tokenizer; {_reason(error)}") from error
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
    """Replace quantized linears by Marlin layers in host memory."""
    replace(
        model,
        {
            result.target.name: memory.or_on_cpu(
                "packed", pack, result.solution, model.get_submodule(result.target.name).bias
            )[0].cpu()
            for result in results
        },
    )


def replace(model: nn.Module, layers: dict[str, MarlinLinear]) -> None:
    """Put other layers in place of the linears of these names, wherever in the model they hang."""
    places = {}
    for dense in dense_layers(model):
        places.setdefault(dense.module, []).append(dense)
    for name, layer in layers.items():
        linear = model.get_submodule(name)
        for dense in places[linear]:
            dense.replace(layer.train(linear.training))


def save(model: PreTrainedModel, tokenizer, directory: Path) -> None:
    """Write the Marlin checkpoint."""
    save_pretrained(model, directory, tokenizer)


def save_report(directory: Path, report: dict, page: str) -> None:
    """Beside a checkpoint, how it was made: for programs, and for people."""
    path, text = directory / report_of.FILE, json.dumps(report, indent=1) + "\n"
    path.with_suffix(".md").write_text(page, encoding="utf-8")
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def identity(source: str, config) -> dict:
    """What tells whether a model is still the same: a commit of the hub, or its files' sizes and
    times."""
    path = Path(source)
    if not path.exists():
        return {"source": source, "commit": getattr(config, "_commit_hash", None)}
    files = sorted([*path.glob("*.safetensors"), *path.glob(CONFIG)])
    stats = {file.name: file.stat() for file in ([path] if path.is_file() else files)}
    return {
        "source": str(path.resolve()),
        "files": {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()},
    }


def _model_class(source: str, config):
    """The class that a configuration names, else a causal language model. Raises ModelError."""
    if not config.architectures:  # a GGUF file does not say
        return AutoModelForCausalLM
    cls = getattr(transformers, config.architectures[0], None)
    if not (isinstance(cls, type) and issubclass(cls, PreTrainedModel)):
        raise ModelError(f"{source}: transformers has no model {config.architectures[0]!r}")
    return cls


def _refuse_pickles(source: str, config) -> None:
    """Where transformers would read one, or find nothing else. Raises ModelError or, of an index,
    CheckpointError."""
    directory = Path(source)
    # transformers reads it whatever the arguments say, as an adapter or where config.json names it.
    beside = _names(directory, ADAPTER) if _names(directory, ADAPTER_CONFIG) else []
    if ADAPTER in (getattr(config, "transformers_weights", None), *beside):
        raise ModelError(f"{source}: {SAFETENSORS}, found {ADAPTER}; {CONVERT}")
    if not directory.is_dir():
        return
    if not _names(directory, "*.safetensors"):
        pickles = [name for kind in PICKLES for name in _names(directory, kind)]
        found = f"{some(pickles)}; {CONVERT}" if pickles else "none"
        raise ModelError(f"{source}: {SAFETENSORS}, found {found}")
    if not _names(directory, WEIGHTS):  # else transformers does not look at it
        read_index(directory)  # may name files of that kind only


def _names(directory: Path, pattern: str) -> list[str]:
    return [path.name for path in directory.glob(pattern)]


def _refuse_other_weights(source: str, told: dict) -> None:
    """transformers makes up weights that it lacks. Raises ModelError with some of their names.

    An encoder's pooler may be missing: it comes after all that is quantized, and sentence encoders
    are published without.
    """
    wrong = []
    if missing := [name for name in told["missing_keys"] if "pooler" not in name.split(".")]:
        wrong.append(f"missing: {some(missing)}")
    if shapes := told["mismatched_keys"]:
        wrong.append(
            "of another shape: "
            + some(
                f"{name} {tuple(found)} rather than {tuple(expected)}"
                for name, found, expected in shapes
            )
        )
    if wrong:
        raise ModelError(
            f"{source}: expected the weights that its configuration describes; {'; '.join(wrong)}"
        )


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


def _reason(error: Exception) -> str:
    """The first line of what it says, and those that lines with a colon at their end announce."""
    text = repr(error) if isinstance(error, KeyError) else str(error)  # which is but the key
    reason = ""
    for line in text.strip().splitlines():
        reason += line.strip() + " "
        if not reason.endswith(": "):
            break
    return reason.strip() or type(error).__name__
