"""The contract of the published `marlin` 0.1.1 (DESIGN §2.1), point by point."""

import inspect
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from marlin import ops
from marlin.layer import MarlinLinear
from marlin.published import Layer, mul, replace_linear

GOLDEN = sorted((Path(__file__).parents[1] / "format" / "golden").glob("*.npz"))


def problem(m, k, n, groupsize=-1, seed=0):
    """(A, B, C, s, workspace, exact product in float64)."""
    torch.manual_seed(seed)
    groups = 1 if groupsize == -1 else k // groupsize
    codes = torch.randint(0, 16, (k, n), dtype=torch.uint8)
    scales = (torch.rand(groups, n) + 0.5).half()
    A = torch.randn(m, k).half()
    weight = (codes.double() - 8) * scales.double().repeat_interleave(k // groups, 0)
    C = torch.full((m, n), float("nan")).half()
    workspace = torch.zeros(n // 128 * 16, dtype=torch.int)
    return A, ops.pack(codes), C, ops.pack_scales(scales), workspace, A.double() @ weight


def relative_error(C, expected):
    return ((C.double() - expected).abs().mean() / expected.abs().mean()).item()


# --------------------------------------------------------------------------------------- mul


def test_signature():
    names = ["A", "B", "C", "s", "workspace", "thread_k", "thread_n", "sms", "max_par"]
    parameters = inspect.signature(mul).parameters
    assert list(parameters) == names
    assert [parameters[n].default for n in names[5:]] == [-1, -1, -1, 16]


@pytest.mark.parametrize("m", [0, 1, 16, 17, 100])
@pytest.mark.parametrize("groupsize", [-1, 32, 64, 128])
def test_mul_writes_the_product(m, groupsize):
    A, B, C, s, workspace, expected = problem(m, 256, 256, groupsize)
    assert mul(A, B, C, s, workspace) is None
    assert m == 0 or relative_error(C, expected) < 5e-4


@pytest.mark.parametrize("tiles", [(-1, -1), (128, 128), (64, 256), (-1, 256), (128, -1)])
def test_mul_takes_legal_tiles(tiles):
    A, B, C, s, workspace, expected = problem(20, 256, 256, 128)
    mul(A, B, C, s, workspace, *tiles, sms=4, max_par=8)
    assert relative_error(C, expected) < 5e-4


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.uint8])
def test_mul_takes_any_workspace_that_is_large_enough(dtype):
    A, B, C, s, _, expected = problem(2, 128, 256)
    mul(A, B, C, s, torch.ones(2 * 16, dtype=dtype))
    assert relative_error(C, expected) < 5e-4
    with pytest.raises(RuntimeError, match="workspace: expected at least 32 entries, got 31"):
        mul(A, B, C, s, torch.ones(31, dtype=dtype))
    with pytest.raises(RuntimeError, match="workspace: expected at least 34"):
        mul(A, B, C, s, torch.ones(32, dtype=dtype), max_par=17)


def test_mul_reads_words_in_any_wrapping():
    A, B, C, s, workspace, expected = problem(3, 256, 256, 128)
    twice = torch.cat([B.flatten(), torch.zeros_like(B.flatten())])
    for words in (
        B.flatten(),
        B.view(torch.int64),
        B.flatten().view(torch.int64),
        B.view(torch.uint8),
        twice,
        twice.view(torch.int64),  # randint(..., (k * n // 8,)) without a dtype
        B.view(1, *B.shape),
    ):
        C.fill_(float("nan"))
        mul(A, words, C, s, workspace)
        assert relative_error(C, expected) < 5e-4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda B: B.flatten()[:-1],
        lambda B: B.view(torch.int64).flatten()[:-1],
        lambda B: B[:-1],
        lambda B: torch.cat([B, B]),  # another layer's: twice as many rows
        lambda B: B.t(),
        lambda B: B[:, ::2],
    ],
)
def test_mul_refuses_words_of_another_problem(spoil):
    A, B, C, s, workspace, _ = problem(3, 256, 256, 128)
    with pytest.raises(RuntimeError, match="B: expected"):
        mul(A, spoil(B), C, s, workspace)
    assert C.isnan().all()


