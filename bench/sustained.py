"""`gemm --sustained`: long loops, after which the card runs at the clock its power cap allows.

`gemm` measures from a short idle pause, where a burst still fits the power budget; a busy server
never sees that. Here every path loops for 30 seconds, with clock and power read meanwhile.
"""

import statistics
import time
from collections.abc import Callable

import torch

from bench import ceilings
from bench.cell import FP16_LAYOUTS, capture_path, make_path
from bench.compare import LARGE_SHAPE
from bench.pools import Pools
from bench.report import number, table, write_result
from marlin.testing.timing import floor_us, known_rates, launch_count, read_clock_mhz, time_graph

ROWS = (1, 16, 64, 256)
SECONDS = 30.0  # of each loop
BATCH_SECONDS = 0.25  # between two readings


def read_watts() -> float | None:
    try:
        return torch.cuda.power_draw() / 1e3
    except Exception:  # no NVML, or one that refuses
        return None


def loop(graph: torch.cuda.CUDAGraph, launches: int, cold_us: float, seconds: float) -> list[dict]:
    """Replays back to back; per batch of replays: seconds since the start, us, MHz, W."""
    replays = max(1, round(BATCH_SECONDS * 1e6 / (cold_us * launches)))
    samples, begin = [], time.perf_counter()
    while time.perf_counter() - begin < seconds:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        time.sleep(BATCH_SECONDS / 2)  # amid the batch
        clock, watts = read_clock_mhz(), read_watts()
        end.synchronize()
        us = start.elapsed_time(end) * 1e3 / (replays * launches)
        at = time.perf_counter() - begin
        samples.append({"at_s": at, "us": us, "clock_mhz": clock, "watts": watts})
    return samples


def summarize_loop(samples: list[dict]) -> dict:
    """Medians of the second half, when the clock has settled."""
    settled = samples[len(samples) // 2 :]

    def median(key: str):
        values = [s[key] for s in settled if s[key] is not None]
        return statistics.median(values) if values else None

    return {key: median(key) for key in ("us", "clock_mhz", "watts")}


def measure(
    names: list[str], make_graph: Callable, k: int, n: int, m: int, floor: float, seconds: float
) -> list[dict]:
    """Records of one cell: per path its cold and its sustained time."""
    records = []
    for name in names:
        graph, launches = make_graph(name)
        cold = time_graph(graph, launches).median_us
        samples = loop(graph, launches, cold, seconds)
        settled = summarize_loop(samples)
        records.append({"k": k, "n": n, "m": m, "path": name, "cold_us": cold, **settled,
                        "percent_of_floor": 100 * floor / settled["us"],
                        "samples": samples})  # fmt: skip
    fp16 = min((r["us"] for r in records if r["path"] in FP16_LAYOUTS), default=None)
    for record in records:
        record["speedup"] = fp16 and fp16 / record["us"]
    return records


def format_result(result: dict) -> str:
    header = ["k", "n", "m", "path", "cold us", "sustained us", "xFP16", "%floor", "MHz", "W"]
    rows = [
        [c["k"], c["n"], c["m"], c["path"], number(c["cold_us"]), number(c["us"]),
         number(c["speedup"]), number(c["percent_of_floor"], 1), number(c["clock_mhz"], 0),
         number(c["watts"], 0)]
        for c in result["cells"]
    ]  # fmt: skip
    title = (
        f"{result['device']['name']}, commit {result['commit']}: "
        f"loops of {result['seconds']:.0f} s, medians of their second half"
    )
    return f"{title}\n{table(header, rows)}"


def run(args, head: dict, name: str) -> int:
    """Measures, prints, writes the result by this name."""
    dtype = getattr(torch, args.dtype)
    shapes, rows = args.shapes or [LARGE_SHAPE], args.rows or ROWS
    seconds = args.seconds or SECONDS
    cells = [(k, n, m) for k, n in shapes for m in rows]
    gpu = head["device"]["name"]
    rates = known_rates(gpu) or ceilings.rates_from(ceilings.measure(dtype))
    pools = Pools(cells, args.group_size, dtype, dense=not args.no_fp16)
    # One layout of the baseline, that of nn.Linear: each loop costs half a minute.
    names = [*args.config, *([] if args.no_fp16 else list(FP16_LAYOUTS)[1:])]
    result = {"bench": "gemm --sustained", "schema": 1, **head, "group_size": args.group_size,
              "dtype": args.dtype, "seconds": seconds, "cells": []}  # fmt: skip
    with torch.inference_mode():
        for k, n, m in cells:

            def make_graph(path_name, k=k, n=n, m=m):
                path = make_path(path_name, pools, rates, k, n, m)
                launches = launch_count(len(path.weights), path.expected_us)
                return capture_path(pools, path, k, n, m, True, launches), launches

            floor = floor_us(rates, m, k, n, args.group_size)
            result["cells"] += measure(names, make_graph, k, n, m, floor, seconds)
            path = write_result(result, name, args.out)
    print(format_result(result))
    print(f"\nwritten to {path}")
    return 0
