"""Every format, written by its definition, is read back value by value."""

import re
import time

import by_definition as by
import numpy as np
import pytest
import torch

from marlin import formats
from marlin.formats import patterns
from marlin.formats.marlin import StateDictReader
from marlin.formats.nibbles import pack_columns, pack_rows, unpack_columns, unpack_rows
from marlin.layer import MarlinLinear

SHAPES = [(64, 64), (96, 72), (256, 8), (32, 200)]
GROUPS = [32, -1]
KINDS = {
    "symmetric": {},
    "zeros": {"zeros": (1, 15)},
    "act-order": {"act_order": True},
    "both": {"zeros": (1, 15), "act_order": True},
}
FORMATS = {
    "gptq": (lambda w: by.gptq(w, 1), by.gptq_config, KINDS),
    "gptq_v2": (
        lambda w: by.gptq(w, 2),
        lambda size, **more: by.gptq_config(size, **{**more, "checkpoint_format": "gptq_v2"}),
        KINDS | {"zero 0": {"zeros": (0, 15)}},
    ),
    "awq": (by.awq, by.awq_config, {"symmetric": {}, "zeros": {"zeros": (0, 15)}}),
    "compressed-tensors": (
        by.compressed_tensors,
        by.compressed_tensors_config,
        KINDS | {"zero 0": {"zeros": (0, 15)}},
    ),
}
CASES = [(name, kind) for name, (_, _, kinds) in FORMATS.items() for kind in kinds]


def reader_for(name, group_size, kind):
    config = FORMATS[name][1]
    if name.startswith("gptq"):
        more = {"sym": "zeros" not in kind, "desc_act": "act_order" in kind}
    elif name == "compressed-tensors":
        more = {"symmetric": "zeros" not in kind}
    else:
        more = {}
    return formats.reader_of({"quantization_config": config(group_size, **more)})


def check(quantized, weight):
    """Bit for bit what was written, and nothing said that goes without saying."""
    assert np.array_equal(quantized.codes.numpy(), weight.codes)
    assert quantized.codes.dtype == torch.uint8 and quantized.codes.is_contiguous()
    assert torch.equal(quantized.scales, weight.scales)
    assert quantized.scales.dtype == weight.scales.dtype
    if (weight.zeros == 8).all():
        assert quantized.zeros is None
    else:
        assert np.array_equal(quantized.zeros.numpy(), weight.zeros)
    if (np.diff(weight.g_idx) >= 0).all():
        assert quantized.g_idx is None
    else:
        assert np.array_equal(quantized.g_idx.numpy(), weight.g_idx)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name, kind", CASES)
def test_a_layer_is_what_was_written(name, kind, shape, group_size, dtype):
    (k, n), keywords = shape, FORMATS[name][2][kind]
    groups = 1 if group_size == -1 else k // group_size
    if groups == 1:
        keywords = {key: value for key, value in keywords.items() if key != "act_order"}
    weight = by.random_weight(k, n, groups, dtype=dtype, **keywords)
    parts = FORMATS[name][0](weight)
    reader = reader_for(name, group_size, keywords)
    names = {f"some.layer.{part}": part for part in parts}
    assert reader.layers([*names, "other.weight", "some.layer.bias"]) == {
        "some.layer": {part: name for name, part in names.items()}
    }
    quantized = reader.read("some.layer", parts)
    check(quantized, weight)
    # And the layer made of it computes with these values.
    if k % 16 == 0:
        dense = MarlinLinear.from_quantized(
            quantized.codes, quantized.scales, None, quantized.zeros, quantized.g_idx
        ).dequantize()
        assert torch.equal(dense.t(), weight.values().to(dtype))


