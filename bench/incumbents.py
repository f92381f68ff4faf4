"""What other kernels reached (bench/anchors), and who is compared with whom."""

import csv
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent / "anchors"
FP16 = "cublas_fp16"
PER_COLUMN = "marlin_published_percolumn"
PUBLISHED = ("marlin_published_g128", "marlin_published_g128_tile64x256")
SPARSE = "sparse_marlin_2_4"  # stores half the weights: no match for a dense kernel

Shape = tuple[int, int]  # (k, n)
Cell = tuple[int, int, int]  # (k, n, m)


@dataclass(frozen=True)
class Incumbents:
    """us of every kernel in every cell."""

    us: dict[Cell, dict[str, float]] = field(default_factory=dict)

    def shapes(self) -> list[Shape]:
        """In the file's order, from small to large."""
        return list(dict.fromkeys((k, n) for k, n, _ in self.us))

    def rows(self, shape: Shape) -> list[int]:
        return [m for k, n, m in self.us if (k, n) == shape]

    def fp16_us(self, cell: Cell) -> float | None:
        return self.us.get(cell, {}).get(FP16)

    def rivals(self, cell: Cell, group_size: int) -> dict[str, float]:
        """The kernels ours is compared with: group 128 with 128, per column with per column."""
        kernels = self.us.get(cell, {})
        if group_size == 128:
            return {k: us for k, us in kernels.items() if k not in (FP16, PER_COLUMN, SPARSE)}
        return {k: us for k, us in kernels.items() if k == PER_COLUMN and group_size == -1}

    def best(self, cell: Cell, group_size: int) -> tuple[str, float] | None:
        """(name, us) of the fastest rival."""
        rivals = self.rivals(cell, group_size)
        return min(rivals.items(), key=lambda item: item[1], default=None)

    def published_us(self, cell: Cell, group_size: int) -> float | None:
        """us of the published Marlin kernel, the better of its tiles."""
        rivals = self.rivals(cell, group_size)
        return min((rivals[k] for k in (*PUBLISHED, PER_COLUMN) if k in rivals), default=None)

    def best_sum(self, cells: list[Cell], group_size: int) -> tuple[str, float] | None:
        """(name, us) of the one kernel that is fastest over all these cells together."""
        rivals = [self.rivals(cell, group_size) for cell in cells]
        names = set.intersection(*(set(r) for r in rivals)) if rivals else set()
        sums = {name: sum(r[name] for r in rivals) for name in sorted(names)}
        return min(sums.items(), key=lambda item: item[1], default=None)

    def fp16_sum(self, cells: list[Cell]) -> float | None:
        us = [self.fp16_us(cell) for cell in cells]
        return None if None in us else sum(us)


@cache
def read_anchors(path: Path = FOLDER / "h200.csv") -> Incumbents:
    us: dict[Cell, dict[str, float]] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            cell = int(row["k"]), int(row["n"]), int(row["m"])
            us.setdefault(cell, {})[row["kernel"]] = float(row["us"])
    return Incumbents(us)


def incumbents_on(gpu: str) -> Incumbents:
    """The file for a GPU by its name ("NVIDIA H200"), or an empty comparison."""
    for path in sorted(FOLDER.glob("*.csv")):
        if path.stem.lower() in gpu.lower():
            return read_anchors(path)
    return Incumbents()
