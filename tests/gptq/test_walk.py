"""The walk over small models of every architecture: nothing about a model may be assumed."""

import copy

import pytest
import torch
from models import BUILD, HIDDEN, MLP, build, token_samples
from torch import nn

from gptq import solver, walk
from gptq.hessian import Hessian
from gptq.plan import find_blocks, make_plan
from marlin.layer import dense_weight

ALL = sorted(BUILD)


def true_hidden_states(model, sample):
    """What really enters and leaves each layer, from hooks on an ordinary forward pass."""
    states = []
    hooks = [
        layer.register_forward_hook(
            lambda module, args, kwargs, output: states.append(
                (args[0] if args else kwargs["hidden_states"], output)
            ),
            with_kwargs=True,
        )
        for layer in find_blocks(model).values()
    ]
    with torch.no_grad():
        model(input_ids=sample)
    for hook in hooks:
        hook.remove()
    return states


def inputs_of(model, names, samples):
    """Everything the named linears read in ordinary forward passes: {name: (tokens, k)}."""
    seen = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: seen[name].append(args[0].flatten(0, -2))
        )
        for name in names
    ]
    with torch.no_grad():
        for sample in samples:
            model(input_ids=sample)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(tokens) for name, tokens in seen.items()}


def quantize(model, samples, group_size=32, **options):
    plan = make_plan(model, group_size)
    steps = walk.quantize_gptq(model, plan, samples, **options)
    return plan, [result for results in steps for result in results]


@pytest.mark.parametrize("name", ALL)
def test_recorded_calls_replay_the_model(name):
    """Layer by layer through the recorded calls must be the model itself, bit for bit."""
    model, samples = build(name), token_samples()
    layers = list(find_blocks(model).values())
    with torch.no_grad():
        hidden, calls = walk.record_calls(model, layers, samples, "cpu")
        for i, sample in enumerate(samples):
            state = hidden[i]
            for layer, per_layer, (entered, left) in zip(
                layers, calls, true_hidden_states(model, sample), strict=True
            ):
                assert torch.equal(state, entered)
                state = per_layer[i].run(layer, state)
                assert torch.equal(state, left)
    assert not any("forward" in vars(layer) for layer in layers)  # the model is itself again


@pytest.mark.parametrize("name", ALL)
def test_quantizes_every_linear_of_every_layer_and_nothing_else(name):
    model = build(name)
    before = copy.deepcopy(model)
    plan, results = quantize(model, token_samples())
    per_layer = {"gpt2": 4, "bert": 6}.get(name, 7)
    assert len(results) == 3 * per_layer == len(plan.all_targets())
    assert all(result.method == "gptq" and result.tokens == 90 for result in results)

    changed = set()
    originals = dict(before.named_parameters())
    for key, parameter in model.named_parameters():
        if not torch.equal(parameter, originals[key]):
            changed.add(key)
    assert changed == {f"{result.target.name}.weight" for result in results}
    for result in results:
        weight = dense_weight(model.get_submodule(result.target.name))
        assert torch.equal(weight, result.solution.dequantize())
        assert result.solution.codes.shape == (result.target.k, result.target.n)


@pytest.mark.parametrize("name", ALL)
def test_loses_less_than_rounding_in_every_layer(name):
    model, samples = build(name), token_samples((80, 60, 90, 70))
    reference = copy.deepcopy(model)
    rounded = copy.deepcopy(model)
    list(walk.quantize_rtn(rounded, make_plan(rounded, 32)))
    _, results = quantize(model, samples)
    assert all(result.loss < result.rtn_loss for result in results)

    def distance(other):
        ends = [
            (true_hidden_states(reference, s)[-1][1], true_hidden_states(other, s)[-1][1])
            for s in samples
        ]
        return sum((a - b).square().sum().item() for a, b in ends)

    assert distance(model) < 0.7 * distance(rounded)


@pytest.mark.parametrize("name", ALL)
def test_solutions_come_from_what_each_layer_reads(name):
    """Layer by layer: the inputs are those behind the quantized layers before it."""
    model, samples = build(name), token_samples()
    half_done = copy.deepcopy(model)
    plan = make_plan(model, 32)
    for targets, results in zip(
        plan.targets, walk.quantize_gptq(model, plan, samples), strict=True
    ):
        inputs = inputs_of(half_done, [target.name for target in targets], samples)
        assert {result.target for result in results} == set(targets)
        for result in results:
            linear = half_done.get_submodule(result.target.name)
            hessian = Hessian(result.target.k)
            hessian.add(inputs[result.target.name])
            expected = solver.gptq(dense_weight(linear), hessian.mean(), 32)
            # The sums run in another order, which may tip a code on the fence.
            same = (result.solution.codes == expected.codes).float().mean()
            assert same > 0.99, result.target.name
        for result in results:
            linear = half_done.get_submodule(result.target.name)
            with torch.no_grad():
                dense_weight(linear).copy_(result.solution.dequantize())


