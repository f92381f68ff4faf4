"""`call`: what a call costs the host, eager from Python, on a layer too small to keep the GPU busy.

Loops of calls without waiting for the GPU, all paths in turn, medians over the rounds.
"""

import statistics
import sys

import torch
import torch.nn.functional as F
from torch import nn

from bench.machine import describe_run
from bench.report import number, table, write_result
from marlin import ops
from marlin.layer import MarlinLinear
from marlin.testing.problems import random_rows, random_weight
from marlin.testing.timing import time_interleaved

SIZE, GROUP_SIZE = 1024, 128
CALLS, ROUNDS, QUICK_ROUNDS = 1000, 21, 5
BASELINE = "F.linear, no_grad"


def make_paths(device: str) -> dict:
    """name -> (context, function of one call), all for one row and a SIZE x SIZE weight."""
    weight = random_weight(SIZE, SIZE, GROUP_SIZE, device=device)
    x = random_rows(1, SIZE, device=device)
    dense = weight.values().half().t().contiguous()
    out = torch.empty(1, SIZE, dtype=x.dtype, device=device)
    layer = MarlinLinear.from_quantized(weight.codes, weight.scales)
    linear = nn.Linear(SIZE, SIZE, bias=False, dtype=x.dtype, device=device)
    no_grad, inference = torch.no_grad, torch.inference_mode
    return {
        BASELINE: (no_grad, lambda: F.linear(x, dense)),
        "F.linear, inference_mode": (inference, lambda: F.linear(x, dense)),
        "nn.Linear, no_grad": (no_grad, lambda: linear(x)),
        "torch.mm(out=), no_grad": (no_grad, lambda: torch.mm(x, dense, out=out)),
        "matmul, no_grad": (no_grad, lambda: ops.matmul(x, weight.b, weight.s)),
        "matmul, inference_mode": (inference, lambda: ops.matmul(x, weight.b, weight.s)),
        "matmul_out, no_grad": (no_grad, lambda: ops.matmul_out(x, weight.b, weight.s, out)),
        "MarlinLinear, no_grad": (no_grad, lambda: layer(x)),
        "MarlinLinear, inference_mode": (inference, lambda: layer(x)),
    }


def measure(paths: dict, calls: int, rounds: int, synchronize) -> dict[str, float]:
    """Median host us per call of each path."""

    def repeat(context, call):
        def run(_round):
            with context():
                for _ in range(calls):
                    call()

        return run

    loops = {}
    for name, (context, call) in paths.items():
        loops[name] = repeat(context, call)
        loops[f"wait after {name}"] = lambda _round: synchronize()  # not part of any time
    seconds = time_interleaved(loops, rounds, in_order=True)
    return {name: statistics.median(seconds[name]) / calls * 1e6 for name in paths}


def run(args) -> int:
    if not torch.cuda.is_available():
        print("bench call: expected a CUDA device, torch sees none", file=sys.stderr)
        return 2
    head = describe_run("cuda")
    rounds = QUICK_ROUNDS if args.quick else ROUNDS
    us = measure(make_paths("cuda"), CALLS, rounds, torch.cuda.synchronize)
    result = {"bench": "call", "schema": 1, **head, "k": SIZE, "n": SIZE, "m": 1, "us": us}
    rows = [[name, number(value), number(value / us[BASELINE])] for name, value in us.items()]
    print(f"{head['device']['name']}, commit {head['commit']}: host us per eager call, m = 1")
    print(table(["", "us", f"/ {BASELINE}"], rows, left=1))
    print(f"\nwritten to {write_result(result, 'call' + '-quick' * args.quick, args.out)}")
    return 0
