"""Measure Marlin on this machine: `marlin bench SUBCOMMAND`, or `python -m bench SUBCOMMAND`."""

import argparse
from pathlib import Path

GROUP_SIZES = (-1, 32, 64, 128)


def shape_list(text: str) -> list[tuple[int, int]]:
    """`4096x4096,8192x8192` -> [(k, n), …]."""
    try:
        shapes = [tuple(int(size) for size in item.split("x")) for item in text.split(",")]
        if any(len(shape) != 2 or min(shape) <= 0 for shape in shapes):
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected KxN[,KxN…], such as 4096x11008, got {text!r}"
        ) from None
    return shapes


def int_list(text: str) -> list[int]:
    """`1,16,64` -> [1, 16, 64]."""
    try:
        values = [int(item) for item in text.split(",")]
        if min(values) <= 0:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected numbers ≥ 1, got {text!r}") from None
    return values


def names(text: str) -> list[str]:
    return text.split(",")


def add_common(parser, *, quick: str) -> None:
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--out", type=Path, metavar="DIR",
                        help="folder for the results (default: bench/results)")  # fmt: skip


def add_problem(parser) -> None:
    parser.add_argument("--group-size", type=int, default=128, choices=GROUP_SIZES,
                        help="rows of the weight per scale; -1: one scale per column")  # fmt: skip
    parser.add_argument("--dtype", default="float16", choices=("float16", "bfloat16"),
                        help="of activations, scales and the baseline")  # fmt: skip
    parser.add_argument("--config", type=names, default=["auto"], metavar="NAME[,NAME…]",
                        help="kernel configurations; auto: the operator's own choice")  # fmt: skip


def add_gemm(commands) -> None:
    parser = commands.add_parser("gemm", help="one layer at a time against cuBLAS FP16 and others")
    add_common(parser, quick="four shapes, m = 1…256, under 45 s")
    add_problem(parser)
    parser.add_argument("--shapes", type=shape_list, metavar="KxN,…")
    parser.add_argument("--rows", type=int_list, metavar="M,…", help="batch sizes m")
    parser.add_argument("--no-fp16", action="store_true", help="leave out the FP16 baseline")
    parser.add_argument("--sustained", action="store_true",
                        help="loop a few cells for --seconds each, log the clock")  # fmt: skip
    parser.add_argument("--seconds", type=float, help="per sustained loop (default: 30)")
    parser.set_defaults(module="gemm")


def add_layer(commands) -> None:
    parser = commands.add_parser("layer", help="whole decoder blocks, chained, against cuBLAS FP16")
    add_common(parser, quick="Llama-2-7B at four batch sizes")
    add_problem(parser)
    parser.add_argument("--models", type=names, metavar="NAME,…",
                        help="Llama-2-7B, Llama-3-8B, Llama-3-70B (default: these), Qwen2-7B, "
                        "Mistral-7B")  # fmt: skip
    parser.add_argument("--rows", type=int_list, metavar="M,…", help="batch sizes m")
    parser.set_defaults(module="layer")


def add_cpu(commands) -> None:
    parser = commands.add_parser("cpu", help="the CPU backend against float32 on the same cores")
    add_common(parser, quick="three batch sizes, seconds")
    parser.add_argument("--group-size", type=int, default=128, choices=GROUP_SIZES)
    parser.add_argument("--shapes", type=shape_list, metavar="KxN", help="default: 4096x4096")
    parser.add_argument("--rows", type=int_list, metavar="M,…", help="batch sizes m")
    parser.set_defaults(module="cpu")


def add_pack(commands) -> None:
    parser = commands.add_parser("pack", help="ms to pack, unpack and dequantize a layer")
    add_common(parser, quick="fewer repeats")
    parser.add_argument("--shapes", type=shape_list, metavar="KxN", help="default: 4096x11008")
    parser.set_defaults(module="pack")


def add_convert(commands) -> None:
    parser = commands.add_parser("convert", help="seconds and memory of converting a checkpoint")
    add_common(parser, quick="two decoder blocks instead of 32")
    parser.add_argument("--dir", type=Path, metavar="DIR",
                        help="for 8 GB of temporary files")  # fmt: skip
    parser.set_defaults(module="convert")


