"""Marlin checkpoints of Hugging Face models: a directory with config.json and safetensors.

What a directory holds beside what transformers itself would write there:
  config.json           `quantization_config` with `quant_method` "marlin", `bits`, `group_size`,
                        `sym`, `modules_to_not_convert`, `format_version`
  *.safetensors         for every packed layer `X.B` (int32 words), `X.s` (scales), `X.bias`,
                        `X.zeros` (zero points), `X.perm` (order of rows), where it has them;
                        everything else under its usual name
transformers is imported by the functions that need it, not with this module.
"""

from __future__ import annotations

import copy
import re
from collections import defaultdict
from collections.abc import Set
from pathlib import Path

import torch
from torch import nn

from marlin import formats, integrations
from marlin.experts import take_apart
from marlin.formats.marlin import FORMAT_VERSION
from marlin.layer import (
    SCALE_DTYPES,
    DenseLayer,
    MarlinLinear,
    PackedModule,
    conv1d_names,
    dense_layers,
    dense_weight,
)
from marlin.ops import TILE_ROWS
from marlin.quantized import LARGEST_ZERO
from marlin.shard_writer import write_shards
from marlin.shards import (
    CONFIG,
    CheckpointError,
    list_tensors,
    open_shard,
    read_json,
    some,
    staged,
)
from marlin.sources import Source, open_source

OPTIONAL_PARTS = ("zeros", "perm")  # of a packed layer, whose words mean nothing without them


# ------------------------------------------------------------------------------------- saving


def save_pretrained(model, directory, tokenizer=None, max_shard_size: int | str = "5GB") -> None:
    """Writes a model with Marlin layers as a checkpoint that `load_pretrained` reads.

    Everything is written to a folder of its own and renamed into place at the end: a save that
    is interrupted leaves what was there. Files of other kinds in the directory stay in it, an old
    tokenizer's only if none is given.

    Args:
        model: a `transformers.PreTrainedModel` with at least one Marlin layer.
        directory: made if need be, with its parents.
        tokenizer: anything with `save_pretrained(directory)`.
        max_shard_size: a file holds no more, say "5GB", unless one tensor alone does.

    Raises:
        ValueError: a model without Marlin layers, or with ones that are empty.
    """
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    config.quantization_config = quantization_config(model)
    tensors = stored_tensors(model)
    with staged(Path(directory)) as stage:
        config.save_pretrained(stage)
        if model.can_generate() and model.generation_config is not None:
            model.generation_config.save_pretrained(stage)
        if tokenizer is not None:
            tokenizer.save_pretrained(stage)
        write_shards(tensors, stage, max_shard_size)


def quantization_config(model: nn.Module) -> dict:
    """The `quantization_config` that describes a model's Marlin layers, which have to be full."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, PackedModule)}
    if not layers:
        raise ValueError("the model has no Marlin layers: quantize it first")
    for name, layer in layers.items():
        if layer.s.is_meta or not torch.isfinite(layer.s).all():
            raise ValueError(f"{name}: scales are not finite; was the layer ever filled?")
    return describe_layers(model, layers)


def describe_layers(model: nn.Module, layers: dict[str, PackedModule]) -> dict:
    """The `quantization_config` of a model with these layers, from their shapes alone."""
    summaries = {
        name: formats.LayerSummary(
            layer.B.shape[0] * TILE_ROWS,
            layer.columns,
            layer.s.shape[0],
            layer.zeros is not None,
            layer.perm is not None,
        )
        for name, layer in layers.items()
    }
    dense = {layer.name for layer in dense_layers(model)}
    return formats.WRITERS["marlin"].config(summaries, sorted(dense))


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict without the second names of one tensor that the loader will tie again:
    those that the model's class declares, and those of a module that hangs in two places."""
    state = model.state_dict()
    sources = getattr(model, "all_tied_weights_keys", {})
    modules = {name for name, _ in model.named_modules()}  # the first name of each
    tensors = {}
    for name, tensor in state.items():
        if tensor.is_meta:
            raise ValueError(f"{name} is on the meta device: there is nothing to save")
        source = state.get(sources.get(name))
        tied = source is not None and source.data_ptr() == tensor.data_ptr()
        if not tied and name.rpartition(".")[0] in modules:
            tensors[name] = tensor
    return tensors


# ------------------------------------------------------------------------------------ loading


