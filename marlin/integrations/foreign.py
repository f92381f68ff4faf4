"""Other programs' 4-bit checkpoints onto Marlin layers, while transformers loads them."""

from __future__ import annotations

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from marlin import formats
from marlin.integrations.headers import Header
from marlin.integrations.loading import (
    BIAS_DTYPES,
    placed,
    places,
    same_architecture,
    take_experts_apart,
)
from marlin.layer import MarlinLinear, dense_layers, dense_weight, resolve_group_size
from marlin.shards import CheckpointError, some
from marlin.sources import read_beside

BEFORE, END = r"^(.+)\.", "$"  # of a part, in the pattern of its tensors' names


class ReadPacked(ConversionOps):
    """Makes the tensors of a Marlin layer from those that a format has for it.

    transformers collects a layer's tensors, on the device where it shall be, and calls `convert`.

    Args:
        quantizer: ours. transformers takes its presence for a sign that types are not to change.
        quantization: the checkpoint's `quantization_config`.
        headers: of all of its tensors.

    Raises:
        CheckpointError: a format that is not read, or layers of which a part is missing.
    """

    def __init__(self, quantizer, quantization: dict, headers: dict[str, Header]):
        self.hf_quantizer = quantizer
        self.headers = headers
        beside = read_beside(next(iter(headers.values())).file.parent)
        self.reader = formats.reader_of({"quantization_config": quantization}, beside)
        self.layers = self.reader.layers(headers)
        self.stored_name = {}
        self.failure: Exception | None = None

    def insert(self, model) -> None:
        """Empty layers where packed ones are stored. Their groups are as usual, for now."""
        take_experts_apart(model, self.headers)
        place = places(model)
        self.stored_name = {place(layer): layer for layer in self.layers}
        stored = placed(self.headers, place)
        found = set()
        for name, parent, attribute, linear in dense_layers(model):
            if name not in self.stored_name:
                continue
            k, n = dense_weight(linear).shape
            header = stored.get(f"{name}.bias")  # some formats have one where the model has not
            bias = linear.bias is not None or header is not None
            layer = MarlinLinear(k, n, bias, group_size=self.usual_size(k), device="meta")
            if header is not None:
                if header.shape != (n,) or header.dtype not in BIAS_DTYPES:
                    raise CheckpointError(
                        f"{name}.bias: expected ({n},), floating point, "
                        f"got {header.shape}, {header.dtype}"
                    )
                layer.bias = layer.bias.to(header.dtype)
            setattr(parent, attribute, layer)
            found.add(name)
        unknown = self.stored_name.keys() - found
        if unknown and same_architecture(model):  # else it may be the stored model's head
            raise CheckpointError(f"packed weights for what is no linear layer: {some(unknown)}")

    def usual_size(self, k: int) -> int:
        try:
            return resolve_group_size(k, getattr(self.reader, "group_size", None) or -1)
        except ValueError:
            return -1

    def converter(self) -> WeightConverter:
        """Has transformers bring the parts of a layer X together under the name `X.B`."""
        parts = (self.reader.main, *self.reader.needed, *self.reader.optional)
        return WeightConverter([BEFORE + part + END for part in parts], r"\1.B", [self])

    def __deepcopy__(self, memo) -> ReadPacked:
        return self  # transformers copies converters for every layer: one reader serves them all

    @torch.no_grad()
    def convert(self, input_dict, *args, full_layer_name: str, model, **kwargs) -> dict:
        name = full_layer_name.removesuffix(".B")
        parts = {
            pattern.removeprefix(BEFORE).removesuffix(END): tensors[0]
            for pattern, tensors in input_dict.items()
        }
        try:
            layer = self.read(self.stored_name[name], parts, model.get_submodule(name))
        except Exception as error:
            self.failure = self.failure or error
            raise
        put(model, name, layer)
        return {f"{name}.{kind}": tensor for kind, tensor in layer.named_buffers()}

    def read(self, stored_name: str, parts: dict, empty: MarlinLinear) -> MarlinLinear:
        codes, scales, zeros, g_idx = self.reader.read(stored_name, parts)
        shape = (empty.in_features, empty.out_features)
        if tuple(codes.shape) != shape:
            raise CheckpointError(
                f"{stored_name}: expected a weight (k, n) = {shape}, got {tuple(codes.shape)}"
            )
        try:
            return MarlinLinear.from_quantized(codes, scales, zeros=zeros, g_idx=g_idx)
        except ValueError as error:
            raise CheckpointError(f"{stored_name}: {error}") from error


def put(model, name: str, layer: MarlinLinear) -> None:
    """An empty layer like this one into the model, which keeps the bias it has there."""
    old = model.get_submodule(name)
    new = MarlinLinear(
        layer.in_features,
        layer.out_features,
        group_size=layer.group_size,
        zeros=layer.zeros is not None,
        act_order=layer.perm is not None,
        dtype=layer.s.dtype,
        device="meta",
    ).train(old.training)
    new.bias, new.weight = old.bias, old.weight
    model.set_submodule(name, new)
