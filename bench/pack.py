"""`pack`: ms to pack, unpack and dequantize a layer, 4096 x 11008 by default.

On the CPU the median of interleaved calls; through the NumPy functions too. On the GPU a CUDA graph
over rotating buffers, so that no input comes from a cache. Every result is checked before its time
is taken; on the GPU it is the graph's.
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

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


@dataclass(frozen=True)
class Path:
    """A way to be timed: a function of the round, and the result of each of its calls."""

    call: Callable[[int], object]
    expected: Tensor


def check(name: str, result, expected: Tensor) -> None:
    """Asserts that a result, a tensor or a NumPy array, is the expected one, bit for bit."""
    result = torch.as_tensor(result)
    want, got = (f"{t.dtype} {tuple(t.shape)}" for t in (expected, result))
    assert got == want, f"{name}: expected {want}, got {got}"
    wrong = (result != expected).sum().item()  # counts NaN
    assert wrong == 0, f"{name}: {wrong} of {expected.numel()} elements are wrong"


def operators(weights: list[Weight]) -> dict[str, Path]:
    """The operators on copies of one weight, in turn.

    What `unpack` and `dequantize` have to return is computed without code of ours, from codes and
    scales; so these two also vouch for the packed words that `pack` is held to.
    """
    count, (codes, b, s) = len(weights), (weights[0].codes, weights[0].b, weights[0].s)
    values = weights[0].values().to(s.dtype)
    return {
        "pack": Path(lambda i: ops.pack(weights[i % count].codes), b),
        "unpack": Path(lambda i: ops.unpack(weights[i % count].b), codes),
        "dequantize": Path(
            lambda i: ops.dequantize(weights[i % count].b, weights[i % count].s), values
        ),
    }


def numpy_functions(weight: Weight) -> dict[str, Path]:
    """The same in marlin.host; empty where that is not built."""
    try:
        from marlin import host
    except ImportError:
        return {}
    codes, b, s = weight.codes.numpy(), weight.b.numpy(), weight.s.numpy()
    values = weight.values().float()
    return {
        "pack (NumPy)": Path(lambda i: host.pack(codes), weight.b),
        "unpack (NumPy)": Path(lambda i: host.unpack(b), weight.codes),
        "dequantize (NumPy, to float32)": Path(lambda i: host.dequantize(b, s), values),
    }


def measure_cpu(weight: Weight, rounds: int) -> dict[str, float]:
    """Median ms of each, once its result has been checked."""
    paths = operators([weight]) | numpy_functions(weight)
    for name, path in paths.items():
        check(name, path.call(0), path.expected)
    seconds = time_interleaved({name: path.call for name, path in paths.items()}, rounds)
    return {name: statistics.median(times) * 1e3 for name, times in seconds.items()}


def time_in_graph(name: str, path: Path, count: int) -> float:
    """Median ms of ``count`` calls in a graph, once what the graph writes has been checked."""
    written = []

    def launch_all():
        for i in range(count):
            written.clear()  # dropped first, so the graph writes one output again and again
            written.append(path.call(i))

    graph = capture(launch_all, lambda: path.call(0))
    written[0].view(torch.uint8).fill_(0xFF)  # NaN; no code; words of nothing but fifteens
    graph.replay()
    check(name, written[0], path.expected)
    return time_graph(graph, count).median_us / 1e3


def measure_gpu(weight: Weight) -> dict[str, float]:
    """Median ms of each, once its result has been checked."""
    count = rotation_count(weight.b.nbytes, ROTATE_BYTES)

    def copy(tensor):
        return [tensor.cuda() for _ in range(count)]

    fields = (copy(t) for t in (weight.codes, weight.scales, weight.b, weight.s))
    weights = [Weight(*each) for each in zip(*fields, strict=True)]
    return {name: time_in_graph(name, path, count) for name, path in operators(weights).items()}


def run(args) -> int:
    (k, n), *others = args.shapes or [SHAPE]
    if others:
        raise SystemExit("bench pack: --shapes: expected one shape")
    weight = random_weight(k, n, GROUP_SIZE)
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
