"""How long a kernel takes on the GPU, and how long it has to take at the very least.

A timing is worth something only if the kernel reads its weights from memory as it would in a model,
so launches rotate over buffers that no cache holds, and one CUDA graph holds many of them, so that
the host's time per launch does not count.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

ROTATE_BYTES = 256_000_000  # of weights, more than four times the L2 of an H200
REPLAYS = 21
IDLE_SECONDS = 0.03  # before a timing, so that all start from the same power budget
FEWEST_REPLAYS = 7
LONG_US = 50_000.0  # of replays in one timing: longer graphs are replayed less often
GRAPH_US = 600.0  # work in one graph: replays cost ~1 us, and 23 of them stay below 35 ms, after
# which the H200's power cap lowers the clock further


@dataclass(frozen=True)
class Rates:
    """What a GPU can do at best: bytes read per second, dense FP16 operations per second."""

    bytes_per_s: float
    flops_per_s: float


# Fixed, so that percentages stay comparable from run to run.
KNOWN_RATES = {"H200": Rates(4.618e12, 818e12)}


def known_rates(gpu: str) -> Rates | None:
    """The constants of a GPU by its name ("NVIDIA H200"); None if nobody fixed any."""
    return next((rates for name, rates in KNOWN_RATES.items() if name in gpu), None)


def group_count(k: int, group_size: int) -> int:
    """Rows of scales for k rows of weights; -1 means one, per column."""
    return 1 if group_size == -1 else k // group_size


def packed_bytes(k: int, n: int, bits: int = 4) -> int:
    """Bytes of a packed weight, without its scales."""
    return k * n * bits // 8


def problem_bytes(m: int, k: int, n: int, group_size: int, bits: int = 4) -> int:
    """Bytes one call has to move: weight, scales, X, Y. 16 bits: a dense weight, no scales."""
    scales = 0 if bits == 16 else group_count(k, group_size) * n * 2
    return packed_bytes(k, n, bits) + scales + 2 * m * (k + n)


def floor_us(rates: Rates, m: int, k: int, n: int, group_size: int, bits: int = 4) -> float:
    """The least time in us: the larger of moving the bytes and doing the arithmetic."""
    read_s = problem_bytes(m, k, n, group_size, bits) / rates.bytes_per_s
    compute_s = 2 * m * k * n / rates.flops_per_s
    return max(read_s, compute_s) * 1e6


def ideal_speedup(rates: Rates, m: int, k: int, n: int, group_size: int) -> float:
    """The floor of a dense 16-bit layer over the floor of the packed one."""
    dense = floor_us(rates, m, k, n, group_size, bits=16)
    return dense / floor_us(rates, m, k, n, group_size)


def rotation_count(buffer_bytes: int, total_bytes: int = ROTATE_BYTES) -> int:
    """How many buffers make at least ``total_bytes``; two at least."""
    return max(2, -(-total_bytes // buffer_bytes))


def launch_count(buffers: int, expected_us: float, graph_us: float = GRAPH_US) -> int:
    """Launches for one graph: about ``graph_us`` of work, a round over the buffers at least.

    Whole rounds; but not of graphs that others made longer than usual, which are to be as long as
    those: arithmetic bounds their launches, so no harm if a replay finds a weight in L2.
    """
    if graph_us > GRAPH_US:
        return max(buffers, round(graph_us / expected_us))
    return buffers * max(1, round(graph_us / (buffers * expected_us)))


def replay_count(graph_us: float) -> int:
    """Replays of a graph of so much work: 21; fewer if it leaves the cold regime anyway."""
    return min(REPLAYS, max(FEWEST_REPLAYS, round(LONG_US / graph_us)))


@dataclass(frozen=True)
class Timing:
    """Replays of one graph: us per launch of each replay, SM clock in MHz if it can be read."""

    us: list[float]
    clock_mhz: int | None = None

    @property
    def median_us(self) -> float:
        return statistics.median(self.us)


def read_clock_mhz() -> int | None:
    """The SM clock as NVML tells it (up to a second old); None if it does not."""
    try:
        return torch.cuda.clock_rate()
    except Exception:  # no NVML, or one that refuses: each build has its own error
        return None


SPARE_BYTES = 4 << 30  # of device memory that finished graphs may leave behind

_capture_stream: torch.cuda.Stream | None = None


def capture(launches: Callable[[], None], warm_up: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """Runs ``warm_up`` once for real, then records ``launches`` into a graph.

    torch.cuda.graph is not used because it empties the allocator's cache every time, and a bench
    captures a thousand graphs.
    """
    global _capture_stream
    if _capture_stream is None:
        _capture_stream = torch.cuda.Stream()
    # What a graph allocated serves no other one, and while capturing the allocator cannot free it.
    if torch.cuda.memory_reserved() - torch.cuda.memory_allocated() > SPARE_BYTES:
        torch.cuda.empty_cache()
    _capture_stream.wait_stream(torch.cuda.current_stream())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_capture_stream):
        warm_up()  # on this stream: the workspaces that libraries keep per stream exist now
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            launches()
        finally:
            graph.capture_end()
    torch.cuda.current_stream().wait_stream(_capture_stream)
    return graph


def time_graph(
    graph: torch.cuda.CUDAGraph,
    launches: int,
    replays: int = REPLAYS,
    idle_seconds: float = IDLE_SECONDS,
    clock: bool = True,
) -> Timing:
    """Replays a graph back to back after an idle pause; us per launch, and the clock if wanted."""
    starts = [torch.cuda.Event(enable_timing=True) for _ in range(replays)]
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(replays)]
    torch.cuda.synchronize()
    time.sleep(idle_seconds)
    for _ in range(2):
        graph.replay()
    for start, end in zip(starts, ends, strict=True):
        start.record()
        graph.replay()
        end.record()
    mhz = read_clock_mhz() if clock else None  # the replays are only queued: the clock under load
    torch.cuda.synchronize()
    pairs = zip(starts, ends, strict=True)
    return Timing([start.elapsed_time(end) * 1e3 / launches for start, end in pairs], mhz)


def time_interleaved(
    paths: dict[str, Callable[[int], object]],
    rounds: int,
    budget_seconds: float = float("inf"),
    in_order: bool = False,
) -> dict[str, list[float]]:
    """Times host functions in turn, so that whoever shares the machine disturbs all alike.

    Each is called with the number of the round, to choose a buffer. Stops after ``rounds``, or once
    ``budget_seconds`` are spent and there were four. Every other round runs in reversed order, as a
    call also pays for what its predecessor left in the caches, unless ``in_order`` forbids it.
    Returns seconds of every call.
    """
    for function in paths.values():
        function(0)
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    end = time.perf_counter() + budget_seconds
    for done in range(rounds):
        if done >= 4 and time.perf_counter() > end:
            break
        step = -1 if done % 2 and not in_order else 1
        for name, function in list(paths.items())[::step]:
            start = time.perf_counter()
            function(done)
            seconds[name].append(time.perf_counter() - start)
    return seconds
