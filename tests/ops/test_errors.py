"""Every violated precondition is one RuntimeError that names the argument and what came."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from marlin import ops
from marlin.testing.problems import random_rows, random_weight

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def valid_call(device="cpu"):
    weight = random_weight(256, 128, 64, device=device)
    a = random_rows(4, 256, device=device)
    return {"a": a, "b": weight.b, "s": weight.s, "bias": torch.zeros(128, device=device)}


# argument -> what is wrong with it: (name, how to spoil the valid one, what the message says)
SPOILED = [
    ("a", lambda a: a.double(), "Half"),
    ("a", lambda a: a.int(), "Half"),
    ("a", lambda a: a[:, :128], "k = 256"),
    ("a", lambda a: a[0, 0], "k = 256"),
    ("b", lambda b: b.long(), "Int"),
    ("b", lambda b: b.flatten(), "2-d"),
    ("b", lambda b: b[:, :100].contiguous(), "multiple of 64"),
    ("b", lambda b: b[:, :0].contiguous(), "multiple of 64"),
    ("b", lambda b: b.t().contiguous().t(), "contiguous"),
    ("s", lambda s: s.float(), "Half or BFloat16"),
    ("s", lambda s: s[0], "2-d"),
    ("s", lambda s: s[:, :64].contiguous(), "n = 128"),
    ("s", lambda s: s[:3].contiguous(), "32, 64 or 128"),
    ("s", lambda s: s.repeat(4, 1), "32, 64 or 128"),
    ("s", lambda s: s[:0], "groups"),
    ("s", lambda s: s.t().contiguous().t(), "contiguous"),
    ("bias", lambda bias: bias[:-1], "n = 128"),
    ("bias", lambda bias: bias.double(), "Half, BFloat16 or Float"),
    ("bias", lambda bias: bias.repeat(2)[::2], "contiguous"),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("argument", "spoil", "says"), SPOILED)
def test_spoiled_argument(device, argument, spoil, says):
    call = valid_call(device)
    call[argument] = spoil(call[argument])
    for operator in (torch.ops.marlin.mul, torch.ops.marlin.mul_inference):
        with pytest.raises(RuntimeError, match=f"marlin::mul: {argument}: expected.*got") as error:
            operator(**call)
        assert says in str(error.value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda out: out.float(), "Half"),
        (lambda out: out[:, :64], "n = 128"),
        (lambda out: out.flatten(), "leading dimensions"),
        (lambda out: out.t().contiguous().t(), "contiguous"),
    ],
)
def test_spoiled_output(device, spoil, says):
    call = valid_call(device)
    out = torch.empty(4, 128, dtype=torch.float16, device=device)
    with pytest.raises(RuntimeError, match="out: expected") as error:
        torch.ops.marlin.mul.out(**call, out=spoil(out))
    assert says in str(error.value)


@pytest.mark.parametrize("device", DEVICES)
def test_output_may_not_be_the_input(device):
    weight = random_weight(64, 64, -1, device=device)
    a = random_rows(4, 64, device=device)
    with pytest.raises(RuntimeError, match="out: expected memory that a does not use"):
        ops.matmul_out(a, weight.b, weight.s, a)


@pytest.mark.parametrize("device", DEVICES)
def test_unknown_config(device):
    call = valid_call(device)
    with pytest.raises(RuntimeError, match=r"config: expected.*got 'warp-drive'"):
        ops.matmul(**call, config="warp-drive")


@pytest.mark.gpu
@pytest.mark.parametrize("argument", ["b", "s", "bias"])
def test_mixed_devices(argument):
    call = valid_call("cuda")
    call[argument] = call[argument].cpu()
    with pytest.raises(RuntimeError, match=f"{argument}: expected a tensor on cuda:0"):
        ops.matmul(**call)


@pytest.mark.gpu
@pytest.mark.parametrize("argument", ["b", "s"])
def test_misaligned_weight(argument):
    call = valid_call("cuda")
    tensor = call[argument]
    shifted = torch.empty(tensor.numel() + 1, dtype=tensor.dtype, device="cuda")[1:]
    call[argument] = shifted.view(tensor.shape).copy_(tensor)
    with pytest.raises(RuntimeError, match=f"{argument}: expected 16-byte aligned data"):
        ops.matmul(**call)


@pytest.mark.gpu
def test_float32_activations_stay_on_the_cpu():
    call = valid_call("cuda")
    call["a"] = call["a"].float()
    with pytest.raises(RuntimeError, match="a: expected Half or BFloat16"):
        ops.matmul(**call)


@pytest.mark.parametrize(
    ("operator", "argument", "wrong"),
    [
        (ops.pack, "codes", torch.zeros(16, 64)),
        (ops.pack, "codes", torch.zeros(16, 60, dtype=torch.uint8)),
        (ops.pack, "codes", torch.zeros(8, 64, dtype=torch.uint8)),
        (ops.pack, "codes", torch.full((16, 64), 16, dtype=torch.uint8)),
        (ops.unpack, "b", torch.zeros(1, 64, dtype=torch.int32)),
        (ops.unpack, "b", torch.zeros(1, 128, dtype=torch.int64)),
        (ops.pack_scales, "scales", torch.zeros(1, 64)),
        (ops.pack_scales, "scales", torch.zeros(1, 32, dtype=torch.float16)),
        (ops.pack_scales, "scales", torch.zeros(1, 64, dtype=torch.int8)),
        (ops.unpack_scales, "s", torch.zeros(64, dtype=torch.float16)),
    ],
)
def test_format_operators(operator, argument, wrong):
    with pytest.raises(RuntimeError, match=f"{argument}: expected.*got"):
        operator(wrong)


def test_dequantize_type():
    weight = random_weight(16, 64, -1)
    with pytest.raises(RuntimeError, match=r"dtype: expected.*got Int"):
        ops.dequantize(weight.b, weight.s, torch.int32)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(data=st.data())
def test_random_invalid_calls(data):
    """Whatever the shapes and types: an error with a name in it, or a result that is right."""
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.int32, torch.int64, torch.uint8]

    def tensor(label, max_dim):
        shape = data.draw(
            st.lists(st.sampled_from([0, 1, 2, 3, 16, 64, 128, 256]), max_size=max_dim),
            label=f"{label} shape",
        )
        return torch.zeros(shape, dtype=data.draw(st.sampled_from(dtypes), label=f"{label} dtype"))

    a, b, s = tensor("a", 3), tensor("b", 2), tensor("s", 2)
    try:
        y = ops.matmul(a, b, s)
    except RuntimeError as error:
        assert "expected" in str(error) and "got" in str(error)
    else:
        assert y.shape == (*a.shape[:-1], b.shape[1] // 2)
        assert (y == 0).all()


@pytest.mark.gpu
def test_more_rows_than_kernels_count():
    call = valid_call("cuda")
    call["a"] = call["a"][:1].expand(2**30 + 1, -1)
    with pytest.raises(RuntimeError, match="a: expected at most 1073741824 rows, inputs"):
        ops.matmul(**call)
    call["a"] = call["a"][:1].expand(2**29, -1)  # would be copied, to that many bytes
    with pytest.raises(RuntimeError, match=f"a: expected at most {2**36} bytes on CUDA, got"):
        ops.matmul(**call)
