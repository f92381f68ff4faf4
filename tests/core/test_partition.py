"""The partition, brute-forced on the CPU: it is constexpr C++ that the kernels run unchanged."""

import itertools
import math

import numpy as np
import pytest

from marlin import host


def check(slices: int, depth: int, runs: int) -> None:
    """Every tile exactly once, whole slices while there are enough for all, what is left in equal
    shares among all runs or nine a slice, and each shared slice's runs in order."""
    covered = np.zeros((slices, depth), np.int32)
    orders: dict[int, list] = {}
    rounds, left = divmod(slices, runs)
    sharers = min(runs, left * depth, 9 * left if rounds else runs)
    for run, segments in enumerate(host.partition(slices, depth, runs)):
        length = 0
        for position, (slice_, first, last, contributors, order) in enumerate(segments):
            assert 0 <= first < last <= depth
            covered[slice_, first:last] += 1
            length += last - first
            orders.setdefault(slice_, []).append((run, order, contributors, first, last))
            if position < rounds:
                assert (slice_, first, last) == (position * runs + run, 0, depth)
                assert (contributors, order) == (1, 0)
            # After these a run has at most one segment it does not own, its first, and shares what
            # it owns only at its end: that is why one buffer and one counter per run are enough.
            assert order == 0 or position == rounds
            assert rounds == 0 or contributors <= 10  # two of them with less than a ninth
            if order == 0 and contributors > 1:
                assert position == len(segments) - 1
        share = left * depth / sharers if run < sharers else 0
        assert math.floor(share) <= length - rounds * depth <= math.ceil(share)
    assert (covered == 1).all()
    for parts in orders.values():
        assert [order for _, order, *_ in parts] == list(range(len(parts)))
        assert {contributors for _, _, contributors, _, _ in parts} == {len(parts)}
        head = parts[0][0]
        assert [run for run, *_ in parts] == list(range(head, head + len(parts)))
        assert parts[0][3] == 0 and parts[-1][4] == depth
        assert all(a[4] == b[3] for a, b in itertools.pairwise(parts))


def test_small_problems_exhaustively():
    """All (slices, depth) up to 9 x 12 and all counts of runs, up to a few that get nothing."""
    for slices, depth in itertools.product(range(1, 10), range(1, 13)):
        for runs in range(1, slices * depth + 4):
            check(slices, depth, runs)


@pytest.mark.parametrize("runs", [1, 56, 72, 108, 128, 132, 264])
def test_real_gpus(runs):
    """Layers of 4096 to 28672 columns on the SM counts of real GPUs."""
    for slices, depth in itertools.product((4, 16, 43, 44, 66, 112, 129), (16, 56, 64, 172, 256)):
        if runs <= slices * depth:
            check(slices, depth, runs)


def test_many_random_problems():
    rng = np.random.default_rng(0)
    for _ in range(20_000):
        slices, depth = int(rng.integers(1, 40)), int(rng.integers(1, 40))
        check(slices, depth, int(rng.integers(1, min(slices * depth, 300) + 1)))


def test_an_even_split_is_a_partition():
    """runs = slices * s cuts each slice into s equal parts and shares it among just those."""
    for run, segments in enumerate(host.partition(6, 20, 24)):
        assert segments == [(run // 4, 5 * (run % 4), 5 * (run % 4) + 5, 4, run % 4)]


def test_the_busiest_run():
    """Its tiles exactly; a segment or a sharer more than any has where cuts do not meet."""
    for slices, depth, runs in itertools.product(
        (1, 2, 3, 7, 64, 132, 133, 300), (1, 4, 33), (1, 2, 5, 64, 132)
    ):
        if runs > slices * depth:
            continue
        segments = host.partition(slices, depth, runs)
        tiles, begun, sharers = host.busiest_run(slices, depth, runs)
        assert tiles == max(sum(last - first for _, first, last, *_ in run) for run in segments)
        even = runs % slices == 0 or slices % runs == 0
        assert 0 <= begun - max(map(len, segments)) <= (not even)
        assert abs(sharers - max(run[-1][3] for run in segments if run)) <= (not even)
