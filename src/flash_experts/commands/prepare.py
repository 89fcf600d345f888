"""``flash-experts prepare``."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, command_parser, print_result


def run(args: Namespace) -> None:
    """Clean card names and split them into data/mtg/*.jsonl, with meta.json."""
    from flash_experts.data.prepare import prepare

    meta = prepare(args.source, Path(args.out), include=args.include)
    counts = ", ".join(f"{count:,} {split}" for split, count in meta["counts"].items())
    print_result(args, meta, f"{args.out}: {counts}")


def make_parser() -> CommandParser:
    parser = command_parser("prepare", run)
    parser.add_argument("--source", default="embedded", help="embedded, or a csv, json, jsonl or txt file of cards")
    parser.add_argument("--out", default="data/mtg", help="folder to write")
    parser.add_argument("--include", type=list[str], default=[], help="[jokes,franchises]: keep what is left out")
    return parser
