"""The command line: `marlin COMMAND`, also as `python -m marlin COMMAND`."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from pathlib import Path

EXAMPLES = """\
from a full-precision model to one that runs on Marlin:
  marlin quantize meta-llama/Llama-3.1-8B --out llama-4bit
  marlin info llama-4bit
  marlin eval llama-4bit --text pydoc

from somebody's GPTQ, AWQ or compressed-tensors checkpoint, and back:
  marlin convert llama-gptq llama-marlin --format marlin
  marlin convert llama-4bit llama-vllm --format compressed-tensors

`marlin COMMAND --help` says more about each.
"""
# As `python -m PACKAGE`, but without the current directory among the places that modules come from:
# it may be somebody's checkpoint, with a gptq/ or a tqdm.py in it. (`python -P` is of Python 3.11.)
START = """\
import sys
sys.path = [place for place in sys.path if place]
import runpy
runpy.run_module({package!r}, run_name="__main__", alter_sys=True)
"""
# Commands of packages that have a command line of their own.
ELSEWHERE = {
    "quantize": ("gptq", "round a model's linear layers to 4 bits and write a checkpoint"),
    "eval": ("gptq", "how well a model or a checkpoint predicts a text"),
    "bench": ("bench", "how fast the kernels are here (in a copy of the source tree)"),
}


def run_info(args) -> int:
    if args.directory is None:
        from marlin import info as module

        report = module.collect()
    else:
        from marlin import contents as module

        report = module.collect(args.directory)
    print(json.dumps(report, indent=2) if args.json else module.describe(report))
    return 1 if report.get("why_no_operators") else 0


def add_info(commands) -> None:
    parser = commands.add_parser(
        "info",
        help="what runs on this machine, or what a checkpoint holds",
        description="Without DIR: what is installed, which GPUs and kernels this machine has, and "
        "why the rest is missing. With DIR: a checkpoint's format, layers, group sizes and size.",
        epilog="example: marlin info llama-4bit",
    )
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="of a checkpoint")
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run_info)


def run_convert(args) -> int:
    from tqdm import tqdm

    from marlin.convert import convert

    report = convert(
        args.source,
        args.target,
        args.format,
        config=args.config,
        device=args.device,
        shard_bytes=int(args.shard_size * 1e9),
        overwrite=args.overwrite,
        progress=lambda steps: tqdm(steps, unit="tensor", mininterval=0.5, dynamic_ncols=True),
    )
    print(
        f"{report.layers} layers from {report.source} to {report.target}: "
        f"{report.bytes_read / 1e6:.1f} MB to {report.bytes_written / 1e6:.1f} MB "
        f"in {report.seconds:.1f} s\nWrote {args.target}"
    )
    for note in report.notes:
        print(f"note: {note}")
    return 0


def add_convert(commands) -> None:
    parser = commands.add_parser(
        "convert",
        help="a checkpoint from one 4-bit format into another, bit for bit",
        description="Write a 4-bit checkpoint in another format. Codes, scales and zero points "
        "stay exactly what they are; tokenizer and other files are copied. Formats that are read: "
        "GPTQ (versions 1 and 2, with act-order), AWQ (gemm), compressed-tensors (pack-quantized), "
        "Marlin (ours, AutoGPTQ's and AutoAWQ's). What a target cannot hold is an error.",
        epilog="example: marlin convert TheBloke_Llama-2-7B-GPTQ llama-marlin --format marlin",
    )
    parser.add_argument(
        "source",
        type=Path,
        metavar="SRC",
        help="a checkpoint's directory, or a file that the published GPTQ script wrote with "
        "torch.save (no other pickle is read)",
    )
    parser.add_argument("target", type=Path, metavar="DST", help="a directory, new or empty")
    parser.add_argument(
        "--format",
        required=True,
        choices=("marlin", "gptq", "compressed-tensors"),
        help="marlin: for this package. gptq: for transformers, vLLM, SGLang, GPTQModel. "
        "compressed-tensors: for vLLM and transformers",
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="DIR",
        help="for a file as SRC: the original model's directory, with config.json and tokenizer "
        "(default: the directory that the file is in)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: cpu)")
    parser.add_argument(
        "--shard-size",
        type=positive,
        default=1.0,
        metavar="GB",
        help="how much a file holds (default: 1); the memory needed does not depend on it",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that DST has"
    )
    parser.set_defaults(run=run_convert)


def positive(text: str) -> float:
    value = float(text)
    if not (value > 0 and math.isfinite(value * 1e9)):  # bytes, of GB
        raise argparse.ArgumentTypeError(f"expected a positive number, got {text}")
    return value


def add_elsewhere(commands) -> None:
    for name, (_, summary) in ELSEWHERE.items():
        commands.add_parser(name, help=summary, add_help=False)


def run_elsewhere(argv: list[str]) -> int:
    """`marlin quantize …` as `python -m gptq quantize …`, `marlin bench …` as `python -m bench …`.

    In a new process, because gptq sets how OpenMP's threads wait before torch is loaded. See START.
    """
    from marlin import ops  # noqa: F401  # raises here, in one line, if the operators do not load

    package, _ = ELSEWHERE[argv[0]]
    root = Path(__file__).parents[1]  # of the source tree, or site-packages
    if not (root / package / "__main__.py").exists():
        print(
            f"marlin: error: {argv[0]} is not installed: it comes with the source tree, "
            f"as `python -m {package}`",
            file=sys.stderr,
        )
        return 2
    # An empty part would be the current directory once more.
    paths = [str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    rest = argv[1:] if package == argv[0] else argv
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-c", START.format(package=package), *rest])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marlin",
        description="4-bit checkpoints for Marlin's kernels: make, convert, inspect, measure.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", title="commands")
    for add in (add_info, add_convert, add_elsewhere):
        add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns the exit status.

    2 is for input that cannot be used, and for operators that do not load: `info` alone works then,
    says why, and returns 1.
    """
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in ELSEWHERE:
            return run_elsewhere(argv)
        args = make_parser().parse_args(argv)
        return args.run(args)
    except (ValueError, OSError, ImportError) as error:  # CheckpointError is a ValueError
        print(f"marlin: error: {str(error).removeprefix('marlin: ')}", file=sys.stderr)
        return 2


def is_running() -> bool:
    """Whether this process is `marlin …` or `python -m marlin …`, as of `import marlin`."""
    argv = getattr(sys, "argv", None) or [""]
    if argv[0] == "-m":  # what comes in place of the module's path while its package is imported
        return sys.orig_argv[-len(argv)].removeprefix("-m") == "marlin"
    return Path(argv[0]).name == "marlin"
