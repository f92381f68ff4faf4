"""Plots from a small made-up result; what a long loop is summed up to; the host's time per call."""

import json

import pytest
import torch

from bench import call, cli, compare, report, sustained
from bench.incumbents import read_anchors

plot = pytest.importorskip("bench.plot", reason="needs matplotlib")


def made_up_result(configs=("auto",)):
    shapes = [compare.LARGE_SHAPE, *compare.fused_layers("Llama-2-7B").values(), (128, 64)]
    cells = [
        {"k": k, "n": n, "m": m, "us": 10.0, "fp16_us": 30.0, "floor_us": 8.0, "config": config,
         "percent_of_floor": 80.0, "ideal_speedup": 3.8,
         "net_us": None}
        for config in configs for k, n in shapes for m in (1, 16, 4096)
    ]  # fmt: skip
    sums = {c: compare.model_sums(cells[: len(cells) // len(configs)], read_anchors(), 128)
            for c in configs}  # fmt: skip
    return {"bench": "gemm", "group_size": 128, "dtype": "float16", "commit": "made-up",
            "device": {"name": "NVIDIA H200"}, "cells": cells, "sums": sums}  # fmt: skip


@pytest.mark.parametrize("form", ["png", "svg"])
def test_pictures_are_written_beside_the_result(tmp_path, form, capsys):
    path = report.write_result(made_up_result(), "gemm", tmp_path)
    assert cli.main(["plot", str(path), "--format", form]) == 0
    for name in ("speedup", "floor"):
        assert (path.parent / f"gemm-{name}.{form}").stat().st_size > 10_000
        assert f"gemm-{name}.{form}" in capsys.readouterr().out or name == "floor"


def test_every_line_of_the_speedup_is_drawn():
    figure = plot.draw_speedup(made_up_result(), "auto")
    assert len(figure.axes) == 2  # the large matrix, Llama-2-7B
    for axis in figure.axes:
        assert [line.get_label() for line in axis.lines[:4]] == [
            label for _, label, _ in plot.LINES
        ]
        ours = axis.lines[1]
        assert list(ours.get_xdata()) == [1, 16, 4096] and list(ours.get_ydata()) == [3, 3, 3]


def test_each_configuration_has_pictures_of_its_own(tmp_path):
    path = report.write_result(made_up_result(("auto", "other")), "gemm-auto-other", tmp_path)
    written = {p.name for p in plot.draw(path, "png")}
    stem = "gemm-auto-other"
    assert written == {
        f"{stem}-{c}-{p}.png" for c in ("auto", "other") for p in ("floor", "speedup")
    }


def test_nothing_to_draw_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "RESULTS", tmp_path)
    with pytest.raises(SystemExit, match=r"no gemm\.json"):
        cli.main(["plot"])
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps({"bench": "cpu"}))
    with pytest.raises(SystemExit, match="expected a gemm result, got cpu"):
        cli.main(["plot", str(path)])


def test_table_aligns():
    text = report.table(["", "ms"], [["pack", "1.5"], ["unpack", "12.25"]], left=1)
    assert text.splitlines() == ["           ms", "pack      1.5", "unpack  12.25"]


def test_a_loop_is_summed_up_by_its_second_half():
    pairs = [(10, 1980), (11, 1900), (20, 1500), (22, 1500)]
    samples = [{"at_s": 0.1, "us": us, "clock_mhz": mhz, "watts": None} for us, mhz in pairs]
    assert sustained.summarize_loop(samples) == {"us": 21, "clock_mhz": 1500, "watts": None}


@pytest.mark.gpu
def test_sustained_runs_on_the_gpu(tmp_path):
    argv = ["gemm", "--sustained", "--seconds", "0.6", "--shapes", "1024x512", "--rows", "1"]
    assert cli.main([*argv, "--out", str(tmp_path)]) == 0
    (path,) = tmp_path.glob("*/gemm-sustained-chosen.json")
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) == 2 and all(len(c["samples"]) >= 2 for c in cells)


def test_calls_are_timed_per_call():
    called = []
    paths = {"a": (torch.no_grad, lambda: called.append(torch.is_grad_enabled()))}
    us = call.measure(paths, calls=10, rounds=4, synchronize=lambda: called.append("wait"))
    assert set(us) == {"a"} and 0 < us["a"] < 1000
    assert called == ([False] * 10 + ["wait"]) * 5


def test_call_paths_agree():
    results = {}
    for name, (context, path) in call.make_paths("cpu").items():
        with context():
            results[name] = path()
    expected = results.pop(call.BASELINE).float()
    del results["nn.Linear, no_grad"], results["matmul_out, no_grad"]  # other weights; no result
    for y in results.values():
        assert (y.float() - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.gpu
def test_call_runs_on_the_gpu(tmp_path):
    assert cli.main(["call", "--quick", "--out", str(tmp_path)]) == 0