def load_pretrained(
    directory, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
):
    """Loads a quantized checkpoint onto `MarlinLinear` layers: one that `save_pretrained` wrote,
    or any other that `marlin convert` reads (GPTQ, AWQ, compressed-tensors, older Marlin ones).

    The model is built without memory for its parameters, which then come from the files one
    after another, so the peak is about the size of the checkpoint. No code or pickle from the
    directory is run.

    Args:
        directory: of the checkpoint.
        device: where the model goes.
        dtype: of what is not packed (scales keep the type they were stored in); by default
            as stored.

    Returns:
        The `transformers.PreTrainedModel`, in evaluation mode.

    Raises:
        CheckpointError: files that are missing, damaged, or do not fit the configuration.
    """
    directory, device = Path(directory), torch.device(device)
    if is_native(directory):
        config, quantization = read_config(directory)
        files = {name: info.file for name, info in list_tensors(directory).items()}
        model = empty_model(config, dtype)
        integrations.adopt(model, conv1d_names(model))
        insert_layers(model, quantization, set(files))
    else:
        with open_source(directory, device=device) as source:
            config = model_config(directory)
            files = {name: source.tensors[name].file for name in source.dense}
            model = empty_model(config, dtype)
            integrations.adopt(model, conv1d_names(model))
            insert_full_layers(model, source)
        model.config.quantization_config = quantization_config(model)
    fill(model, directory, files, device, dtype)
    model.to(device)  # buffers that are not stored
    if model.can_generate() and (directory / "generation_config.json").is_file():
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(directory)
    return model.eval()


def is_native(directory: Path) -> bool:
    """Whether its configuration is of our own format, which is loaded without unpacking it."""
    quantization = read_json(directory / CONFIG).get("quantization_config")
    if not isinstance(quantization, dict):
        return False
    return quantization.get("quant_method") == "marlin" and "is_marlin_format" not in quantization


def read_config(directory: Path):
    """The model's configuration and its `quantization_config`, checked."""
    raw = read_json(directory / "config.json")
    quantization = raw.get("quantization_config")
    if not isinstance(quantization, dict) or quantization.get("quant_method") != "marlin":
        raise CheckpointError(
            f"{directory}: expected quantization_config with quant_method 'marlin' in "
            f"config.json, got {quantization!r}"
        )
    check_quantization(quantization, directory)
    return model_config(directory), quantization


def check_quantization(quantization: dict, where) -> None:
    """Refuses a `quantization_config` of another format; adds the optional keys it lacks."""
    expected = {"bits": 4, "format_version": FORMAT_VERSION}
    for key, value in expected.items():
        if quantization.get(key) != value:
            raise CheckpointError(
                f"{where}: quantization_config: expected {key}={value}, "
                f"got {quantization.get(key)!r}"
            )
    quantization.setdefault("sym", None)  # has to be said
    types = {
        "group_size": int,
        "sym": bool,
        "desc_act": bool,
        "modules_to_not_convert": list,
        "modules_without_zeros": list,
        "modules_without_perm": list,
        "group_size_overrides": dict,
    }
    for key, kind in types.items():
        if not isinstance(quantization.setdefault(key, kind()), kind):
            raise CheckpointError(f"{where}: quantization_config: {key} must be {kind}")


