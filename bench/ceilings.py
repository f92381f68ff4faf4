"""What this GPU can do today: its read bandwidth and its dense rate, measured in the same run."""

import torch

from marlin.testing.timing import Rates, capture, time_graph


def best_of(paths: dict, launches: int) -> tuple[str, float]:
    """Name and us of the fastest path, each launched `launches` times in a graph."""
    best = None
    for name, path in paths.items():
        graph = capture(lambda path=path: [path() for _ in range(launches)], path)
        us = time_graph(graph, launches).median_us
        if best is None or us < best[1]:
            best = name, us
    return best


def measure_bandwidth(size_bytes: int = 1 << 30) -> tuple[str, float]:
    """(how, bytes per second): the best of reductions, a product by a vector, and a copy.

    A copy counts what it reads and what it writes.
    """
    words = torch.empty(size_bytes // 4, dtype=torch.int32, device="cuda").random_()
    half = torch.empty(size_bytes // 2, dtype=torch.float16, device="cuda").normal_()
    matrix = half.view(-1, 8192)
    vector, target = matrix[0].clone(), torch.empty_like(half)
    product = half.new_empty(len(matrix), 1)
    reads = {
        "amax": lambda: torch.amax(words, 0),
        "sum": lambda: torch.sum(words, 0, dtype=torch.int32),
        "mv": lambda: torch.mm(matrix, vector.view(-1, 1), out=product),
    }
    how, us = best_of(reads, 2)
    _, copy_us = best_of({"copy": lambda: target.copy_(half)}, 2)
    if copy_us / 2 < us:
        how, us = "copy", copy_us / 2
    return how, size_bytes / us * 1e6


def measure_dense_rate(dtype: torch.dtype = torch.float16, size: int = 8192) -> float:
    """Operations per second of a square product, the better of both layouts of the weight."""
    a, b = (torch.empty(size, size, dtype=dtype, device="cuda").normal_() for _ in range(2))
    out = torch.empty_like(a)
    paths = {
        "nn": lambda: torch.mm(a, b, out=out),
        "nt": lambda: torch.mm(a, b.t(), out=out),
    }
    _, us = best_of(paths, 1)
    return 2 * size**3 / us * 1e6


def measure(dtype: torch.dtype) -> dict:
    """Both, for the report."""
    how, bandwidth = measure_bandwidth()
    return {
        "read_bytes_per_s": bandwidth,
        "read_by": how,
        "dense_flops_per_s": measure_dense_rate(dtype),
    }


def rates_from(measured: dict) -> Rates:
    return Rates(measured["read_bytes_per_s"], measured["dense_flops_per_s"])
