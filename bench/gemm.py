"""`gemm`: one layer at a time, every shape and batch size of the anchors, against cuBLAS FP16.

Protocol (DESIGN §5): random data; weights rotate over at least 256 MB; one CUDA graph of about
600 us, or of a round over the weights, equally long for all that are compared; checked against
float64 first; 30 ms idle, then the median of 21 replays, fewer where a replay takes longer than
2.4 ms. Two passes over all cells: from few rows to many, since those heat the GPU, and back.
A third over those where a path's passes differ: now and then the GPU clocks down in the middle of
a timing, whatever runs, and the median of three leaves that out.
"""

import sys
import time
from collections.abc import Iterator

import torch

from bench import ceilings, compare, sustained
from bench.cell import (
    AUTO,
    FP16_LAYOUTS,
    NET,
    NET_ROWS,
    make_path,
    shared_graph_us,
    spread_percent,
    summarize,
    time_path,
)
from bench.incumbents import Incumbents, incumbents_on
from bench.machine import describe_run
from bench.pools import Pools
from bench.report import number, table, write_result
from marlin.testing.timing import (
    FEWEST_REPLAYS,
    IDLE_SECONDS,
    LONG_US,
    REPLAYS,
    Rates,
    Timing,
    known_rates,
)

QUICK_SHAPES = ((4096, 4096), (11008, 4096), (8192, 8192), (16384, 16896))
QUICK_ROWS = (1, 16, 32, 64, 128, 256)
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 4096, 8192)
LARGE_ROWS = (1, 2, 4, *ROWS[1:])  # of the large shape, where 2 and 4 differ from 1 most
UNSTEADY_PERCENT = 4  # by which a path's passes may differ
TIMING = (
    "weights rotate over >= 256 MB, one CUDA graph, equally long for all that are compared, "
    f"{IDLE_SECONDS * 1e3:.0f} ms idle before each timing (the cold power regime), median of "
    f"{REPLAYS} replays (fewer, {FEWEST_REPLAYS} at least, of graphs longer than "
    f"{LONG_US / REPLAYS * 1e-3:.1f} ms)"
)
PASSES = (
    "one pass",
    "two passes, the second in reversed order",
    "two passes, the second in reversed order, and of cells where they differ by more than "
    f"{UNSTEADY_PERCENT} % a third: the median",
)

Cell = tuple[int, int, int]  # (k, n, m)


def protocol(passes: int) -> str:
    """How was measured what so many passes have timed."""
    return f"{TIMING}, {PASSES[passes - 1]}"


def choose_cells(args, incumbents: Incumbents) -> list[Cell]:
    """The (k, n, m) that the command line asks for. By default every cell of the anchors is among
    them, and every layer that the sums over models add, at all rows."""
    shapes = args.shapes or (QUICK_SHAPES if args.quick else incumbents.shapes())
    rows = args.rows or (QUICK_ROWS if args.quick else None)

    def rows_of(shape) -> list[int]:
        usual = LARGE_ROWS if shape == compare.LARGE_SHAPE else ROWS
        return list(rows) if rows else sorted({*usual, *incumbents.rows(shape)})

    return [(*shape, m) for shape in shapes for m in rows_of(shape)]


