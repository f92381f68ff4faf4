"""Memory runs out wherever it may: the CPU finishes the work and the report says so, or one line
says what did not fit."""

import copy

import pytest
import torch
from faults import Elsewhere, always, at_first, out_of_memory_when
from models import HIDDEN, build, token_samples
from torch import nn

from gptq import export, memory, resume, solver, travellers, walk
from gptq.hessian import Hessian
from gptq.plan import make_plan
from gptq.record import Batch
from gptq.visit import Visit
from marlin.layer import MarlinLinear

NOTE = "CUDA out of memory: {} on the CPU"
FIRST = "model.layers.0.self_attn."
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def quantize(model, samples, **options):
    steps = walk.quantize_gptq(model, make_plan(model, 32), samples, **options)
    return [result for results in steps for result in results]


def round_to_nearest(model, **options):
    steps = walk.quantize_rtn(model, make_plan(model, 32), **options)
    return [result for results in steps for result in results]


def same(model, results, others, device="cpu"):
    """The same weights, in the results and in the model; a GPU may round otherwise here or there.
    others: what the CPU does if memory does not run out."""
    assert [r.target for r in results] == [r.target for r in others]
    for a, b in zip(results, others, strict=True):
        ours, theirs = a.solution.cpu(), b.solution
        agree = (ours.codes == theirs.codes).float().mean()
        assert agree == 1 if device == "cpu" else agree > 0.99, a.target.name
        torch.testing.assert_close(
            ours.scales, theirs.scales, rtol=0 if device == "cpu" else 2e-3, atol=0
        )
        weight = model.get_submodule(a.target.name).weight
        assert torch.equal(weight.t(), ours.dequantize())


def notes(results):
    return {result.target.name: result.note for result in results if result.note}


# Where memory runs out the first time -> what the report says, of which linears.
SPOTS = [
    (Hessian, "mean", "second moments averaged", "qkv"),
    (solver, "gptq", "solved", "qkv"),
    (Visit, "change", "weight set", "q"),
]


@pytest.mark.parametrize("module, name, what, linears", SPOTS)
def test_the_cpu_takes_over_and_the_report_says_so(module, name, what, linears, monkeypatch):
    model, samples = build("llama"), token_samples()
    expected = quantize(copy.deepcopy(model), samples)
    assert not notes(expected)
    out_of_memory_when(at_first(), monkeypatch, module, name)
    results = quantize(model, samples)
    same(model, results, expected)
    assert notes(results) == {f"{FIRST}{x}_proj": NOTE.format(what) for x in linears}
    assert all(result.method == "gptq" for result in results)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "module, name, what, on_gpu",
    [
        (Hessian, "mean", "second moments averaged", lambda self: self.sum.is_cuda),
        (Visit, "change", "weight set", lambda self, parameter, values: values.is_cuda),
    ],
)
def test_what_never_fits_on_the_gpu_is_done_on_the_cpu(module, name, what, on_gpu, monkeypatch):
    model, samples = build("llama"), token_samples()
    out_of_memory_when(on_gpu, monkeypatch, module, name)
    for result in quantize(model, samples, device="cuda"):
        assert result.note == NOTE.format(what) and result.method == "gptq"
        assert result.loss < result.rtn_loss
        weight = model.get_submodule(result.target.name).weight
        assert torch.equal(weight.t(), result.solution.cpu().dequantize().to(weight.dtype))


@pytest.mark.parametrize("module, name", [(Hessian, "mean"), (Visit, "change"), (solver, "gptq")])
def test_activations_make_room_first(module, name, monkeypatch):
    """Then nothing needs the CPU, and there is no note."""
    model, samples = build("llama"), token_samples()
    expected = quantize(copy.deepcopy(model), samples)
    moved = pretend_activations_are_elsewhere(monkeypatch)
    out_of_memory_when(at_first(), monkeypatch, module, name)
    results = quantize(model, samples)
    same(model, results, expected)
    assert len(moved) == 1 and not notes(results)


def pretend_activations_are_elsewhere(monkeypatch):
    """Where they are not said to be on the CPU there is something to move. Returns the moves."""
    create, spare, moved = travellers.Travellers.__init__, travellers.Travellers.spare_memory, []

    def __init__(self, *args):
        create(self, *args)
        self.activations = torch.device("cpu", 0)

    def spare_memory(self):
        moved.append(spare(self))
        return moved[-1]

    monkeypatch.setattr(travellers.Travellers, "__init__", __init__)
    monkeypatch.setattr(travellers.Travellers, "spare_memory", spare_memory)
    return moved


