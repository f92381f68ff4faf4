"""One cell of `gemm`: a problem, the ways to compute it, and each way's checked timing."""

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.pools import Pools, check_dense
from marlin import ops
from marlin.testing.timing import (
    GRAPH_US,
    Rates,
    Timing,
    capture,
    floor_us,
    launch_count,
    problem_bytes,
    replay_count,
    time_graph,
)

AUTO = "auto"  # the configuration that the operator chooses itself
NET = "dense"  # dequantize, then the library's product
NET_ROWS = 512  # from which on it is timed beside ours
FP16_LAYOUTS = {"fp16 (k, n)": False, "fp16 (n, k)": True}  # name -> stored transposed


@dataclass(frozen=True)
class Path:
    """A way to compute a cell.

    multiply(x, weight, out) launches; check(y, x, weight) asserts; `expected_us` sizes the graph.
    """

    weights: list
    multiply: Callable[[Tensor, object, Tensor], object]
    check: Callable[[Tensor, Tensor, object], None]
    expected_us: float

    @property
    def round_us(self) -> float:
        """What a launch with each of the weights takes."""
        return len(self.weights) * self.expected_us


def shared_graph_us(paths: Iterable[Path]) -> float:
    """us of work for every graph of a cell: no less than the longest round over the weights takes.

    More packed weights than dense ones make 256 MB. If each graph were as long as its own round,
    ours would run up to four times as long as the baseline's, and so at a lower clock.
    """
    return max([GRAPH_US, *(path.round_us for path in paths)])


def our_path(pools: Pools, rates: Rates, k: int, n: int, m: int, config: str | None) -> Path:
    def multiply(x, weight, out):
        ops.matmul_out(x, weight.b, weight.s, out, config=config)

    def check(y, x, weight):
        weight.check(y, x)

    floor = floor_us(rates, m, k, n, pools.group_size)
    return Path(pools.packed_weights(k, n), multiply, check, floor)


def dense_path(pools: Pools, rates: Rates, k: int, n: int, m: int, transposed: bool) -> Path:
    def multiply(x, weight, out):
        torch.mm(x, weight, out=out)

    def check(y, x, weight):
        check_dense(y, x, weight)

    floor = floor_us(rates, m, k, n, -1, bits=16)
    return Path(pools.dense_weights(k, n, transposed), multiply, check, floor)


def make_path(name: str, pools: Pools, rates: Rates, k: int, n: int, m: int) -> Path:
    """A path by its name: a layout of the baseline, or one of our configurations."""
    if name in FP16_LAYOUTS:
        return dense_path(pools, rates, k, n, m, FP16_LAYOUTS[name])
    return our_path(pools, rates, k, n, m, None if name == AUTO else name)


def capture_path(
    pools: Pools, path: Path, k: int, n: int, m: int, check: bool, launches: int
) -> torch.cuda.CUDAGraph:
    """So many launches of the path in a graph; ``check``: first assert what it writes.

    The first and the last launch of the graph have an output of their own, poisoned before, and
    both are checked: what is timed is what was checked.
    """
    x = pools.activations(m, k)
    first, last = pools.output_pair(m, n)

    def launch_all():
        for i in range(launches):
            out = first if i == 0 else last
            path.multiply(x, path.weights[i % len(path.weights)], out)

    graph = capture(launch_all, lambda: path.multiply(x, path.weights[0], first))
    if check:
        pools.output_pair(m, n)  # poisons both again
        graph.replay()
        path.check(first, x, path.weights[0])
        path.check(last, x, path.weights[(launches - 1) % len(path.weights)])
    return graph


def time_path(
    pools: Pools, path: Path, k: int, n: int, m: int, check: bool, graph_us: float
) -> Timing:
    """The protocol's timing of a path, by graphs of so much work."""
    launches = launch_count(len(path.weights), path.expected_us, graph_us)
    graph = capture_path(pools, path, k, n, m, check, launches)
    return time_graph(graph, launches, replay_count(graph_us))


def spread_percent(passes: list[Timing]) -> float:
    """By how much the passes of a path differ."""
    us = [timing.median_us for timing in passes]
    return 100 * (max(us) - min(us)) / statistics.mean(us)


def summarize(
    k: int,
    n: int,
    m: int,
    timings: dict[str, list[Timing]],
    configs: list[str],
    group_size: int,
    rates: Rates,
) -> list[dict]:
    """The record of a cell for each of our configurations, from the passes of every path: of three
    the median, of two the mean."""
    typical_us = {
        name: statistics.median(t.median_us for t in passes) for name, passes in timings.items()
    }
    dense = {name: typical_us[name] for name in FP16_LAYOUTS if name in timings}
    layout = min(dense, key=dense.get, default=None)
    net_us = typical_us.get(NET)
    records = []
    for name in configs:
        if name not in timings:
            continue
        passes = timings[name]
        us = typical_us[name]
        floor = floor_us(rates, m, k, n, group_size)
        fp16_us = dense.get(layout)
        records.append({
            "k": k, "n": n, "m": m, "config": name,
            "us": us, "us_passes": [timing.median_us for timing in passes],
            "spread_percent": spread_percent(passes),
            "floor_us": floor, "percent_of_floor": 100 * floor / us,
            "tbyte_per_s": problem_bytes(m, k, n, group_size) / us * 1e-6,
            "tflop_per_s": 2 * m * k * n / us * 1e-6,
            "fp16_us": fp16_us, "fp16_layout": layout and layout.removeprefix("fp16 "),
            "fp16_us_passes": layout and [t.median_us for t in timings[layout]],
            "fp16_us_other_layout": max(dense.values(), default=None),
            "net_us": net_us, "net_speedup": net_us and fp16_us and fp16_us / net_us,
            "speedup": fp16_us and fp16_us / us,
            "ideal_speedup": floor_us(rates, m, k, n, -1, bits=16) / floor,
            "clock_mhz": passes[-1].clock_mhz,
        })  # fmt: skip
    return records
