"""What Torch expects of an operator: opcheck, compile, gradients, fakes."""

import pytest
import torch

from marlin import ops
from marlin.testing.problems import random_rows, random_weight

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("m", [0, 3])
def test_opcheck_mul(device, with_bias, m):
    weight = random_weight(128, 64, 32, device=device)
    a = random_rows(m, 128, device=device).requires_grad_()
    bias = torch.randn(64, device=device).half().requires_grad_() if with_bias else None
    torch.library.opcheck(torch.ops.marlin.mul.default, (a, weight.b, weight.s, bias))
    plain = (a.detach(), weight.b, weight.s, None if bias is None else bias.detach())
    torch.library.opcheck(torch.ops.marlin.mul_inference.default, plain)
    out = torch.empty(m, 64, dtype=torch.float16, device=device)
    torch.library.opcheck(torch.ops.marlin.mul.out, plain, {"out": out})


@pytest.mark.parametrize("device", DEVICES)
def test_opcheck_format(device):
    weight = random_weight(128, 64, 32, device=device)
    operators = torch.ops.marlin
    torch.library.opcheck(operators.pack.default, (weight.codes,))
    torch.library.opcheck(operators.unpack.default, (weight.b,))
    torch.library.opcheck(operators.pack_scales.default, (weight.scales,))
    torch.library.opcheck(operators.unpack_scales.default, (weight.s,))
    torch.library.opcheck(operators.dequantize.default, (weight.b, weight.s, torch.bfloat16))


@pytest.mark.parametrize("device", DEVICES)
def test_compile_with_dynamic_rows(device):
    weight = random_weight(64, 64, 32, device=device)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, backend=count)
    def model(a):
        return ops.matmul(a * 2, weight.b, weight.s).relu() + 1

    for m in (2, 5, 33, 150):
        a = random_rows(m, 64, device=device, seed=m)
        torch._dynamo.mark_dynamic(a, 0)
        assert torch.equal(model(a), ops.matmul(a * 2, weight.b, weight.s).relu() + 1)
    assert len(graphs) == 1


@pytest.mark.parametrize("device", DEVICES)
def test_compile_through_inductor(device):
    """Inductor too, with a gradient: both passes compiled, one graph."""
    weight = random_weight(64, 64, 32, device=device)

    @torch.compile(fullgraph=True, dynamic=True)
    def model(a):
        return torch.ops.marlin.mul(a.sin(), weight.b, weight.s).square().sum(dtype=torch.float32)

    a = random_rows(6, 64, device=device).requires_grad_()
    model(a).backward()
    compiled, a.grad = a.grad, None
    (ops.matmul(a.sin(), weight.b, weight.s).square().sum(dtype=torch.float32)).backward()
    torch.testing.assert_close(compiled, a.grad, rtol=1e-2, atol=1e-2)


def test_gradcheck():
    weight = random_weight(48, 64, -1)
    a = random_rows(3, 48, dtype=torch.float32).requires_grad_()
    bias = torch.randn(64).requires_grad_()
    # Linear, so a step of one has no truncation error, and float32's rounding does not drown it.
    assert torch.autograd.gradcheck(
        lambda a, bias: torch.ops.marlin.mul(a, weight.b, weight.s, bias),
        (a, bias), eps=1.0, atol=1e-3, rtol=1e-3,
    )  # fmt: skip


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradient(device, dtype):
    weight = random_weight(128, 64, 64, device=device)
    a = random_rows(6, 128, dtype=dtype, device=device).reshape(2, 3, 128).requires_grad_()
    grad = random_rows(6, 64, dtype=dtype, device=device, seed=2).reshape(2, 3, 64)
    ops.matmul(a, weight.b, weight.s).backward(grad)
    expected = grad.double() @ weight.values().t()
    torch.testing.assert_close(a.grad.double(), expected, rtol=2e-2, atol=2e-2)


def test_no_autograd_where_no_gradient_is_needed(monkeypatch):
    """Only calls that need a gradient reach the operator whose autograd costs microseconds."""
    weight = random_weight(32, 64, -1)
    a = random_rows(2, 32)
    calls = []

    class Recorder(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    with Recorder():
        assert ops.matmul(a, weight.b, weight.s).grad_fn is None
        with torch.no_grad():
            ops.matmul(a.clone().requires_grad_(), weight.b, weight.s)
    assert calls.count("marlin.mul_inference.default") == 2
    assert "marlin.mul.default" not in calls
    assert ops.matmul(a.clone().requires_grad_(), weight.b, weight.s).grad_fn is not None


def test_fake_checks_shapes():
    weight = random_weight(64, 64, 32)
    with torch._subclasses.FakeTensorMode() as mode:
        a = torch.empty(3, 48, dtype=torch.float16)
        b, s = mode.from_tensor(weight.b), mode.from_tensor(weight.s)
        with pytest.raises(RuntimeError, match="a: expected"):
            ops.matmul(a, b, s)


def test_meta_tensors():
    weight = random_weight(64, 128, 32)
    y = ops.matmul(torch.empty(5, 64, device="meta"), weight.b.to("meta"), weight.s.to("meta"))
    assert y.shape == (5, 128) and y.device.type == "meta"