@pytest.mark.parametrize(
    "name, expected",
    [
        ("llama", [{"q_proj", "k_proj", "v_proj"}, {"o_proj"}, {"gate_proj", "up_proj"}]),
        ("gpt2", [{"attn.c_attn"}, {"attn.c_proj"}, {"mlp.c_fc"}]),
        ("bert", [{"query", "key", "value"}, {"attention.output.dense"}, {"intermediate.dense"}]),
    ],
)
def test_layers_that_read_one_input_share_one_hessian(name, expected, monkeypatch):
    groups, made = [], []
    solve, create = walk._solve, Hessian.__init__
    monkeypatch.setattr(
        walk, "_solve", lambda targets, *rest: groups.append(targets) or solve(targets, *rest)
    )
    monkeypatch.setattr(
        Hessian, "__init__", lambda self, *args: made.append(self) or create(self, *args)
    )
    quantize(build(name), token_samples())
    assert len(made) == len(groups) == 3 * 4
    for names, targets in zip(expected, groups, strict=False):
        assert len(targets) == len(names)
        assert all(any(target.name.endswith(name) for target in targets) for name in names)
    assert [targets[0].k for targets in groups[:4]] == [HIDDEN, HIDDEN, HIDDEN, MLP]


def test_results_do_not_depend_on_how_activations_are_kept():
    """The same through `on_result`, the generator, and options to the solver."""
    heard = []
    _, results = quantize(build("llama"), token_samples(), on_result=heard.append, clip=False)
    assert heard == results
    _, clipped = quantize(build("llama"), token_samples())
    assert any(
        not torch.equal(a.solution.scales, b.solution.scales)
        for a, b in zip(results, clipped, strict=True)
    )


def test_activations_that_are_not_finite_name_layer_and_sample():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"model\.layers\.1: .* NaN or Inf in sample 0"):
        quantize(model, token_samples())


def test_a_linear_that_no_sample_reaches_is_rounded():
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.spare = nn.Linear(HIDDEN, 32, bias=False)
    weight = model.model.layers[0].mlp.spare.weight.detach().clone()
    _, results = quantize(model, token_samples())
    spare = next(r for r in results if r.target.name == "model.layers.0.mlp.spare")
    assert spare.method == "rtn" and spare.tokens == 0 and spare.loss is None
    assert torch.equal(spare.solution.codes, solver.rtn(weight.T, 32).codes)


def test_layers_may_return_tuples():
    """As older architectures do: the model takes the first item, which must not be a batch row.

    This model also hides its `use_cache`, so that layers are offered a cache they must not get.
    """
    model, samples = build("llama"), token_samples()
    plain = copy.deepcopy(model)
    for layer in model.model.layers:
        layer.__class__ = type("TupleLayer", (type(layer),), {"forward": in_tuple(type(layer))})
    base_forward = model.model.forward

    def unwrapping(**kwargs):
        originals = list(model.model.layers)
        with pytest.MonkeyPatch.context() as patch:
            wrapped = [lambda *a, layer=layer, **k: layer(*a, **k)[0] for layer in originals]
            patch.setitem(model.model._modules, "layers", wrapped)
            return base_forward(**kwargs)

    model.model.forward = unwrapping
    _, results = quantize(model, samples)
    _, expected = quantize(plain, samples)
    for a, b in zip(results, expected, strict=True):
        assert torch.equal(a.solution.codes, b.solution.codes)


def in_tuple(cls):
    return lambda self, *args, **kwargs: (cls.forward(self, *args, **kwargs), "weights")


def test_a_model_that_runs_its_layers_otherwise_is_refused():
    model = build("llama")
    layers = model.model.layers
    model.model.config.num_hidden_layers = 2  # the model now stops short of its last layer
    assert len(layers) == 3
    with pytest.raises(ValueError, match=r"run its 3 layers once each and in order, got \[0, 1\]"):
        quantize(model, token_samples())


@pytest.mark.gpu
@pytest.mark.parametrize("name", ALL)
def test_on_the_gpu_one_layer_at_a_time(name):
    model, samples = build(name), token_samples()
    on_cpu = copy.deepcopy(model)
    plan = make_plan(model, 32)
    results = []
    for step in walk.quantize_gptq(model, plan, samples, device="cuda"):
        results += step
        assert {p.device.type for p in model.parameters()} == {"cpu"}
    _, expected = quantize(on_cpu, samples)
    for a, b in zip(results, expected, strict=True):
        assert a.solution.codes.device.type == "cpu"
        assert a.loss == pytest.approx(b.loss, rel=0.2)
