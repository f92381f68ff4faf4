"""The options of ``marlin quantize`` and ``marlin eval``, with help that a newcomer can follow."""

import argparse
import inspect
from pathlib import Path

import torch

from . import calibration, solver
from .hessian import PRODUCTS, Hessian
from .plan import GROUP_SIZES, PER_COLUMN

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
SOLVER_HELP = {
    "clip": "search each group's scale; without, its largest weight decides",
    "full_range": "try scales of either sign, so that the largest weight may use code -8",
    "order": "round inputs that matter most first; the checkpoint is no different for it",
    "refit": "fit the scales to the codes once these are known",
    "sweeps": "times that codes are looked at again once all of them are known",
    "guard": "layers that would lose less by the published algorithm get what that finds",
    "metric": "by what loss a scale is chosen",
    "damping": "of the second moments, relative to their mean diagonal",
    "products": "what layers' inputs are rounded to for their second moments; own: not at all",
}
CHOICES = {"metric": solver.METRICS, "products": PRODUCTS}
MODEL_HELP = "a directory, a Hugging Face hub id, or a .gguf file"


def add_quantize(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)
    parser.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="a directory, new or empty"
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the checkpoint that DIR has"
    )
    add_device(parser)

    what = parser.add_argument_group("what to quantize, and how")
    what.add_argument(
        "--group-size",
        type=int,
        default=128,
        choices=sorted((PER_COLUMN, *GROUP_SIZES)),
        help="inputs that share a scale: fewer are more exact and take more memory; "
        "-1: one scale per output (default: 128)",
    )
    what.add_argument("--bits", type=int, default=4, choices=[4], help="bits per weight")
    what.add_argument(
        "--method",
        default="gptq",
        choices=["gptq", "rtn"],
        help="gptq fits the rounding to calibration text; rtn rounds to nearest, which is quick, "
        "needs no text and loses more (default: gptq)",
    )
    what.add_argument(
        "--skip",
        action="append",
        default=[],
        metavar="PATTERN",
        help="leave layers whose dotted name matches (like '*.down_proj') in full precision; "
        "may be repeated",
    )
    what.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of what stays unpacked (default: as stored if 16-bit, else float16)",
    )

    text = parser.add_argument_group("calibration text, of which more and closer to use is better")
    text.add_argument(
        "--calibration",
        default=calibration.BUILTIN,
        metavar="FILE_OR_DATASET",
        help="a text file, a .jsonl file with a field 'text', a dataset NAME[:CONFIG][:SPLIT] for "
        "the datasets package, or 'pydoc': Python's own reference (default)",
    )
    text.add_argument(
        "--tokens",
        type=positive,
        help=f"to calibrate with (default: {calibration.TOKENS_PER_INPUT} per input of the widest "
        f"layer, at most {calibration.MOST_TOKENS}; fewer if the text has no more)",
    )
    text.add_argument("--nsamples", type=positive, help="no more samples than this")
    text.add_argument(
        "--seqlen",
        type=positive,
        default=2048,
        help="longest sample, in tokens; documents keep their own ends (default: 2048)",
    )
    text.add_argument("--seed", type=int, default=0, help="which samples are drawn (default: 0)")

    add_solver_options(
        parser.add_argument_group("the solver; the README says how the defaults were chosen")
    )

    trouble = parser.add_argument_group("when something goes wrong")
    again = trouble.add_mutually_exclusive_group()
    again.add_argument(
        "--resume",
        action="store_true",
        help="go on after the last layer that an interrupted run with the same settings finished",
    )
    again.add_argument(
        "--restart", action="store_true", help="throw away what an earlier run finished"
    )
    trouble.add_argument(
        "--skip-bad-samples",
        action="store_true",
        help="leave out samples that make activations NaN or infinite instead of stopping",
    )


def add_eval(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model", metavar="MODEL", help="a 4-bit checkpoint or a model: " + MODEL_HELP
    )
    parser.add_argument(
        "--text",
        required=True,
        help="a text file, a .jsonl file with a field 'text', or 'pydoc': topics of Python's "
        "reference that its calibration text leaves out",
    )
    parser.add_argument(
        "--seqlen", type=positive, default=512, help="tokens per window (default: 512)"
    )
    parser.add_argument("--max-tokens", type=positive, help="stop after about so many tokens")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="to compute in (default: float32 on the CPU, else as stored)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_device(parser)


def solver_options() -> dict[str, inspect.Parameter]:
    """The switches of ``solver.gptq`` and ``Hessian``, by name, that the command line offers."""
    parameters = {
        **inspect.signature(solver.gptq).parameters,
        **inspect.signature(Hessian).parameters,
    }
    return {name: parameters[name] for name in SOLVER_HELP}


def add_solver_options(group) -> None:
    for name, parameter in solver_options().items():
        default = parameter.default
        option = name.replace("_", "-")
        if isinstance(default, bool):
            group.add_argument(
                f"--{option}",
                action=argparse.BooleanOptionalAction,
                default=default,
                help=SOLVER_HELP[name],
            )
        else:
            group.add_argument(
                f"--{option}",
                type=TYPES.get(name, type(default)),
                default=default,
                choices=CHOICES.get(name),
                help=f"{SOLVER_HELP[name]} (default: %(default)s)",
            )


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


def damping(text: str) -> float:
    value = float(text)
    if not 0 <= value <= solver.MAX_DAMPING:
        raise argparse.ArgumentTypeError(f"expected 0 to {solver.MAX_DAMPING:g}, got {text}")
    return value


def sweeps(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected 0 or more, got {text}")
    return value


TYPES = {"damping": damping, "sweeps": sweeps}  # of options that not every number will do for
