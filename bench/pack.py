"""`pack`: ms to pack, unpack and dequantize a layer, 4096 x 11008 by default.

On the CPU the median of interleaved calls; through the NumPy functions too. On the GPU a CUDA graph
over rotating buffers, so that no input comes from a cache.
"""

import statistics

import torch

from bench.machine import describe_run
from bench.report import number, table, write_result
from marlin import ops
from marlin.testing.problems import Weight, random_weight
from marlin.testing.timing import (
    ROTATE_BYTES,
    capture,
    rotation_count,
    time_graph,
    time_interleaved,
)

SHAPE = (4096, 11008)
GROUP_SIZE = 128
ROUNDS, QUICK_ROUNDS = 21, 5


def check(weight: Weight) -> None:
    """Asserts that what is about to be timed is right."""
    assert torch.equal(ops.unpack(weight.b), weight.codes)
    expected = weight.values().to(weight.s.dtype)
    assert torch.equal(ops.dequantize(weight.b, weight.s), expected)


def operators(weights: list[Weight]) -> dict:
    """name -> function of the round."""
    count = len(weights)
    return {
        "pack": lambda i: ops.pack(weights[i % count].codes),
        "unpack": lambda i: ops.unpack(weights[i % count].b),
        "dequantize": lambda i: ops.dequantize(weights[i % count].b, weights[i % count].s),
    }


def numpy_functions(weight: Weight) -> dict:
    """The same in marlin.host; empty where that is not built."""
    try:
        from marlin import host
    except ImportError:
        return {}
    codes, b, s = weight.codes.numpy(), weight.b.numpy(), weight.s.numpy()
    assert (host.pack(codes) == b).all()
    return {
        "pack (NumPy)": lambda i: host.pack(codes),
        "unpack (NumPy)": lambda i: host.unpack(b),
        "dequantize (NumPy, to float32)": lambda i: host.dequantize(b, s),
    }


def measure_cpu(weight: Weight, rounds: int) -> dict[str, float]:
    """Median ms of each."""
    paths = operators([weight]) | numpy_functions(weight)
    seconds = time_interleaved(paths, rounds)
    return {name: statistics.median(times) * 1e3 for name, times in seconds.items()}


def measure_gpu(weight: Weight) -> dict[str, float]:
    """Median ms of each."""
    count = rotation_count(weight.b.nbytes, ROTATE_BYTES)

    def copy(tensor):
        return [tensor.cuda() for _ in range(count)]

    fields = (copy(t) for t in (weight.codes, weight.scales, weight.b, weight.s))
    weights = [Weight(*each) for each in zip(*fields, strict=True)]
    check(weights[0])
    ms = {}
    for name, function in operators(weights).items():
        # Each result is dropped at once, so the graph writes one output again and again.
        def launch_all(function=function):
            for i in range(count):
                function(i)

        graph = capture(launch_all, lambda function=function: function(0))
        ms[name] = time_graph(graph, count).median_us / 1e3
    return ms


def run(args) -> int:
    (k, n), *others = args.shapes or [SHAPE]
    if others:
        raise SystemExit("bench pack: --shapes: expected one shape")
    weight = random_weight(k, n, GROUP_SIZE)
    check(weight)
    name = "pack" + ("-quick" if args.quick else "") + ("-chosen" if args.shapes else "")
    measured = {"cpu": measure_cpu(weight, QUICK_ROUNDS if args.quick else ROUNDS)}
    if torch.cuda.is_available() and ops.why_no_cuda() is None:
        measured["cuda"] = measure_gpu(weight)
    for device, ms in measured.items():
        head = describe_run(device)
        result = {"bench": "pack", "schema": 1, **head, "k": k, "n": n,
                  "group_size": GROUP_SIZE, "ms": ms}  # fmt: skip
        rows = [[name, number(value, 3)] for name, value in ms.items()]
        print(f"{head['device']['name']}, commit {head['commit']}; k={k} n={n}")
        print(table(["", "ms"], rows, left=1))
        print(f"written to {write_result(result, name, args.out)}\n")
    return 0