class Measurement:
    """All timings of a run, by cell and by path, as they come in."""

    def __init__(self, pools: Pools, rates: Rates, configs: list[str], with_fp16: bool):
        self.pools, self.rates, self.configs, self.with_fp16 = pools, rates, configs, with_fp16
        self.timings: dict[Cell, dict[str, list[Timing]]] = {}
        self.failures: dict[tuple[Cell, str], str] = {}

    def measure(self, cell: Cell, done: int) -> None:
        """One more pass over one cell, after so many; the first checks the results too, the second
        takes paths in reversed order."""
        first = done == 0
        names = [*self.configs, *(FP16_LAYOUTS if self.with_fp16 else ())]
        if cell[2] >= NET_ROWS and NET not in names:
            names.append(NET)
        paths = {name: make_path(name, self.pools, self.rates, *cell) for name in names}
        graph_us = shared_graph_us(paths.values())
        for name in reversed(names) if done == 1 else names:
            if (cell, name) in self.failures:
                continue
            try:
                timing = time_path(self.pools, paths[name], *cell, first, graph_us)
            except (AssertionError, RuntimeError) as error:
                if isinstance(error, torch.cuda.OutOfMemoryError):
                    raise
                kind = "WRONG" if isinstance(error, AssertionError) else "refused"
                self.failures[cell, name] = f"{kind}: {str(error).splitlines()[0]}"
                print(f"{cell} {name}: {self.failures[cell, name]}", file=sys.stderr)
                torch.cuda.synchronize()  # a broken context ends the run here, not at the next cell
                continue
            self.timings.setdefault(cell, {}).setdefault(name, []).append(timing)

    def passes(self, cells: list[Cell]) -> Iterator[int]:
        """Two over all cells, a third over unsteady ones; after each, how many are done."""
        by_rows = sorted(cells, key=lambda cell: cell[2])
        for done, order in enumerate((by_rows, by_rows[::-1], by_rows)):
            for cell in order:
                if done < 2 or self.unsteady(cell):
                    self.measure(cell, done)
            yield done + 1

    def unsteady(self, cell: Cell) -> bool:
        """Whether a path of the cell took clearly longer in one pass than in another."""
        return any(
            spread_percent(passes) > UNSTEADY_PERCENT
            for passes in self.timings.get(cell, {}).values()
        )

    def records(self, cells: list[Cell]) -> list[dict]:
        found = [
            summarize(*cell, self.timings[cell], self.configs, self.pools.group_size, self.rates)
            for cell in cells
            if cell in self.timings
        ]
        return [record for records in found for record in records]


def build_result(
    head: dict, options: dict, measurement: Measurement, cells: list[Cell], passes: int = 2
) -> dict:
    """What is written as JSON after so many passes."""
    incumbents = incumbents_on(head["device"]["name"])
    records = measurement.records(cells)
    group_size = options["group_size"]
    compare.add_comparison(records, incumbents, group_size)
    sums = {
        config: compare.model_sums(
            [r for r in records if r["config"] == config], incumbents, group_size
        )
        for config in measurement.configs
    }
    failures = [
        {"k": k, "n": n, "m": m, "config": name, "error": error}
        for ((k, n, m), name), error in measurement.failures.items()
    ]
    return {"bench": "gemm", "schema": 1, **head, **options, "protocol": protocol(passes),
            "rates": vars(measurement.rates), "cells": records, "sums": sums,
            "failures": failures}  # fmt: skip


def cell_table(records: list[dict]) -> str:
    configs = {r["config"] for r in records}
    header = ["k", "n", "m", "us", "+-%", "fp16", "xFP16", "net", "ideal", "%floor", "xpubl",
              "xbest", "best", "MHz"]  # fmt: skip
    rows = [
        [r["k"], r["n"], r["m"], number(r["us"]), number(r["spread_percent"], 1),
         number(r["fp16_us"]), number(r["speedup"]),
         number(r["net_speedup"]), number(r["ideal_speedup"]), number(r["percent_of_floor"], 1),
         number(r["vs_published"]), number(r["vs_best"]),
         (r["best_incumbent"] or "-").split("_")[0], r["clock_mhz"] or "-"]
        for r in records
    ]  # fmt: skip
    if len(configs) > 1:
        header.append("config")
        rows = [[*row, r["config"]] for row, r in zip(rows, records, strict=True)]
    return table(header, rows)


def sums_table(sums: dict[str, list[dict]]) -> str:
    """Per batch size and column: speed-up / percent of floor (the best incumbent's speed-up), and
    the net's speed-up where it was measured."""
    by_rows = {m: {} for column in sums.values() for m in sorted(s["m"] for s in column)}
    for name, column in sums.items():
        for s in column:
            best = f" ({number(s['best_incumbent_speedup'])})" if s["best_incumbent"] else ""
            text = f"{number(s['speedup'])} / {number(s['percent_of_floor'], 0)}{best}"
            if s["net_speedup"]:
                text += f" net {number(s['net_speedup'])}"
            by_rows[s["m"]][name] = text
    names = list(sums)
    rows = [[m, *(cells.get(name, "-") for name in names)] for m, cells in sorted(by_rows.items())]
    return table(["m", *names], rows)