def model_config(directory: Path):
    """The `transformers.PretrainedConfig` in a directory."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a configuration class makes of a bad file
        raise CheckpointError(f"{directory}: config.json: {error}") from error


def empty_model(config, dtype: torch.dtype | None):
    """The model of a configuration, its parameters on the meta device, its buffers real.

    Buffers are computed by the constructors (rotary frequencies, say), and what is not stored
    has no other source; they are small.
    """
    import transformers
    from torch.nn.modules.module import register_module_parameter_registration_hook

    name = (config.architectures or ["(none)"])[0]
    architecture = getattr(transformers, name, None)
    if not (
        isinstance(architecture, type) and issubclass(architecture, transformers.PreTrainedModel)
    ):
        raise CheckpointError(f"config.json: transformers has no model {name!r}")

    def forget(module, attribute, parameter):
        if parameter is None or parameter.is_meta:
            return None  # as it is: a tied parameter must stay the same object
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    hook = register_module_parameter_registration_hook(forget)
    try:
        return architecture._from_config(config, dtype=dtype or config.dtype)
    except Exception as error:  # likewise
        raise CheckpointError(f"config.json does not describe a {name}: {error}") from error
    finally:
        hook.remove()


def insert_layers(model: nn.Module, quantization: dict, names: set[str]) -> None:
    """Puts an empty MarlinLinear where the files have one, checked against the configuration."""
    take_apart(model, names)
    own = model.state_dict().keys()
    packed = {name.removesuffix(".B") for name in names - own if name.endswith(".B")}
    kept = set(map(str, quantization["modules_to_not_convert"]))
    overrides = quantization["group_size_overrides"]
    has = parts_of_layers(quantization, packed, names - own)
    places = places_of(model, packed)
    tied = getattr(model, "all_tied_weights_keys", {}).keys()
    if both := packed & kept:
        raise CheckpointError(f"packed, but in modules_to_not_convert: {some(both)}")
    for linear, found in places.items():
        name = next((dense.name for dense in found if dense.name in packed), None)
        if name is None:
            weights = {f"{dense.name}.weight" for dense in found}
            if not weights & tied and not any(dense.name in kept for dense in found):
                raise CheckpointError(
                    f"{found[0].name}: missing tensor {found[0].name}.B, "
                    "and modules_to_not_convert does not list it"
                )
            continue
        k, n = dense_weight(linear).shape
        size = overrides.get(name, quantization["group_size"])
        try:
            layer = MarlinLinear(
                k,
                n,
                linear.bias is not None or f"{name}.bias" in names,
                group_size=size,
                zeros=name in has["zeros"],
                act_order=name in has["perm"],
                device="meta",
            )
        except (ValueError, TypeError) as error:
            raise CheckpointError(f"{name}: {error}") from error
        for dense in found:
            dense.replace(layer)


def insert_full_layers(model: nn.Module, source: Source) -> None:
    """Puts a MarlinLinear where a checkpoint in another format has a packed layer. Only its bias
    is still to come: that is a tensor like any other."""
    take_apart(model, source.tensors.keys())
    for linear, found in places_of(model, source.layers.keys()).items():
        name = next((dense.name for dense in found if dense.name in source.layers), None)
        if name is None:
            continue
        weight = source.read(name, source.parts(name))
        if weight.codes.shape != dense_weight(linear).shape:
            raise CheckpointError(
                f"{name}: expected a weight (k, n) = {tuple(dense_weight(linear).shape)}, "
                f"got {tuple(weight.codes.shape)}"
            )
        try:
            layer = MarlinLinear.from_quantized(
                weight.codes, weight.scales, None, weight.zeros, weight.g_idx
            )
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}") from error
        if linear.bias is not None or f"{name}.bias" in source.tensors:
            layer.bias = weight.scales.new_empty(layer.out_features, device="meta")
        for dense in found:
            dense.replace(layer)


def places_of(model: nn.Module, packed: Set[str]) -> dict[nn.Module, list[DenseLayer]]:
    """Where each dense layer hangs (it may be several places), if there is one for all packed."""
    places = defaultdict(list)
    for dense in dense_layers(model):
        places[dense.module].append(dense)
    if unknown := packed - {dense.name for found in places.values() for dense in found}:
        raise CheckpointError(f"packed weights for what is no linear layer: {some(unknown)}")
    return places


def parts_of_layers(quantization: dict, packed: set[str], names: set[str]) -> dict[str, set[str]]:
    """The packed layers that have zeros, and those that have a perm.

    The configuration says so beside the files: words whose zeros got lost would still look like a
    layer.
    """
    anywhere = {"zeros": not quantization["sym"], "perm": quantization["desc_act"]}
    has = {}
    for part in OPTIONAL_PARTS:
        without = set(map(str, quantization[f"modules_without_{part}"]))
        claimed = packed - without if anywhere[part] else set()
        found = {name.removesuffix(f".{part}") for name in names if name.endswith(f".{part}")}
        if missing := claimed - found:
            raise CheckpointError(f"by the configuration, {part} missing in {some(missing)}")
        if unexpected := found - claimed:
            raise CheckpointError(f"by the configuration, no {part} in {some(unexpected)}")
        has[part] = found
    return has


def fill(
    model: nn.Module,
    directory: Path,
    files: dict[str, str],
    device: torch.device,
    dtype: torch.dtype | None,
) -> None:
    """Reads every tensor into the model's parameters and persistent buffers."""
    slots = list_slots(model)
    files = {n: file for n, file in files.items() if n in slots or not is_obsolete(model, n)}
    if unexpected := files.keys() - slots.keys():
        raise CheckpointError(f"{directory}: unexpected tensors: {some(unexpected)}")
    filled = {id(slot) for slot in slots.values() if slot.is_full()}
    if both := [name for name in files if id(slots[name]) in filled]:
        raise CheckpointError(f"{directory}: stored in two formats: {some(both)}")
    for filename in sorted(set(files.values())):
        with open_shard(directory / filename, str(device)) as shard:
            for name in sorted(n for n, f in files.items() if f == filename):
                slot = slots[name]
                if id(slot) in filled:
                    if not slot.holds(shard.get_tensor(name)):
                        raise CheckpointError(
                            f"{directory}: {name} is tied and stored twice, with other values"
                        )
                    continue
                filled.add(id(slot))
                slot.set(name, shard.get_tensor(name), dtype)
    if missing := {name for name, slot in slots.items() if id(slot) not in filled}:
        raise CheckpointError(f"{directory}: missing tensors: {some(missing)}")


