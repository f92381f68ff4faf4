"""Zero points: mul and dequantize with them, against float64; what Torch expects; refusals."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin import host, ops
from marlin.testing.problems import check_product, random_rows, random_weight
from marlin.testing.shapes import GROUP_SIZES, ROWS

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALVES = [torch.float16, torch.bfloat16]


def multiply(a, weight, bias=None, config=None):
    return ops.matmul(a, weight.b, weight.s, bias, config, weight.z)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_rows(device, dtype, group_size):
    """Every batch size around a tile boundary, into a poisoned output."""
    weight = random_weight(384, 192, group_size, device=device, zeros=True)
    assert (weight.zeros == 16).any() and (weight.zeros == 0).any()
    values = weight.values()
    for m in ROWS:
        a = random_rows(m, 384, dtype=dtype, device=device, seed=m)
        y = torch.full((m, 192), float("nan"), dtype=dtype, device=device)
        ops.matmul_out(a, weight.b, weight.s, y, zeros=weight.z)
        check_product(y, a, values)
        assert torch.equal(multiply(a, weight), y)


@pytest.mark.parametrize("config", host.cpu_kernels())
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_every_instruction_set(config, dtype):
    weight = random_weight(192, 128, 32, zeros=True)
    bias = torch.randn(128)
    for m in (1, 4, 13, 256, 257):  # 257: by way of the BLAS
        a = random_rows(m, 192, dtype=dtype)
        check_product(multiply(a, weight, bias, config), a, weight.values(), bias)


@pytest.mark.parametrize("device", DEVICES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_problems(device, data):
    group_size = data.draw(st.sampled_from(GROUP_SIZES), label="group size")
    unit = 16 if group_size == -1 else group_size
    k = unit * data.draw(st.integers(1, 512 // unit), label="k units")
    n = 64 * data.draw(st.integers(1, 8), label="n / 64")
    m = data.draw(st.integers(0, 300), label="m")
    dtype = data.draw(st.sampled_from(HALVES), label="dtype")
    scale_dtype = data.draw(st.sampled_from(HALVES), label="scale dtype")
    seed = data.draw(st.integers(0, 2**31), label="seed")
    weight = random_weight(
        k, n, group_size, dtype=scale_dtype, device=device, seed=seed, zeros=True
    )
    bias = torch.randn(n, device=device, dtype=dtype) if data.draw(st.booleans()) else None
    a = random_rows(m, k, dtype=dtype, device=device, seed=seed + 1)
    check_product(multiply(a, weight, bias), a, weight.values(), bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", [-1, 32])
def test_zeros_of_eight_are_none(device, group_size):
    """Bit for bit; not in the net, which is more exact with them."""
    weight = random_weight(256, 128, group_size, device=device)
    eights = torch.full_like(weight.s, 8, dtype=torch.uint8)
    config = "reference" if device == "cuda" else None
    for dtype, m in itertools.product(HALVES, (1, 33)):
        a = random_rows(m, 256, dtype=dtype, device=device)
        with_zeros = ops.matmul(a, weight.b, weight.s, config=config, zeros=eights)
        assert torch.equal(with_zeros, ops.matmul(a, weight.b, weight.s, config=config))
    assert torch.equal(
        ops.dequantize(weight.b, weight.s, zeros=eights), ops.dequantize(weight.b, weight.s)
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", [-1, 64])
@pytest.mark.parametrize("scale_dtype", HALVES)
@pytest.mark.parametrize("dtype", [None, torch.float16, torch.bfloat16, torch.float32])
def test_dequantize_is_exact(device, group_size, scale_dtype, dtype):
    weight = random_weight(192, 128, group_size, dtype=scale_dtype, device=device, zeros=True)
    result = ops.dequantize(weight.b, weight.s, dtype, weight.z)
    # From float32: torch rounds float64 to bfloat16 twice.
    assert torch.equal(result, weight.values().float().to(dtype or scale_dtype))
    if device == "cpu" and scale_dtype == torch.float16 and dtype is None:
        from_host = host.dequantize(weight.b.numpy(), weight.s.numpy(), weight.z.numpy())
        assert (from_host == weight.values().numpy()).all()


@pytest.mark.parametrize("device", DEVICES)
def test_any_scale(device):
    """Zero, negative, huge and tiny scales are right; Inf and NaN come out where they went in."""
    weight = random_weight(256, 128, 64, device=device, zeros=True)
    scales = weight.scales.clone()
    scales[0, 0::8], scales[0, 2::8], scales[-1, 3::8] = 0, 8.0, 2.0**-24
    scales[-1, 1::8] *= -1
    weight.scales, weight.s = scales, ops.pack_scales(scales)
    a = random_rows(19, 256, device=device)
    check_product(multiply(a, weight), a, weight.values())
    scales[0, 7], scales[-1, 15] = float("nan"), float("inf")
    weight.s = ops.pack_scales(scales)
    bad = ~multiply(a, weight).isfinite()
    assert bad[:, [7, 15]].all() and bad.sum() == 2 * 19


def rounded_upwards(k, n, group_size, dtype, device):
    """A weight whose columns have means near zero, with every group all above or all below, and
    with scales for which rounding to their type makes nearly every value larger."""
    weight = random_weight(k, n, group_size, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    above = (torch.arange(k // group_size) % 2 == 0)[:, None]
    codes = torch.randint(0, 4, (k, n), generator=generator)
    codes = codes + 12 * above.repeat_interleave(group_size, 0)
    zeros = torch.where(above, 0, 16).expand(-1, n)
    drawn = torch.rand(32, *weight.scales.shape, generator=generator)
    drawn = (0.01 + 0.002 * drawn).to(dtype)
    exact = drawn.double() * (torch.arange(4).view(4, 1, 1, 1) + torch.where(above, 12, -16))
    errors = (exact.float().to(dtype).double() - exact).sum(0)
    weight.scales = drawn.gather(0, errors.argmax(0, keepdim=True))[0].to(device)
    weight.codes, weight.zeros = codes.byte().to(device), zeros.byte().to(device)
    weight.b, weight.s = ops.pack(weight.codes), ops.pack_scales(weight.scales)
    weight.z = ops.pack_scales(weight.zeros.contiguous())
    return weight


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("mean", [8.0, 32.0])
def test_means(device, dtype, group_size, mean):
    """Errors of weights that are rounded to 16 bits would add up where activations have a mean."""
    k, n = 2048, 320
    weight = rounded_upwards(k, n, group_size, dtype, device)
    values = weight.values()
    configs = [None, "reference", "dense", "dense@3"] if device == "cuda" else [None]
    biases = [None, *(30 * torch.randn(n, device=device).to(t) for t in (*HALVES, torch.float32))]
    for m in (7, 100):
        a = random_rows(m, k, dtype=dtype, device=device, mean=mean)
        rounded = a.double() @ values.float().to(dtype).double()
        with pytest.raises(AssertionError, match=r"an element is [2-9]"):
            check_product(rounded.float().to(dtype), a, values)
        for config, bias in itertools.product(configs, biases):
            check_product(multiply(a, weight, bias, config), a, values, bias)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("groups", [1, 3])
def test_zeros_are_ordered_like_scales(device, groups):
    zeros = torch.randint(0, 17, (groups, 192), dtype=torch.uint8)
    packed = ops.pack_scales(zeros.to(device))
    assert packed.dtype == torch.uint8
    assert torch.equal(packed.cpu().half(), ops.pack_scales(zeros.half()))
    assert torch.equal(ops.unpack_scales(packed).cpu(), zeros)
    if device == "cpu":
        assert (host.pack_scales(zeros.numpy()) == packed.numpy()).all()
        assert (host.unpack_scales(packed.numpy()) == zeros.numpy()).all()


# --------------------------------------------------------------------- what Torch expects


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("m", [0, 3])
def test_opcheck(device, m):
    weight = random_weight(128, 64, 32, device=device, zeros=True)
    operators = torch.ops.marlin
    a = random_rows(m, 128, device=device).requires_grad_()
    bias = torch.randn(64, device=device).half().requires_grad_()
    arguments = (weight.b, weight.s, bias.detach(), None, weight.z, "uint4")
    torch.library.opcheck(operators.mul.default, (a, weight.b, weight.s, bias, *arguments[3:]))
    torch.library.opcheck(operators.mul_inference.default, (a.detach(), *arguments))
    out = torch.empty(m, 64, dtype=torch.float16, device=device)
    torch.library.opcheck(operators.mul.out, (a.detach(), *arguments), {"out": out})
    for dtype in (None, torch.bfloat16):
        torch.library.opcheck(
            operators.dequantize.default, (weight.b, weight.s, dtype, weight.z, "uint4")
        )
    torch.library.opcheck(operators.pack_scales.default, (weight.zeros,))
    torch.library.opcheck(operators.unpack_scales.default, (weight.z,))


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_dynamic_rows(device):
    weight = random_weight(64, 64, 32, device=device, zeros=True)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def model(a):
        return multiply(a * 2, weight).relu() + 1

    for m in (2, 5, 33, 150):
        a = random_rows(m, 64, device=device, seed=m)
        torch._dynamo.mark_dynamic(a, 0)
        assert torch.equal(model(a), multiply(a * 2, weight).relu() + 1)
    assert len(graphs) == 1


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("compiled", [False, True])
def test_gradient(device, compiled):
    weight = random_weight(128, 64, 64, device=device, zeros=True)
    a = random_rows(6, 128, device=device).reshape(2, 3, 128).requires_grad_()
    grad = random_rows(6, 64, device=device, seed=2).reshape(2, 3, 64)
    function = torch.compile(multiply, fullgraph=True, dynamic=True) if compiled else multiply
    function(a, weight).backward(grad)
    expected = grad.double() @ weight.values().t()
    torch.testing.assert_close(a.grad.double(), expected, rtol=2e-2, atol=2e-2)


def test_gradcheck():
    weight = random_weight(48, 64, -1, zeros=True)
    a = random_rows(3, 48, dtype=torch.float32).requires_grad_()
    # Linear, so a step of one has no truncation error, and float32's rounding does not drown it.
    assert torch.autograd.gradcheck(lambda a: multiply(a, weight), a, eps=1.0, atol=1e-3, rtol=1e-3)


def test_meta_tensors():
    weight = random_weight(64, 128, 32, zeros=True)
    b, s, z = weight.b.to("meta"), weight.s.to("meta"), weight.z.to("meta")
    y = ops.matmul(torch.empty(5, 64, device="meta"), b, s, zeros=z)
    assert y.shape == (5, 128) and y.device.type == "meta"
    assert ops.dequantize(b, s, zeros=z).shape == (64, 128)
    assert ops.pack_scales(z).dtype == torch.uint8


# ------------------------------------------------------------------------------- refusals


def calls(weight, a):
    """Every operator that takes a weight, as functions of what else it is given."""
    out = torch.empty(*a.shape[:-1], weight.codes.shape[1], dtype=a.dtype, device=a.device)
    operators = torch.ops.marlin
    return [
        lambda **more: operators.mul(a, weight.b, weight.s, **more),
        lambda **more: operators.mul_inference(a, weight.b, weight.s, **more),
        lambda **more: operators.mul.out(a, weight.b, weight.s, out=out, **more),
        lambda **more: operators.dequantize(weight.b, weight.s, **more),
    ]


SPOILED = [
    (lambda z: z.int(), "expected Byte, got Int"),
    (lambda z: z.half(), "expected Byte, got Half"),
    (lambda z: z[0], "expected a 2-d tensor"),
    (lambda z: z[:1].contiguous(), r"expected \(4, 128\) like s, got Byte \(1, 128\)"),
    (lambda z: z[:, :64].contiguous(), r"expected \(4, 128\) like s, got Byte \(4, 64\)"),
    (lambda z: z.t().contiguous().t(), "expected a contiguous tensor"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("spoil", "says"), SPOILED)
def test_spoiled_zeros(device, spoil, says):
    weight = random_weight(256, 128, 64, device=device, zeros=True)
    for call in calls(weight, random_rows(4, 256, device=device)):
        with pytest.raises(RuntimeError, match=f"zeros: {says}"):
            call(zeros=spoil(weight.z))


@pytest.mark.parametrize("device", DEVICES)
def test_weight_types(device):
    weight = random_weight(64, 64, 32, device=device, zeros=True)
    for call in calls(weight, random_rows(2, 64, device=device)):
        for named, plain in (
            (call(zeros=weight.z, weight_type="uint4"), call(zeros=weight.z)),
            (call(weight_type="uint4b8"), call()),
        ):
            assert named is None or torch.equal(named, plain)
        for wrong in ("uint4b8", "int4", ""):
            with pytest.raises(RuntimeError, match=f"weight_type: .*'uint4',.*got '{wrong}'"):
                call(zeros=weight.z, weight_type=wrong)
        for wrong in ("uint4", "float8"):
            with pytest.raises(RuntimeError, match=f"weight_type: .*'uint4b8',.*got '{wrong}'"):
                call(weight_type=wrong)


@pytest.mark.gpu
@pytest.mark.parametrize("m", [1, 65])
@pytest.mark.parametrize("scale_dtype", HALVES)
@pytest.mark.parametrize("dtype", HALVES)
def test_what_zeros_take(m, dtype, scale_dtype):
    """The net for many rows, but not in FP16 with scales that FP16 cannot hold."""
    weight = random_weight(256, 256, 64, dtype=scale_dtype, device="cuda", zeros=True)
    a = random_rows(m, 256, dtype=dtype, device="cuda")
    holds = dtype == torch.bfloat16 or scale_dtype == torch.float16
    expected = multiply(a, weight, config="dense" if m > 64 and holds else "reference")
    assert torch.equal(expected, multiply(a, weight))
    assert torch.equal(expected, multiply(a, weight, config="unchained"))


@pytest.mark.gpu
def test_no_engine_takes_zeros():
    weight = random_weight(256, 256, 64, device="cuda", zeros=True)
    a = random_rows(5, 256, device="cuda")
    for config in (*host.kernel_shapes(), "warp-drive"):
        with pytest.raises(RuntimeError, match=f"config: expected .*'reference'.*{config}"):
            multiply(a, weight, config=config)


@pytest.mark.gpu
def test_zeros_on_another_device_or_misaligned():
    weight = random_weight(64, 64, 32, device="cuda", zeros=True)
    for call in calls(weight, random_rows(2, 64, device="cuda")):
        with pytest.raises(RuntimeError, match="zeros: expected a tensor on cuda:0"):
            call(zeros=weight.z.cpu())
        shifted = torch.empty(weight.z.numel() + 1, dtype=torch.uint8, device="cuda")[1:]
        with pytest.raises(RuntimeError, match="zeros: expected 16-byte aligned data"):
            call(zeros=shifted.view(weight.z.shape).copy_(weight.z))


def test_host_refuses_zeros():
    weight = random_weight(64, 64, 32, zeros=True)
    b, s, z = weight.b.numpy(), weight.s.numpy(), weight.z.numpy()
    for wrong in (z[:1], z.astype("float16"), z.T):
        with pytest.raises(ValueError, match="zeros: expected"):
            host.dequantize(b, s, wrong)
