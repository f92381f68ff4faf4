"""The gemm bench: choosing, checking, summing up. The CPU stands in for the GPU."""

import argparse
import json
import shlex

import pytest
import torch

from bench import cell, cli, compare, gemm, machine, report
from bench.incumbents import Incumbents, read_anchors
from bench.pools import Pools
from marlin.testing.timing import KNOWN_RATES, Timing, replay_count

H200 = KNOWN_RATES["H200"]


class FakeGraph:
    def __init__(self, launches):
        self.replay = launches


@pytest.fixture
def on_cpu(monkeypatch):
    """Runs a cell's launches on the CPU and invents their time: 2 us, 3 us in the second pass."""

    def capture(launches, warm_up):
        warm_up()
        return FakeGraph(launches)

    passes = iter([2.0] * 12 + [3.0] * 12)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(cell, "capture", capture)
    monkeypatch.setattr(
        cell, "time_graph", lambda graph, launches, replays: Timing([next(passes)], 1700)
    )
    monkeypatch.setattr(cell, "launch_count", lambda buffers, *us: 2 * buffers)


CELLS = [(128, 256, 1), (128, 256, 3), (256, 64, 1), (256, 64, 3)]


def measure(configs, group_size=128, dtype=torch.float16):
    pools = Pools(CELLS, group_size, dtype, device="cpu", rotate_bytes=100_000)
    measurement = gemm.Measurement(pools, H200, configs, with_fp16=True)
    for done, order in enumerate((CELLS, CELLS[::-1])):
        for one in order:
            measurement.measure(one, done)
    return measurement


HEAD = {
    "command": "python -m bench gemm", "commit": "abc", "date": "now", "versions": {},
    "device": {"name": "NVIDIA H200"},
}  # fmt: skip


@pytest.mark.parametrize("group_size", [-1, 32, 128])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_cell_is_checked_and_recorded(on_cpu, group_size, dtype):
    measurement = measure([gemm.AUTO], group_size, dtype)
    assert not measurement.failures
    records = measurement.records(CELLS)
    assert [(r["k"], r["n"], r["m"]) for r in records] == CELLS
    for r in records:
        assert r["us"] == pytest.approx(2.5) and r["us_passes"] == [2.0, 3.0]
        assert r["spread_percent"] == pytest.approx(40)
        assert r["speedup"] == pytest.approx(1) and r["clock_mhz"] == 1700
        assert r["percent_of_floor"] == pytest.approx(100 * r["floor_us"] / 2.5)


def test_cells_whose_passes_differ_get_a_third(on_cpu, monkeypatch):
    steady, slow_once = (128, 256, 1), (128, 256, 3)
    us = {steady: iter([2.0, 2.06]), slow_once: iter([2.0, 2.4, 2.1])}

    def time_path(pools, path, k, n, m, check, graph_us):
        ours = path.multiply.__qualname__.startswith("our_path")
        return Timing([next(us[k, n, m]) if ours else 2.0], 1700)

    monkeypatch.setattr(gemm, "time_path", time_path)
    pools = Pools([steady, slow_once], 128, torch.float16, device="cpu", rotate_bytes=100_000)
    measurement = gemm.Measurement(pools, H200, [gemm.AUTO], with_fp16=True)
    assert list(measurement.passes([steady, slow_once])) == [1, 2, 3]
    first, second = measurement.records([steady, slow_once])
    assert first["us_passes"] == [2.0, 2.06] and first["us"] == pytest.approx(2.03)
    assert second["us_passes"] == [2.0, 2.4, 2.1] and second["us"] == 2.1
    assert second["fp16_us_passes"] == [2.0, 2.0, 2.0]


def test_the_net_is_timed_beside_many_rows(on_cpu, monkeypatch):
    monkeypatch.setattr(gemm, "NET_ROWS", 3)
    # The CPU has no such configuration: its own choice stands in for it.
    multiply = cell.ops.matmul_out
    monkeypatch.setattr(
        cell.ops, "matmul_out", lambda x, b, s, out, config=None: multiply(x, b, s, out)
    )
    times = {1: {"net_us": None, "net_speedup": None}, 3: {"net_us": 2.0, "net_speedup": 1.0}}
    monkeypatch.setattr(cell, "time_graph", lambda graph, launches, replays: Timing([2.0], 1700))
    records = measure([gemm.AUTO]).records(CELLS)
    assert len(records) == len(CELLS)
    for r in records:
        assert {key: r[key] for key in times[r["m"]]} == times[r["m"]]


