"""`MarlinLinear` with zero points and with rows in an order of their own ("act-order")."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from marlin import ops
from marlin.layer import MarlinLinear
from marlin.published import Layer
from marlin.quantized import Quantized
from marlin.testing.problems import check_product

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
KINDS = [(True, False), (False, True), (True, True)]  # zeros, act-order


def random_quantized(k=128, n=100, groups=4, zeros=True, order=True, seed=0, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(groups, n, generator=generator) * 0.02 + 0.001).half()
    points = torch.randint(0, 17, (groups, n), dtype=torch.uint8, generator=generator)
    g_idx = (torch.randperm(k, generator=generator) % groups).to(torch.int32)
    parts = (codes, scales, points if zeros else None, g_idx if order else None)
    return Quantized(*(None if part is None else part.to(device) for part in parts))


def exact_weight(weight):
    """(k, n) in float64, by the definition."""
    k, groups = weight.codes.shape[0], weight.scales.shape[0]
    g_idx = torch.arange(k, device=weight.codes.device) // (k // groups)
    g_idx = g_idx if weight.g_idx is None else weight.g_idx.long()
    zeros = 8 if weight.zeros is None else weight.zeros.double()[g_idx]
    return (weight.codes.double() - zeros) * weight.scales.double()[g_idx]


def make_layer(weight, bias=None):
    return MarlinLinear.from_quantized(weight.codes, weight.scales, bias, *weight[2:])


def assert_same_parts(ours, given):
    for name, part in given._asdict().items():
        other = getattr(ours, name)
        if part is None:
            assert other is None, name
        else:
            assert torch.equal(other, part.to(other.dtype)) and other.is_contiguous(), name


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zeros, order", KINDS)
@pytest.mark.parametrize("k, n, groups", [(128, 64, 4), (256, 100, 2), (48, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_forward(device, zeros, order, k, n, groups, dtype):
    weight = random_quantized(k, n, groups, zeros, order and groups > 1, device=device)
    bias = torch.randn(n, device=device).half()
    layer = make_layer(weight, bias)
    values = exact_weight(weight)
    for leading in [(5,), (2, 3), (1, 1, 2)]:
        x = torch.randn(*leading, k, dtype=dtype, device=device)
        y = layer(x)
        assert y.dtype == dtype and y.is_contiguous() and y.shape == (*leading, n)
        if n > 1:  # the bound on the mean wants many elements
            check_product(y, x, values, bias)
    assert torch.equal(layer(x[0, 0, 0]), layer(x)[0, 0, 0])
    assert layer(torch.empty(0, k, dtype=dtype, device=device)).shape == (0, n)
    assert torch.equal(layer.dequantize(), values.float().half().t())


@given(
    groups=st.sampled_from([1, 2, 3, 4]),
    size=st.sampled_from([32, 64, 128]),
    n=st.integers(1, 200),
    zeros=st.booleans(),
    order=st.booleans(),
    m=st.integers(0, 20),
    seed=st.integers(0, 2**31),
)
def test_any_layer_is_exact_and_comes_back(groups, size, n, zeros, order, m, seed):
    k = groups * size
    weight = random_quantized(k, n, groups, zeros, order and groups > 1, seed)
    layer = make_layer(weight)
    assert (layer.zeros is not None) == zeros
    assert_same_parts(layer.quantized(), weight)
    again = make_layer(layer.quantized())
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in layer.state_dict().items())
    x = torch.randn(m, k)
    y, expected = layer(x).double(), x.double() @ exact_weight(weight)
    assert ((y - expected).abs() <= 1e-5 * (x.abs().double() @ exact_weight(weight).abs())).all()


def test_a_published_layer_comes_back_too():
    weight = random_quantized(128, 64, 4, zeros=False, order=False)
    layer = Layer(128, 64, 32)
    layer.B, layer.s = ops.pack(weight.codes), ops.pack_scales(weight.scales)
    assert_same_parts(layer.quantized(), weight)


# ----------------------------------------------------------------------------- groups of rows


def test_rows_in_order_need_no_gather():
    weight = random_quantized(128, 64, 4, order=False)
    in_order = (torch.arange(128) // 32).to(torch.int32)
    for g_idx in (in_order, in_order.long()):
        layer = make_layer(weight._replace(g_idx=g_idx))
        assert layer.perm is None and layer.quantized().g_idx is None
    one_group = random_quantized(64, 64, 1, order=False)._replace(g_idx=torch.zeros(64).int())
    assert make_layer(one_group).perm is None


def test_rows_of_a_group_keep_their_order():
    weight = random_quantized(64, 64, 2, order=False)
    layer = make_layer(weight._replace(g_idx=torch.tensor([1, 0] * 32)))
    assert layer.perm.dtype == torch.int32
    assert layer.perm.tolist() == [*range(1, 64, 2), *range(0, 64, 2)]
    backwards = make_layer(weight._replace(g_idx=torch.tensor([1] * 32 + [0] * 32)))
    assert backwards.perm.tolist() == [*range(32, 64), *range(32)]


@pytest.mark.parametrize(
    "change, message",
    [
        (
            {"zeros": torch.zeros(4, 64, dtype=torch.int32)},
            "zeros must be .* got torch.int32",
        ),
        ({"zeros": torch.full((4, 64), 17, dtype=torch.uint8)}, "zeros must be 0 to 16, got 17"),
        (
            {"zeros": torch.zeros(2, 64, dtype=torch.uint8)},
            r"zeros \(4, 64\) .* got \(2, 64\)",
        ),
        ({"zeros": torch.zeros(64, dtype=torch.uint8)}, r"zeros \(4, 64\) .* got \(64,\)"),
        (
            {"g_idx": torch.zeros(127, dtype=torch.int32)},
            r"g_idx: expected .*\(128,\), .*127",
        ),
        ({"g_idx": torch.zeros(128)}, "g_idx: expected int32 or int64 .* got torch.float32"),
        ({"g_idx": torch.arange(128) % 5}, "g_idx must be 0 to 3, got 0 to 4"),
        ({"g_idx": torch.arange(128) % 4 - 1}, "g_idx must be 0 to 3, got -1 to 2"),
        (
            {"g_idx": (torch.arange(128) // 32).index_fill(0, torch.tensor([40]), 3)},
            "g_idx: expected 32 rows in every group, got 31 in group 1",
        ),
        (
            {"g_idx": torch.arange(128).div(50, rounding_mode="floor")},
            "g_idx: expected 32 rows in every group, got 50 in group 0",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    weight = random_quantized(128, 64, 4)._replace(**change)
    with pytest.raises(ValueError, match=message):
        make_layer(weight)


def test_too_many_or_too_few_columns_are_not_gathered():
    layer = make_layer(random_quantized())
    for k in (64, 127, 129, 256):
        with pytest.raises(RuntimeError, match=r"a: expected \(\.\.\., k\) with k = 128"):
            layer(torch.ones(2, k))
    with pytest.raises(RuntimeError, match="a: expected"):
        layer(torch.tensor(1.0))


# ---------------------------------------------------------------------- state, copies, moves


@pytest.mark.parametrize("zeros, order", [(False, False), *KINDS])
def test_the_state_dict_has_what_the_layer_has(zeros, order):
    layer = make_layer(random_quantized(128, 100, 4, zeros, order))
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in layer.state_dict().items()}
    expected = {"B": (torch.int32, (8, 256)), "s": (torch.float16, (4, 128))}
    if zeros:
        expected["zeros"] = (torch.uint8, (4, 128))
    if order:
        expected["perm"] = (torch.int32, (128,))
    assert shapes == expected
    assert ("zeros=True" in repr(layer)) == zeros and ("act_order=True" in repr(layer)) == order


@pytest.mark.parametrize("assign", [True, False])
@pytest.mark.parametrize("zeros, order", KINDS)
def test_loading_a_state_dict(zeros, order, assign):
    source = make_layer(random_quantized(128, 100, 4, zeros, order), torch.randn(100))
    target = MarlinLinear(128, 100, True, group_size=32, zeros=zeros, act_order=order)
    x = torch.randn(3, 128)
    assert target(x).isnan().all()
    target.load_state_dict(source.state_dict(), assign=assign)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("part", ["zeros", "perm"])
def test_loading_without_a_part_is_an_error_even_if_not_strict(part, strict):
    full = make_layer(random_quantized(128, 64, 4))
    has = {"zeros": part != "zeros", "act_order": part != "perm"}
    lacking = MarlinLinear(128, 64, group_size=32, **has)
    with pytest.raises(RuntimeError, match=f"{part} is in the state dict, but not in the layer"):
        lacking.load_state_dict(full.state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match=rf"0\.{part} is in the layer, but not in the state"):
        nn.Sequential(full).load_state_dict(nn.Sequential(lacking).state_dict(), strict=strict)
    with pytest.raises(RuntimeError, match="not in the layer"):
        Layer(128, 64, 32).load_state_dict(full.state_dict(), strict=strict)
    # Other tensors alone, a bias say, do load.
    full.load_state_dict({}, strict=False)


@pytest.mark.parametrize("zeros, order", KINDS)
def test_an_empty_layer_cannot_look_like_a_result(zeros, order):
    layer = MarlinLinear(64, 100, group_size=32, zeros=zeros, act_order=order)
    assert layer(torch.ones(2, 64)).isnan().all()
    on_meta = MarlinLinear(64, 100, group_size=32, zeros=zeros, act_order=order, device="meta")
    assert on_meta(torch.empty(2, 64, device="meta")).shape == (2, 100)
    with torch.device("meta"):
        assert MarlinLinear(64, 100, group_size=32, zeros=zeros, act_order=order).B.is_meta
    filled = on_meta.to_empty(device="cpu")
    assert filled(torch.ones(2, 64)).isnan().all() and filled.dequantize().isnan().all()


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casts_leave_the_weight_alone(cast):
    layer = make_layer(random_quantized())
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    getattr(nn.Sequential(layer), cast)()
    for name, tensor in layer.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name])


def test_copies_are_equal_and_independent():
    layer = make_layer(random_quantized())
    x = torch.randn(3, 128)
    expected = layer(x)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    copies.append(MarlinLinear(128, 100, group_size=32, zeros=True, act_order=True))
    copies[-1].load_state_dict(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
    layer.zeros.zero_()
    layer.perm.copy_(torch.arange(128))
    for other in copies:
        assert torch.equal(other(x), expected)


def test_a_bias_that_became_a_parameter():
    layer = make_layer(random_quantized(), torch.randn(100))
    expected = layer(torch.ones(1, 128))
    layer.bias = nn.Parameter(layer.bias.float())
    layer(torch.ones(1, 128)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.ones(100))
    torch.testing.assert_close(layer(torch.ones(1, 128)), expected)


# ------------------------------------------------------------------------ compile, gradients


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zeros, order", KINDS)
def test_compiles_without_breaks_for_any_batch(device, zeros, order):
    weight = random_quantized(zeros=zeros, order=order, device=device)
    layer = make_layer(weight)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (2, 3, 17):
        x = torch.randn(m, 128, device=device).half()
        check_product(compiled(x), x, exact_weight(weight))


def test_compiled_exported_and_functional_calls_take_the_buffers_of_now():
    first, second, third = (make_layer(random_quantized(seed=seed)) for seed in range(3))
    x = torch.randn(4, 128)
    compiled = torch.compile(first, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), first(x))
    for name, tensor in second.state_dict().items():
        setattr(first, name, tensor.clone())
    assert torch.equal(compiled(x), second(x))
    first.load_state_dict(third.state_dict())
    assert torch.equal(compiled(x), third(x))
    assert torch.equal(torch.func.functional_call(first, second.state_dict(), (x,)), second(x))
    rows = torch.export.Dim("rows", min=2, max=99)
    for module in (third, nn.Sequential(third)):
        exported = torch.export.export(module, (x,), dynamic_shapes=({0: rows},))
        assert torch.equal(exported.module()(x.repeat(3, 1)), third(x.repeat(3, 1)))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("zeros, order", KINDS)
def test_gradient_reaches_the_activations(device, zeros, order):
    weight = random_quantized(zeros=zeros, order=order, device=device)
    dtype = torch.float32 if device == "cpu" else torch.float16
    x = torch.randn(2, 3, 128, dtype=dtype, device=device, requires_grad=True)
    grad = torch.randn(2, 3, 100, dtype=dtype, device=device)
    make_layer(weight)(x).backward(grad)
    expected = grad.double() @ exact_weight(weight).t()
    bound = 1e-5 if device == "cpu" else 2e-2
    torch.testing.assert_close(x.grad.double(), expected, rtol=bound, atol=bound)


def test_autocast_casts_as_for_a_linear():
    layer, linear = make_layer(random_quantized()), nn.Linear(128, 100)
    x = torch.randn(3, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype == torch.bfloat16
        check_product(layer(x), x.bfloat16(), exact_weight(layer.quantized()))


@pytest.mark.gpu
def test_moves_to_a_gpu_and_back():
    weight = random_quantized()
    layer = make_layer(weight, torch.randn(100)).cuda()
    assert {t.device.type for t in layer.state_dict().values()} == {"cuda"}
    assert_same_parts(Quantized(*(t.cpu() for t in layer.quantized())), weight)
    x = torch.randn(5, 128, device="cuda")
    assert layer(x).dtype == torch.float32  # computed in the type of the scales
    check_product(layer(x.half()), x.half(), exact_weight(weight).cuda(), layer.bias)
    there = make_layer(Quantized(*(t.cuda() for t in weight)))
    for name, tensor in there.state_dict().items():
        assert torch.equal(tensor, layer.state_dict()[name])
    assert torch.equal(layer.cpu().B, make_layer(weight).B)
    # g_idx may lie elsewhere than the codes.
    mixed = Quantized(weight.codes.cuda(), weight.scales.cuda(), weight.zeros.cuda(), weight.g_idx)
    assert torch.equal(make_layer(mixed).perm, there.perm)


def test_gather_happens_once_per_call(monkeypatch):
    layer = make_layer(random_quantized())
    seen = []
    matmul = ops.matmul
    monkeypatch.setattr(ops, "matmul", lambda a, *rest: seen.append(a.clone()) or matmul(a, *rest))
    x = torch.randn(2, 128)
    layer(x)
    assert len(seen) == 1 and torch.equal(seen[0], x[:, layer.perm.long()])