def test_mul_raises_runtime_errors():
    A, B, C, s, workspace, _ = problem(16, 64, 128)
    with pytest.raises(RuntimeError, match="do not divide k=64"):
        mul(A, B, C, s, workspace, 128, 128, -1)
    A, B, C, s, workspace, _ = problem(16, 256, 256)
    with pytest.raises(RuntimeError, match="no kernel for thread_k=256"):
        mul(A, B, C, s, workspace, 256, 256, -1)
    for unknown in [(64, 128), (128, 64), (0, 128), (128, 0), (1, 1), (-5, 128)]:
        with pytest.raises(RuntimeError):
            mul(A, B, C, s, workspace, *unknown)
    for groups in (3, 0, 512):
        with pytest.raises(RuntimeError, match="groups"):
            mul(A, B, C, torch.ones(groups, 256).half(), workspace)
    with pytest.raises(RuntimeError):
        mul(A, B, C, torch.ones(16, 256).half(), workspace)  # 16 rows: no such groups
    with pytest.raises(RuntimeError):
        mul(A, B, C, torch.ones(1, 128).half(), workspace)
    with pytest.raises(RuntimeError):
        mul(A, B, C[:15], s, workspace)
    with pytest.raises(RuntimeError):
        mul(A, B, C.t().contiguous().t(), s, workspace)
    with pytest.raises(RuntimeError):
        mul(A.float(), B, C, s, workspace)
    with pytest.raises(RuntimeError):
        mul(A[0], B, C, s, workspace)
    assert C.isnan().all()  # and nothing was written


# ------------------------------------------------------------------------------------- Layer


def test_a_new_layer():
    layer = Layer(256, 512, groupsize=128)
    state = layer.state_dict()
    assert list(state) == ["B", "s"]
    assert state["B"].dtype == torch.int32 and state["B"].shape == (16, 1024)
    assert state["s"].dtype == torch.half and state["s"].shape == (2, 512)
    assert layer.s.isnan().all()
    assert layer(torch.ones(1, 256).half()).isnan().all()
    workspace = dict(layer.named_buffers())["workspace"]
    assert workspace.dtype == torch.int32 and workspace.shape == (64,) and not workspace.any()
    assert (layer.k, layer.n, layer.groupsize) == (256, 512, 128)
    assert Layer(256, 512).groupsize == Layer(256, 512, -1).groupsize == 256
    assert Layer(infeatures=256, outfeatures=512).s.shape == (1, 512)


@pytest.mark.parametrize("arguments", [(100, 256), (256, 100), (256, 0), (320, 256, 128)])
def test_layer_refuses_sizes_it_cannot_hold(arguments):
    with pytest.raises(ValueError):
        Layer(*arguments)


@pytest.mark.parametrize("shape", [(256,), (3, 256), (2, 3, 256), (0, 256)])
def test_layer_takes_any_leading_dimensions(shape):
    _, B, _, s, _, _ = problem(1, 256, 128, 128)
    layer = Layer(256, 128, 128)
    layer.load_state_dict({"B": B, "s": s})
    A = torch.randn(shape).half()
    y = layer(A)
    assert y.shape == (*shape[:-1], 128) and y.dtype == torch.half
    flat = A.reshape(-1, 256)
    C = torch.empty(len(flat), 128).half()
    mul(flat, layer.B, C, layer.s, layer.workspace)
    assert torch.equal(y, C.view(y.shape))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_pack_gives_the_published_words(path):
    data = np.load(path)
    codes, scales = torch.from_numpy(data["codes"]), torch.from_numpy(data["scales"])
    k, n = codes.shape
    values = (codes.half() - 8).reshape(len(scales), -1, n) * scales[:, None]
    linear = nn.Linear(k, n)
    linear.weight.data = values.reshape(k, n).t()
    layer = Layer(k, n, int(data["group_size"]))
    layer.pack(linear, scales.t())
    assert layer.B.numpy().tobytes() == data["B"].tobytes()
    assert layer.s.numpy().tobytes() == data["s"].tobytes()
    assert list(layer.state_dict()) == ["B", "s"]


