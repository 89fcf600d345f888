"""``flash-experts plot``."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, command_parser, print_result
from flash_experts.files import check_out_file


def run(args: Namespace) -> None:
    """Draw the curves of training runs side by side."""
    from flash_experts.training.curves import check_format, read_curves, write_curves

    out = Path(args.out)
    check_out_file(args.out)
    check_format(out)
    curves = read_curves(args.runs)
    write_curves(curves, out)
    print_result(args, curves, str(out))


def make_parser() -> CommandParser:
    parser = command_parser("plot", run)
    parser.add_argument("runs", nargs="+", help="folders of runs, or metrics.jsonl files")
    parser.add_argument("--out", default="curves.png", help="what to write: .png, .svg, .pdf, .html or .json")
    return parser