def test_a_wrong_result_is_not_timed(on_cpu, monkeypatch):
    right = cell.ops.matmul_out

    def wrong(x, b, s, out, config=None):
        right(x, b, s, out)
        out[-1, -1] += 1

    monkeypatch.setattr(cell.ops, "matmul_out", wrong)
    measurement = measure([gemm.AUTO])
    assert len(measurement.failures) == len(CELLS)
    assert all(error.startswith("WRONG: an element") for error in measurement.failures.values())
    assert measurement.records(CELLS) == []


def test_an_unwritten_output_is_found(on_cpu, monkeypatch):
    monkeypatch.setattr(cell.ops, "matmul_out", lambda *args, config: None)
    assert len(measure([gemm.AUTO]).failures) == len(CELLS)


def test_a_refused_configuration_is_reported_and_the_others_go_on(on_cpu):
    measurement = measure([gemm.AUTO, "no-such-kernel"])
    assert {name for _, name in measurement.failures} == {"no-such-kernel"}
    assert all("refused" in e and "config" in e for e in measurement.failures.values())
    assert len(measurement.records(CELLS)) == len(CELLS)


def test_result_is_json_and_prints(on_cpu, tmp_path):
    options = {"group_size": 128, "dtype": "float16",
               "measured": {"read_bytes_per_s": 4.4e12, "read_by": "mv",
                            "dense_flops_per_s": 750e12}}  # fmt: skip
    result = gemm.build_result(HEAD, options, measure([gemm.AUTO]), CELLS)
    path = report.write_result(result, "gemm", tmp_path)
    assert path == tmp_path / "nvidia-h200" / "gemm.json"
    again = json.loads(path.read_text())
    assert set(again) == {
        "bench", "schema", "command", "commit", "date", "versions", "device", "protocol",
        "group_size", "dtype", "rates", "measured", "cells", "sums", "failures",
    }  # fmt: skip
    text = gemm.format_result(again)
    assert "4.618 TB/s, 818 TFLOP/s" in text and "read 4.400 TB/s (mv)" in text
    assert len([line for line in text.splitlines() if line.split()[:2] == ["128", "256"]]) == 2


def test_default_cells_fill_the_table_and_hold_the_anchors():
    def cells(*argv, incumbents=read_anchors()):  # noqa: B008
        return gemm.choose_cells(cli.make_parser().parse_args(["gemm", *argv]), incumbents)

    assert set(read_anchors().us) <= set(cells()) and len(set(cells())) == len(cells())
    assert len(cells("--quick")) == 24
    assert cells("--shapes", "64x128", "--rows", "3") == [(64, 128, 3)]
    assert cells("--shapes", "64x64")[0] == (64, 64, 1)
    assert cells(incumbents=Incumbents()) == []


def test_every_row_of_the_table_is_summed():
    """By default: the large shape at every m that was asked for, the models at all but 2 and 4."""
    cells = gemm.choose_cells(cli.make_parser().parse_args(["gemm"]), read_anchors())
    records = [record_of(k, n, m) for k, n, m in cells]
    columns = compare.model_sums(records, read_anchors(), 128)
    large, *models = ([s["m"] for s in column] for column in columns.values())
    assert large == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192]
    assert len(models) == 3 and all(
        rows == [m for m in large if m not in (2, 4)] for rows in models
    )


@pytest.mark.parametrize(("graph_us", "replays"), [(600, 21), (2400, 21), (5000, 10), (40_000, 7)])
def test_long_graphs_are_replayed_less_often(graph_us, replays):
    assert replay_count(graph_us) == replays


def test_graphs_that_are_compared_are_equally_long(monkeypatch):
    """However many weights each rotates over: 30 of ours, 8 of the baseline's."""
    launches = {}

    def capture_path(pools, path, k, n, m, check, count):
        launches[path] = count

    monkeypatch.setattr(cell, "capture_path", capture_path)
    monkeypatch.setattr(cell, "time_graph", lambda graph, count, replays: replays)
    for counts in ((30, 8), (7, 2), (3, 2)):
        ours, theirs = (cell.Path((None,) * count, print, print, 300.0) for count in counts)
        graph_us = cell.shared_graph_us([ours, theirs])
        replays = {cell.time_path(None, p, 1, 1, 1, False, graph_us) for p in (ours, theirs)}
        assert launches[ours] == launches[theirs] == counts[0] and len(replays) == 1
    short = cell.Path((None,) * 3, print, print, 2.0)
    cell.time_path(None, short, 1, 1, 1, False, cell.shared_graph_us([short]))
    assert launches[short] == 300


