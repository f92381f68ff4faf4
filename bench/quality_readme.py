"""Puts the numbers of the committed quality run into the README: `python -m bench.quality_readme`.

What stands between the two marks there comes from this file alone; a test compares.
"""

import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RESULT = ROOT / "bench" / "results" / "nvidia-h200" / "quality.json"
MARKS = ("<!-- drawn by python -m bench.quality_readme -->\n", "<!-- drawn -->\n")
ROWS = {  # of the run, by name: what the README calls them
    "full precision": "full precision",
    "RTN": "rounded to nearest",
    "published": "GPTQ as published",
    "plain clip": "GPTQ with searched scales",
    "+ refit": "all four",
    "default": "**the default**: all four, guarded",
    "metric trial": "default, but `--metric trial`",
    "one sweep": "default, but `--sweeps 1`",
}
DOMAINS = ("reference", "docstrings")


def section(result: dict) -> str:
    """A table of the language model and the encoder side by side, and what its numbers are."""
    language, encoder = split(result["rows"])
    lines = [
        "| | layers' loss | reference | closed | docstrings | closed | MiniLM |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, title in ROWS.items():
        if name in language:
            lines.append(line(title, language[name], encoder.get(name)))
    most = max(
        (r for r in result["rows"] if alike(r, language["default"])), key=lambda r: r["tokens"]
    )
    if most is not language["default"]:
        lines.append(line(f"default, from {thousands(most['tokens'])} tokens", most, None))
    return "\n".join(lines) + "\n\n" + caption(result, language, encoder)


def split(rows: list[dict]) -> tuple[dict, dict]:
    """The first row of each name of the language model, and of the encoder: the usual group size,
    seed and amount of text come first."""
    kinds = {}, {}
    for row in rows:
        kinds["nll" not in row["domains"]["reference"]].setdefault(row["name"], row)
    return kinds


def alike(row: dict, other: dict) -> bool:
    """Whether two rows differ in the amount of text only."""
    fields = ("model", "name", "group_size", "seed")
    return all(row.get(field) == other.get(field) for field in fields)


def line(title: str, language: dict, encoder: dict | None) -> str:
    loss = language.get("loss_to_rtn")
    if language["name"] == "RTN":
        loss = 1.0
    cells = [title, "" if loss is None else f"{loss:.3f}"]
    for domain in DOMAINS:
        entry = language["domains"][domain]
        cells += [f"{entry['nll']:.3f}", f"{entry['closed']:.0%}" if "closed" in entry else ""]
    cells.append("" if encoder is None else f"{encoder['domains']['reference']['cosine']:.3f}")
    return f"| {' | '.join(cells)} |"


def caption(result: dict, language: dict, encoder: dict) -> str:
    judged, of = result["judged"], language["default"]
    model, other = of["model"], encoder["default"]
    tokens = [thousands(judged[model][domain]) for domain in DOMAINS]
    both = thousands(sum(judged[model][domain] for domain in DOMAINS))
    return (
        f"{result['device']['name']}, commit {result['commit']}, "
        f"`{RESULT.relative_to(ROOT)}`. SmolLM2-135M-Instruct, groups of {of['group_size']}, "
        f"calibrated with {thousands(of['tokens'])} tokens of Python's reference; NLL over {both} "
        f"held-out tokens: {tokens[0]} of other topics of it, and {tokens[1]} of the standard "
        "library's docstrings, which calibration never sees; how much of rounding's loss is "
        "closed; the loss of the layers on the calibration text, relative to rounding's. "
        "all-MiniLM-L6-v2, groups of "
        f"{other['group_size']}, {other['samples']} sentences to calibrate with: mean cosine to "
        f"full precision of {judged[other['model']]['reference']} held-out embeddings.\n"
    )


def thousands(count: int) -> str:
    return f"{count / 1000:.1f}k"


def drawn(readme: str, text: str) -> str:
    """The README with ``text`` between the marks."""
    first, last = map(re.escape, MARKS)
    new, count = re.subn(f"(?s)({first}).*?({last})", lambda m: f"{m[1]}\n{text}\n{m[2]}", readme)
    if count != 1:
        raise SystemExit(f"{README}: expected the marks {MARKS} once, found them {count} times")
    return new


def main() -> None:
    README.write_text(drawn(README.read_text(), section(json.loads(RESULT.read_text()))))


if __name__ == "__main__":
    main()