def format_result(result: dict) -> str:
    """The report that a run prints."""
    measured, rates = result.get("measured"), result["rates"]
    lines = [
        f"{result['device']['name']}, commit {result['commit']}, group {result['group_size']}, "
        f"{result['dtype']}; floor: {rates['bytes_per_s'] / 1e12:.3f} TB/s, "
        f"{rates['flops_per_s'] / 1e12:.0f} TFLOP/s",
    ]
    if measured:
        lines.append(
            f"this run: read {measured['read_bytes_per_s'] / 1e12:.3f} TB/s "
            f"({measured['read_by']}), 8192^3 {measured['dense_flops_per_s'] / 1e12:.0f} TFLOP/s"
        )
    lines += [result["protocol"], "", cell_table(result["cells"])]
    for config, sums in result["sums"].items():
        if sums:
            title = (
                f"sums over layers measured alone, {config}: speed-up / % of floor (best "
                "incumbent's speed-up) net: dequantizing first"
            )
            lines += ["", title, sums_table(sums)]
    for key, bound, who in (
        ("vs_published", compare.MATCH_PUBLISHED, "the published kernel"),
        ("vs_best", compare.MATCH_BEST, "the best incumbent"),
    ):
        if not any(r[key] for r in result["cells"]):
            continue
        slower = compare.beaten(result["cells"], key, bound)
        lines.append(f"below {bound} x {who}: {len(slower)} cells")
        if slower:
            lines[-1] += ", worst: " + "; ".join(
                f"{r['k']}x{r['n']} m={r['m']} {r[key]:.2f} ({r['best_incumbent']})"
                for r in slower[:10]
            )
    for failure in result["failures"]:
        lines.append("FAILED {k}x{n} m={m} {config}: {error}".format(**failure))
    return "\n".join(lines)


def result_name(args) -> str:
    """File name: a partial run never replaces a whole one."""
    group = "" if args.group_size == 128 else f"-g{args.group_size}".replace("-g-1", "-percolumn")
    dtype = "" if args.dtype == "float16" else f"-{args.dtype}"
    config = "" if args.config == [AUTO] else "-" + "-".join(args.config)
    quick = "-quick" * args.quick
    lasting = "-sustained" * args.sustained
    chosen = "-chosen" * bool(args.shapes or args.rows or args.seconds or args.no_fp16)
    return f"gemm{lasting}{group}{dtype}{config}{quick}{chosen}"


def run(args) -> int:
    """Measures, prints, writes; 1 if a result was wrong or the automatic choice failed."""
    if not torch.cuda.is_available():
        print("bench gemm: expected a CUDA device, torch sees none", file=sys.stderr)
        return 2
    started = time.perf_counter()
    head = describe_run("cuda")
    dtype = getattr(torch, args.dtype)
    incumbents = incumbents_on(head["device"]["name"])
    if args.sustained:
        return sustained.run(args, head, result_name(args))
    cells = choose_cells(args, incumbents)
    if not cells:
        print("bench gemm: no anchors for this GPU: expected --shapes", file=sys.stderr)
        return 2
    measured = ceilings.measure(dtype)
    rates = known_rates(head["device"]["name"]) or ceilings.rates_from(measured)
    torch.cuda.empty_cache()
    pools = Pools(cells, args.group_size, dtype, dense=not args.no_fp16)
    measurement = Measurement(pools, rates, args.config, not args.no_fp16)
    options = {"group_size": args.group_size, "dtype": args.dtype, "measured": measured}
    with torch.inference_mode():
        for passes in measurement.passes(cells):
            head["seconds"] = round(time.perf_counter() - started, 1)
            result = build_result(head, options, measurement, cells, passes)
            path = write_result(result, result_name(args), args.out)
    print(format_result(result))
    print(f"\n{head['seconds']:.0f} s, written to {path}")
    failed = [f for f in result["failures"]
              if f["error"].startswith("WRONG") or f["config"] == AUTO]  # fmt: skip
    return 1 if failed or not result["cells"] else 0
