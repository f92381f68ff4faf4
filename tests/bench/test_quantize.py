"""`bench quantize` on a model of a few thousand weights."""

import json

import pytest
import torch

from bench import cli, quantize


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(tmp_path, *more):
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    arguments = ("--out", tmp_path, "--dir", scratch, *more)
    status = cli.main(["quantize", "--models", "tiny", *map(str, arguments)])
    assert not list(scratch.iterdir())  # nothing is left of the checkpoints
    (path,) = tmp_path.glob("*/quantize-chosen.json")
    return status, json.loads(path.read_text())["models"][0]


def test_seconds_add_up_and_are_extrapolated(tmp_path, capsys):
    status, result = run(tmp_path, "--tokens", 600, "--layers", 3)
    assert status == 0
    assert result["layers"] == 4 and result["layers_measured"] == 3
    assert result["tokens"] == 600 and len(result["modules"]) == 3 * 7
    assert sum(result["phases"].values()) == pytest.approx(result["seconds"], rel=0.02, abs=0.01)
    missing = result["seconds_whole_model"] - result["seconds"]
    assert missing == pytest.approx(result["seconds_per_layer"])
    assert 0 < result["seconds_per_layer"] < result["seconds"]
    said = capsys.readouterr().out
    assert "whole model, extrapolated:" in said and "forward" in said


def test_a_loss_worse_than_roundings_is_no_success(tmp_path, monkeypatch, capsys):
    from gptq import solver

    monkeypatch.setattr(solver, "gptq", lambda weight, *args, **options: bad(weight))

    def bad(weight):
        good = solver.rtn(weight, 128)
        return solver.Solution(good.codes.clamp(6, 10), good.scales)

    status, result = run(tmp_path, "--tokens", 600, "--layers", 2)
    assert status == 1 and len(result["worse_than_rounding"]) == 14
    assert "WORSE THAN ROUNDING: model.layers.0" in capsys.readouterr().out


def test_unknown_models_and_single_layers_are_refused(tmp_path):
    with pytest.raises(SystemExit, match="expected Llama-3-8B, Llama-3-70B"):
        cli.main(["quantize", "--models", "GPT-5"])
    with pytest.raises(SystemExit, match="expected at least 2"):
        cli.main(["quantize", "--models", "tiny", "--layers", "1", "--out", str(tmp_path)])


def test_shapes_have_the_parameters_their_names_say():
    def billions(shape):
        head = shape.hidden // shape.heads
        attention = shape.hidden * head * (2 * shape.heads + 2 * shape.kv_heads)
        layer = attention + 3 * shape.hidden * shape.mlp
        return (shape.layers * layer + 2 * shape.vocabulary * shape.hidden) / 1e9

    assert billions(quantize.SHAPES["Llama-3-8B"]) == pytest.approx(8.03, abs=0.01)
    assert billions(quantize.SHAPES["Llama-3-70B"]) == pytest.approx(70.55, abs=0.01)
