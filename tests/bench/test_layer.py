"""Decoder blocks: order and data flow of their layers. The CPU stands in for the GPU."""

import json

import pytest
import torch

from bench import cell, cli, layer
from bench.blocks import BLOCK, MODELS, attention_stand_in, block_steps
from marlin.testing.timing import KNOWN_RATES, Timing

TINY = {"q": (256, 256), "k": (256, 64), "v": (256, 64), "o": (256, 256),
        "gate": (256, 384), "up": (256, 384), "down": (384, 256)}  # fmt: skip


@pytest.fixture
def on_cpu(monkeypatch):
    """Runs the launches on the CPU, each a microsecond long; knows a tiny model."""

    class FakeGraph:
        def __init__(self, launches):
            self.replay = launches

    def capture(launches, warm_up):
        warm_up()
        launches()  # recording
        return FakeGraph(launches)

    monkeypatch.setitem(MODELS, "tiny", TINY)
    multiply = layer.ops.matmul_out
    monkeypatch.setattr(layer.ops, "matmul_out", lambda x, b, s, out, config=None: multiply(
        x, b, s, out, config=None if config == "unchained" else config))  # fmt: skip
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    for module in (cell, layer):
        monkeypatch.setattr(module, "capture", capture)
        monkeypatch.setattr(module, "time_graph", lambda graph, launches, replays: Timing([1.0]))
        monkeypatch.setattr(module, "launch_count", lambda buffers, *us: 2 * buffers)


def test_steps_follow_a_real_block():
    steps = block_steps("Llama-3-8B", fused=False)
    by_name = {s.name: i for i, s in enumerate(steps)}
    assert [s.name for s in steps] == ["q", "k", "v", "o", "gate", "up", "down"]
    sources = [BLOCK] * 3 + [by_name["q"], by_name["o"], by_name["o"], by_name["gate"]]
    assert [s.source for s in steps] == sources
    fused = block_steps("Llama-3-8B", fused=True)
    assert [(s.name, s.k, s.n, s.source) for s in fused] == [
        ("qkv", 4096, 6144, BLOCK), ("o", 4096, 4096, 0),
        ("gate_up", 4096, 28672, 1), ("down", 14336, 4096, 2),
    ]  # fmt: skip
    assert sum(s.k * s.n for s in steps) == sum(s.k * s.n for s in fused)


def measure(configs, rows=(1, 3), group_size=128, dtype=torch.float16):
    measurement = layer.ModelMeasurement(
        "tiny", list(rows), group_size, dtype, KNOWN_RATES["H200"], configs,
        device="cpu", rotate_bytes=400_000,
    )  # fmt: skip
    measurement.measure_chains()
    measurement.measure_alone()
    return measurement


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_all_variants_are_right_and_recorded(on_cpu, dtype):
    measurement = measure([layer.AUTO], dtype=dtype)
    assert not measurement.failures
    records = measurement.records()
    assert {(r["m"], r["variant"]) for r in records} == {
        (m, v) for m in (1, 3) for v in (layer.ALONE, *layer.VARIANTS)
    }
    for r in records:
        layers = (
            4 if r["variant"] == layer.ALONE else 1
        )  # each of the four a microsecond, or a block
        assert r["us"] == r["fp16_us"] == layers and r["speedup"] == 1
        assert len(r["us_passes"]) == 2
        assert r["vs_unchained"] == 1 / layers and r["vs_alone"] == 4 / layers
    head = {"device": {"name": "NVIDIA H200"}, "commit": "abc", "group_size": 128,
            "dtype": "float16", "blocks": records, "failures": []}  # fmt: skip
    text = layer.format_result(head)
    assert "tiny, auto" in text and len(text.splitlines()) == 2 + 1 + 1 + 1 + 2


