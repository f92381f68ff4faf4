"""The walk over small models of every architecture: nothing about a model may be assumed."""

import collections
import copy
import re

import pytest
import torch
from faults import out_of_memory_when
from models import BUILD, HIDDEN, MLP, build, token_samples
from torch import nn

from gptq import grid, record, solver, travellers, walk
from gptq.hessian import PRODUCTS, Hessian
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


def test_seconds_of_what_is_solved_together_are_shared_by_size():
    _, results = quantize(build("llama"), token_samples())
    seconds = {result.target.name: result.seconds for result in results}
    for layer in range(3):
        q, k, v = (seconds[f"model.layers.{layer}.self_attn.{x}_proj"] for x in "qkv")
        assert q == pytest.approx(2 * k) and k == v > 0  # of 64 and 32 outputs


@pytest.mark.parametrize("tokens", [1, 96])
@pytest.mark.parametrize("name", ALL)
def test_recorded_calls_replay_the_model(name, tokens):
    """Layer by layer through the recorded calls must be the model itself, batched or not."""
    model, samples = build(name), token_samples((24, 9, 40, 17, 24, 24, 9))
    layers = list(find_blocks(model).values())
    with torch.no_grad():
        batches = list(record.record_batches(model, layers, samples, tokens))
        assert sorted(number for batch in batches for number in batch.samples) == list(range(7))
        rows = [len(batch.samples) for batch in batches]
        assert rows == ([1] * 7 if tokens == 1 else [2, 1, 3, 1])
        # Batches are also taken apart along the way.
        for batch in [half for whole in batches for half in whole.halves()]:
            states = batch.hidden
            expected = [true_hidden_states(model, samples[number]) for number in batch.samples]
            for index, layer in enumerate(layers):
                for row, layer_states in enumerate(expected):
                    torch.testing.assert_close(states[row : row + 1], layer_states[index][0])
                states = batch.calls[index].run(layer, states)
                if tokens == 1:
                    assert torch.equal(states, expected[0][index][1])
            for row, layer_states in enumerate(expected):
                torch.testing.assert_close(states[row : row + 1], layer_states[-1][1])
    assert not any("forward" in vars(layer) for layer in layers)  # the model is itself again


@pytest.mark.parametrize("name", ALL)
def test_quantizes_every_linear_of_every_layer_and_nothing_else(name):
    model = build(name)
    before = copy.deepcopy(model)
    plan, results = quantize(model, token_samples())
    per_layer = {"gpt2": 4, "bert": 6, "mixtral": 4 + 4 * 2}.get(name, 7)
    assert len(results) == 3 * per_layer == len(plan.all_targets())
    expert = re.compile(r"layers\.(\d)\.mlp\.experts\.\d\.gate_up_proj")
    read = collections.Counter()
    for result in results:
        if ".experts." not in result.target.name:
            assert result.method == "gptq" and result.tokens == 90
        elif found := expert.search(result.target.name):
            read[found[1]] += result.tokens
    assert set(read.values()) <= {2 * 90}  # two experts read each token

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
    model, samples = build(name), token_samples(*[(90, 80, 70, 80, 60)] * (name == "mixtral"))
    half_done = copy.deepcopy(model)
    plan = make_plan(model, 32)
    for targets, results in zip(
        plan.targets, walk.quantize_gptq(model, plan, samples, **solver.PUBLISHED), strict=True
    ):
        inputs = inputs_of(half_done, [target.name for target in targets], samples)
        assert {result.target for result in results} == set(targets)
        for result in results:
            linear = half_done.get_submodule(result.target.name)
            hessian = Hessian(result.target.k)
            hessian.add(inputs[result.target.name])
            expected = solver.gptq(
                dense_weight(linear).detach(), hessian.mean(), 32, **solver.PUBLISHED
            )
            # The sums run in another order, which may tip a code on the fence (and with searched
            # scales, whole groups: so none are searched here).
            same = (result.solution.codes == expected.codes).float().mean()
            assert same > 0.99, result.target.name
        for result in results:
            linear = half_done.get_submodule(result.target.name)
            with torch.no_grad():
                dense_weight(linear).copy_(result.solution.dequantize())


