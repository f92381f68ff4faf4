"""The commands ``marlin quantize`` and ``marlin eval``, also as ``python -m gptq``."""

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from marlin.convert import check_device
from marlin.shards import recover, some

from . import calibration, evaluate, export, memory, report, run, walk
from .options import DTYPES, add_eval, add_quantize, solver_options
from .phases import Phases, phase
from .plan import PER_COLUMN, Plan, make_plan
from .resume import FOLDER, Store, finished, holds_a_run


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for input that cannot be used)."""
    args = build_parser().parse_args(argv)
    try:
        check_device(args.device)
        args.run(args)
    except (ValueError, OSError) as error:
        return fail(error)
    except RuntimeError as error:
        if not memory.out_of_memory(error):
            raise
        return fail(memory.too_little("the model and one sample", args.device))
    return 0


def fail(error: Exception) -> int:
    print(f"marlin: error: {error}", file=sys.stderr)
    return 2


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marlin",  # which runs this
        description="Quantize language models to 4 bits for Marlin, and measure what it costs.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    quantize = commands.add_parser(
        "quantize",
        help="write a Marlin checkpoint of a model",
        description=run_quantize.__doc__,
        epilog="example: marlin quantize meta-llama/Llama-3.1-8B --out llama-4bit",
    )
    quantize.set_defaults(run=run_quantize)
    add_quantize(quantize)
    evaluation = commands.add_parser(
        "eval",
        help="negative log-likelihood and perplexity",
        description=run_eval.__doc__,
        epilog="example: marlin eval llama-4bit --text pydoc",
    )
    evaluation.set_defaults(run=run_eval)
    add_eval(evaluation)
    return parser


def run_quantize(args: argparse.Namespace) -> None:
    """Quantize the linear layers of MODEL's decoder (or encoder) layers to 4 bits and write a
    checkpoint that marlin.load_pretrained reads. Output head and embeddings stay as they are.
    One layer at a time is in memory, and each is safe on disk when it is done: --resume goes on
    after an interruption."""
    check_apart(args.out, Path(args.model))
    check_writable(args.out)
    check_free(args)
    config = export.load_config(args.model)
    skeleton = export.skeleton(args.model, config)
    plan = make_plan(skeleton, args.group_size, args.skip)
    print_plan(plan, sum(parameter.numel() for parameter in skeleton.parameters()))
    tokenizer = load_tokenizer_if_any(args)
    samples = draw_samples(args, tokenizer, plan, config) if args.method == "gptq" else []
    options = {name: getattr(args, name) for name in solver_options()} if samples else {}
    settings = {
        "method": args.method,
        "group_size": args.group_size,
        "bits": args.bits,
        "options": options,
        "calibration": args.calibration if samples else None,
        "samples": len(samples),
        "tokens": sum(sample.numel() for sample in samples),
    }
    pins = {
        "model": export.identity(args.model, config),
        "layers": [target.name for target in plan.all_targets()],
        "text": calibration.digest(samples),
        **settings,
    }
    store = Store(args.out, plan, pins, resume=args.resume, restart=args.restart)
    dtype = DTYPES[args.dtype] if args.dtype else export.stored_dtype(config)
    pins["dtype"] = str(dtype).removeprefix("torch.")  # layers do not depend on it
    if args.resume and not store.begun and finished(args.out, plan, pins):
        store.remove()  # a run that was killed at the very end may not have got so far
        print(f"{args.out} is finished, by a run with these settings: nothing to resume")
        return
    if store.count:
        print(f"Going on after {store.count} of {len(plan.blocks)} layers")

    print(f"Loading {args.model}", flush=True)
    started = time.perf_counter()
    skipped: dict[int, str] = {}
    with Phases(args.device) as phases:
        with phase("load"):
            model = export.load_model(args.model, apart=True)
        loaded = time.perf_counter()
        with progress(plan) as show:
            modules = run.quantize(
                model,
                plan,
                samples,
                store,
                method=args.method,
                device=args.device,
                on_result=show,
                skip_bad_samples=args.skip_bad_samples,
                on_skip=skipped.__setitem__,
                **options,
            )
        quantized = time.perf_counter()
        with phase("write"):
            model.to(dtype)
            export.save(model, tokenizer, args.out)
    outcome = {
        "model": args.model,
        **settings,
        "device": args.device,
        "seconds": {"load": loaded - started, "quantize": quantized - loaded},
        "phases": {name: round(value, 3) for name, value in phases.seconds.items()},
        "peak_bytes": max((m["peak_bytes"] or 0 for m in modules), default=0) or None,
        "peak_host_bytes": memory.peak_host_bytes(),
        "skipped_samples": skipped,
        **report.everything(plan, modules),
        "pins": pins,
    }
    export.save_report(args.out, outcome, report.markdown(outcome))
    store.remove()
    print_outcome(outcome, args.out)


def check_apart(out: Path, model: Path) -> None:
    """Raises ValueError where the checkpoint would be among the model's own files."""
    inner, outer = out.resolve(), model.resolve()
    if outer.is_dir() and (inner == outer or outer in inner.parents):
        raise ValueError(f"--out: expected another directory, outside of the model's, got {out}")