def record_of(k, n, m, us=10.0, fp16_us=30.0):
    return {"k": k, "n": n, "m": m, "us": us, "fp16_us": fp16_us, "floor_us": 5.0,
            "ideal_speedup": 3.5, "net_us": 2 * fp16_us}  # fmt: skip


def test_sums_add_a_models_fused_layers_and_name_the_best_rival():
    records = [record_of(k, n, 1) for k, n in compare.fused_layers("Llama-2-7B").values()]
    sums = compare.model_sums(records, read_anchors(), 128)
    assert list(sums) == ["Llama-2-7B"]
    (row,) = sums["Llama-2-7B"]
    assert row["us"] == 40 and row["speedup"] == 3 and row["percent_of_floor"] == 50
    assert row["best_incumbent"] == "humming"  # the anchors' README: 1.93 times FP16
    assert row["best_incumbent_speedup"] == pytest.approx(1.93, abs=0.005)
    assert row["net_speedup"] == 0.5
    assert row["ideal_speedup"] == 3.5 and 1 < row["published_speedup"] < 1.93


def test_fused_layers_are_in_the_anchors():
    for model in compare.SUMMED_MODELS:
        assert set(compare.fused_layers(model).values()) <= set(read_anchors().shapes())


def test_beaten_names_the_worst_first():
    records = [record_of(4096, 4096, m, us) for m, us in ((1, 10.0), (16, 5.0), (32, 20.0))]
    compare.add_comparison(records, read_anchors(), 128)
    assert records[0]["best_incumbent"] == "tinygemm_bf16"
    assert records[0]["vs_best"] == pytest.approx(0.6787)
    assert records[0]["vs_published"] == pytest.approx(1.0231)
    assert [r["m"] for r in compare.beaten(records, "vs_best", 0.98)] == [32, 1]


def test_partial_runs_have_names_of_their_own():
    def name(*argv):
        return gemm.result_name(cli.make_parser().parse_args(["gemm", *argv]))

    assert name() == "gemm"
    assert name("--quick") == "gemm-quick"
    assert name("--group-size", "-1") == "gemm-percolumn"
    assert name("--group-size", "64", "--dtype", "bfloat16") == "gemm-g64-bfloat16"
    assert name("--config", "a,b", "--rows", "1") == "gemm-a-b-chosen"
    assert name("--no-fp16") == "gemm-chosen"
    assert name("--sustained") == "gemm-sustained"
    assert name("--sustained", "--rows", "16,256") == "gemm-sustained-chosen"
    assert name("--sustained", "--seconds", "1") == "gemm-sustained-chosen"
    assert name("--sustained", "--group-size", "64") == "gemm-sustained-g64"


def test_committed_results_bear_the_name_of_their_run():
    paths = sorted(report.RESULTS.glob("*/gemm*.json"))
    assert paths
    for path in paths:
        python, _, bench, *argv = shlex.split(json.loads(path.read_text())["command"])
        assert (python, bench) == ("python", "bench")
        name = gemm.result_name(cli.make_parser().parse_args(argv))
        assert machine.slug(name) == path.stem


@pytest.mark.parametrize("text", ["4096", "4096x", "0x64", "axb", "1x2x3"])
def test_bad_shapes_are_named(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected KxN"):
        cli.shape_list(text)


def test_names_become_names_of_folders_and_files():
    assert machine.slug("NVIDIA H200") == "nvidia-h200"
    assert machine.slug("gemm-like:132:166912-chosen") == "gemm-like-132-166912-chosen"
    assert machine.slug("Intel(R) Xeon(R) Processor @ 2.0GHz") == "intel-xeon-processor-2-0ghz"


@pytest.mark.gpu
def test_gemm_runs_on_the_gpu(tmp_path, capsys):
    argv = ["gemm", "--shapes", "1024x512", "--rows", "1,16", "--out", str(tmp_path)]
    assert cli.main(argv) == 0
    assert "written to" in capsys.readouterr().out
    (path,) = tmp_path.glob("*/gemm-chosen.json")
    assert len(json.loads(path.read_text())["cells"]) == 2
