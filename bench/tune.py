"""`tune`: which configuration of the sm_90 engine is fastest for each shape and batch size.

Times every candidate in the cold regime of `gemm`, the best few again more carefully, and writes
all of it as JSON; `--write` makes the selection table of csrc/dispatch from the winners.
"""

import sys
from pathlib import Path

import torch

from bench.cell import capture_path, our_path
from bench.incumbents import incumbents_on
from bench.machine import describe_run
from bench.pools import Pools
from bench.report import number, table, write_result
from marlin import host
from marlin.testing.shapes import MODELS
from marlin.testing.timing import Rates, floor_us, known_rates, time_graph

# A row of the table holds up to its batch size; the first stands for decoding one token, too.
ROWS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 4096)
FINALISTS = 3
FALLBACK_RATES = Rates(3.3e12, 650e12)  # only sizes the graphs


def shapes_to_tune(gpu: str) -> list[tuple[int, int]]:
    """The anchors' shapes, and every layer of the models as Hugging Face has them."""
    layers = {shape for model in MODELS.values() for shape in model.values()}
    return sorted(layers | set(incumbents_on(gpu).shapes()))


def run_counts(shape: dict, k: int, n: int, m: int, sm_count: int) -> list[int]:
    """Runs worth a try: stripes over all SMs, even splits of every slice, whole waves of slices."""
    slices = -(-n // shape["columns"]) * -(-m // shape["rows"])
    tiles = slices * -(-k // shape["depth"])
    places = sm_count * shape["ctas"]
    counts = {sm_count} | {slices * split for split in (1, 2, 3, 4, 6, 8)}
    if slices > sm_count:
        counts.add(-(-slices // -(-slices // sm_count)))
    return sorted(c for c in counts if sm_count * 0.6 <= c <= min(places, tiles)) or [
        min(sm_count, tiles)
    ]


def candidates(k: int, n: int, m: int, sm_count: int) -> list[str]:
    """Names of configurations: the lowest tile that holds m, and the two heights below it."""
    shapes = {name: s for name, s in host.kernel_shapes().items() if s["engine"] == "sm90"}
    heights = sorted({shape["rows"] for shape in shapes.values()})
    fitting = [h for h in heights if h >= m][:1] or heights[-1:]
    lower = [h for h in heights if h < fitting[0]][-3:] if m > 32 else []
    return [
        f"{name}@{runs}"
        for name, shape in shapes.items()
        if shape["rows"] in (*fitting, *lower)
        for runs in run_counts(shape, k, n, m, sm_count)
    ]


def tune_cell(pools: Pools, rates: Rates, cell: tuple[int, int, int], names: list[str]) -> dict:
    """us by configuration, best first."""

    def time(name: str, replays: int, idle: float, check: bool) -> float:
        path = our_path(pools, rates, *cell, name)
        return time_graph(*capture_path(pools, path, *cell, check), replays, idle).median_us

    rough = {name: time(name, 5, 0.005, False) for name in names}
    finalists = sorted(rough, key=rough.get)[:FINALISTS]
    return {
        name: us
        for us, name in sorted((time(name, 15, 0.02, True), name) for name in finalists)
    }  # fmt: skip


def table_text(cells: list[dict], head: dict) -> str:
    """The C++ rows, each with its evidence."""
    lines = [
        f"// {head['device']['name']}, {head['date'][:10]}, commit {head['commit']}: written by",
        "// `python -m bench tune --write`. k, n, m up to, shape, runs; us, and the next best.",
    ]
    for cell in cells:
        (best, us), *others = cell["us"].items()
        shape, runs = best.split("@")
        rest = "; ".join(f"{name} {other:.1f}" for name, other in others)
        row = f'{{{cell["k"]}, {cell["n"]}, {cell["m"]}, "{shape}", {runs}}},'
        lines.append(f"{row}  // {us:.1f}; {rest}" if rest else f"{row}  // {us:.1f}")
    return "\n".join(lines) + "\n"


def run(args) -> int:
    """Measures, prints, writes; 1 if nothing could be measured."""
    if not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9:
        print("bench tune: expected a Hopper GPU (the 8.x table is not tuned)", file=sys.stderr)
        return 2
    head = describe_run("cuda")
    gpu = head["device"]["name"]
    rates = known_rates(gpu) or FALLBACK_RATES
    shapes = args.shapes or shapes_to_tune(gpu)
    rows = args.rows or ((8, 64) if args.quick else ROWS)
    cells = [(k, n, m) for k, n in shapes for m in rows]
    pools = Pools(cells, 128, torch.float16, dense=False)
    results = []
    with torch.inference_mode():
        for k, n, m in cells:
            names = candidates(k, n, m, head["device"]["sm_count"])
            us = tune_cell(pools, rates, (k, n, m), names)
            floor = floor_us(rates, m, k, n, 128)
            results.append({"k": k, "n": n, "m": m, "us": us, "floor_us": floor})
    result = {"bench": "tune", "schema": 1, **head, "cells": results}
    path = write_result(result, "tune-quick" if args.quick else "tune", args.out)
    print(table(["k", "n", "m", "best", "us", "%floor"], [
        [r["k"], r["n"], r["m"], name := next(iter(r["us"])), number(r["us"][name], 1),
         number(100 * r["floor_us"] / r["us"][name], 0)] for r in results
    ]))  # fmt: skip
    print(f"\nwritten to {path}")
    if args.write:
        target = Path(args.write)
        target.write_text(table_text(results, head))
        print(f"and {target}")
    return 0 if results else 1