def test_linears_that_no_token_reached(monkeypatch):
    model, samples = build("llama"), token_samples()
    for layer in model.model.layers:
        layer.mlp.spare = nn.Linear(HIDDEN, 40, bias=False)
    expected = quantize(copy.deepcopy(model), samples)
    first = at_first()
    unreached = lambda weight, *args: weight.shape == (HIDDEN, 40) and first()  # noqa: E731
    out_of_memory_when(unreached, monkeypatch, solver, "rtn")
    results = quantize(model, samples)
    same(model, results, expected)
    starved = "no token reached it"
    assert notes(results) == {
        "model.layers.0.mlp.spare": f"{NOTE.format('rounded')}; {starved}",
        "model.layers.1.mlp.spare": starved,
        "model.layers.2.mlp.spare": starved,
    }


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "module, name, what", [(solver, "rtn", "rounded"), (Visit, "change", "weight set")]
)
def test_plain_rounding(module, name, what, device, monkeypatch):
    model = build("llama")
    expected = round_to_nearest(copy.deepcopy(model))
    out_of_memory_when(at_first(), monkeypatch, module, name)
    results = round_to_nearest(model, device=device)
    same(model, results, expected, device)
    assert notes(results) == {f"{FIRST}q_proj": NOTE.format(what)}


@pytest.mark.parametrize("device", DEVICES)
def test_plain_rounding_of_a_layer_that_does_not_fit(device, monkeypatch):
    """It stays where it is, and the next one is brought again."""
    model = build("llama")
    expected = round_to_nearest(copy.deepcopy(model))
    large = model.model.layers[1].mlp.down_proj.weight.data_ptr()
    does_not_fit = lambda self, tensor: tensor.data_ptr() == large  # noqa: E731
    out_of_memory_when(does_not_fit, monkeypatch, Visit, "_moved")
    results = round_to_nearest(model, device=device)
    same(model, results, expected, device)
    in_it = [r.target.name for r in results if r.target.name.startswith("model.layers.1.")]
    assert notes(results) == dict.fromkeys(in_it, NOTE.format("rounded")) and len(in_it) == 7
    assert {p.device.type for p in model.parameters()} == {"cpu"}


@pytest.mark.parametrize("device", DEVICES)
def test_packing(device, monkeypatch, tmp_path):
    model = build("llama")
    results = round_to_nearest(model, device=device)
    tensors, told = resume.pack_all(results)
    assert told == results
    out_of_memory_when(at_first(), monkeypatch, MarlinLinear, "from_quantized")
    again, told = resume.pack_all(results)
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[key], tensors[key]) for key in tensors)
    assert notes(told) == {f"{FIRST}q_proj": NOTE.format("packed")}
    out_of_memory_when(at_first(), monkeypatch, MarlinLinear, "from_quantized")
    export.install(model, results)
    layer = model.get_submodule(f"{FIRST}q_proj")
    assert torch.equal(layer.B, tensors[f"{FIRST}q_proj.B"])


def test_checking_weights(monkeypatch):
    model, samples = build("llama"), token_samples()
    expected = quantize(copy.deepcopy(model), samples)
    out_of_memory_when(at_first(), monkeypatch, travellers, "_all_finite")
    results = quantize(model, samples)
    same(model, results, expected)


@pytest.mark.parametrize("tokens, which", [(1, 1), (1, 3), (96, 1)])
def test_advancing(tokens, which, monkeypatch):
    """Batches are halved; for single samples, activations make room."""
    monkeypatch.setitem(travellers.BATCH_TOKENS, "cpu", tokens)
    model, samples = build("llama"), token_samples((24, 24, 24, 24, 40))
    expected = quantize(copy.deepcopy(model), samples)
    moved = pretend_activations_are_elsewhere(monkeypatch)
    sizes = []
    fails = lambda hidden: sizes.append(len(hidden)) or len(sizes) == which  # noqa: E731
    out_of_memory_when(fails, monkeypatch, travellers, "finite_rows")
    results = quantize(model, samples)
    assert sizes[:4] == ([4, 2, 2, 1] if tokens == 96 else [1, 1, 1, 1])
    assert moved == ([] if tokens == 96 else [True])
    assert [r.tokens for r in results] == [136] * 21
    for a, b in zip(results, expected, strict=True):
        if tokens == 1:
            assert torch.equal(a.solution.codes, b.solution.codes)
        else:  # batches of another size sum up in another order
            assert (a.solution.codes == b.solution.codes).float().mean() > 0.98


