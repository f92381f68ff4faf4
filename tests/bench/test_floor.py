"""The arithmetic of the floor against the figures DESIGN §4.1 and the anchors state."""

import csv

import pytest

from bench.incumbents import FOLDER
from marlin.testing import timing
from marlin.testing.timing import KNOWN_RATES, floor_us, ideal_speedup

H200 = KNOWN_RATES["H200"]


def test_constants_are_found_by_name():
    assert timing.known_rates("NVIDIA H200") == H200 == timing.Rates(4.618e12, 818e12)
    assert timing.known_rates("NVIDIA A10") is None


def test_bytes_of_a_problem():
    assert timing.problem_bytes(1, 4096, 4096, 128) == 8388608 + 32 * 4096 * 2 + 4 * 4096
    assert timing.problem_bytes(1, 4096, 4096, -1) == 8388608 + 4096 * 2 + 4 * 4096
    assert timing.problem_bytes(2, 4096, 64, 128, bits=16) == 2 * 4096 * 64 + 4 * (4096 + 64)


def test_floor_of_every_anchor():
    with open(FOLDER / "h200.csv", newline="") as file:
        rows = [r for r in csv.DictReader(file) if r["kernel"] == "marlin_published_g128"]
    assert len(rows) > 90
    for row in rows:
        m, k, n = int(row["m"]), int(row["k"]), int(row["n"])
        assert floor_us(H200, m, k, n, 128) == pytest.approx(
            float(row["floor_us"]), rel=5e-4, abs=0.01
        )


@pytest.mark.parametrize(
    ("shape", "m", "speedup"),
    [((16384, 16896), 1, 3.88), ((16384, 16896), 128, 1.405), ((16384, 16896), 184, 1.0),
     ((8192, 8192), 128, 1.43), ((4096, 4096), 64, 2.85)],
)  # fmt: skip
def test_ideal_speedup(shape, m, speedup):
    assert ideal_speedup(H200, m, *shape, 128) == pytest.approx(speedup, abs=0.005)


def test_bytes_and_arithmetic_meet_near_47_rows():
    def read_us(m):
        return timing.problem_bytes(m, 8192, 8192, 128) / H200.bytes_per_s * 1e6

    below, above = (floor_us(H200, m, 8192, 8192, 128) == read_us(m) for m in (47, 49))
    assert below and not above


def test_rotation_and_launches():
    assert timing.rotation_count(8 << 20) == 31
    assert timing.rotation_count(1 << 30) == 2
    assert timing.launch_count(31, 2.0) == 31 * 10
    assert timing.launch_count(2, 6000.0) == 2


def test_interleaving_calls_each_in_turn():
    calls = []
    paths = {name: lambda i, name=name: calls.append((name, i)) for name in "ab"}
    seconds = timing.time_interleaved(paths, 3)
    assert calls == [(name, 0) for name in "abab"] + [("b", 1), ("a", 1), ("a", 2), ("b", 2)]
    assert [len(s) for s in seconds.values()] == [3, 3]
    assert [len(s) for s in timing.time_interleaved(paths, 9, 0.0).values()] == [4, 4]
