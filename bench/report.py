"""Result files and tables."""

import json
from pathlib import Path

from bench.machine import ROOT, slug

RESULTS = ROOT / "bench" / "results"


def write_result(result: dict, name: str, out: Path | None = None) -> Path:
    """Writes <out>/<device>/<name>.json, in names that any file system takes; ``out`` defaults to
    bench/results."""
    folder = Path(out or RESULTS) / slug(result["device"]["name"])
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{slug(name)}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def table(header: list[str], rows: list[list], left: int = 0) -> str:
    """Columns of text, right-aligned but for the first ``left``; no trailing blanks."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]

    def line(row):
        parts = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(parts).rstrip()

    return "\n".join(line(row) for row in cells)