def is_obsolete(model: nn.Module, name: str) -> bool:
    """Whether a checkpoint of an older program may hold a tensor that the model computes now."""
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    return name.endswith("rotary_emb.inv_freq") or any(re.search(p, name) for p in patterns)


class Slot:
    """A tensor of a model: all the places where it hangs."""

    def __init__(self, current: torch.Tensor):
        self.current = current
        self.places: list[tuple[nn.Module, str]] = []

    def set(self, name: str, tensor: torch.Tensor, dtype: torch.dtype | None) -> None:
        module, attribute = self.places[0]
        scales = isinstance(module, PackedModule) and attribute == "s"
        self.check(name, tensor, scales)
        if isinstance(module, PackedModule):
            check_part(name, tensor, attribute)
        floating = tensor.is_floating_point()
        if dtype is not None and floating and not scales:
            tensor = tensor.to(dtype)
        if isinstance(self.current, nn.Parameter):
            tensor = nn.Parameter(tensor, self.current.requires_grad and floating)
        for module, attribute in self.places:
            # Not setattr: models may wrap it, and the kind of entry does not change.
            entries = module._parameters if attribute in module._parameters else module._buffers
            entries[attribute] = tensor

    def is_full(self) -> bool:
        """Whether `insert_full_layers` put it there."""
        module, attribute = self.places[0]
        packed = isinstance(module, PackedModule) and attribute in ("B", "s", "zeros", "perm")
        return packed and not self.current.is_meta

    def holds(self, tensor: torch.Tensor) -> bool:
        module, attribute = self.places[0]
        current = getattr(module, attribute)
        return current.shape == tensor.shape and torch.equal(current, tensor.to(current.dtype))

    def check(self, name: str, tensor: torch.Tensor, scales: bool) -> None:
        expected = self.current
        if tensor.shape != expected.shape:
            raise CheckpointError(
                f"{name}: expected shape {tuple(expected.shape)}, got {tuple(tensor.shape)}"
            )
        if scales:
            if tensor.dtype not in SCALE_DTYPES:
                raise CheckpointError(f"{name}: expected FP16 or BF16 scales, got {tensor.dtype}")
            if not torch.isfinite(tensor).all():
                raise CheckpointError(f"{name}: scales are not finite")
        elif expected.is_floating_point():
            if not tensor.is_floating_point():
                raise CheckpointError(f"{name}: expected floating point, got {tensor.dtype}")
        elif tensor.dtype != expected.dtype:
            raise CheckpointError(f"{name}: expected {expected.dtype}, got {tensor.dtype}")


def check_part(name: str, tensor: torch.Tensor, attribute: str) -> None:
    """Values that the operators take on trust."""
    if attribute == "zeros" and tensor.max() > LARGEST_ZERO:
        raise CheckpointError(
            f"{name}: expected values 0 to {LARGEST_ZERO}, got {tensor.max().item()}"
        )
    if attribute == "perm":
        in_order = torch.arange(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        if not torch.equal(tensor.sort().values, in_order):
            raise CheckpointError(f"{name}: expected each of 0 to {tensor.numel() - 1} once")


def list_slots(model: nn.Module) -> dict[str, Slot]:
    """What a state dict of the model would hold, by name; tied names share their slot."""
    slots, by_tensor = {}, {}
    for path, module in model.named_modules(remove_duplicate=False):
        transient = module._non_persistent_buffers_set
        for attribute, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or attribute in transient:
                continue
            slot = by_tensor.setdefault(id(tensor), Slot(tensor))
            slot.places.append((module, attribute))
            slots[f"{path}.{attribute}".lstrip(".")] = slot
    return slots