def test_what_runs_with_which_configuration(on_cpu, monkeypatch):
    """Every chain without programmatic dependent launch says so, and no other one does."""
    asked, multiply = [], layer.ops.matmul_out

    def note(x, b, s, out, config=None):
        asked.append((measuring[0], config))
        multiply(x, b, s, out)  # the CPU knows none of these names

    measuring = [None]
    both_passes = layer.ModelMeasurement._both_passes

    def both(self, variant, *rest):
        measuring[0] = variant
        both_passes(self, variant, *rest)

    monkeypatch.setattr(layer.ops, "matmul_out", note)
    monkeypatch.setattr(layer.ModelMeasurement, "_both_passes", both)
    measure([layer.AUTO, "a"], rows=(1,))
    chained = {(variant, config) for variant in layer.VARIANTS for config in (None, "a")}
    chained -= {(layer.UNCHAINED, None), (layer.UNCHAINED, "a")}
    unchained = {(layer.UNCHAINED, "unchained"), (layer.UNCHAINED, "unchained:a")}
    assert set(asked) == chained | unchained


def test_fp16_takes_its_faster_layout(on_cpu, monkeypatch):
    """Both in the fused chain, then only the one that won there."""

    def time_chain(chain, floor, check):
        weight = chain.weights[0][0]
        transposed = isinstance(weight, torch.Tensor) and weight.stride(0) == 1
        return Timing([1.0 if transposed else 2.0])

    monkeypatch.setattr(layer, "time_chain", time_chain)
    timings = measure([layer.AUTO], rows=(2,)).timings
    layouts = {variant: set(paths) - {layer.AUTO} for (_, variant), paths in timings.items()}
    fast = {"fp16 (n, k)"}
    assert layouts == {"fused": set(cell.FP16_LAYOUTS), "unchained": set(), "unfused": fast,
                       "real": fast, "alone": fast}  # fmt: skip


def test_activations_keep_their_size_through_a_chain(on_cpu):
    weights = layer.BlockWeights("tiny", 128, torch.float16, "cpu", 400_000)
    steps = block_steps("tiny", fused=True)

    def multiply(x, weight, y):
        layer.ops.matmul_out(x, weight.b, weight.s, y)

    weights.blocks = 12
    chain = layer.Chain(steps, weights.packed(steps), weights.rows(64, 256), multiply, False)
    chain.launch()
    assert len(chain.launched) == 4 * 12
    for launch in chain.launched:
        assert 0.5 < launch.y.float().std() < 2


def test_one_wrong_layer_in_a_chain_is_found(on_cpu, monkeypatch):
    right = layer.ops.matmul_out

    def wrong(x, b, s, out, config=None):
        right(x, b, s, out)
        if out.shape[1] == 256 and x.shape[1] == 384:
            out[0, 0] += 1

    monkeypatch.setattr(layer.ops, "matmul_out", wrong)
    failures = measure([layer.AUTO], rows=(2,)).failures
    assert {variant for _, variant, _ in failures} == {layer.ALONE, *layer.VARIANTS}
    assert all(error.startswith("WRONG") for error in failures.values())


def test_the_stand_in_for_attention_depends_on_all_three():
    q, k, v = torch.randn(2, 8), torch.randn(2, 4), torch.randn(2, 4)
    expected = q + 0.1 * (k * v).repeat(1, 2)
    assert torch.allclose(attention_stand_in(q, k, v), expected)


@pytest.mark.gpu
def test_layer_runs_on_the_gpu(tmp_path, monkeypatch):
    # Of TINY's size, the 256 MB that the weights of a chain make would be thousands of blocks.
    small = {name: (8 * k, 8 * n) for name, (k, n) in TINY.items()}
    monkeypatch.setitem(MODELS, "tiny", small)
    assert cli.main(["layer", "--models", "tiny", "--rows", "1,16", "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/layer-chosen.json")
    result = json.loads(path.read_text())
    assert len(result["blocks"]) == 2 * (1 + len(layer.VARIANTS)) and result["seconds"] > 0