def test_recording(monkeypatch):
    model, samples = build("llama"), token_samples()
    expected = quantize(copy.deepcopy(model), samples)
    moved = pretend_activations_are_elsewhere(monkeypatch)
    out_of_memory_when(at_first(), monkeypatch, travellers.Travellers, "_record")
    same(model, quantize(model, samples), expected)
    assert moved == [True]


ERROR = "cpu: expected memory for {}, ran out; {}"


@pytest.mark.parametrize(
    "module, name, what, remedy",
    [
        (travellers.Travellers, "_record", "the embeddings and one sample", memory.SHORTER),
        (travellers, "collect", "model.layers.0 and one sample", memory.SHORTER),
        (travellers, "finite_rows", "model.layers.0 and one sample of 9 tokens", memory.SHORTER),
        (Visit, "_moved", "the embeddings and the first layer", memory.ON_CPU),
    ],
)
def test_what_nothing_helps_is_one_line(module, name, what, remedy, monkeypatch):
    model = build("llama")
    before = {key: value.data_ptr() for key, value in model.named_parameters()}
    out_of_memory_when(always, monkeypatch, module, name)
    with pytest.raises(memory.TooLittleMemoryError) as caught:
        quantize(model, token_samples((24, 9, 40)))
    assert str(caught.value) == ERROR.format(what, remedy)
    changed = {k for k, value in model.named_parameters() if value.data_ptr() != before[k]}
    # What was quantized before stays so; the rest is where it was.
    assert changed == set() or (name == "finite_rows" and len(changed) == 7)


def test_a_layer_that_does_not_fit_is_named(monkeypatch):
    model = build("llama")
    large = model.model.layers[1].mlp.down_proj.weight.data_ptr()
    does_not_fit = lambda self, tensor: tensor.data_ptr() == large  # noqa: E731
    out_of_memory_when(does_not_fit, monkeypatch, Visit, "_moved")
    with pytest.raises(memory.TooLittleMemoryError) as caught:
        quantize(model, token_samples())
    assert str(caught.value) == ERROR.format("model.layers.1", memory.ON_CPU)


@pytest.mark.parametrize(
    "module, name, what",
    [
        (travellers, "locate", "model.layers.0 and one sample"),
        (Batch, "without", "the other samples"),
    ],
)
def test_looking_for_bad_samples(module, name, what, monkeypatch):
    model, samples = build("llama"), token_samples((24, 24, 40))
    for sample in samples:
        sample[sample == 299] = 5
    samples[2][0, 20] = 299
    with torch.no_grad():
        model.model.embed_tokens.weight[299] = torch.inf
    with monkeypatch.context() as patch:
        pretend_activations_are_elsewhere(patch)
        out_of_memory_when(at_first(), patch, module, name)
        results = quantize(copy.deepcopy(model), samples, skip_bad_samples=True)
        assert all(result.tokens == 48 for result in results)
    out_of_memory_when(always, monkeypatch, module, name)
    with pytest.raises(memory.TooLittleMemoryError, match=f"expected memory for {what}, ran out"):
        quantize(model, samples, skip_bad_samples=True)


def test_the_second_try_is_on_copies_in_host_memory():
    tensor = torch.arange(3.0).as_subclass(Elsewhere)
    seen = []

    def double(values, others, nothing):
        seen.append((values.device.type, others[0].device.type, nothing))
        if values.device.type == "cuda":
            raise torch.OutOfMemoryError("no room")
        return values * 2

    rooms = iter([True, False])
    result, note = memory.or_on_cpu(
        "doubled", double, tensor, [tensor], None, make_room=lambda: next(rooms)
    )
    assert seen == [("cuda", "cuda", None)] * 2 + [("cpu", "cpu", None)]
    assert torch.equal(result, torch.tensor([0.0, 2.0, 4.0]))
    assert note == "CUDA out of memory: doubled on the CPU"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("no memory"),
        RuntimeError("CUSOLVER_STATUS_ALLOC_FAILED, when ..."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might ..."),
    ],
)
def test_every_way_of_saying_it(error):
    def fail():
        raise error

    assert memory.attempt(fail) == (False, None)


def test_other_errors_are_not_taken_for_it():
    def fail():
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        memory.or_on_cpu("done", fail)


def test_a_gpus_state_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 10**9, 80 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 19.5e9)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda device: 0.25)
    assert str(memory.too_little("model.layers.1", "cuda:1", memory.ON_CPU)) == (
        "cuda:1: expected memory for model.layers.1, ran out with 19.50 GB in use here of "
        "20.00 GB allowed and 3.00 GB free; --device cpu would do"
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", always_raises)
    assert "ran out; " in str(memory.too_little("model.layers.1", "cuda:1"))


def always_raises(*args):
    raise RuntimeError("CUDA error: out of memory")
