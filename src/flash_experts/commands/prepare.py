"""``flash-experts prepare``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, add_overwrite, command_parser, print_result
from flash_experts.files import check_out_folder


def run(args: Namespace) -> None:
    """Clean card names and split them into training, validation and test sets."""
    from flash_experts.data.prepare import prepare

    check_out_folder(args.out, overwrite=True)  # prepare itself checks each file
    meta = prepare(args.source, Path(args.out), include=args.include, overwrite=args.overwrite, only=args.only)
    print_result(args, meta, summary(meta, args.out))


def summary(meta: dict[str, Any], out: str) -> str:
    """Text summary: counts, dropped names, unreadable values and changes."""
    counts = ", ".join(f"{count:,} {split}" for split, count in meta["counts"].items())
    lines = [f"{out}: {counts}", f"source: {meta['source']}, {meta['version']}"]
    if meta["dropped"]:
        lines.append("left out: " + ", ".join(f"{count:,} {reason}" for reason, count in meta["dropped"].items()))
    for column, entry in meta["unread"].items():
        what = "rows without a name" if column == "name" else f"unknown, because {column} could not be read"
        lines.append(f"{entry['count']:,} {what} (first: {entry['first']})")
    if meta["up_to_date"]:
        lines.append("nothing to do: the files are up to date")
    elif changes := meta["changes"]:
        since = changes["since"]
        lines.append(
            f"changed since {since['source']}, {since['version']}: "
            f"{_some(changes['added'], 'added', changes['added_names'])}, "
            f"{_some(changes['removed'], 'removed', changes['removed_names'])}"
        )
    return "\n".join(lines)


def _some(count: int, verb: str, names: list[str]) -> str:
    """``12 names added (Arbor Sage, ...)``."""
    shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
    return f"{count:,} names {verb}" + (f" ({shown})" if names else "")


def make_parser() -> CommandParser:
    parser = command_parser("prepare", run)
    sources = (
        "source: embedded, scryfall, mtgjson, mtgjson-printings (with rarities), or a csv, tsv, json, jsonl or txt file"
    )
    parser.section("The cards")
    parser.add_argument("--source", default="embedded", help=sources)
    parser.add_argument(
        "--include", type=list[str], default=[], help="cards to keep that are otherwise left out: jokes, franchises"
    )
    only = "cards to take alone: franchises (Universes Beyond) or jokes (default: all but those)"
    parser.add_optional("--only", only)
    parser.section("Output")
    parser.add_argument("--out", default="data/mtg", help="output folder")
    add_overwrite(parser)
    return parser
