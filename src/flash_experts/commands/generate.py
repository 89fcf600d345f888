"""``flash-experts generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, command_parser


def run(args: Namespace) -> None:
    """Make up names for a card. None of them is a real card's."""
    from flash_experts import NameGenerator

    wanted: tuple[str, ...] = ("count", "colors", "mana_value", "preset", "temperature", "top_k", "top_p", "min_p")
    wanted += ("repetition_penalty", "starts_with", "max_words", "max_length", "seed", "batch_size")
    names = NameGenerator.from_pretrained(args.model, args.device).generate(
        type_line=args.type, banned_words=args.ban, **{name: args[name] for name in wanted}
    )
    if args.json:
        from dataclasses import asdict

        print(json.dumps([asdict(name) for name in names], indent=2, ensure_ascii=False))
    elif sys.stdout.isatty():
        _print_names(names)
    else:
        print("\n".join(name.text for name in names))


def _print_names(names: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "log-probability", "nearest card", "similarity")
    for name in names:
        table.add_row(name.text, f"{name.log_prob:.1f}", name.nearest_card, f"{name.similarity:.2f}")
    Console().print(table)


def make_parser() -> CommandParser:
    parser = command_parser("generate", run)
    parser.add_argument("--model", default="models/quickstart", help="model folder or hub id")
    parser.add_argument("--count", type=int, default=20, help="how many names")
    parser.add_argument("--type", type=str | None, default=None, help='such as "Legendary Creature — Goblin"')
    parser.add_argument("--colors", type=str | None, default=None, help="letters of WUBRG, or C for colorless")
    parser.add_argument("--mana_value", type=int | None, default=None, help="such as 3")
    parser.add_argument("--preset", default="balanced", help="conservative, balanced or creative")
    parser.add_argument("--temperature", type=float | None, default=None, help="over the preset's, as the next four")
    parser.add_argument("--top_k", type=int | None, default=None, help="0 keeps all tokens")
    parser.add_argument("--top_p", type=float | None, default=None, help="1 keeps all tokens")
    parser.add_argument("--min_p", type=float | None, default=None, help="0 keeps all tokens")
    parser.add_argument("--repetition_penalty", type=float | None, default=None, help="1 is none")
    parser.add_argument("--starts_with", type=str | None, default=None, help="letters that names begin with")
    parser.add_argument("--max_words", type=int | None, default=None, help="words at most")
    parser.add_argument("--max_length", type=int | None, default=None, help="characters at most")
    parser.add_argument("--ban", type=list[str], default=[], help="[word,word]: words that no name has")
    parser.add_argument("--seed", type=int | None, default=None, help="the same seed gives the same names")
    parser.add_argument("--batch_size", type=int, default=64, help="names computed at once")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, cuda:1; the best there is")
    return parser
