"""The demo's results for people: a table on the terminal, plots, and report.md."""

import os
import platform
import re
from collections import defaultdict
from pathlib import Path

import torch

from .measure import QUESTION
from .steps import Settings

NAMES = {"full": "full precision", "rtn": "4 bits, rounded (RTN)", "gptq": "4 bits, GPTQ"}
COLORS = {"full": "#777777", "rtn": "#d1605e", "gptq": "#3c78b4"}


def rows(measured: dict, quantized: dict) -> list[dict]:
    """One row per variant, in the order of NAMES."""
    table = []
    for key, name in NAMES.items():
        result = measured[key]
        report = quantized.get(key)
        table.append(
            {
                "key": key,
                "name": name,
                "nll": result["nll"],
                "perplexity": result["perplexity"],
                "delta": result["nll"] - measured["full"]["nll"],
                # Two bytes a parameter is what full precision takes as an FP16 checkpoint.
                "megabytes": (report["bytes"] if report else 2 * result["parameters"]) / 1e6,
                "seconds": report["seconds"]["quantize"] if report else None,
                "tokens_per_second": result["tokens_per_second"],
                "answer": result["answer"],
            }
        )
    return table


def closed(measured: dict) -> float:
    """The share of RTN's loss that GPTQ takes back."""
    lost = measured["rtn"]["nll"] - measured["full"]["nll"]
    return (measured["rtn"]["nll"] - measured["gptq"]["nll"]) / lost


def markdown_table(table: list[dict]) -> str:
    lines = [
        "| | NLL | ΔNLL | perplexity | size | time to quantize | decoding |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in table:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.1f} s"
        lines.append(
            f"| {row['name']} | {row['nll']:.3f} | {row['delta']:+.3f} | {row['perplexity']:.2f} "
            f"| {row['megabytes']:.1f} MB | {seconds} | {row['tokens_per_second']:.1f} tokens/s |"
        )
    return "\n".join(lines)


def terminal_table(table: list[dict]) -> str:
    """The markdown table with its columns lined up."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown_table(table).splitlines()
        if not line.startswith("|---")
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def write(folder: Path, settings: Settings, measured: dict, quantized: dict) -> Path:
    """Write report.md and its plots into ``folder``; returns the report's path."""
    table = rows(measured, quantized)
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    plot_overview(table, plots / "overview.png")
    plot_losses(quantized["gptq"], plots / "losses.png")
    gptq = quantized["gptq"]
    group = "per column" if settings.group_size == -1 else f"groups of {settings.group_size}"
    answers = "\n".join(f"**{row['name']}**\n\n{quote(row['answer'])}\n" for row in table)
    text = f"""# {Path(settings.model).name}, quantized to 4 bits for Marlin

Written by `make demo` on {machine(settings.device)}.

{markdown_table(table)}

GPTQ closes **{closed(measured):.0%}** of the loss of plain rounding.

- Model: {Path(settings.model).name}; {len(gptq["modules"])} linear layers in 4 bits, {group};
  {", ".join(gptq["full_precision"])} in full precision.
- Calibration: {gptq["samples"]} samples, {gptq["tokens"]} tokens of Python's language reference
  (`pydoc_data.topics`). Evaluation: {measured["full"]["tokens"]} tokens of other topics, in windows
  of {settings.seqlen}; paragraphs that topics share are kept out of calibration.
- NLL in nats per token. Size: all weights on disk, of full precision as FP16. Every row was
  measured in a process of its own, the 4-bit ones through Marlin layers
  ({measured["gptq"]["marlin_layers"]} of them), computing in {measured["gptq"]["dtype"]};
  decoding at batch 1 with `generate`.

![NLL, size and speed](plots/overview.png)

![Loss of each layer](plots/losses.png)

Share of each layer's output energy that 4 bits lose on the calibration tokens, by depth.

## An answer from each

> {QUESTION}

{answers}"""
    path = folder / "report.md"
    path.write_text(text, encoding="utf-8")
    return path


def quote(text: str) -> str:
    return "\n".join(f"> {line}".rstrip() for line in text.splitlines() or [""])


def machine(device: str) -> str:
    """What the numbers were measured on."""
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    if torch.device(device).type == "cuda":
        return f"one {torch.cuda.get_device_name(device)}, {versions}"
    return f"{cpu_name()} ({torch.get_num_threads()} threads), {versions}"


def cpu_name() -> str:
    if os.path.exists("/proc/cpuinfo"):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def plot_overview(table: list[dict], path: Path) -> None:
    """Three bars each for prediction, size and speed."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.0))
    panels = [
        ("delta", "NLL lost to full precision", "{:+.3f}"),
        ("megabytes", "weights on disk, MB", "{:.0f}"),
        ("tokens_per_second", "decoding, tokens/s", "{:.1f}"),
    ]
    for axis, (field, title, form) in zip(axes, panels, strict=True):
        values = [row[field] for row in table]
        bars = axis.bar(list(NAMES), values, color=list(COLORS.values()), width=0.65)
        axis.bar_label(bars, [form.format(value) for value in values], padding=2, fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.margins(y=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def plot_losses(report: dict, path: Path) -> None:
    """Loss by depth, a panel for each kind of layer, GPTQ against rounding."""
    kinds = defaultdict(list)
    for module in report["modules"]:
        if module["loss"] is not None:
            kind = re.split(r"\.\d+\.", module["name"], maxsplit=1)[-1]
            kinds[kind].append((module["loss"], module["rtn_loss"]))
    plt = pyplot()
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(2.4 * columns, 2.0 * lines), sharex=True, sharey=True,
        squeeze=False,
    )  # fmt: skip
    for axis in axes.flat[len(kinds) :]:
        axis.set_visible(False)
    for axis, (kind, losses) in zip(axes.flat, kinds.items(), strict=False):
        ours, rounded = zip(*losses, strict=True)
        axis.semilogy(rounded, color=COLORS["rtn"], label="RTN")
        axis.semilogy(ours, color=COLORS["gptq"], label="GPTQ")
        axis.set_title(kind, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=7)
    axes.flat[0].legend(fontsize=7, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def pyplot():
    """matplotlib without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot
