"""`tune`: which configuration of an engine is fastest for each shape and batch size.

Of the sm_90 engine every candidate is timed briefly, those near the best again, the last few in the
cold regime of `gemm` with their results checked. Of the sm_80 engine, whose cards this GPU stands
in for, all are timed briefly, from which costs are fitted. All of it is written as JSON; `--write`
makes the tables of csrc/dispatch from it (bench/tune_tables.py). A run over some shapes or batch
sizes keeps what the committed result has of the others.
"""

import json
import sys

import torch

from bench.cell import capture_path, our_path, shared_graph_us, time_path
from bench.incumbents import incumbents_on
from bench.machine import describe_run, slug
from bench.pools import Pools
from bench.report import RESULTS, number, table, write_result
from bench.tune_tables import DENSE, RESULT, with_earlier, write_tables
from marlin import host
from marlin.testing.shapes import MODELS
from marlin.testing.timing import (
    Rates,
    floor_us,
    known_rates,
    launch_count,
    packed_bytes,
    time_graph,
)

# A row of the table holds up to its batch size; the first stands for decoding one token, too.
ROWS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 1024, 2048, 4096, 8192)
# Small to large, high and wide, and not so many as of Hopper: costs have four numbers a shape.
SM80_SHAPES = (
    (2048, 2048), (3584, 3584), (4096, 1024), (4096, 2048), (4096, 4096), (4096, 6144),
    (4096, 12288), (4096, 22016), (5120, 5120), (8192, 8192), (11008, 4096), (16384, 16896),
)  # fmt: skip
SM80_ROWS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 512, 1024, 4096)
NET_ROWS = 512  # from which on the net is a candidate
NET_SLICE_BYTES = 256 << 20  # more it may not take
NEAR_BEST = 1.2  # of the brief timings, for a second one
FINALISTS = 3
LONG_ROWS = 2048  # from here on launches heat the GPU, so that what ran before matters
BRIEF_US, LONGEST_US = 200.0, 2000.0  # of a brief timing's graph
COLD_BYTES = 150_000_000  # of weights that it reads, more than an L2 holds
FALLBACK_RATES = Rates(3.3e12, 650e12)  # only sizes the graphs


def shapes_to_tune(gpu: str) -> list[tuple[int, int]]:
    """The anchors' shapes, and every layer of the models as Hugging Face has them."""
    layers = {shape for model in MODELS.values() for shape in model.values()}
    return sorted(layers | set(incumbents_on(gpu).shapes()))


