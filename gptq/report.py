"""How a quantization went: every module for JSON, a table to read, a summary for the terminal."""

import re
from collections import defaultdict
from dataclasses import asdict, replace

from .plan import Plan, Target
from .robust import GPTQ, RTN
from .solver import Solution
from .walk import Result

FILE = "gptq_report.json"  # beside the checkpoint
FIELDS = (
    "method", "loss", "rtn_loss", "tokens", "dead_inputs", "seconds", "peak_bytes",
    "peak_host_bytes", "note",
)  # fmt: skip


def module(result: Result) -> dict:
    """One linear, ready for JSON."""
    values = {name: getattr(result, name) for name in FIELDS}
    values["seconds"] = round(result.seconds, 4)
    return {**asdict(result.target), **values, "damping": result.solution.damping}


def result(target: Target, values: dict, solution: Solution) -> Result:
    """What ``module`` was made from."""
    solution = replace(solution, damping=values["damping"])
    return Result(target, solution, **{name: values.get(name) for name in FIELDS})


def everything(plan: Plan, modules: list[dict]) -> dict:
    """What became of every weight."""
    return {"modules": modules, "full_precision": plan.kept}


def markdown(run: dict) -> str:
    """A report as ``cli`` writes it to JSON, as a page with one line per linear."""
    seconds = ", ".join(f"{name} {value:.1f}" for name, value in run["phases"].items())
    calibration = (
        f"{run['samples']} samples, {run['tokens']} tokens of {run['calibration']}"
        if run["samples"]
        else "none"
    )
    lines = [
        f"# {run['model']}, quantized to {run['bits']} bits",
        "",
        f"- Method: {run['method']}, group size {run['group_size']}",
        f"- Calibration: {calibration}",
        f"- Seconds on {run['device']}: {seconds}",
        f"- Peak host memory, mapped files included: {run['peak_host_bytes'] / 1e9:.2f} GB",
        *([f"- Peak GPU memory: {run['peak_bytes'] / 1e9:.2f} GB"] if run["peak_bytes"] else []),
        *(f"- Left out sample {n}: {place}" for n, place in run["skipped_samples"].items()),
        *(f"- Full precision: {name} ({why})" for name, why in run["full_precision"].items()),
        "",
        "Loss: share of the output's energy that rounding loses on the calibration tokens. "
        + (
            "Peak: GPU memory since the layers before it were done."
            if run["peak_bytes"]
            else "Peak: host memory of the whole process since it began, mapped files included."
        )
        + " Seconds: linears that read one input are solved together, and have shares by size.",
        "",
        "| layer | k × n | method | loss | rounding's | damping | tokens | seconds | peak | note |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for m in run["modules"]:
        peak = m["peak_bytes"] or m["peak_host_bytes"]
        peak = f"{peak / 1e9:.2f} GB" if peak else ""  # an older version's are resumed without
        lines.append(
            f"| {m['name']} | {m['k']} × {m['n']} | {m['method']} | {_number(m['loss'])} "
            f"| {_number(m['rtn_loss'])} | {m['damping']:g} | {m['tokens']} | {m['seconds']:.2f} "
            f"| {peak} | {m['note'] or ''} |"
        )
    return "\n".join(lines) + "\n"


def table(modules: list[dict]) -> str:
    """One line for each kind of linear, over all layers; empty without calibration."""
    kinds = defaultdict(list)
    for values in modules:
        if values["rtn_loss"]:
            kinds[kind(values["name"])].append(values)
    if not kinds:
        return ""
    rows = [("", "layers", "loss", "rounding's", "ratio", "seconds")]
    for name, group in kinds.items():
        loss, rtn_loss = _mean(group, "loss"), _mean(group, "rtn_loss")
        seconds = sum(values["seconds"] for values in group)
        rows.append(
            (
                name, str(len(group)), f"{loss:.2e}", f"{rtn_loss:.2e}", f"{loss / rtn_loss:.0%}",
                f"{seconds:.1f}",
            )
        )  # fmt: skip
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def kind(name: str) -> str:
    """``model.layers.3.mlp.up_proj`` -> ``mlp.up_proj``; experts count as one kind."""
    return re.sub(r"\.\d+\.", ".*.", re.split(r"\.\d+\.", name, maxsplit=1)[-1])


def fallbacks(modules: list[dict]) -> list[str]:
    """What did not go as planned, a line for each."""
    return [
        f"{m['name']}: {m['method']} ({m['note']})"
        for m in modules
        if m["note"] or m["method"] not in (GPTQ, RTN)
    ]


def ratio(modules: list[dict]) -> str:
    """How much of the loss of plain rounding is left, over all layers."""
    pairs = [(m["loss"], m["rtn_loss"]) for m in modules if m["rtn_loss"]]
    if not pairs:
        return ""
    mean = sum(loss / rtn for loss, rtn in pairs) / len(pairs)
    return f"; mean loss {mean:.0%} of rounding's"


def _mean(group: list[dict], field: str) -> float:
    return sum(values[field] for values in group) / len(group)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3e}"