def check_writable(out: Path) -> None:
    """Raises ValueError where no directory can be made; leaves nothing behind."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out: expected a directory that can be written, got {out}")


def check_free(args: argparse.Namespace) -> None:
    """Raises ValueError for a directory with something in it that is not to be replaced."""
    if not args.out.exists():
        return
    recover(args.out)
    names = {path.name for path in args.out.iterdir()}
    ours = (args.resume or args.restart) and holds_a_run(args.out)
    others = names - {FOLDER}  # of which the store takes care
    if others and not (ours or args.overwrite):
        raise ValueError(
            f"--out: expected a directory that is new or empty, found {some(others)} in "
            f"{args.out}; --overwrite replaces the checkpoint there"
        )


def draw_samples(args: argparse.Namespace, tokenizer, plan: Plan, config) -> list[torch.Tensor]:
    documents = calibration.read_documents(args.calibration)
    seqlen = min(args.seqlen, export.longest_input(config) or args.seqlen)
    tokens = args.tokens
    if not tokens and not args.nsamples:
        tokens = calibration.default_tokens(plan.widest())
    samples = calibration.samples(
        documents, tokenizer, args.nsamples, seqlen, args.seed, tokens=tokens
    )
    count = sum(sample.numel() for sample in samples)
    wanted = f" of the {tokens} asked for" if args.tokens and count < args.tokens else ""
    print(f"Calibrating with {len(samples)} samples, {count} tokens{wanted}, of {args.calibration}")
    return samples


@contextlib.contextmanager
def progress(plan: Plan):
    """A bar, and the function that moves it by one linear layer."""
    with tqdm(
        total=len(plan.all_targets()), unit="layer", mininterval=0.5, dynamic_ncols=True
    ) as bar:

        def show(result: walk.Result) -> None:
            bar.update()
            if result.loss is not None:
                bar.set_postfix_str(f"{result.target.name} loss {result.loss:.2e}")
            if result.note:
                bar.write(f"{result.target.name}: {result.method}, {result.note}", file=sys.stderr)

        yield show


def print_outcome(outcome: dict, out: Path) -> None:
    modules, seconds = outcome["modules"], outcome["seconds"]["quantize"]
    if table := report.table(modules):
        print(table)
    for sample, place in outcome["skipped_samples"].items():
        print(f"Left out sample {sample}: not finite at {place}")
    if failed := report.fallbacks(modules):
        print(f"{len(failed)} layers did not go as planned:")
        print("\n".join(f"  {line}" for line in failed[:20]))
        if len(failed) > 20:
            print(f"  and {len(failed) - 20} more, see {report.FILE}")
    phases = ", ".join(f"{name} {value:.1f}" for name, value in outcome["phases"].items())
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    tokens = f" with {outcome['tokens']} tokens" if outcome["tokens"] else ""
    ratio = report.ratio(modules)
    print(f"Quantized {len(modules)} layers{tokens} in {seconds:.1f} s ({phases}){ratio}")
    print(f"Wrote {out} ({size / 1e6:.1f} MB of weights) and {report.FILE} in it")


def run_eval(args: argparse.Namespace) -> None:
    """Predict a text with a model and print the mean negative log-likelihood per token (in nats)
    and its exponential, the perplexity."""
    if args.text == calibration.BUILTIN:
        documents = calibration.pydoc_topics(held_out=True)
    elif Path(args.text).is_file():
        documents = calibration.read_documents(args.text)
    else:
        raise ValueError(f"--text: expected a file or 'pydoc', found no file {args.text!r}")
    dtype = DTYPES[args.dtype] if args.dtype else None
    if dtype is None and torch.device(args.device).type == "cpu":
        dtype = torch.float32
    model = export.load_any(args.model, args.device, dtype)
    tokenizer = export.load_tokenizer(args.model)
    result = evaluate.evaluate(
        model,
        tokenizer,
        documents,
        seqlen=args.seqlen,
        max_tokens=args.max_tokens,
        progress=lambda pieces: tqdm(pieces, unit="window", mininterval=0.5, dynamic_ncols=True),
    )
    if args.json:
        print(json.dumps({"model": args.model, "text": args.text, **asdict(result)}))
    else:
        print(f"nll         {result.nll:.4f} nats per token")
        print(f"perplexity  {result.perplexity:.3f}")
        print(f"tokens      {result.tokens} in {result.windows} windows, {result.seconds:.1f} s")


def print_plan(plan: Plan, parameters: int) -> None:
    """Say what will be quantized and what will not, and why, before the work starts."""
    group = "per column" if plan.group_size == PER_COLUMN else f"in groups of {plan.group_size}"
    share = plan.weights() / parameters
    print(
        f"To quantize: {len(plan.all_targets())} linear layers in {len(plan.blocks)} blocks, "
        f"{plan.weights() / 1e6:.1f} M of {parameters / 1e6:.1f} M weights, {group}"
    )
    for reason, names in plan.kept_by_reason().items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        print(f"Full precision: {', '.join(names[:4])}{more} ({reason})")
    if share < 0.5:
        print(f"Note: {1 - share:.0%} of the weights stay in full precision")


def load_tokenizer_if_any(args: argparse.Namespace):
    """The tokenizer to calibrate with and to store; rounding does without where there is none."""
    try:
        return export.load_tokenizer(args.model)
    except export.ModelError as error:
        if args.method == "gptq":
            raise
        print(f"The checkpoint will have no tokenizer: {error}")
        return None
