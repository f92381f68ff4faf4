"""`MarlinLinear` where nothing needs a gradient: a shorter way to the operator, the same results.

Nothing is remembered between calls: whatever replaces a buffer, by whichever door, counts at once.
"""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from marlin import ops
from marlin.layer import MarlinLinear

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


def make_layer(seed=0, n=64, bias=True, zeros=False, order=False):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (128, n), dtype=torch.uint8, generator=generator)
    scales = torch.rand(2, n, generator=generator).half()
    g_idx = torch.randperm(128, generator=generator) % 2 if order else None
    return MarlinLinear.from_quantized(
        codes, scales,
        bias=torch.randn(n, generator=generator) if bias else None,
        zeros=torch.randint(0, 17, (2, n), dtype=torch.uint8, generator=generator)
        if zeros else None,
        g_idx=g_idx,
    )  # fmt: skip


def rows(dtype=torch.float16):
    return torch.randn(3, 128, generator=torch.Generator().manual_seed(1)).to(dtype)


def expected(layer, x):
    """By the operator, from what the layer's state dict holds now."""
    state = layer.state_dict()
    if "perm" in state:
        x = x.index_select(-1, state["perm"])
    bias, n = state.get("bias"), layer.out_features
    if bias is not None:
        bias = nn.functional.pad(bias, (0, state["s"].shape[1] - n))
    return ops.matmul(x, state["B"], state["s"], bias, None, state.get("zeros"))[..., :n]


def assert_all_ways_agree(layer, x):
    want = expected(layer, x)
    assert torch.equal(layer(x).detach(), want)
    for mode in MODES.values():
        with mode():
            y = layer(x)
        assert torch.equal(y, want) and y.is_contiguous() and not y.requires_grad


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("zeros", [True, False])
@pytest.mark.parametrize("order", [True, False])
@pytest.mark.parametrize("n", [64, 100])
def test_every_kind_of_layer(dtype, bias, zeros, order, n):
    layer = make_layer(0, n, bias, zeros, order)
    assert_all_ways_agree(layer, rows(dtype))
    assert_all_ways_agree(layer, rows(dtype).reshape(3, 1, 128))


def set_attributes(layer, other):
    layer.B, layer.s, layer.bias = other.B, other.s, other.bias


def write_into_the_dictionary(layer, other):  # as accelerate does
    layer._buffers.update(B=other.B, s=other.s, bias=other.bias)


def copy_in_place(layer, other):
    for name in ("B", "s", "bias"):
        getattr(layer, name).copy_(getattr(other, name))


def load(layer, other):
    layer.load_state_dict(other.state_dict())


def load_and_assign(layer, other):
    layer.load_state_dict(other.state_dict(), assign=True)


def make_the_bias_a_parameter(layer, other):
    set_attributes(layer, other)
    del layer.bias
    layer.bias = nn.Parameter(other.bias.clone(), requires_grad=False)


def take_the_bias_away(layer, other):
    set_attributes(layer, other)
    layer.bias = None


def bring_zeros(layer, other):
    set_attributes(layer, other)
    layer.zeros = torch.full((2, 64), 3, dtype=torch.uint8)


def bring_an_order(layer, other):
    set_attributes(layer, other)
    layer.perm = torch.arange(127, -1, -1, dtype=torch.int32)


def come_from_the_meta_device(layer, other):
    layer.to("meta").to_empty(device="cpu")
    load(layer, other)


@pytest.mark.parametrize(
    "change",
    [
        set_attributes, write_into_the_dictionary, copy_in_place, load, load_and_assign,
        make_the_bias_a_parameter, take_the_bias_away, bring_zeros, bring_an_order,
        come_from_the_meta_device,
    ],
)  # fmt: skip
def test_what_replaces_a_buffer_counts_at_once(change):
    layer, other, x = make_layer(0), make_layer(1), rows()
    with torch.no_grad():
        before = layer(x)
    change(layer, other)
    assert_all_ways_agree(layer, x)
    with torch.no_grad():
        assert not torch.equal(layer(x), before)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_twins_go_their_own_way(twin):
    layer, x = make_layer(), rows()
    with torch.no_grad():
        before = layer(x)
        other = twin(layer)
        layer.s.mul_(2)
        assert torch.equal(other(x), before)
    assert_all_ways_agree(layer, x)


@torch.no_grad()
def test_casts_leave_the_results_alone():
    layer, x = make_layer(bias=False), rows()
    before = layer(x)
    for cast in ("half", "bfloat16", "float"):
        assert torch.equal(getattr(layer, cast)()(x), before)


@torch.no_grad()
def test_autocast_still_casts():
    layer = make_layer()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(rows())
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected(layer, rows().bfloat16()))


@torch.no_grad()
def test_hooks_are_called():
    layer, x, seen = make_layer(), rows(), []
    handles = [
        layer.register_forward_pre_hook(lambda module, args: (args[0] * 2,)),
        layer.register_forward_hook(lambda module, args, y: seen.append("own")),
        register_module_forward_hook(lambda module, args, y: seen.append("global")),
    ]
    try:
        y = layer(x)
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen) == ["global", "own"] and torch.equal(y, expected(layer, x * 2))
    layer.forward = lambda x: x + 1  # what dispatching libraries do
    assert torch.equal(layer(x), x + 1)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("n", [64, 100])
def test_compiles_without_breaks(mode, n):
    layer = make_layer(n=n)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    with MODES[mode]():
        compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=count)
        for m in (2, 3, 17):
            x = torch.randn(m, 128).half()
            assert torch.equal(compiled(x), expected(layer, x))
    assert len(graphs) == 1
    torch.compiler.reset()  # what all tests compile of one function counts together


@torch.no_grad()
def test_errors_are_the_operators():
    with pytest.raises(RuntimeError, match=r"a: expected \(..., k\) with k = 128"):
        make_layer()(torch.randn(3, 64).half())
    with pytest.raises(RuntimeError, match="a: expected Half, BFloat16 or Float"):
        make_layer()(torch.ones(3, 128, dtype=torch.int32))
