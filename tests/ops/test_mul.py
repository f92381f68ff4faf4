"""torch.ops.marlin.mul against the float64 product, on every device that is there."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin import host, ops
from marlin.testing.problems import Weight, check_product, random_rows, random_weight
from marlin.testing.shapes import GROUP_SIZES, MODELS, ODD_SHAPES, ROWS, scaled_model_shapes

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
HALVES = [torch.float16, torch.bfloat16]


def poisoned(*shape, dtype, device):
    return torch.full(shape, float("nan"), dtype=dtype, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_rows(device, dtype, group_size):
    """Every batch size around a tile boundary, into a poisoned output."""
    weight = random_weight(384, 320, group_size, device=device)
    values = weight.values()
    for m in ROWS:
        a = random_rows(m, 384, dtype=dtype, device=device, seed=m)
        y = poisoned(m, 320, dtype=dtype, device=device)
        ops.matmul_out(a, weight.b, weight.s, y)
        check_product(y, a, values)
        assert torch.equal(ops.matmul(a, weight.b, weight.s), y)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("scale_dtype", HALVES)
def test_odd_shapes(device, group_size, scale_dtype):
    """k of an odd number of groups (of 16 rows, per column), n of an odd number of strips."""
    unit = 16 if group_size == -1 else group_size
    for k, n in ODD_SHAPES:
        k = -(-k // unit) * unit
        weight = random_weight(k, n, group_size, dtype=scale_dtype, device=device, seed=k)
        for m in (1, 9, 33):
            a = random_rows(m, k, device=device)
            check_product(ops.matmul(a, weight.b, weight.s), a, weight.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("k", "n"), scaled_model_shapes(8))
def test_model_shapes(device, k, n):
    weight = random_weight(k, n, 128, device=device)
    values = weight.values()
    for m in (1, 16, 130):
        a = random_rows(m, k, device=device)
        check_product(ops.matmul(a, weight.b, weight.s), a, values)


@pytest.mark.gpu
@pytest.mark.parametrize(("k", "n"), sorted({s for m in MODELS.values() for s in m.values()}))
def test_whole_model_shapes(k, n):
    """As large as they are, by whatever is selected for decoding, a small batch and a prompt."""
    words = torch.randint(-(2**31), 2**31, (k // 16, 2 * n), dtype=torch.int32, device="cuda")
    scales = (torch.rand(k // 128, n, device="cuda") * 0.02 + 0.001).half()
    weight = Weight(ops.unpack(words), scales, words, ops.pack_scales(scales))
    values = weight.values()
    for m in (1, 16, 100, 1000):
        a = random_rows(m, k, device="cuda", seed=m)
        check_product(ops.matmul(a, weight.b, weight.s), a, values)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias_dtype", [*HALVES, torch.float32])
def test_bias(device, bias_dtype):
    weight = random_weight(128, 192, 64, device=device)
    bias = torch.randn(192).to(bias_dtype).to(device)
    for m in (0, 1, 20, 300):
        a = random_rows(m, 128, device=device)
        check_product(ops.matmul(a, weight.b, weight.s, bias), a, weight.values(), bias)


@pytest.mark.parametrize("config", host.cpu_kernels())
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32])
def test_every_instruction_set(config, dtype):
    """Rows 1 to 13 reach every inner loop of cpu/kernels.inl; 256 and 257 its two ways."""
    weight = random_weight(192, 128, 32)
    for m in (*range(1, 14), 256, 257):
        a = random_rows(m, 192, dtype=dtype)
        check_product(ops.matmul(a, weight.b, weight.s, config=config), a, weight.values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_many_rows_and_slices(dtype):
    """So wide that the CPU hands the BLAS two slices of columns, the second narrower."""
    k, n = 8192, 1088
    weight = random_weight(k, n, 128)
    bias = torch.randn(n)
    a = random_rows(257, k, dtype=dtype)
    values = weight.values()
    check_product(ops.matmul(a, weight.b, weight.s), a, values)
    check_product(ops.matmul(a, weight.b, weight.s, bias), a, values, bias)


@pytest.mark.parametrize("device", DEVICES)
def test_leading_dimensions(device):
    weight = random_weight(64, 64, -1, device=device)
    a = random_rows(24, 64, device=device)
    expected = ops.matmul(a, weight.b, weight.s)
    for shape in ((24,), (2, 12), (2, 3, 4), (1, 24, 1)):
        y = ops.matmul(a.reshape(*shape, 64), weight.b, weight.s)
        assert y.shape == (*shape, 64)
        assert torch.equal(y.reshape(24, 64), expected)
    one = ops.matmul(a[0], weight.b, weight.s)
    assert one.shape == (64,)
    assert torch.equal(one, ops.matmul(a[:1], weight.b, weight.s)[0])


@pytest.mark.parametrize("device", DEVICES)
def test_strided_activations(device):
    """Any strides give the result of a contiguous copy, aligned rows or not, broadcast or not."""
    weight = random_weight(128, 128, 32, device=device)
    wide = random_rows(40, 512, device=device)
    cube = random_rows(60, 128, device=device).reshape(3, 4, 5, 128)
    views = [
        wide[:, 128:256],  # aligned rows, read in place
        wide[:, 3:131],  # misaligned rows
        wide[::3, 8:136],
        wide[:, ::4],  # strided along k
        wide.t()[:128].t(),  # k-major
        wide[:1, :128].expand(7, 128),  # stride 0
        wide.flatten()[1 : 1 + 128 * 5].view(5, 128),  # contiguous, misaligned
        cube.transpose(0, 1),
        cube[:, 1:3],
        cube[:, :, :0],
    ]
    for view in views:
        expected = ops.matmul(view.contiguous().clone(), weight.b, weight.s)
        assert torch.equal(ops.matmul(view, weight.b, weight.s), expected), view.stride()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mean", [0.0, 32.0])
def test_large_means(device, mean):
    weight = random_weight(1024, 128, 128, device=device)
    a = random_rows(17, 1024, device=device, mean=mean)
    a[:, 5] *= 100  # an outlier channel
    check_product(ops.matmul(a, weight.b, weight.s), a, weight.values())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("group_size", GROUP_SIZES)
def test_any_scale(device, group_size):
    """Zero, negative, huge and tiny scales are right; Inf and NaN come out where they went in."""
    weight = random_weight(256, 128, group_size, device=device)
    scales = weight.scales.clone()
    scales[0, 0::8] = 0
    scales[-1, 1::8] *= -1
    scales[0, 2::8] = 8.0
    scales[-1, 3::8] = 2.0**-24
    weight.scales, weight.s = scales, ops.pack_scales(scales)
    for m in (1, 16, 70):
        a = random_rows(m, 256, device=device)
        check_product(ops.matmul(a, weight.b, weight.s), a, weight.values())

    scales = scales.clone()
    scales[0, 7], scales[-1, 15], scales[0, 100] = float("nan"), float("inf"), float("-inf")
    weight.scales = scales
    y = ops.matmul(random_rows(9, 256, device=device), weight.b, ops.pack_scales(scales))
    assert y[:, 7].isnan().all()
    # Inf times a sum is Inf where Inf times each term would be NaN for a lack of one sign.
    assert (y.isfinite().sum(0) == 0)[[7, 15, 100]].all()
    assert y.isfinite().sum() == 9 * 125


@pytest.mark.parametrize("device", DEVICES)
def test_same_bits_every_time(device):
    weight = random_weight(512, 256, 64, device=device)
    a = random_rows(65, 512, device=device)
    first = ops.matmul(a, weight.b, weight.s)
    for _ in range(20):
        assert torch.equal(ops.matmul(a, weight.b, weight.s), first)


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
    weight = random_weight(k, n, group_size, dtype=scale_dtype, device=device, seed=seed)
    bias = torch.randn(n, device=device, dtype=dtype) if data.draw(st.booleans()) else None
    a = random_rows(m, k, dtype=dtype, device=device, seed=seed + 1)
    check_product(ops.matmul(a, weight.b, weight.s, bias), a, weight.values(), bias)
