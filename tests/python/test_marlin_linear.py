"""`MarlinLinear` and `quantize`: what comes out, and what survives moves, casts and state dicts."""

import copy
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from marlin import ops
from marlin.layer import MarlinLinear, quantize, round_to_nearest


def random_layer(k=128, n=64, group_size=64, bias=True, dtype=torch.float16, seed=0):
    torch.manual_seed(seed)
    linear = nn.Linear(k, n, bias=bias)
    return linear, MarlinLinear.from_linear(linear, group_size, dtype)


def exact_weight(layer):
    """(k, n) in float64, from the layer's own codes and scales."""
    codes = ops.unpack(layer.B).double() - 8
    scales = ops.unpack_scales(layer.s).double()
    weight = codes * scales.repeat_interleave(codes.shape[0] // scales.shape[0], 0)
    return weight[:, : layer.out_features]


def reference(layer, x):
    y = x.double() @ exact_weight(layer)
    return y if layer.bias is None else y + layer.bias.double()


def assert_close(y, expected):
    bound = {torch.float16: 5e-4, torch.bfloat16: 4e-3, torch.float32: 1e-5}[y.dtype]
    assert y.shape == expected.shape
    error = (y.double() - expected).abs().mean() / expected.abs().mean()
    assert error < bound


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("k, n, group_size", [(128, 64, 64), (96, 100, 32), (48, 1, -1)])
@pytest.mark.parametrize("bias", [True, False])
def test_forward(k, n, group_size, bias, scale_dtype, dtype):
    _, layer = random_layer(k, n, group_size, bias, scale_dtype)
    for leading in [(5,), (2, 3), (1, 1, 2), ()]:
        x = torch.randn(*leading, k, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype and y.is_contiguous()
        assert_close(y, reference(layer, x))
    assert layer(torch.empty(0, k, dtype=dtype)).shape == (0, n)
    assert layer(torch.empty(3, 0, k, dtype=dtype)).shape == (3, 0, n)


@given(
    k=st.sampled_from([32, 64, 128, 192, 256]),
    n=st.integers(1, 200),
    group_size=st.sampled_from([32, 64, 128, -1]),
    seed=st.integers(0, 99),
)
def test_rounding_to_nearest_is_within_half_a_step(k, n, group_size, seed):
    if group_size != -1 and k % group_size:
        return
    linear, layer = random_layer(k, n, group_size, seed=seed)
    groups = layer.s.shape[0]
    scales = ops.unpack_scales(layer.s)[:, :n].float().repeat_interleave(k // groups, 0)
    # +7.5 steps is nearest to code 7: there the error is half a step, give or take rounding.
    assert ((layer.dequantize().float() - linear.weight).abs() <= scales.t() * 0.5001 + 1e-3).all()
    assert layer.dequantize().shape == (n, k)
    largest = linear.weight.detach().t().reshape(groups, -1, n).abs().amax(1)
    assert torch.equal(ops.unpack_scales(layer.s)[:, :n], (largest / 7.5).half())


def test_from_quantized_holds_exactly_what_it_was_given():
    torch.manual_seed(0)
    codes = torch.randint(0, 16, (64, 70), dtype=torch.uint8)
    scales = torch.rand(2, 70).half()
    bias = torch.randn(70)
    layer = MarlinLinear.from_quantized(codes, scales, bias)
    assert layer.in_features == 64 and layer.out_features == 70 and layer.group_size == 32
    assert torch.equal(ops.unpack(layer.B)[:, :70], codes)
    assert torch.equal(ops.unpack_scales(layer.s)[:, :70], scales)
    assert torch.equal(layer.bias, bias.half())
    weight = (codes.float() - 8) * scales.float().repeat_interleave(32, 0)
    assert torch.equal(layer.dequantize(), weight.half().t())
    own = bias.half()
    assert MarlinLinear.from_quantized(codes, scales, own).bias.data_ptr() != own.data_ptr()
    # Slices and transposes are not contiguous: the operators would refuse them.
    other = MarlinLinear.from_quantized(codes.t().contiguous().t(), scales[:, :].t().clone().t())
    assert torch.equal(other.B, layer.B) and other.bias is None


@pytest.mark.parametrize(
    "codes, scales, bias, message",
    [
        ((64, 64), (1, 32), None, r"codes \(k, n\) and scales"),
        ((64, 64), (3, 64), None, "3 groups .* k=64"),
        ((64, 64), (0, 64), None, "0 groups"),
        ((64, 64), (4, 64), None, "group_size=16 does not fit"),
        ((40, 64), (1, 64), None, "multiple of 16, got 40"),
        ((64, 64), (1, 64), (63,), r"bias must be \(64,\)"),
    ],
)
def test_from_quantized_refuses(codes, scales, bias, message):
    bias = None if bias is None else torch.zeros(bias)
    with pytest.raises(ValueError, match=message):
        MarlinLinear.from_quantized(
            torch.zeros(codes, dtype=torch.uint8), torch.ones(scales).half(), bias
        )


def test_from_quantized_refuses_types_and_codes():
    codes, scales = torch.zeros(64, 64, dtype=torch.uint8), torch.ones(1, 64).half()
    with pytest.raises(ValueError, match="dtype must be"):
        MarlinLinear.from_quantized(codes, scales.float())
    with pytest.raises(ValueError, match=r"torch.uint8, got torch.int32"):
        MarlinLinear.from_quantized(codes.int(), scales)
    with pytest.raises(ValueError, match="0 to 15, got 16"):
        MarlinLinear.from_quantized(codes + 16, scales)


def test_sizes_that_do_not_fit_say_which_would():
    with pytest.raises(ValueError, match=r"group_size=128 .* in_features=576; .* 32, 64, -1"):
        MarlinLinear(576, 64)
    with pytest.raises(ValueError, match="sizes that do: -1"):
        MarlinLinear(48, 64, group_size=32)
    with pytest.raises(ValueError, match="multiple of 16, got 100"):
        MarlinLinear(100, 64, group_size=-1)
    for bad in (0, -2, 16, 3):
        with pytest.raises(ValueError, match="does not fit"):
            MarlinLinear(128, 64, group_size=bad)
    with pytest.raises(ValueError, match="out_features must be positive, got 0"):
        MarlinLinear(128, 0)
    with pytest.raises(ValueError, match=r"got torch.float32"):
        MarlinLinear(128, 64, dtype=torch.float32)


def test_weights_without_a_4_bit_form_are_refused():
    linear = nn.Linear(64, 64)
    linear.weight.data[3, 5] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        MarlinLinear.from_linear(linear, 64)
    linear.weight.data[3, 5] = 1e6  # its scale would be infinite in FP16, not in BF16
    with pytest.raises(ValueError, match=r"too large for scales in torch.float16"):
        MarlinLinear.from_linear(linear, 64)
    assert MarlinLinear.from_linear(linear, 64, torch.bfloat16).dequantize().isfinite().all()


def test_zero_weights_stay_zero():
    codes, scales = round_to_nearest(torch.zeros(64, 64), 32, torch.float16)
    assert (codes == 8).all() and scales.isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_an_empty_layer_cannot_look_like_a_result(bias):
    layer = MarlinLinear(64, 64, bias, group_size=64)
    assert layer(torch.ones(2, 64)).isnan().all()
    on_meta = MarlinLinear(64, 64, bias, group_size=64, device="meta")
    assert on_meta(torch.empty(2, 64, device="meta")).shape == (2, 64)
    assert on_meta.to_empty(device="cpu")(torch.ones(2, 64)).isnan().all()


def test_state_dict_holds_padded_words_and_the_logical_bias():
    _, layer = random_layer(128, 100, 64)
    shapes = {name: (t.dtype, tuple(t.shape)) for name, t in layer.state_dict().items()}
    assert shapes == {
        "B": (torch.int32, (8, 256)),
        "s": (torch.float16, (2, 128)),
        "bias": (torch.float16, (100,)),
    }
    assert set(random_layer(bias=False)[1].state_dict()) == {"B", "s"}


@pytest.mark.parametrize("assign", [True, False])
def test_loading_keeps_the_checkpoints_scales(assign):
    _, source = random_layer(128, 100, 64, dtype=torch.bfloat16)
    target = MarlinLinear(128, 100, True, group_size=64)
    assert target.load_state_dict(source.state_dict(), assign=assign)
    assert target.s.dtype == torch.bfloat16 and torch.equal(target.s, source.s)
    x = torch.randn(3, 128)
    assert_close(target(x), reference(source, x))
    with pytest.raises(RuntimeError, match="size mismatch"):
        MarlinLinear(128, 100, True, group_size=32).load_state_dict(source.state_dict())


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casting_a_model_leaves_the_scales_alone(cast):
    _, layer = random_layer(128, 100, 64)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    model = nn.Sequential(layer, nn.LayerNorm(100))
    getattr(model, cast)()
    assert torch.equal(layer.s, before["s"]) and layer.s.dtype == torch.float16
    assert torch.equal(layer.B, before["B"])
    if cast != "double":  # the activations of which no kernel takes
        x = torch.randn(4, 128).to(model[1].weight.dtype)
        assert model(x).dtype == x.dtype
        assert_close(layer(x), reference(layer, x))


def test_a_failing_move_leaves_the_layer_usable():
    _, layer = random_layer()
    expected = layer(torch.ones(1, 128))

    def fail(tensor):
        raise MemoryError

    with pytest.raises(MemoryError):
        layer._apply(fail)
    assert torch.equal(layer(torch.ones(1, 128)), expected)


def test_copies_are_equal_and_independent():
    _, layer = random_layer(128, 100, 64)
    x = torch.randn(3, 128)
    expected = layer(x)
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    layer.s.zero_()
    for other in copies:
        assert torch.equal(other(x), expected)


def test_autocast_casts_as_for_a_linear():
    linear, layer = random_layer()
    x = torch.randn(3, 128)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype == torch.bfloat16
        assert_close(layer(x), reference(layer, x.bfloat16()))
    assert layer(x).dtype == torch.float32


@pytest.mark.parametrize("n", [64, 100])
def test_compiles_without_breaks_for_any_batch(n):
    _, layer = random_layer(128, n, 64)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    for m in (2, 3, 17):
        x = torch.randn(m, 128)
        assert_close(compiled(x), reference(layer, x))


def test_gradient_reaches_the_activations():
    _, layer = random_layer(128, 100, 64)
    x = torch.randn(3, 128, requires_grad=True)
    weight = exact_weight(layer).float().t()
    layer(x).square().sum().backward()
    dense = x.detach().clone().requires_grad_()
    F.linear(dense, weight, layer.bias.float()).square().sum().backward()
    torch.testing.assert_close(x.grad, dense.grad, rtol=1e-4, atol=1e-4)
    assert not layer(x.detach()).requires_grad
    with torch.no_grad():
        assert layer(x).grad_fn is None


def test_repr_says_what_it_is():
    text = "in_features=128, out_features=100, bias=True, group_size=64, dtype=torch.float16"
    assert text in repr(random_layer(128, 100, 64)[1])
    assert "group_size=-1" in repr(MarlinLinear(48, 64, group_size=-1))


class Conv1D(nn.Module):
    """As GPT-2 has it: weight (in, out)."""

    def __init__(self, nf, nx):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.randn(nx, nf) * 0.02)
        self.bias = nn.Parameter(torch.randn(nf))


def test_conv1d_is_taken_in_its_own_orientation():
    torch.manual_seed(0)
    conv = Conv1D(100, 64)
    layer = MarlinLinear.from_linear(conv, 64)
    assert (layer.in_features, layer.out_features) == (64, 100)
    x = torch.randn(5, 64)
    dense = torch.addmm(conv.bias, x, conv.weight)
    assert (layer(x) - dense).abs().mean() < 0.1 * dense.std()


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(64, 96), nn.ReLU())])
        self.conv = Conv1D(64, 96)
        self.odd = nn.Linear(72, 64)
        self.lm_head = nn.Linear(64, 64)
        self.attention = nn.MultiheadAttention(64, 4)
        self.shared = self.blocks[0][0]


