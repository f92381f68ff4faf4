"""`cpu`: the CPU backend against float32 on the same cores, k = n = 4096 by default.

Two incumbents: F.linear with the dequantized float32 weight, which reads eight times the bytes, and
dequantize-then-linear, which keeps the weight packed as ours does. The paths are timed in turn and
their medians compared, since others may share the cores. Weights rotate as on the GPU.
"""

import statistics

import torch
import torch.nn.functional as F

from bench.machine import describe_run
from bench.pools import PackedWeight
from bench.report import number, table, write_result
from marlin import ops
from marlin.testing.problems import random_rows, random_weight
from marlin.testing.timing import ROTATE_BYTES, packed_bytes, rotation_count, time_interleaved

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 2048)
QUICK_ROWS = (1, 16, 256)
FP32, DEQUANTIZE = "F.linear", "dequantize, F.linear"
MAX_ROUNDS = 101

# Of sqrt(Σ (x w)²). Summing k terms one by one in FP32 strays up to ~2^-16 at k = 4096 (MKL's own
# product for one row too); a single wrong code is off by 2^-7 and more.
ERROR_BOUND = 2.0**-14


def kernel_names() -> list[str]:
    """The instruction sets of this CPU, fastest first; the operator takes the first itself."""
    from marlin import host  # not built for every Python that has the operators

    return host.cpu_kernels()


class Weights:
    """The same random weights, packed and in float32, in more buffers than a cache holds."""

    def __init__(self, k: int, n: int, group_size: int, rotate_bytes: int):
        self.k, self.n, self.group_size = k, n, group_size
        first = random_weight(k, n, group_size)
        self.values = first.values()
        # Copies suffice here: a CPU's time does not depend on the values.
        packed_count = rotation_count(packed_bytes(k, n), rotate_bytes)
        self.packed = [PackedWeight(first.b.clone(), first.s) for _ in range(packed_count)]
        dense = self.values.float().t().contiguous()  # (n, k), as nn.Linear stores it
        dense_count = rotation_count(4 * k * n, rotate_bytes)
        self.dense = [dense.clone() for _ in range(dense_count)]

    def paths(self, x: torch.Tensor, kernels: list[str]) -> dict:
        """name -> function of the round, returning x · W."""

        def ours(i, config):
            weight = self.packed[i % len(self.packed)]
            return ops.matmul(x, weight.b, weight.s, config=config)

        def dequantize(i):
            weight = self.packed[i % len(self.packed)]
            return x @ ops.dequantize(weight.b, weight.s, torch.float32)

        paths = {name: lambda i, config=name: ours(i, config) for name in kernels}
        paths[FP32] = lambda i: F.linear(x, self.dense[i % len(self.dense)])
        paths[DEQUANTIZE] = dequantize
        return paths


def check(y: torch.Tensor, x: torch.Tensor, values: torch.Tensor) -> None:
    """Asserts that the float32 result y is x · W, against float64."""
    error = (y.double() - x.double() @ values).abs()
    worst = (error / (x.double().square() @ values.square()).sqrt()).max().item()
    assert worst <= ERROR_BOUND, f"|error| / sqrt(sum (x w)^2) is {worst:.3g}"  # NaN fails too


def measure(weights: Weights, m: int, kernels: list[str], budget_seconds: float) -> dict:
    """One row of the table: ms of every path at m rows, after checking its result."""
    x = random_rows(m, weights.k, dtype=torch.float32)
    paths = weights.paths(x, kernels)
    for path in paths.values():
        check(path(0), x, weights.values)
    seconds = time_interleaved(paths, MAX_ROUNDS, budget_seconds)
    ms = {name: statistics.median(times) * 1e3 for name, times in seconds.items()}
    fastest = {name: min(times) * 1e3 for name, times in seconds.items()}
    best = kernels[0]
    return {
        "m": m,
        "rounds": len(seconds[best]),
        "ms": ms,
        "ms_fastest": fastest,  # what the machine can do when left alone
        "speedup": {name: ms[FP32] / ms[name] for name in kernels},
        "speedup_vs_dequantize": {name: ms[DEQUANTIZE] / ms[name] for name in kernels},
    }


def format_result(result: dict) -> str:
    kernels = result["kernels"]
    device = result["device"]
    header = ["m", *(f"{name} ms" for name in [*kernels, FP32, DEQUANTIZE]),
              *(f"x {FP32}: {name}" for name in kernels), "x dequantize",
              "(fastest: x linear", "x deq.)"]  # fmt: skip
    rows = [
        [c["m"], *(number(ms, 3) for ms in c["ms"].values()),
         *(number(c["speedup"][name]) for name in kernels),
         number(c["speedup_vs_dequantize"][kernels[0]]),
         *(number(c["ms_fastest"][other] / c["ms_fastest"][kernels[0]])
           for other in (FP32, DEQUANTIZE))]
        for c in result["cells"]
    ]  # fmt: skip
    title = (
        f"{device['name']}, {device['threads']} threads, commit {result['commit']}; "
        f"k={result['k']} n={result['n']} group {result['group_size']}, float32 activations; "
        "medians of interleaved calls, fastest calls"
    )
    return f"{title}\n{table(header, rows)}"


def run(args) -> int:
    kernels = kernel_names()
    rows = args.rows or (QUICK_ROWS if args.quick else ROWS)
    rotate_bytes = ROTATE_BYTES // 8 if args.quick else ROTATE_BYTES
    budget = 0.5 if args.quick else 5.0
    (k, n), *others = args.shapes or [(4096, 4096)]
    if others:
        raise SystemExit("bench cpu: --shapes: expected one shape")
    head = describe_run("cpu")
    with torch.inference_mode():
        weights = Weights(k, n, args.group_size, rotate_bytes)
        cells = [measure(weights, m, kernels, budget) for m in rows]
    result = {"bench": "cpu", "schema": 1, **head, "k": k, "n": n, "group_size": args.group_size,
              "kernels": kernels, "cells": cells}  # fmt: skip
    print(format_result(result))
    name = (
        "cpu" + ("-quick" if args.quick else "") + ("-chosen" if args.rows or args.shapes else "")
    )
    print(f"\nwritten to {write_result(result, name, args.out)}")
    return 0
