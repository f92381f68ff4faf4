"""Every configuration of the CUDA engine, by name, against float64."""

import pytest
import torch

from marlin import host, ops
from marlin.testing.problems import check_product, random_rows, random_weight
from marlin.testing.shapes import LIKE, ROWS

pytestmark = pytest.mark.gpu
CONFIGS = [*host.kernel_shapes(), "dense", *LIKE.values()]
GUARD = 4096  # elements around an output that no kernel may touch


def tile_count(config: str, m: int, n: int, k: int) -> tuple[int, int]:
    """(slices, tiles) of a problem under a configuration."""
    shape = host.kernel_shapes()[config]
    slices = -(-n // shape["columns"]) * max(1, -(-m // shape["rows"]))
    return slices, slices * -(-k // shape["depth"])


def guarded_multiply(a, weight, bias, config):
    """The product into the middle of a poisoned buffer, whose borders must stay as they are."""
    m, n = a.shape[0], weight.codes.shape[1]
    buffer = torch.full((m * n + 2 * GUARD,), float("nan"), dtype=a.dtype, device=a.device)
    y = buffer[GUARD : GUARD + m * n].view(m, n)
    ops.matmul_out(a, weight.b, weight.s, y, bias, config, weight.z)
    assert buffer[:GUARD].isnan().all() and buffer[-GUARD:].isnan().all()
    return y


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_rows_and_tails(config, dtype, group_size):
    """Rows around every tile's edge; n and k that fill their last strip and stage partly."""
    unit = 16 if group_size == -1 else group_size
    rows = host.kernel_shapes().get(config, {"rows": 64})["rows"]
    for k, n in ((unit, 64), (unit * 7, 320), (1024 + unit, 576)):
        weight = random_weight(k, n, group_size, device="cuda", seed=k + n)
        values = weight.values()
        bias = torch.randn(n, device="cuda").to(dtype)
        for m in (1, 7, rows - 1, rows, rows + 1, 2 * rows + 3, 150):
            a = random_rows(m, k, dtype=dtype, device="cuda", seed=m)
            check_product(guarded_multiply(a, weight, bias, config), a, values, bias)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_batch_size(config, dtype):
    weight = random_weight(384, 320, 64, device="cuda")
    values, bias = weight.values(), torch.randn(320, device="cuda").to(dtype)
    for m in ROWS[1:]:
        a = random_rows(m, 384, dtype=dtype, device="cuda", seed=m)
        check_product(guarded_multiply(a, weight, bias, config), a, values, bias)


@pytest.mark.parametrize("config", list(host.kernel_shapes()))
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [-1, 32, 64, 128])
def test_rings_that_go_round(config, dtype, group_size):
    """One CTA (or two twins) for everything, so that every ring of stages is used again, up to
    edges of n and k: what comes after the first round may come another way."""
    unit = 16 if group_size == -1 else group_size
    k, n = 2048 + 3 * unit, 320
    shape = host.kernel_shapes()[config]
    assert k > shape["depth"] * shape["stages"]
    weight = random_weight(k, n, group_size, device="cuda")
    bias = torch.randn(n, device="cuda").to(dtype)
    for m in (1, shape["rows"] + 1):
        a = random_rows(m, k, dtype=dtype, device="cuda", seed=m)
        y = guarded_multiply(a, weight, bias, f"{config}@1")
        check_product(y, a, weight.values(), bias)


@pytest.mark.parametrize("config", list(host.kernel_shapes()))
@pytest.mark.parametrize("group_size", [-1, 32, 128])
def test_any_number_of_runs(config, group_size):
    """From one CTA for everything to one tile per CTA: right, and the same bits every time."""
    m, k, n = 40, 768, 576
    weight = random_weight(k, n, group_size, device="cuda")
    values = weight.values()
    a = random_rows(m, k, device="cuda")
    slices, tiles = tile_count(config, m, n, k)
    for runs in sorted({1, 2, 3, 7, slices, 2 * slices, tiles // 2, tiles - 1, tiles, 131, 132}):
        if not 1 <= runs <= min(tiles, 132):
            continue
        name = f"{config}@{runs}"
        y = guarded_multiply(a, weight, None, name)
        check_product(y, a, values)
        for _ in range(20):
            assert torch.equal(ops.matmul(a, weight.b, weight.s, config=name), y), name


@pytest.mark.parametrize(
    "config", [n for n, s in host.kernel_shapes().items() if s["engine"] == "sm90"]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group_size", [-1, 128])
def test_two_for_every_slice(config, dtype, group_size):
    """Pairs of CTAs add over distributed shared memory, and may finish half of the rows each: where
    the second half has none, some, or all; with as many columns as fill no strip."""
    k, n = 1024, 320
    rows = host.kernel_shapes()[config]["rows"]
    weight = random_weight(k, n, group_size, device="cuda")
    values, bias = weight.values(), torch.randn(n, device="cuda")
    for m in (1, rows // 2, rows // 2 + 1, rows - 1, rows, rows + rows // 2 + 3):
        slices, _ = tile_count(config, m, n, k)
        a = random_rows(m, k, dtype=dtype, device="cuda", seed=m)
        y = guarded_multiply(a, weight, bias, f"{config}@{2 * slices}")
        check_product(y, a, values, bias)
        for _ in range(5):
            again = guarded_multiply(a, weight, bias, f"{config}@{2 * slices}")
            assert torch.equal(again, y), m


@pytest.mark.parametrize("config", CONFIGS)
def test_any_scale(config):
    """Zero, negative, huge and tiny scales; NaN and Inf stay in their columns."""
    for group_size in (-1, 64):
        weight = random_weight(512, 256, group_size, device="cuda")
        scales = weight.scales.clone()
        scales[0, 0::8], scales[-1, 2::8], scales[0, 3::8] = 0, 2048.0, 2.0**-24
        scales[-1, 1::8] *= -1
        a = random_rows(17, 512, device="cuda") / 64
        weight.scales = scales
        y = ops.matmul(a, weight.b, ops.pack_scales(scales), config=config)
        check_product(y, a, weight.values())
        scales[0, 9], scales[-1, 100] = float("nan"), float("inf")
        y = ops.matmul(a, weight.b, ops.pack_scales(scales), config=config)
        bad = ~y.isfinite()
        assert bad[:, [9, 100]].all() and bad.sum() == 2 * 17


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias_dtype", [None, torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("zeros", [False, True])
def test_any_number_of_slices(dtype, bias_dtype, zeros):
    """The net in one slice of columns, in some of unequal width, a strip each; any type of bias."""
    m, k, n = 100, 768, 64 * 13
    weight = random_weight(k, n, 128, device="cuda", zeros=zeros)
    values = weight.values()
    a = random_rows(m, k, dtype=dtype, device="cuda")
    bias = None if bias_dtype is None else 10 * torch.randn(n, device="cuda").to(bias_dtype)
    for slices in (1, 2, 3, 5, 12, 13):
        y = guarded_multiply(a, weight, bias, f"dense@{slices}")
        check_product(y, a, values, bias)
    for name in ("dense@0", "dense@14", "dense@", "densest"):
        with pytest.raises(RuntimeError, match="config: expected one of"):
            ops.matmul(a, weight.b, weight.s, config=name, zeros=weight.z)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1025, 2100])
def test_more_rows_than_sums_have_room_for(dtype, m):
    """The net's FP32 sums, two with zero points, are made of some rows at a time: of all columns in
    one slice 768 with zero points, 1280 without. Rows that lie apart, a slice that is narrower."""
    k, n = 128, 8192 + 64
    a = random_rows(m, 2 * k, dtype=dtype, device="cuda")[:, 8 : 8 + k]
    bias = 10 * torch.randn(n, device="cuda")
    for zeros in (False, True):
        weight = random_weight(k, n, 32, device="cuda", zeros=zeros)
        for slices in (1, 2):
            y = guarded_multiply(a, weight, bias, f"dense@{slices}")
            check_product(y, a, weight.values(), bias)


# Not the net, which holds weights in the activations' type.
@pytest.mark.parametrize("config", list(host.kernel_shapes()))
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_scales_at_the_ends_of_their_range(config, scale_dtype):
    """Weights of up to eight scales that FP16 cannot hold, beside ordinary and tiny ones."""
    a = random_rows(20, 512, device="cuda") / 8192
    weight = random_weight(512, 512, 128, device="cuda")
    scales = weight.scales.clone().to(scale_dtype)
    scales[1, 4::16], scales[2, 5::16], scales[:, 6::16] = 65504.0, -9000.0, 2.0**-20
    weight.scales = scales
    shape, packed = host.kernel_shapes()[config], ops.pack_scales(scales)
    if scale_dtype is torch.bfloat16 and not shape["scales_sums"]:  # FP16 cannot hold them
        with pytest.raises(RuntimeError, match="config: expected"):
            ops.matmul(a * 8, weight.b, packed, config=config)
        return
    y = ops.matmul(a * 8, weight.b, packed, config=config)
    check_product(y, a * 8, weight.values())


SCALING_WEIGHTS = [name for name, s in host.kernel_shapes().items() if not s["scales_sums"]]


@pytest.mark.parametrize("config", SCALING_WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_scales_that_come_and_go_beyond_what_fp16_can_multiply(config, dtype):
    """Columns whose scales are 2^13 or more in some groups: alone, two in a row, with either sign,
    in either half of a pair; over codes of zero, where nothing else may notice."""
    k, n, m = 2048, 320, 70
    weight = random_weight(k, n, 128, device="cuda")
    scales, codes = weight.scales.clone(), weight.codes.clone()
    large = [
        8000,
        8192,
        9000,
        8000,
        -65504,
        8184,
        8200,
        3,
        12000,
        1,
        8191,
        -8192,
        7,
        9,
        8000,
        10000,
    ]
    for column in (1, 10, 64 + 9, 300):
        scales[:, column] = torch.tensor(large, device="cuda")
    for column in (3, 12, 128 + 24, 319):  # zero where they are large
        for group in (0, 5, 6, 15):
            scales[group, column] = 9000.0
            codes[128 * group : 128 * (group + 1), column] = 8
    weight.scales, weight.codes = scales, codes
    b, s = ops.pack(codes), ops.pack_scales(scales)
    a = random_rows(m, k, dtype=dtype, device="cuda") / 8192
    values = weight.values()
    shape = host.kernel_shapes()[config]
    slices = -(-n // shape["columns"]) * -(-m // shape["rows"])
    for runs in (1, slices, 2 * slices + 1):
        check_product(ops.matmul(a, b, s, config=f"{config}@{runs}"), a, values)


@pytest.mark.parametrize(
    "config", [n for n, s in host.kernel_shapes().items() if s["engine"] == "sm80"]
)
def test_bf16_rows_have_all_digits_of_fp16_scales(config):
    """Activations with a mean, and groups of one sign: what rounding scales to BF16 would cost does
    not cancel. (On Hopper the shapes with wgmma do round them.)"""
    weight = random_weight(4096, 256, 128, device="cuda")
    signs = 1 - 2 * (torch.arange(4096, device="cuda")[:, None] // 128 % 2)
    weight.codes = (8 + signs * (1 + weight.codes.int() % 7)).to(torch.uint8)
    a = random_rows(70, 4096, dtype=torch.bfloat16, device="cuda", mean=8.0)
    y = ops.matmul(a, ops.pack(weight.codes), weight.s, config=config)
    check_product(y, a, weight.values())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("group_size", [32, 128])
def test_scales_that_wander(config, group_size):
    """From group to group by up to 2^10, and in each by up to 2^7, with zeros between: what is done
    to bring scales into FP16's reach has to follow them."""
    weight = random_weight(2048, 256, group_size, device="cuda")
    groups = weight.scales.shape[0]
    exponents = torch.tensor([-9, -8, -10, -4, -14, -13, -13, 1, 0, 0, -3, -6, -6, -12, -2, -9])
    factors = 2.0 ** exponents.repeat_interleave(groups // 16)[:, None].float()
    within = 2.0 ** -(torch.arange(256) * 5 % 8).float()
    scales = (factors * within).to("cuda") * (1 + 50 * weight.scales.float())
    scales[3, 7::16], scales[5:7, 9::16], scales[-1] = 0, 0, 0
    scales[:, 1::4] *= -1
    weight.scales = scales.half()
    a = random_rows(40, 2048, device="cuda") / 64
    y = ops.matmul(a, weight.b, ops.pack_scales(weight.scales), config=config)
    check_product(y, a, weight.values())


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("apart", [6, 7, 9])
def test_small_codes_beside_large_scales(config, apart):
    """Most codes near zero, as real weights have them, and one column in 16 whose scales are larger
    by 2^apart: what is small must not be rounded as if it were large."""
    weight = random_weight(4096, 256, 128, device="cuda")
    codes = (torch.randn(4096, 256, generator=torch.Generator().manual_seed(3)) * 2 + 8).round()
    weight.codes = codes.clamp(0, 15).to(torch.uint8).to("cuda")
    scales = weight.scales.clone()
    scales[:, 5::16] *= 2.0**apart
    weight.scales = scales
    a = random_rows(48, 4096, device="cuda")
    y = ops.matmul(a, ops.pack(weight.codes), ops.pack_scales(scales), config=config)
    values = weight.values()
    ordinary = [column for column in range(256) if column % 16 != 5]
    check_product(y[:, ordinary], a, values[:, ordinary])
    check_product(y[:, 5::16], a, values[:, 5::16])


@pytest.mark.parametrize("config", CONFIGS)
def test_strided_rows(config):
    weight = random_weight(256, 128, 64, device="cuda")
    wide = random_rows(50, 1024, device="cuda")
    for view in (wide[:, 256:512], wide[::5, 8:264], wide[:, 3:259], wide[:1, :256].expand(9, 256)):
        expected = ops.matmul(view.contiguous().clone(), weight.b, weight.s, config=config)
        assert torch.equal(ops.matmul(view, weight.b, weight.s, config=config), expected)


@pytest.mark.parametrize("config", CONFIGS)
def test_large_means_and_outliers(config):
    weight = random_weight(2048, 256, 128, device="cuda")
    a = random_rows(33, 2048, device="cuda", mean=32.0)
    a[:, 5] *= 50
    check_product(ops.matmul(a, weight.b, weight.s, config=config), a, weight.values())


@pytest.mark.parametrize("m", [1, 100, 512, 1000])
def test_wide_scales_with_narrow_rows(m):
    """FP16 rows and BF16 scales that FP16 cannot hold, by whatever is selected."""
    weight = random_weight(512, 256, 128, device="cuda")
    scales = weight.scales.clone().to(torch.bfloat16)
    scales[1, 3::16], scales[:, 6::16] = 1e5, 1e-9
    weight.scales = scales
    a = random_rows(m, 512, device="cuda") / 8192
    check_product(ops.matmul(a, weight.b, ops.pack_scales(scales)), a, weight.values())


def test_refused_configurations():
    weight = random_weight(128, 64, 64, device="cuda")
    a = random_rows(4, 128, device="cuda")
    expected = ops.matmul(a, weight.b, weight.s)
    for name in (
        "16x256x64x2@0",
        "16x256x64x2@3",
        "16x256x64x2@",
        "16x256x64x2@2x",
        "16x256x64",
        "",
        "@1",
    ):
        with pytest.raises(RuntimeError, match="config: expected one of"):
            ops.matmul(a, weight.b, weight.s, config=name)
        assert torch.equal(ops.matmul(a, weight.b, weight.s), expected)
