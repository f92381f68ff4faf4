"""The search for the fastest configurations, with made-up times."""

import json
from pathlib import Path

import numpy as np
import pytest

from bench import cli, tune, tune_tables
from marlin import host

ROOT = Path(__file__).resolve().parents[2]
SHAPES = [(3584, 512), (4096, 4096), (8192, 57344), (16384, 16896)]
HEAD = {"device": {"name": "NVIDIA H200"}, "date": "2026-11-21", "commit": "abc"}
CELL = {"k": 64, "n": 128, "m": 8, "commit": "abc"}


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("m", tune.ROWS)
def test_candidates_are_configurations_of_this_problem(k, n, m):
    names = tune.candidates(k, n, m, 132)
    assert len(set(names)) == len(names) <= 100
    shapes = host.kernel_shapes()
    for name in names:
        shape, runs = name.split("@")
        if shape == tune_tables.DENSE:
            assert m >= tune.NET_ROWS and 1 <= int(runs) <= n // 64
            assert 2 * k * n / int(runs) <= tune.NET_SLICE_BYTES
            continue
        tiles = -(-n // shapes[shape]["columns"]) * -(-m // shapes[shape]["rows"])
        tiles *= -(-k // shapes[shape]["depth"])
        assert 1 <= int(runs) <= min(tiles, 132)
    assert (m >= tune.NET_ROWS) == any(name.startswith(tune_tables.DENSE) for name in names)


@pytest.mark.parametrize(("k", "n"), SHAPES)
@pytest.mark.parametrize("m", tune.SM80_ROWS)
def test_candidates_for_8x_cards(k, n, m):
    """Enough of them, also for cards with less shared memory, and none that is mostly empty."""
    names = tune.sm80_candidates(k, n, m, 132, 227 * 1024)
    shapes = {name.split("@")[0]: host.kernel_shapes()[name.split("@")[0]] for name in names}
    assert len(set(names)) == len(names) and len(shapes) >= 3
    few = {name.split("@")[0] for name in tune.sm80_candidates(k, n, m, 132, 99 * 1024)}
    assert len(few) >= 2 and all(shapes[name]["shared_bytes"] <= 99 * 1024 for name in few)
    assert all(shape["engine"] == "sm80" for shape in shapes.values())
    assert all(shape["rows"] <= max(16, 2 * m) for shape in shapes.values())


def test_a_survey_keeps_all_and_repeats_the_best():
    calls = []

    def brief(name):
        calls.append(name)
        return {"a": 10.0, "b": 11.0, "c": 30.0}[name] - 2 * (calls.count(name) > 1)

    assert list(tune.survey(["c", "b", "a"], brief).items()) == [
        ("a", 8.0),
        ("b", 9.0),
        ("c", 30.0),
    ]
    assert calls == ["c", "b", "a", "b", "a"]


def test_few_slices_are_tried_without_a_split():
    """n = 512 at 192 rows: 12 tiles of 64 x 128, one CTA each, two, or four."""
    names = tune.candidates(3584, 512, 192, 132)
    assert {f"h64x128x128x2@{runs}" for runs in (12, 24, 48)} <= set(names)


def test_hopeless_candidates_are_timed_once():
    times = {"a@1": 10.0, "b@1": 11.0, "c@1": 30.0, "d@1": 10.5, "e@1": 11.5}
    briefly, carefully = [], []

    def brief(name):
        briefly.append(name)
        return times[name]

    def careful(name):
        carefully.append(name)
        return times[name] + (5 if name == "a@1" else 0)

    assert list(tune.choose(list(times), brief, careful)) == ["d@1", "b@1", "a@1"]
    assert briefly.count("c@1") == 1 and briefly.count("a@1") == 2
    assert sorted(carefully) == ["a@1", "b@1", "d@1"]


def test_long_launches_are_timed_in_both_orders():
    calls = []

    def careful(name, check):
        calls.append(name)
        assert check == (len(calls) <= 4)
        return {"dense@1": 5.0, "dense@2": 6.0, "dense@4": 7.0, "x@1": 9.0}[name] + len(calls)

    names = ["x@1", "dense@1", "dense@2", "dense@4"]
    us = tune.choose_hot(names, careful)
    assert calls == names + names[::-1]
    assert list(us) == ["dense@1", "dense@2", "dense@4", "x@1"]  # the engine's best stays
    assert us["dense@1"] == 5.0 + (2 + 7) / 2


def test_the_net_never_stands_alone():
    times = {"dense@1": 1.0, "dense@2": 1.1, "dense@4": 1.2, "x@1": 9.0, "y@1": 8.0}
    us = tune.choose(list(times), times.get, times.get)
    assert list(us) == ["dense@1", "dense@2", "dense@4", "y@1"]
    text = tune_tables.table_text([{**CELL, "m": 512, "us": us}], HEAD)
    rows = [line for line in text.splitlines() if not line.startswith("//")]
    assert rows == [
        '{64, 128, 512, "dense", 1},  // 1.0; dense@2 1.1; dense@4 1.2; y@1 8.0',
        '{64, 128, 512, "y", 1},  // 8.0',
    ]


def test_the_engine_needs_one_row():
    text = tune_tables.table_text([{**CELL, "us": {"x@3": 2.0, "dense@1": 3.0}}], HEAD)
    assert text.splitlines()[-1] == '{64, 128, 8, "x", 3},  // 2.0; dense@1 3.0'
    assert all(line.startswith(("//", "{64")) for line in text.splitlines())


def test_a_run_over_some_cells_keeps_the_others():
    """What is measured anew replaces what was there; times of shapes that are gone go, too."""
    shape = next(iter(host.kernel_shapes()))
    earlier = {"commit": "old", "cells": [
        {"k": 64, "n": 128, "m": 8, "us": {f"{shape}@1": 3.0, "gone@1": 2.0}},
        {"k": 64, "n": 128, "m": 16, "us": {f"{shape}@2": 4.0}},
        {"k": 64, "n": 128, "m": 32, "us": {"gone@1": 4.0, "dense@1": 3.0}},
        {"k": 64, "n": 64, "m": 8, "us": {f"{shape}@1": 5.0}, "commit": "older"},
    ]}  # fmt: skip
    new = {**CELL, "m": 16, "us": {f"{shape}@1": 1.0}}
    cells = tune_tables.with_earlier([new], earlier)
    assert [(c["n"], c["m"], c["commit"]) for c in cells] == [
        (64, 8, "older"), (128, 8, "old"), (128, 16, "abc"),
    ]  # fmt: skip
    assert cells[1]["us"] == {f"{shape}@1": 3.0} and cells[2] is new
    head, _, _, *rows = tune_tables.table_text([*cells, {**new, "m": 24}], HEAD).splitlines()
    assert "commit abc" in head  # most rows', which is left out there
    assert [row.split("// ")[1] for row in rows] == ["5.0 (older)", "3.0 (old)", "1.0", "1.0"]


def test_a_quick_run_makes_no_table(capsys):
    assert cli.main(["tune", "--quick", "--write"]) == 2
    assert "expected --quick or --write" in capsys.readouterr().err


@pytest.mark.parametrize("engine", tune_tables.TABLES)
def test_the_committed_tables_are_what_tune_writes(tmp_path, engine):
    """From the committed result, whose shapes exist."""
    name = tune_tables.RESULT[engine]
    result = json.loads((ROOT / f"bench/results/nvidia-h200/{name}.json").read_text())
    cells = tune_tables.with_earlier([], result)
    assert [cell["us"] for cell in cells] == [cell["us"] for cell in result["cells"]]
    for path in tune_tables.write_tables(engine, cells, result, tmp_path):
        assert path.read_text() == (tune_tables.DISPATCH / path.name).read_text()


def test_a_batch_does_as_a_larger_one_that_is_faster():
    """In as many tiles of rows: 48 rows fit a tile of 64, 100 take two."""
    cells = [
        {**CELL, "m": 48, "us": {"h48x256x128x2@1": 5.0}},
        {**CELL, "m": 64, "us": {"h64x256x128x2@1": 4.0, "h32x256x128x2@2": 4.5}},
        {**CELL, "m": 100, "us": {"h48x256x128x2@1": 5.0}},
        {**CELL, "n": 64, "m": 128, "us": {"h64x256x128x2@1": 1.0}},
    ]
    found = tune_tables.at_most_as_slow(cells)
    assert found[0]["us"] == {"h64x256x128x2@1": 4.0, "h48x256x128x2@1": 5.0}
    assert found[1:] == cells[1:]
    # Its own timing of a configuration counts more than a larger batch's, and noise nothing.
    large = {**CELL, "m": 64, "us": {"h64x256x128x2@1": 4.0}}
    for us in ({"h48x256x128x2@1": 4.9, "h64x256x128x2@1": 5.0}, {"h48x256x128x2@1": 4.01}):
        cell = {**CELL, "m": 48, "us": us}
        assert tune_tables.at_most_as_slow([cell, large])[0] == cell
    row = tune_tables.table_text(found[:1], HEAD).splitlines()[-1]
    assert row.endswith('"h64x256x128x2", 1},  // 4.0 at m = 64; h48x256x128x2@1 5.0')


def test_costs_are_found_again():
    """From timings made up of them, by shape; without the net and long launches."""
    true = {"h64x128x128x2": (2.0, 0.5, 1.0, 0.25), "h128x256x128x2": (0.0, 1.5, 3.0, 0.0)}
    cells = []
    for shape, costs in true.items():
        for k, n, runs in ((4096, 4096, 64), (8192, 4096, 128), (4096, 6144, 132), (512, 512, 4)):
            size = host.kernel_shapes()[shape]
            slices = -(-n // size["columns"]) * -(-64 // size["rows"])
            tiles, segments, sharers = host.busiest_run(slices, k // size["depth"], runs)
            us = sum(c * x for c, x in zip(costs, (1, tiles, segments, sharers - 1), strict=True))
            cells.append({"k": k, "n": n, "m": 64, "us": {f"{shape}@{runs}": us, "dense@1": 1.0}})
    cells.append({"k": 64, "n": 64, "m": 4096, "us": {"h64x128x128x2@1": 1e6}})
    found = tune_tables.fit(cells)
    assert set(found) == set(true)
    shares = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 4.0]]) / np.array([[4.0], [2.0], [1.0]])
    assert np.linalg.lstsq(shares, np.ones(3), rcond=None)[0].min() < 0
    costs = tune_tables._non_negative(shares)
    assert costs.min() == 0 and costs.max() > 0
    for shape, (costs, count, error) in found.items():
        assert costs == pytest.approx(true[shape], abs=1e-6) and count == 4 and error < 1e-6