def add_call(commands) -> None:
    parser = commands.add_parser("call", help="host time of an eager call against F.linear")
    add_common(parser, quick="fewer repeats")
    parser.set_defaults(module="call")


def add_quantize(commands) -> None:
    parser = commands.add_parser("quantize", help="seconds and memory that GPTQ takes, by phase")
    add_common(parser, quick="two layers of each, an eighth of the tokens")
    parser.add_argument("--models", type=names, metavar="NAME,…",
                        help="shapes, with random weights: Llama-3-8B, Llama-3-70B (default: "
                        "these), SmolLM2-135M, tiny")  # fmt: skip
    parser.add_argument("--layers", type=int, metavar="N",
                        help="how many are run, the rest is extrapolated (default: all; of "
                        "Llama-3-70B 4)")  # fmt: skip
    parser.add_argument("--tokens", type=int, help="of calibration (default: 128 x 2048)")
    parser.add_argument("--group-size", type=int, default=128, choices=GROUP_SIZES)
    parser.add_argument("--memory", type=float, metavar="GB",
                        help="of the GPU, and no more (default: 25 for Llama-3-70B)")  # fmt: skip
    parser.add_argument("--dir", type=Path, metavar="DIR",
                        help="where checkpoints lie for a while (default: /tmp)")  # fmt: skip
    parser.add_argument("--verbose", action="store_true", help="a line for each linear")
    parser.set_defaults(module="quantize")


def add_quality(commands) -> None:
    parser = commands.add_parser("quality", help="what 4 bits cost real models, by method")
    add_common(parser, quick="four rows per model, little text")
    parser.add_argument("--models", type=names, metavar="MODEL,…",
                        help="directories, hub ids or .gguf files (default: SmolLM2-135M-Instruct "
                        "and all-MiniLM-L6-v2 if their packages are installed)")  # fmt: skip
    parser.add_argument(
        "--only", metavar="NAME;…", help="of the rows these alone, like 'RTN;published;default'"
    )
    parser.add_argument("--texts", choices=("usual", "other"), default="usual",
                        help="usual: of Python's reference, and docstrings; other: calibrated with "
                        "docstrings, judged by licences and code, by which no default was chosen "
                        "(default: usual)")  # fmt: skip
    parser.add_argument("--budget", type=float, metavar="SECONDS",
                        help="start no row after so long; the most telling come first")  # fmt: skip
    parser.add_argument("--jobs", type=int, default=1, metavar="N",
                        help="processes that share the GPU, each with a copy of the models; one "
                        "alone leaves most of a large GPU idle")  # fmt: skip
    parser.set_defaults(module="quality")


def add_tune(commands) -> None:
    parser = commands.add_parser("tune", help="find the fastest configurations of an engine")
    add_common(parser, quick="two batch sizes")
    parser.add_argument("--engine", choices=("sm90", "sm80"), default="sm90",
                        help="sm80: that of 8.x cards, for which this GPU stands in (default: "
                        "sm90)")  # fmt: skip
    parser.add_argument("--shapes", type=shape_list, metavar="KxN,…")
    parser.add_argument("--rows", type=int_list, metavar="M,…", help="batch sizes m")
    parser.add_argument("--write", action="store_true",
                        help="make the engine's tables of csrc/dispatch from it")  # fmt: skip
    parser.set_defaults(module="tune")


def add_plot(commands) -> None:
    parser = commands.add_parser("plot", help="draw a gemm result: speed-up, percent of floor")
    parser.add_argument("results", type=Path, nargs="*", metavar="gemm.json",
                        help="default: every bench/results/*/gemm.json")  # fmt: skip
    parser.add_argument("--format", default="png", choices=("png", "svg"))
    parser.set_defaults(module="plot")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="marlin bench",
        description="Measure speed and quality on this machine. Results go to bench/results.",
        epilog="example: marlin bench gemm --quick; `marlin bench SUBCOMMAND --help` says more",
    )
    commands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for add in (
        add_gemm, add_layer, add_cpu, add_pack, add_convert, add_call, add_quantize, add_quality,
        add_tune, add_plot,
    ):  # fmt: skip
        add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    # Imported only now: `--help` needs no Torch, and `plot` alone needs matplotlib.
    module = __import__(f"bench.{args.module}", fromlist=["run"])
    return module.run(args)