def test_quantize_reaches_everything_it_can_and_names_the_rest():
    model = Model().eval()
    kept = quantize(model, 32)
    assert kept == ["odd", "lm_head"]
    assert type(model.blocks[0][0]) is MarlinLinear and model.shared is model.blocks[0][0]
    assert type(model.conv) is MarlinLinear
    assert not model.conv.training
    # nn.MultiheadAttention reads its projection's weight, so that has to stay a Linear.
    x = torch.randn(3, 1, 64)
    assert model.attention(x, x, x)[0].shape == x.shape
    skip = ["blocks.0.0", "shared", "conv", "lm_head"]
    assert sorted(quantize(Model(), 32, skip=skip)) == sorted([*skip, "odd"])


@pytest.mark.gpu
@pytest.mark.parametrize("n", [64, 100])
def test_on_a_gpu(n):
    _, layer = random_layer(128, n, 64)
    x = torch.randn(5, 128, device="cuda")
    layer.cuda()
    assert layer.s.is_cuda and layer.s.dtype == torch.float16
    for dtype in (torch.float16, torch.bfloat16):
        assert_close(layer(x.to(dtype)), reference(layer, x.to(dtype)))
    layer.float()
    y = layer(x)  # FP32 is computed in the scales' type
    assert y.dtype == torch.float32
    assert (y.double() - reference(layer, x)).abs().mean() < 1e-3 * y.abs().mean()
    with torch.autocast("cuda", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    on_gpu = MarlinLinear.from_linear(nn.Linear(128, n, device="cuda"), 64)
    assert on_gpu.B.is_cuda and on_gpu(x.half()).shape == (5, n)
    with pytest.raises(RuntimeError):
        layer(x.cpu().half())
