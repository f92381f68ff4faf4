"""The command line: `marlin SUBCOMMAND`, also as `python -m marlin SUBCOMMAND`."""

import argparse
import json


def run_info(args) -> int:
    from marlin import info

    report = info.collect()
    print(json.dumps(report, indent=2) if args.json else info.describe(report))
    return 0


def add_info(commands) -> None:
    parser = commands.add_parser(
        "info", help="what is installed, what runs on this machine, and why the rest does not"
    )
    parser.add_argument("--json", action="store_true", help="for machines")
    parser.set_defaults(run=run_info)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="marlin", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="SUBCOMMAND")
    for add in (add_info,):
        add(commands)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    return args.run(args)