def test_there_are_golden_files():
    assert len(GOLDEN) == 5


def test_pack_follows_overwritten_attributes():
    # As the published tests do it, to get at shapes that the constructor refused.
    A, B, _, s, _, expected = problem(4, 192, 64, 64)
    codes, scales = ops.unpack(B), ops.unpack_scales(s)
    linear = nn.Linear(192, 64)
    linear.weight.data = ((codes.half() - 8).view(3, 64, 64) * scales[:, None]).view(192, 64).t()
    layer = Layer(256, 256, groupsize=128)
    layer.k, layer.n, layer.groupsize = 192, 64, 64
    layer.B = torch.empty((192 // 16, 64 * 16 // 8), dtype=torch.int)
    layer.s = torch.empty((3, 64), dtype=torch.half)
    layer.pack(linear, scales.t())
    assert torch.equal(layer.B, B) and torch.equal(layer.s, s)
    assert relative_error(layer(A), expected) < 5e-4


def test_pack_rounds_the_half_quotient_to_even():
    torch.manual_seed(0)
    k, n = 512, 256
    linear = nn.Linear(k, n).half()
    linear.weight.data.normal_()
    scales = (linear.weight.abs().amax(1, keepdim=True) / 7.5).half()
    layer = Layer(k, n)
    layer.pack(linear, scales)
    # NumPy's float16 stands in for the definition: quotient to half, then to even.
    w, s = linear.weight.detach().t().numpy(), scales.detach().t().numpy()
    expected = np.clip(np.rint((w / s).astype(np.float16)) + 8, 0, 15).astype(np.uint8)
    assert np.array_equal(ops.unpack(layer.B).numpy(), expected)
    in_float = np.clip(np.rint(w.astype(np.float32) / s.astype(np.float32)) + 8, 0, 15)
    assert 0 < (in_float != expected).mean() < 0.002  # the difference this is about


def test_pack_with_zero_scales_gives_zero_weights():
    linear = nn.Linear(128, 64).half()
    linear.weight.data.zero_()
    layer = Layer(128, 64)
    layer.pack(linear, torch.zeros(64, 1).half())
    assert (ops.unpack(layer.B) == 8).all()


def test_pack_refuses():
    layer = Layer(128, 64)
    with pytest.raises(ValueError, match=r"torch\.half, got torch\.float32"):
        layer.pack(nn.Linear(128, 64), torch.ones(64, 1).half())
    with pytest.raises(ValueError, match="expected weight"):
        layer.pack(nn.Linear(64, 128).half(), torch.ones(64, 1).half())
    with pytest.raises(ValueError, match="expected weight"):
        layer.pack(nn.Linear(128, 64).half(), torch.ones(1, 64).half())  # (groups, n)


def test_state_dicts_are_those_of_the_other_class_too():
    _, B, _, s, _, _ = problem(1, 256, 128, 64)
    layer, linear = Layer(256, 128, 64), MarlinLinear(256, 128, group_size=64)
    layer.load_state_dict({"B": B, "s": s})
    linear.load_state_dict(layer.state_dict())
    again = Layer(256, 128, 64)
    again.load_state_dict(linear.state_dict())
    x = torch.randn(2, 256).half()
    assert torch.equal(layer(x), linear(x)) and torch.equal(layer(x), again(x))


def test_layer_survives_casts_and_a_flat_int64_buffer():
    A, B, _, s, _, expected = problem(4, 256, 128)
    layer = Layer(256, 128)
    layer.load_state_dict({"B": B, "s": s})
    layer.bfloat16().float()
    assert layer.s.dtype == torch.half and torch.equal(layer.s, s)
    layer.B = B.flatten().view(torch.int64)
    assert relative_error(layer(A), expected) < 5e-4


# ---------------------------------------------------------------------------- replace_linear


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(128, 128)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(128, 64, bias=False), nn.ReLU())])
        self.named = nn.ModuleDict({"out": nn.Linear(64, 128)})
        self.norm = nn.LayerNorm(128)
        self.again = self.first


