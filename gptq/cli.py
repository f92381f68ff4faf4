"""The commands: ``python -m gptq quantize`` and ``python -m gptq eval``."""

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

from . import calibration, evaluate, export, walk
from .plan import GROUP_SIZES, PER_COLUMN, Plan, make_plan

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
MODEL_HELP = "a directory, a Hugging Face hub id, or a .gguf file"


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns the exit status (2 for input that cannot be used)."""
    args = build_parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m gptq",
        description="Quantize language models to 4 bits for Marlin, and measure what it costs.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    quantize = commands.add_parser(
        "quantize", help="write a Marlin checkpoint of a model", description=run_quantize.__doc__
    )
    quantize.set_defaults(run=run_quantize)
    quantize.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    quantize.add_argument("--out", required=True, type=Path, help="directory of the checkpoint")
    quantize.add_argument(
        "--group-size",
        type=int,
        default=128,
        choices=sorted((PER_COLUMN, *GROUP_SIZES)),
        help="inputs that share a scale; -1: one scale per output (default: 128)",
    )
    quantize.add_argument("--bits", type=int, default=4, choices=[4], help="bits per weight")
    quantize.add_argument(
        "--method",
        default="gptq",
        choices=["gptq", "rtn"],
        help="rtn rounds to nearest and needs no calibration (default: gptq)",
    )
    quantize.add_argument(
        "--nsamples", type=positive, default=128, help="calibration samples (default: 128)"
    )
    quantize.add_argument(
        "--seqlen", type=positive, default=2048, help="longest sample, in tokens (default: 2048)"
    )
    quantize.add_argument(
        "--calibration",
        default=calibration.BUILTIN,
        metavar="FILE_OR_DATASET",
        help="a text file, a .jsonl file with a field 'text', a dataset NAME[:CONFIG][:SPLIT] for "
        "the datasets package, or 'pydoc': Python's own reference (default)",
    )
    quantize.add_argument("--seed", type=int, default=0, help="which samples are drawn")
    quantize.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave layers whose dotted name matches (like '*.down_proj') in full precision",
    )
    quantize.add_argument(
        "--no-clip",
        action="store_true",
        help="take each group's largest weight for its scale instead of searching",
    )
    quantize.add_argument(
        "--damping", type=float, default=0.01, help="relative to mean(diag(H)) (default: 0.01)"
    )
    quantize.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of what stays unpacked (default: as stored if 16-bit, else float16)",
    )
    add_device(quantize)

    evaluation = commands.add_parser(
        "eval", help="negative log-likelihood and perplexity", description=run_eval.__doc__
    )
    evaluation.set_defaults(run=run_eval)
    evaluation.add_argument(
        "model", metavar="DIR_OR_MODEL", help="a Marlin checkpoint, " + MODEL_HELP
    )
    evaluation.add_argument(
        "--text",
        required=True,
        help="a text file, a .jsonl file with a field 'text', or 'pydoc': topics of Python's "
        "reference that its calibration text leaves out",
    )
    evaluation.add_argument(
        "--seqlen", type=positive, default=512, help="tokens per window (default: 512)"
    )
    evaluation.add_argument("--max-tokens", type=positive, help="stop after about so many tokens")
    evaluation.add_argument(
        "--dtype",
        choices=DTYPES,
        help="to compute in (default: float32 on the CPU, else as stored)",
    )
    evaluation.add_argument("--json", action="store_true", help="print one JSON object")
    add_device(evaluation)
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="cpu, cuda or cuda:N (default: %(default)s)",
    )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def run_quantize(args: argparse.Namespace) -> None:
    """Quantize the linear layers of MODEL's decoder (or encoder) layers to 4 bits and write a
    checkpoint that marlin.load_pretrained reads. Output head and embeddings stay as they are."""
    if args.out.exists() and args.out.resolve() == Path(args.model).resolve():
        raise ValueError(f"--out: expected another directory than the model's, got {args.out}")
    started = time.perf_counter()
    on_cpu = torch.device(args.device).type == "cpu"
    config = export.load_config(args.model)
    plan = make_plan(export.skeleton(args.model, config), args.group_size, args.skip)
    print_plan(plan)
    tokenizer = load_tokenizer_if_any(args)
    samples = []
    if args.method == "gptq":
        documents = calibration.read_documents(args.calibration)
        seqlen = min(args.seqlen, export.longest_input(config) or args.seqlen)
        samples = calibration.samples(documents, tokenizer, args.nsamples, seqlen, args.seed)
        tokens = sum(sample.numel() for sample in samples)
        print(f"Calibrating with {len(samples)} samples, {tokens} tokens of {args.calibration}")
    print(f"Loading {args.model}", flush=True)
    # Half precision is slow on CPUs, and rounding would add up over the layers.
    model = export.load_model(args.model, torch.float32 if on_cpu else None)
    loaded = time.perf_counter()

    results = quantize_model(model, plan, samples, args)
    model.to(DTYPES[args.dtype] if args.dtype else export.stored_dtype(config))
    quantized = time.perf_counter()

    report = {
        "model": args.model,
        "method": args.method,
        "group_size": args.group_size,
        "bits": args.bits,
        "calibration": args.calibration if samples else None,
        "samples": len(samples),
        "tokens": sum(sample.numel() for sample in samples),
        "device": args.device,
        "seconds": {"load": loaded - started, "quantize": quantized - loaded},
        **export.module_report(plan, results),
    }
    export.save(model, tokenizer, args.out, report)
    size = sum(path.stat().st_size for path in args.out.glob("*.safetensors"))
    print(f"Quantized {len(results)} layers in {quantized - loaded:.1f} s{summary(results)}")
    print(f"Wrote {args.out} ({size / 1e6:.1f} MB of weights) and {export.REPORT} in it")


def quantize_model(model, plan: Plan, samples, args: argparse.Namespace) -> list[walk.Result]:
    """Walk the model with a progress bar, and pack each decoder layer as soon as it is done."""
    results = []
    with tqdm(
        total=len(plan.all_targets()), unit="layer", mininterval=0.5, dynamic_ncols=True
    ) as bar:

        def show(result: walk.Result) -> None:
            bar.update()
            if result.loss is not None:
                bar.set_postfix_str(f"{result.target.name} loss {result.loss:.2e}")

        if args.method == "rtn":
            steps = walk.quantize_rtn(model, plan, on_result=show)
        else:
            steps = walk.quantize_gptq(
                model,
                plan,
                samples,
                device=args.device,
                on_result=show,
                clip=not args.no_clip,
                damping=args.damping,
            )
        for finished in steps:
            export.install(model, finished)
            results += finished
    return results


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


def print_plan(plan: Plan) -> None:
    """Say what will be quantized and what will not, and why, before the work starts."""
    weights = sum(target.k * target.n for target in plan.all_targets())
    group = "per column" if plan.group_size == PER_COLUMN else f"in groups of {plan.group_size}"
    print(
        f"To quantize: {len(plan.all_targets())} linear layers in {len(plan.blocks)} blocks, "
        f"{weights / 1e6:.1f} M weights, {group}"
    )
    for reason, names in plan.kept_by_reason().items():
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        print(f"Full precision: {', '.join(names[:4])}{more} ({reason})")


def load_tokenizer_if_any(args: argparse.Namespace):
    """The tokenizer to calibrate with and to store; rounding does without where there is none."""
    try:
        return export.load_tokenizer(args.model)
    except export.ModelError:
        if args.method == "gptq":
            raise
        return None


def summary(results: list[walk.Result]) -> str:
    """How much of the loss of plain rounding is left, over all layers."""
    pairs = [(result.loss, result.rtn_loss) for result in results if result.rtn_loss]
    if not pairs:
        return ""
    mean = sum(loss / rtn for loss, rtn in pairs) / len(pairs)
    return f"; mean loss {mean:.0%} of rounding's"
