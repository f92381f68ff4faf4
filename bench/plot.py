"""`plot`: draws a gemm result, beside its JSON: speed-up over batch size, percent of floor."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt

from bench.compare import SUMMED_MODELS
from bench.report import RESULTS

# what a line shows: (key of a sum, label, style)
LINES = (
    ("ideal_speedup", "ideal (floor of FP16 / floor of INT4)", {"color": "0.55", "ls": "--"}),
    ("speedup", "this project", {"color": "#0b5fa5", "marker": "o", "lw": 2.2}),
    ("best_incumbent_speedup", "best other kernel", {"color": "#d1661a", "marker": "s", "ms": 4}),
    ("published_speedup", "published Marlin", {"color": "#7a8b2f", "marker": "^", "ms": 4}),
)


def subtitle(result: dict) -> str:
    group = "per column" if result["group_size"] == -1 else f"group {result['group_size']}"
    dtype = {"float16": "FP16", "bfloat16": "BF16"}[result["dtype"]]
    return f"{result['device']['name']}, {dtype} × INT4 {group}, commit {result['commit']}"


def draw_speedup(result: dict, config: str) -> plt.Figure:
    """A panel for the large matrix and for every model whose layers were all measured."""
    sums = result["sums"][config]
    figure, axes = plt.subplots(
        1, len(sums), figsize=(4.2 * len(sums), 4.2), sharey=True, squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis, (name, column) in zip(axes[0], sums.items(), strict=True):
        for key, label, style in LINES:
            points = [(s["m"], s[key]) for s in column if s[key] is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=label, **style)
        axis.axhline(1, color="0.8", lw=1, zorder=0)
        axis.set_xscale("log", base=2)
        axis.set_xticks([s["m"] for s in column], [str(s["m"]) for s in column], rotation=60)
        axis.minorticks_off()
        axis.set_title(f"layers of {name}" if name in SUMMED_MODELS else name, fontsize=11)
        axis.set_xlabel("batch size (rows of X)")
        axis.set_ylim(bottom=0)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("times faster than cuBLAS FP16")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(LINES), frameon=False)
    figure.suptitle(subtitle(result), fontsize=10, color="0.35")
    return figure


def draw_floor(result: dict, config: str) -> plt.Figure:
    """Percent of floor, a row per shape and a column per batch size."""
    cells = {(c["k"], c["n"], c["m"]): c["percent_of_floor"]
             for c in result["cells"] if c["config"] == config}  # fmt: skip
    shapes = sorted({(k, n) for k, n, _ in cells}, key=lambda s: s[0] * s[1])
    rows = sorted({m for *_, m in cells})
    values = [[cells.get((k, n, m), float("nan")) for m in rows] for k, n in shapes]
    size = (1.9 + 0.55 * len(rows), 1.6 + 0.36 * len(shapes))
    figure, axis = plt.subplots(figsize=size, layout="constrained")
    image = axis.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for y, line in enumerate(values):
        for x, value in enumerate(line):
            if value == value:
                color = "white" if value < 60 else "black"
                axis.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color=color)
    axis.set_xticks(range(len(rows)), rows)
    axis.set_yticks(range(len(shapes)), [f"{k} × {n}" for k, n in shapes])
    axis.set_xlabel("batch size (rows of X)")
    axis.set_ylabel("k × n")
    axis.spines[:].set_visible(False)
    figure.colorbar(image, label="% of floor")
    figure.suptitle(subtitle(result), fontsize=10, color="0.35")
    return figure


def draw(path: Path, form: str) -> list[Path]:
    """Draws one result; returns the files written, beside it."""
    result = json.loads(path.read_text())
    if result["bench"] != "gemm":
        raise SystemExit(f"bench plot: {path}: expected a gemm result, got {result['bench']}")
    written = []
    for config, sums in result["sums"].items():
        if not any(c["config"] == config for c in result["cells"]):
            continue
        stem = path.stem + ("" if len(result["sums"]) == 1 else f"-{config}")
        drawings = {"floor": draw_floor} | ({"speedup": draw_speedup} if sums else {})
        for name, function in drawings.items():
            figure = function(result, config)
            target = path.with_name(f"{stem}-{name}.{form}")
            figure.savefig(target, dpi=150)
            plt.close(figure)
            written.append(target)
    return written


def run(args) -> int:
    paths = args.results or sorted(RESULTS.glob("*/gemm.json"))
    if not paths:
        raise SystemExit(f"bench plot: no gemm.json under {RESULTS}: run `python -m bench gemm`")
    for path in paths:
        for written in draw(path, args.format):
            print(f"written to {written}")
    return 0