@pytest.mark.parametrize("products", [*PRODUCTS, "tf32"])
def test_second_moments_are_multiplied_in_the_type_asked_for(products):
    model, samples = build("llama"), token_samples((90, 80))
    if products not in PRODUCTS:
        with pytest.raises(ValueError, match="products: expected one of own"):
            quantize(model, samples, products=products)
        return
    losses, plain = (
        [result.loss for result in quantize(copy.deepcopy(model), samples, products=which)[1]]
        for which in (products, "own")
    )
    # The model is in FP32: only 16-bit products can be told from its own.
    assert (losses[:4] == pytest.approx(plain[:4], rel=1e-4)) == (products[-2:] != "16")
    assert losses == pytest.approx(plain, rel=0.2)


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
        walk,
        "_solve",
        lambda reading, *rest: groups.append(reading.targets) or solve(reading, *rest),
    )
    monkeypatch.setattr(
        Hessian,
        "__init__",
        lambda self, *args, **kw: made.append(self) or create(self, *args, **kw),
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


def with_a_bad_token(token=299):
    """A model that turns one token into infinity, and samples of which the third one has it."""
    model, samples = build("llama"), token_samples((24, 24, 24, 40))
    for sample in samples:
        sample[sample == token] = 5
    samples[2][0, 20] = token
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = torch.inf
    return model, samples


@pytest.mark.parametrize("tokens", [1, 96])
def test_activations_that_are_not_finite_name_layer_and_sample(tokens, monkeypatch):
    monkeypatch.setitem(travellers.BATCH_TOKENS, "cpu", tokens)
    model, samples = with_a_bad_token()
    message = r"model\.layers\.0\.self_attn\.q_proj: input: .* NaN or Inf in sample 2 "
    with pytest.raises(travellers.NonFiniteError, match=message):
        quantize(model, samples)


@pytest.mark.parametrize("tokens", [1, 96])
def test_bad_samples_are_left_out_on_request(tokens, monkeypatch):
    monkeypatch.setitem(travellers.BATCH_TOKENS, "cpu", tokens)
    model, samples = with_a_bad_token()
    rest = copy.deepcopy(model)
    left_out = {}
    _, results = quantize(model, samples, skip_bad_samples=True, on_skip=left_out.__setitem__)
    assert left_out == {2: "model.layers.0.self_attn.q_proj: input"}
    assert all(result.tokens == 88 for result in results)
    _, expected = quantize(rest, [samples[0], samples[1], samples[3]])
    for a, b in zip(results, expected, strict=True):
        assert (a.solution.codes == b.solution.codes).float().mean() > 0.99


def test_infinity_that_a_layer_swallows_is_found_too():
    """A linear reads it, but nothing of it is left at the layer's end."""
    model, samples = build("llama"), token_samples()

    class Swallow(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            huge = torch.inf if x.shape[1] == 9 else 1.0  # sample 1, and no other
            return torch.nan_to_num(self.inner(x * huge), 0, 0, 0)

    for layer in model.model.layers:
        layer.post_attention_layernorm = nn.Sequential(layer.post_attention_layernorm, Swallow())
    message = r"layers\.0\.post_attention_layernorm\.1\.inner: input: .* in sample 1 "
    with pytest.raises(travellers.NonFiniteError, match=message):
        quantize(model, samples)


def test_when_no_sample_is_finite_skipping_does_not_help():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[0] = torch.nan
    with pytest.raises(travellers.NonFiniteError, match=r"layers\.1\.self_attn.* in every sample"):
        quantize(model, token_samples(), skip_bad_samples=True)


def test_weights_that_are_not_finite_are_named():
    model = build("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.inf
    message = r"model\.layers\.1\.mlp\.down_proj: expected finite weights"
    with pytest.raises(travellers.NonFiniteError, match=message):
        quantize(copy.deepcopy(model), token_samples(), skip_bad_samples=True)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: weight: expected"):
        list(walk.quantize_rtn(model, make_plan(model, 32)))


def test_linears_that_too_few_tokens_reach_are_rounded_and_say_so():
    model = build("llama")
    for layer in model.model.layers:
        layer.mlp.spare = nn.Linear(HIDDEN, 32, bias=False)
        layer.mlp.rare = Rare()
    model.model.layers[0].mlp.register_forward_hook(
        lambda mlp, args, output: output + mlp.rare(args[0])
    )
    weight = model.model.layers[0].mlp.spare.weight.detach().clone()
    _, results = quantize(model, token_samples())
    found = {r.target.name.removeprefix("model.layers.0.mlp."): r for r in results}
    spare = found["spare"]
    assert spare.method == "full-range rtn" and spare.tokens == 0 and spare.loss is None
    assert spare.note == "no token reached it"
    assert torch.equal(spare.solution.codes, solver.rtn(weight.T, 32, full_range=True).codes)
    starved, fed = found["rare.starved"], found["rare.fed"]
    assert starved.method == "full-range rtn" and starved.tokens == 7
    assert starved.note == "only 7 tokens for 64 inputs" and starved.loss > 0
    assert fed.method == "gptq" and fed.tokens == 8 and fed.note is None


class Rare(nn.Module):
    """Like experts: linears that are called for a few tokens only."""

    def __init__(self):
        super().__init__()
        self.starved = nn.Linear(HIDDEN, HIDDEN)
        self.fed = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, x):
        if x.shape[1] != 9:  # one sample has nine tokens
            return 0
        self.fed(x[:, :8])
        self.starved(x[:, :7])
        return 0


def test_linears_that_share_an_input_only_at_times_get_a_hessian_each():
    """As experts might: the second reads what the first does for one sample, and more later."""
    model, samples = build("llama"), token_samples()

    class Router(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Linear(HIDDEN, HIDDEN)
            self.second = nn.Linear(HIDDEN, HIDDEN)

        def forward(self, x):
            if x.shape[1] in (24, 40):
                self.first(x)
            self.second(x if x.shape[1] == 24 else 2 * x)
            return x

    for layer in model.model.layers:
        layer.mlp = nn.Sequential(Router(), layer.mlp)
    _, results = quantize(model, samples)
    tokens = {r.target.name: r.tokens for r in results}
    assert tokens["model.layers.0.mlp.0.first"] == 24 + 40
    assert tokens["model.layers.0.mlp.0.second"] == 90


def test_inputs_that_are_always_zero_are_counted_and_their_weights_rounded():
    model = build("llama")
    dead = [3, 17, 40]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.input_layernorm.weight[dead] = 0
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().T.clone()
    _, results = quantize(model, token_samples(), clip=False)
    result = next(r for r in results if r.target.name == "model.layers.0.self_attn.q_proj")
    assert result.dead_inputs == 3 and result.method == "gptq"
    assert sum(r.dead_inputs for r in results if "layers.0" in r.target.name) == 9  # q, k, v
    scales = result.solution.scales.float().repeat_interleave(32, dim=0)[dead]
    codes = result.solution.codes[dead]
    assert torch.equal(codes, grid.encode(weight[dead], scales).to(torch.uint8))
    assert (codes != 8).any()


@pytest.mark.parametrize("late", [False, True])
def test_batches_that_do_not_fit_are_halved(late, monkeypatch):
    monkeypatch.setitem(travellers.BATCH_TOKENS, "cpu", 96)
    samples = token_samples((24, 24, 24, 24, 40))
    whole = build("llama")
    with torch.no_grad():
        layers = list(find_blocks(whole).values())
        batches = list(record.record_batches(whole, layers, samples, 96))
    torn = copy.deepcopy(whole)
    _, expected = quantize(whole, samples)
    rows = []
    too_many = lambda self, hidden, *args: rows.append(len(hidden)) or len(hidden) > 1  # noqa: E731
    out_of_memory_when(too_many, monkeypatch, type(torn.model.layers[0]), "forward")
    if late:  # recording still works

        def arrive(self, *args):
            self.batches = batches

        monkeypatch.setattr(travellers.Travellers, "depart", arrive)
    _, results = quantize(torn, samples)
    assert 4 in rows and 1 in rows
    for a, b in zip(results, expected, strict=True):
        assert a.tokens == b.tokens == 136
        if "layers.0" in a.target.name:  # further on the few codes on the fence add up
            assert (a.solution.codes == b.solution.codes).float().mean() > 0.98


def test_memory_that_never_suffices_is_an_error_that_says_what_would_help(monkeypatch):
    out_of_memory_when(lambda *args: True, monkeypatch, travellers, "collect")
    with pytest.raises(ValueError, match="ran out; shorter samples"):
        quantize(build("llama"), token_samples())


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
    model, samples = build(name), token_samples((24, 9, 24, 40, 17))
    on_cpu = copy.deepcopy(model)
    plan = make_plan(model, 32)
    layers = list(find_blocks(model).values())
    results = []
    for index, step in enumerate(walk.quantize_gptq(model, plan, samples, device="cuda")):
        results += step
        there = {p.device.type for p in layers[index].parameters()}
        others = {
            p.device.type
            for module in [model.base_model.get_input_embeddings(), *layers]
            if module is not layers[index]
            for p in module.parameters()
        }
        assert there == {"cuda"} and others == {"cpu"}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    _, expected = quantize(on_cpu, samples)
    for a, b in zip(results, expected, strict=True):
        assert a.solution.codes.device.type == "cuda"
        assert a.peak_bytes > 0
        assert a.loss == pytest.approx(b.loss, rel=0.2)


@pytest.mark.gpu
def test_what_does_not_fit_on_the_gpu_is_solved_on_the_cpu(monkeypatch):
    model, samples = build("llama"), token_samples()
    on_gpu = lambda weight, *args: weight.is_cuda and weight.shape[0] == MLP  # noqa: E731
    out_of_memory_when(on_gpu, monkeypatch, solver, "gptq")
    _, results = quantize(model, samples, device="cuda")
    for result in results:
        down = result.target.name.endswith("down_proj")
        assert result.solution.codes.is_cuda != down
        assert result.note == ("CUDA out of memory: solved on the CPU" if down else None)
        assert result.method == "gptq" and result.loss < result.rtn_loss
