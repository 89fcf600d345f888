"""``flash-experts plot``."""

from __future__ import annotations

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, add_out_file, command_parser, out_file, print_result

_CURVES = "curves.png"


def run(args: Namespace) -> None:
    """Plot the metrics of training runs side by side."""
    from flash_experts.evaluation.curves import read_curves, write_curves

    out = out_file(args, _CURVES)
    curves = read_curves(args.runs)
    if out is not None:
        write_curves(curves, out)
    print_result(args, curves, str(out))


def make_parser() -> CommandParser:
    parser = command_parser("plot", run)
    parser.add_argument("runs", nargs="+", help="run folders or metrics.jsonl files")
    parser.section("Output")
    add_out_file(parser, _CURVES, "output file: .png, .svg or .pdf")
    return parser