def test_replace_linear_reaches_into_containers_and_keeps_biases():
    model = Model()
    bias = model.first.bias.detach().half()
    asked = []
    replace_linear(model, lambda name: asked.append(name) or name != "named.out", groupsize=64)
    assert asked == ["first", "again", "blocks.0.0", "named.out"]
    assert [n for n, m in model.named_modules() if type(m) in [Layer]] == ["first", "blocks.0.0"]
    assert model.again is model.first
    assert isinstance(model.named["out"], nn.Linear) and isinstance(model.norm, nn.LayerNorm)
    assert model.first.groupsize == 64 and model.first.s.isnan().all()
    assert torch.equal(model.first.bias, bias)
    assert model.blocks[0][0].bias is None
    assert list(model.first.state_dict()) == ["B", "s", "bias"]
    assert list(model.blocks[0][0].state_dict()) == ["B", "s"]


def test_a_kept_bias_is_added():
    A, B, _, s, _, expected = problem(5, 128, 64)
    model = nn.Sequential(nn.Linear(128, 64))
    replace_linear(model)
    model.load_state_dict({"0.B": B, "0.s": s, "0.bias": model[0].bias})
    assert relative_error(model(A), expected + model[0].bias.double()) < 5e-4
    with pytest.raises(RuntimeError, match=r"Missing key.*bias"):
        model.load_state_dict({"0.B": B, "0.s": s})


def test_replace_linear_prefixes_names():
    asked = []
    model = Model()
    replace_linear(model, lambda name: asked.append(name), name="model.layers.3")
    assert asked[0] == "model.layers.3.first" and "model.layers.3.blocks.0.0" in asked
    assert type(model.first) is nn.Linear  # the filter returned None


def test_replace_linear_names_what_does_not_fit_and_changes_nothing():
    model = nn.Sequential(nn.Linear(128, 128), nn.Sequential(nn.Linear(128, 100)))
    with pytest.raises(ValueError, match=r"1\.0: outfeatures .* 64, got 100"):
        replace_linear(model)
    assert type(model[0]) is nn.Linear
    replace_linear(nn.Linear(128, 128))  # a root has no parent to be replaced in


def test_replace_linear_on_the_meta_device_makes_real_layers():
    model = nn.Sequential(nn.Linear(128, 64, device="meta"))
    replace_linear(model)
    assert not model[0].s.is_meta and model[0].bias.isnan().all()
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(128, 64))
        replace_linear(model)
    assert model[0].s.is_meta and model[0].bias.is_meta


@pytest.mark.gpu
def test_on_a_gpu():
    A, B, C, s, workspace, expected = problem(7, 256, 256, 128)
    A, B, C, s, workspace = (t.cuda() for t in (A, B, C, s, workspace))
    mul(A, B.flatten().view(torch.int64), C, s, workspace, 64, 256)
    assert relative_error(C.cpu(), expected) < 5e-4
    linear = nn.Linear(256, 256).half().cuda()
    scales = (linear.weight.detach().abs().amax(1, keepdim=True) / 7.5).half()
    layers = [Layer(256, 256), Layer(256, 256).cuda()]
    layers[0].pack(linear, scales)  # a CPU layer from a CUDA weight, as the GPTQ script does
    layers[1].pack(linear, scales)
    assert torch.equal(layers[0].B, layers[1].B.cpu())
    assert torch.equal(layers[0].s, layers[1].s.cpu())
    model = nn.Sequential(nn.Linear(256, 256, device="cuda"))
    replace_linear(model)
    assert model[0].B.is_cuda and model[0].workspace.is_cuda and model[0].bias.is_cuda