@pytest.mark.parametrize("group_size", GROUPS)
@pytest.mark.parametrize("shape", [(64, 64), (96, 192)], ids=str)
@pytest.mark.parametrize("dialect", ["native", "autogptq", "legacy", "autoawq", "state dict"])
def test_dialects_of_marlin(dialect, shape, group_size):
    k, n = shape
    weight = by.random_weight(k, n, 1 if group_size == -1 else k // group_size)
    beside, parts = None, by.marlin(weight)
    if dialect == "native":
        config = by.marlin_config(group_size)
    elif dialect == "autogptq":
        config = by.gptq_config(group_size, checkpoint_format="marlin")
    elif dialect == "legacy":
        config = None
        beside = {"bits": 4, "group_size": group_size, "sym": True, "is_marlin_format": True}
    else:
        config = by.awq_config(group_size, version="marlin", zero_point=False)
        parts = by.autoawq_marlin(weight)
    reader = formats.reader_of({"quantization_config": config}, beside)
    if dialect == "state dict":
        reader, parts = StateDictReader(), by.marlin(weight)
    check(reader.read("layer", parts), weight)


def test_gptqmodel_takes_one_from_whole_words():
    """So a zero point 0 borrows from its neighbour; everybody else stores 15 for a 16."""
    weight = by.random_weight(32, 8, 1, zeros=(3, 9))
    weight.zeros[0] = [5, 0, 4, 9, 15, 0, 1, 7]
    parts = by.gptq(weight, 2)
    parts["qzeros"] = parts["qzeros"] - 0x11111111
    config = by.gptq_config(-1, sym=False, meta={"quantizer": ["gptqmodel:7.7.0"]})
    check(formats.reader_of({"quantization_config": config}).read("x", parts), weight)

    weight.zeros[0] = [5, 16, 4, 9, 15, 16, 1, 7]
    config = by.gptq_config(-1, sym=False)
    reader = formats.reader_of({"quantization_config": config})
    check(reader.read("x", by.gptq(weight, 1)), weight)


def test_group_sizes_of_single_layers():
    config = by.gptq_config(32, dynamic={r"+:.*\.special$": {"group_size": 64}})
    reader = formats.reader_of({"quantization_config": config})
    weight = by.random_weight(128, 8, 2)
    check(reader.read("a.special", by.gptq(weight)), weight)
    with pytest.raises(formats.CheckpointError, match=r"a\.usual: .* 2 groups .* group_size=32"):
        reader.read("a.usual", by.gptq(weight))


def test_scales_in_fp32_that_16_bits_hold():
    weight = by.random_weight(32, 8, 1)
    parts = by.gptq(weight) | {"scales": weight.scales.float()}
    reader = formats.reader_of({"quantization_config": by.gptq_config(-1)})
    check(reader.read("x", parts), weight)
    parts["scales"] = weight.scales.float() + 1e-9
    with pytest.raises(formats.CheckpointError, match="FP32"):
        reader.read("x", parts)


@pytest.mark.parametrize("order", [tuple(range(8)), by.AWQ_ORDER], ids=str)
def test_nibbles(order):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 16, (40, 24))
    packed = by.along_columns(codes, order)
    assert torch.equal(unpack_columns(packed, order), torch.from_numpy(codes).to(torch.uint8))
    assert torch.equal(pack_columns(torch.from_numpy(codes).to(torch.uint8), order), packed)
    packed = by.along_rows(codes)
    assert torch.equal(unpack_rows(packed), torch.from_numpy(codes).to(torch.uint8))
    assert torch.equal(pack_rows(torch.from_numpy(codes).to(torch.uint8)), packed)


@pytest.mark.gpu
def test_nibbles_on_the_gpu():
    words = torch.randint(-(2**31), 2**31, (40, 24), dtype=torch.int32)
    assert torch.equal(unpack_rows(words.cuda()).cpu(), unpack_rows(words))
    assert torch.equal(pack_rows(unpack_rows(words.cuda())).cpu(), words)
    order = by.AWQ_ORDER
    assert torch.equal(unpack_columns(words.cuda(), order).cpu(), unpack_columns(words, order))
    assert torch.equal(pack_columns(unpack_columns(words.cuda(), order), order).cpu(), words)


USUAL = [  # exceptions as people write them
    r".*\.(?:0|1|10|11|12|2|20|31)\..*\.(?:gate|up)_proj.*", r"model\.layers\.0\..*", r".*q_proj",
    r"^model\.layers\.([0-9]|1[0-9])\.mlp\.(experts\.\d+\.)?(gate|up|down)_proj$", "", r"lm_head",
    r"(?!.*mlp).*layers\.(?P<n>\d{1,3})\.self_attn\.[qkv]_proj", r".*(gate|shared_expert).*",
]  # fmt: skip


@pytest.mark.parametrize("pattern", USUAL)
def test_patterns_that_are_usual_mean_what_they_mean(pattern):
    layers = (f"model.layers.{n}.{x}_proj" for n in (0, 11, 70) for x in ("self_attn.q", "mlp.up"))
    for layer in [*layers, "model.layers.3.mlp.experts.63.gate_proj", "lm_head", "x" * 150]:
        assert patterns.match(pattern, layer) == bool(re.match(pattern, layer))


def test_patterns_that_are_allowed_take_no_long_time():
    for pattern in (".*" * 4, "(?:a|.)" * 8 + ".*" * 3, ".?" * 24):
        started = time.perf_counter()
        assert not patterns.match(pattern + "[^a]!", "a" * 60)
        assert time.perf_counter() - started < 5