def run_counts(shape: dict, k: int, n: int, m: int, sm_count: int) -> list[int]:
    """Runs worth a try: stripes over all SMs, even splits of every slice, whole waves of slices.

    Few slices: splits by one, two and four too, however many SMs they leave idle, since the CTAs of
    a slice add up in turn.
    """
    sm_count //= shape["twins"]
    slices = -(-n // shape["columns"]) * -(-m // shape["rows"])
    tiles = slices * -(-k // shape["depth"])
    most = min(sm_count, tiles)
    counts = {sm_count} | {slices * split for split in (3, 6, 8)}
    if slices > sm_count:
        counts.add(-(-slices // -(-slices // sm_count)))
    chosen = {c for c in counts if sm_count * 0.6 <= c <= most}
    chosen |= {slices * split for split in (1, 2, 4) if slices * split <= most}
    return sorted(chosen) or [most]


def net_slices(k: int, n: int) -> list[int]:
    """Slices of columns worth a try for the net, by their size: 16 to 256 MB of FP16 weights."""
    return [
        count
        for count in (1, 2, 3, 4, 6, 8, 12, 16)
        if 2 * k * n <= count * NET_SLICE_BYTES and (count == 1 or 2 * k * n >= count * 16 << 20)
    ]


def candidates(k: int, n: int, m: int, sm_count: int) -> list[str]:
    """Names of configurations: the lowest tile that holds m, the next higher one, the three heights
    below, or all lower ones where the GPU would stay half empty; for many rows the net."""
    shapes = {name: s for name, s in host.kernel_shapes().items() if s["engine"] == "sm90"}
    heights = sorted({shape["rows"] for shape in shapes.values()})
    fitting = next((h for h in heights if h >= m), heights[-1])
    lower = [h for h in heights if h < fitting]
    few = -(-m // fitting) * -(-n // 128) * 2 <= sm_count
    at_least = heights.index(fitting)
    chosen = {*heights[at_least : at_least + 2], *(lower if few else lower[-3:])}
    names = [
        f"{name}@{runs}"
        for name, shape in shapes.items()
        if shape["rows"] in chosen
        for runs in run_counts(shape, k, n, m, sm_count)
    ]
    return names + [f"{DENSE}@{count}" for count in net_slices(k, n) if m >= NET_ROWS]


def sm80_candidates(k: int, n: int, m: int, sm_count: int, shared_bytes: int) -> list[str]:
    """Names of configurations: all tiles that fit and are neither mostly empty nor far too low."""
    return [
        f"{name}@{runs}"
        for name, shape in host.kernel_shapes().items()
        if shape["engine"] == "sm80" and shape["shared_bytes"] <= shared_bytes
        if min(m // 16, 48) <= shape["rows"] <= max(16, 2 * m)
        for runs in run_counts(shape, k, n, m, sm_count)
    ]


def survey(names: list[str], brief) -> dict[str, float]:
    """us of all, best first; of those near the best the lesser of two timings."""
    rough = {name: brief(name) for name in names}
    near = NEAR_BEST * min(rough.values())
    us = {name: min(us, brief(name)) if us <= near else us for name, us in rough.items()}
    return {name: round(us, 2) for name, us in sorted(us.items(), key=lambda item: item[1])}


def choose(names: list[str], brief, careful) -> dict[str, float]:
    """us of the finalists, best first; `brief` and `careful` time a configuration by its name.

    Among them is one of the engine's own: not every problem can take the net.
    """
    rough = {name: brief(name) for name in names}
    best = min(rough.values())
    near = {name: min(us, brief(name)) for name, us in rough.items() if us <= NEAR_BEST * best}
    finalists = sorted(near, key=near.get)[:FINALISTS]
    if all(name.startswith(DENSE) for name in finalists):
        engine = [name for name in names if not name.startswith(DENSE)]
        finalists.append(min(engine, key=rough.get))
    return dict(sorted(((name, careful(name)) for name in finalists), key=lambda item: item[1]))


def choose_hot(names: list[str], careful) -> dict[str, float]:
    """The same for long launches: all candidates carefully, once forwards and once backwards.
    careful(name, check) checks results first in one of both."""
    passes = [
        {name: careful(name, check) for name in order}
        for order, check in ((names, True), (names[::-1], False))
    ]
    mean = {name: sum(us[name] for us in passes) / len(passes) for name in names}
    ranked = sorted(mean, key=mean.get)
    engine = next(name for name in ranked if not name.startswith(DENSE))
    kept = ranked[:FINALISTS] + ([engine] if engine not in ranked[:FINALISTS] else [])
    return {name: mean[name] for name in kept}


def worth_a_long_try(name: str, shapes: dict) -> bool:
    shape = name.split("@")[0]
    return shape == DENSE or shapes[shape]["rows"] >= 128


def tune_cell(pools: Pools, rates: Rates, cell: tuple[int, int, int], engine: str) -> dict:
    """us by configuration, best first."""
    k, n, m = cell
    gpu = torch.cuda.get_device_properties(0)
    expected = floor_us(rates, m, k, n, pools.group_size)
    launches = max(BRIEF_US / expected, COLD_BYTES / packed_bytes(k, n))
    launches = max(2, round(min(launches, LONGEST_US / expected)))

    def brief(name: str) -> float:
        path = our_path(pools, rates, *cell, name)
        graph = capture_path(pools, path, *cell, engine == "sm80", launches)
        return time_graph(graph, launches, 2, idle_seconds=0.001, clock=False).median_us

    def careful(name: str) -> float:
        path = our_path(pools, rates, *cell, name)
        count = launch_count(len(path.weights), path.expected_us)
        return time_graph(capture_path(pools, path, *cell, True, count), count, 15, 0.02).median_us

    # As gemm does: which clock a long launch gets depends on what ran before it.
    def hot(name: str, check: bool) -> float:
        path = our_path(pools, rates, *cell, name)
        return time_path(pools, path, *cell, check, shared_graph_us([path])).median_us

    if engine == "sm80":
        fitting = gpu.multi_processor_count, gpu.shared_memory_per_block_optin
        return survey(sm80_candidates(*cell, *fitting), brief)
    names = candidates(*cell, gpu.multi_processor_count)
    if m >= LONG_ROWS:
        shapes = host.kernel_shapes()
        likely = [name for name in names if worth_a_long_try(name, shapes)]
        return choose_hot(likely, hot)
    return choose(names, brief, careful)


def run(args) -> int:
    """Measures, prints, writes; 1 if nothing could be measured."""
    if args.quick and args.write:
        print("bench tune: expected --quick or --write, both came", file=sys.stderr)
        return 2
    sm80 = args.engine == "sm80"
    if not torch.cuda.is_available() or (torch.cuda.get_device_capability()[0] != 9 and not sm80):
        print(f"bench tune: expected a {'' if sm80 else 'Hopper '}GPU", file=sys.stderr)
        return 2
    head = describe_run("cuda")
    gpu = head["device"]["name"]
    rates = known_rates(gpu) or FALLBACK_RATES
    shapes = args.shapes or (SM80_SHAPES if sm80 else shapes_to_tune(gpu))
    rows = args.rows or ((8, 64) if args.quick else SM80_ROWS if sm80 else ROWS)
    cells = [(k, n, m) for k, n in shapes for m in rows]
    pools = Pools(cells, 128, torch.float16, dense=False)
    results = []
    with torch.inference_mode():
        for k, n, m in cells:
            us = tune_cell(pools, rates, (k, n, m), args.engine)
            floor = floor_us(rates, m, k, n, 128)
            results.append({"k": k, "n": n, "m": m, "us": us, "floor_us": floor,
                            "commit": head["commit"]})  # fmt: skip
    result_name = RESULT[args.engine]
    committed = RESULTS / slug(gpu) / f"{result_name}.json"
    partly = bool(args.shapes or args.rows) and not args.quick and committed.exists()
    kept = with_earlier(results, json.loads(committed.read_text())) if partly else results
    result = {"bench": "tune", "schema": 1, **head, "cells": kept}
    path = write_result(result, f"{result_name}-quick" if args.quick else result_name, args.out)
    print(table(["k", "n", "m", "best", "us", "%floor"], [
        [r["k"], r["n"], r["m"], name := next(iter(r["us"])), number(r["us"][name], 1),
         number(100 * r["floor_us"] / r["us"][name], 0)] for r in results
    ]))  # fmt: skip
    print(f"\nwritten to {path}")
    if args.write:
        print("and", *write_tables(args.engine, kept, head))
    return 0 if results else 1
