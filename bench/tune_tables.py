"""The tables of csrc/dispatch that `tune` writes: what won, and what any launch costs.

`python -m bench.tune_tables` makes them again from the committed results.
"""

import functools
import json
import statistics
from pathlib import Path

import numpy as np

from bench.report import RESULTS
from marlin import host

TABLE = "sm90_table.def"
DISPATCH = Path(__file__).resolve().parents[1] / "csrc/dispatch"
DENSE = "dense"  # the net
COLD_ROWS = 1024  # up to which launches are timed at the clock of a cold GPU
CLEARLY = 0.99  # of a time: less than that is no noise


def with_earlier(cells: list[dict], earlier: dict) -> list[dict]:
    """These cells and those of an earlier result that are not among them, in order, each with its
    commit. Configurations that are gone are left out, and cells that had no other."""
    exists = {DENSE, *host.kernel_shapes()}
    found = {}
    for cell in earlier["cells"]:
        us = {name: us for name, us in cell["us"].items() if name.split("@")[0] in exists}
        if any(not name.startswith(DENSE) for name in us):
            found[_place(cell)] = {"commit": earlier["commit"], **cell, "us": us}
    found |= {_place(cell): cell for cell in cells}
    return [found[place] for place in sorted(found)]


def _place(cell: dict) -> tuple[int, int, int]:
    return cell["k"], cell["n"], cell["m"]


def at_most_as_slow(cells: list[dict]) -> list[dict]:
    """Cells in which no batch takes longer than a larger one: it may do as that does, in as many
    tiles of rows, though such high tiles were no candidates for it."""
    found = []
    for cell in cells:
        others = [
            (us, name, other["m"])
            for other in cells
            if (other["k"], other["n"]) == (cell["k"], cell["n"]) and other["m"] > cell["m"]
            for name, us in other["us"].items()
            if name not in cell["us"]
            and _row_tiles(name, other["m"]) == _row_tiles(name, cell["m"])
        ]
        us, name, m = min(others, default=(np.inf, "", 0))
        if us < CLEARLY * min(cell["us"].values()):
            cell = {**cell, "us": {name: us, **cell["us"]}, "of": m}
        found.append(cell)
    return found


def _row_tiles(name: str, m: int) -> int:
    """0 for the net, which has none."""
    shape = name.split("@")[0]
    return 0 if shape == DENSE else -(-m // host.kernel_shapes()[shape]["rows"])


def table_text(cells: list[dict], head: dict) -> str:
    """C++ rows: what won, each with its evidence."""
    usual = statistics.mode(cell["commit"] for cell in cells)
    lines = [
        f"// {head['device']['name']}, commit {usual} where a row",
        "// names no other: written by `python -m bench tune --write`. k, n, m up to, shape, runs;",
        "// us, and the next best. Where the net won (dense, slices), the engine's best follows.",
    ]
    for cell in cells:
        ranked = list(cell["us"].items())
        engine = next(i for i, (name, _) in enumerate(ranked) if not name.startswith(DENSE))
        for first in sorted({0, engine}):
            (name, us), *others = ranked[first:]
            shape, runs = name.split("@")
            evidence = "; ".join([f"{us:.1f}", *(f"{name} {us:.1f}" for name, us in others)])
            if first == 0 and "of" in cell:
                evidence = evidence.replace(";", f" at m = {cell['of']};", 1)
            if cell["commit"] != usual:
                evidence += f" ({cell['commit']})"
            row = f'{{{cell["k"]}, {cell["n"]}, {cell["m"]}, "{shape}", {runs}}},'
            lines.append(f"{row}  // {evidence}")
    return "\n".join(lines) + "\n"


def fit(cells: list[dict]) -> dict[str, tuple[np.ndarray, int, float]]:
    """By shape: us of a launch, a tile, a segment and a further sharer of the busiest run, from
    every timing of up to COLD_ROWS rows; how many there were, and the relative error (rms)."""
    timings: dict[str, list[tuple]] = {}
    for cell in cells:
        if cell["m"] > COLD_ROWS:
            continue
        for name, us in cell["us"].items():
            if name.startswith(DENSE):
                continue
            name, runs = name.split("@")
            shape = host.kernel_shapes()[name]
            slices = _row_tiles(name, cell["m"]) * -(-cell["n"] // shape["columns"])
            depth = -(-cell["k"] // shape["depth"])
            tiles, segments, sharers = host.busiest_run(slices, depth, int(runs))
            timings.setdefault(name, []).append(((1, tiles, segments, sharers - 1), us))
    found = {}
    for shape, rows in sorted(timings.items()):
        work, us = (np.array(column, dtype=float) for column in zip(*rows, strict=True))
        costs = _non_negative(work / us[:, None])
        error = np.log(work @ costs / us)
        found[shape] = costs, len(rows), float(np.sqrt(np.mean(error**2)))
    return found


def _non_negative(shares: np.ndarray) -> np.ndarray:
    """Least squares of shares · costs = 1; costs that would be negative are left out."""
    kept = list(range(shares.shape[1]))
    while True:
        solved = np.linalg.lstsq(shares[:, kept], np.ones(len(shares)), rcond=None)[0]
        if solved.min() >= 0:
            costs = np.zeros(shares.shape[1])
            costs[kept] = solved
            return costs
        kept.pop(int(solved.argmin()))


def costs_text(cells: list[dict], head: dict, options: str = "--write") -> str:
    """C++ rows: what a launch of each shape costs."""
    lines = [
        f"// {head['device']['name']}: fitted by `python -m bench tune {options}` to its",
        f"// timings of up to {COLD_ROWS} rows. Shape; us of a launch, a tile, a segment, a",
        "// sharer; timings, and by how much they differ (rms).",
    ]
    for shape, (costs, count, error) in fit(cells).items():
        numbers = ", ".join(f"{cost:.3f}" for cost in costs)
        lines.append(f'{{"{shape}", {numbers}}},  // {count}, {100 * error:.1f} %')
    return "\n".join(lines) + "\n"


def sm90_table_text(cells: list[dict], head: dict) -> str:
    return table_text(at_most_as_slow(cells), head)


# By engine and file: how its text is made of a result's cells and head.
TABLES = {
    "sm90": {TABLE: sm90_table_text, "sm90_costs.def": costs_text},
    "sm80": {"sm80_costs.def": functools.partial(costs_text, options="--engine sm80 --write")},
}
RESULT = {"sm90": "tune", "sm80": "tune-sm80"}  # names of results


def write_tables(engine: str, cells: list[dict], head: dict, folder: Path = DISPATCH) -> list[Path]:
    """An engine's; returns where they are."""
    paths = []
    for name, text in TABLES[engine].items():
        (folder / name).write_text(text(cells, head))
        paths.append(folder / name)
    return paths


if __name__ == "__main__":
    for engine, name in RESULT.items():
        committed = json.loads((RESULTS / f"nvidia-h200/{name}.json").read_text())
        print(*write_tables(engine, with_earlier([], committed), committed))
