"""``flash-experts inspect``."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Literal

from jsonargparse import Namespace

from flash_experts.commands import common

if TYPE_CHECKING:
    from flash_experts.data.cards import Card

_COUNT = 500
_PAGE = "inspect.html"


def run(args: Namespace) -> None:
    """Show which experts take which tokens, and test for specialization."""
    if args.count is not None and args.count < 1:
        raise ValueError(f"--count must be 1 or more, not {args.count}")
    if args.show < 0:
        raise ValueError(f"--show must be 0 or more, not {args.show}")
    if args.names is not None:
        common.refuse_unused(make_parser(), args, ["split"], "--names inspects the names of a file")
    page = common.out_file(args, _PAGE, also=(".json",))

    from flash_experts.evaluation.report import write_pages
    from flash_experts.evaluation.routing.maps import check_has_experts, inspect_router
    from flash_experts.evaluation.routing.report import format_router, render_router_report

    check_has_experts(args.model)
    names, cards = _names(args)
    prompted = args.attributes == "all"
    result = inspect_router(
        args.model, names, cards, prompted=prompted, shown=args.show, seed=args.seed, device=args.device
    )
    if page is not None:
        numbers = json.dumps(result.to_json(), ensure_ascii=False)
        write_pages({page: render_router_report(result), page.with_suffix(".json"): numbers})
    common.print_result(args, result.to_json(), f"{format_router(result)}\n\nThe page: {page}")


def _names(args: Namespace) -> tuple[list[str], list[Card] | None]:
    if args.names is not None:
        from flash_experts.evaluation import read_names

        return read_names(args.names)[: args.count], None
    from flash_experts.data.prepare import load_split

    cards = load_split(args.data, args.split)
    cards = random.Random(f"inspect/{args.seed}").sample(cards, min(args.count or _COUNT, len(cards)))
    return [card.name for card in cards], cards


def make_parser() -> common.CommandParser:
    parser = common.command_parser("inspect", run)
    parser.add_argument("model", help="model folder or hub id of an MoE model")
    parser.section("The names")
    parser.add_optional(
        "--names", "file of names to inspect instead of cards, one per line or as generate writes them (default: none)"
    )
    parser.add_argument("--data", default="data/mtg", help="folder written by prepare")
    parser.add_argument("--split", default="validation", help="split of the data: train, validation, test or test_iid")
    parser.add_optional("--count", f"number of names to inspect (default: {_COUNT} of the data, all of --names)", int)
    parser.add_argument("--show", type=int, default=24, help="number of names shown token by token")
    parser.add_argument(
        "--attributes",
        type=Literal["all", "none"],
        default="all",
        help="attributes in the prompts; all: type, colors and mana value; none: unconditional",
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the choice of names and of shuffling")
    parser.section("Output")
    common.add_out_file(parser, _PAGE, "page file, with its numbers next to it as .json")
    parser.section("The device")
    common.add_device(parser)
    return parser
