"""Marlin layers in a transformers model whose weights are yet to be loaded, and what was loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from marlin.checkpoint import check_part, check_quantization, insert_layers
from marlin.experts import take_apart
from marlin.integrations.headers import Header
from marlin.layer import SCALE_DTYPES, MarlinLinear, dense_layers
from marlin.shards import CheckpointError, some

BIAS_DTYPES = (*SCALE_DTYPES, torch.float32)
DTYPES = {
    "B": (torch.int32,),
    "s": SCALE_DTYPES,
    "bias": BIAS_DTYPES,
    "zeros": (torch.uint8,),
    "perm": (torch.int32,),
}


def insert_native(model, quantization: dict, headers: dict[str, Header]) -> None:
    """Empty Marlin layers, on the meta device, in the places and shapes that the files have."""
    check_quantization(quantization, "config.json")
    take_experts_apart(model, headers)
    place = places(model)
    for key, value in quantization.items():
        if isinstance(value, list):
            quantization[key] = [place(name) for name in value]
        elif isinstance(value, dict):
            quantization[key] = {place(name): entry for name, entry in value.items()}
    stored = placed(headers, place)
    names = set(stored)
    if not same_architecture(model):  # the stored model's head is not this one's
        modules = {name for name, _ in model.named_modules()}
        names = {name for name in names if name.rpartition(".")[0] in modules}
        quantization["modules_to_not_convert"] += new_heads(model, names)
    insert_layers(model, quantization, names)
    for name, layer in marlin_layers(model).items():
        fit_to_headers(name, layer, stored)


def take_experts_apart(model, names: Iterable[str]) -> None:
    """Gives experts linear layers of their own, where the files have tensors of these names."""
    take_apart(model, {candidate for name in names for candidate in candidates(model, name)})


def places(model) -> Callable[[str], str]:
    """Gives the name in this model of a layer that may be stored under another."""
    own = model.state_dict().keys()

    def place(layer: str) -> str:
        return next((name for name in candidates(model, layer) if f"{name}.weight" in own), layer)

    return place


def candidates(model, name: str) -> tuple[str, str, str]:
    """What a stored name may be in the model, which may be the base of the stored one, or have it
    for its base."""
    prefix = f"{model.base_model_prefix}."
    return name, name.removeprefix(prefix), prefix + name


def placed(headers: dict[str, Header], place: Callable[[str], str]) -> dict[str, Header]:
    """The headers by the names that their tensors have in the model."""
    stored = {}
    for name, header in headers.items():
        layer, _, kind = name.rpartition(".")
        stored[f"{place(layer)}.{kind}".lstrip(".")] = header
    return stored


def new_heads(model, names: set[str]) -> list[str]:
    """The linear layers beside a model's base of which no tensor is stored."""
    if model.base_model is model:
        return []
    base = f"{model.base_model_prefix}."
    stored = {name.rpartition(".")[0] for name in names}
    layers = {dense.name for dense in dense_layers(model)}
    return [name for name in layers if not name.startswith(base) and name not in stored]


def fit_to_headers(name: str, layer: MarlinLinear, stored: dict[str, Header]) -> None:
    """Checks a layer's tensors in the files, and makes the layer expect the types they have.

    Scales and bias keep those whatever the model's dtype is, so that nothing is rounded.
    """
    for kind, expected in layer.named_buffers():
        header = stored.get(f"{name}.{kind}")
        if header is None:
            raise CheckpointError(f"missing tensors: {name}.{kind}")
        if header.shape != expected.shape:
            raise_shape(f"{name}.{kind}", expected.shape, header.shape)
        if header.dtype not in DTYPES[kind]:
            raise CheckpointError(
                f"{name}.{kind}: expected {' or '.join(map(str, DTYPES[kind]))}, got {header.dtype}"
            )
        if kind == "s" and not torch.isfinite(header.read()).all():
            raise CheckpointError(f"{name}.s: scales are not finite")
        if kind in ("zeros", "perm"):
            check_part(f"{name}.{kind}", header.read(), kind)
        setattr(layer, kind, expected.to(header.dtype))


def untie_packed(model) -> None:
    """Forgets ties of parameters whose layers are packed: the model has no such parameters."""
    ties = model.all_tied_weights_keys
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, source in list(ties.items()):
        if name not in parameters or source not in parameters:
            del ties[name]


def check_after_loading(model, failure: Callable[[], Exception | None]) -> None:
    """Has the model raise on what transformers would only warn of, or not even that.

    Missing tensors get random values from transformers, and with a quantized model it takes
    tensors of any shape. A model of another architecture than the stored one (with a new head,
    say) may still lack what is not packed.

    failure: tells, after loading, what went wrong meanwhile.
    """
    packed = marlin_layers(model)
    own = {f"{name}.{kind}": b for name, m in packed.items() for kind, b in m.named_buffers()}
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items() if name not in own}
    strict = same_architecture(model)
    adjust = model._adjust_missing_and_unexpected_keys
    for layer in packed.values():
        hold_weight(layer)

    def adjust_and_check(info) -> None:
        del model._adjust_missing_and_unexpected_keys  # back to the class's own
        for layer in marlin_layers(model).values():
            del layer.weight
        wrong_shapes = sorted(info.mismatched_keys)
        # What transformers would say of these in the end is longer, and would hide our own errors.
        info.mismatched_keys.clear()
        info.conversion_errors.clear()
        if (error := failure()) is not None:
            raise error
        for name, got, expected in wrong_shapes:
            raise_shape(name, expected, got)
        adjust(info)
        missing, unexpected = set(info.missing_keys), set(info.unexpected_keys)
        if not strict:
            missing = {name for name in missing if name.rpartition(".")[0] in packed}
            unexpected = set()
        if missing:
            raise CheckpointError(f"missing tensors: {some(missing)}")
        if unexpected:
            raise CheckpointError(f"unexpected tensors: {some(unexpected)}")
        for name, tensor in model.state_dict().items():
            if tensor.shape != shapes.get(name, tensor.shape):
                raise_shape(name, shapes[name], tensor.shape)
        for name, layer in marlin_layers(model).items():  # some models want FP32 in places
            for kind in ("s", "bias"):
                tensor = getattr(layer, kind)
                if tensor is not None and tensor.dtype is torch.float32:
                    setattr(layer, kind, tensor.to(own[f"{name}.{kind}"].dtype))

    model._adjust_missing_and_unexpected_keys = adjust_and_check


def raise_shape(name: str, expected, got) -> None:
    raise CheckpointError(f"{name}: expected shape {tuple(expected)}, got {tuple(got)}")


def hold_weight(layer: MarlinLinear) -> None:
    """A `weight` without memory, for models that initialize those of modules inside others.

    transformers skips it, since it bears the mark of a loaded tensor.
    """
    layer.weight = torch.empty(layer.out_features, layer.in_features, device="meta")
    layer.weight._is_hf_initialized = True


def marlin_layers(model) -> dict[str, MarlinLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, MarlinLinear)}


def same_architecture(model) -> bool:
    return type(model).__name__ in (model.config.architectures or [])
