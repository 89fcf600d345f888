"""``flash-experts evaluate``."""

from __future__ import annotations

import sys
from functools import partial

from jsonargparse import Namespace

from flash_experts.commands import common
from flash_experts.terminal import say


def run(args: Namespace) -> None:
    """Evaluate a model: bits per character on held-out names, control, novelty, speed."""
    from flash_experts.evaluation import evaluate as measure
    from flash_experts.evaluation import evaluate_names, format_evaluation, format_names, read_names

    common.check_samples(args)
    if args.lists:
        _evaluate_lists(args)
        return
    if args.names is not None:
        why = "--names measures the names of a file alone"
        common.refuse_unused(make_parser(), args, ("samples", "max_names", "seed"), why)
        named = evaluate_names(read_names(args.names), args.model, args.data, device=args.device)
        common.print_result(args, named.to_json(), format_names(named))
        return
    result = measure(
        args.model, args.data, samples=args.samples, seed=args.seed, max_names=args.max_names, device=args.device
    )
    common.print_result(args, result.to_json(), format_evaluation(result))


def _evaluate_lists(args: Namespace) -> None:
    from flash_experts.evaluation import evaluate_lists, format_lists
    from flash_experts.evaluation.evaluate import is_baseline

    if args.names is not None:
        make_parser().error("--lists measures the model's own lists: leave out --names")
    common.refuse_unused(make_parser(), args, ("samples", "max_names"), "--lists has a number of names of its own")
    if is_baseline(args.model):
        make_parser().error("--lists needs a model that `generate` can use, not a baseline")
    report = partial(say, file=sys.stderr)
    found = evaluate_lists(args.model, args.data, seed=args.seed, device=args.device, progress=report)
    common.print_result(args, [one.to_json() for one in found], format_lists(found))


def make_parser() -> common.CommandParser:
    parser = common.command_parser("evaluate", run)
    parser.add_argument(
        "model",
        help="model folder or hub id, with +ngram to mix it with the n-gram baseline; or ngram, swap: baselines",
    )
    parser.section("What is measured")
    parser.add_optional(
        "--names",
        "file of names to measure instead of a model's, one per line or as generate writes them (default: none)",
    )
    lists = "measure lists of 20 names for 50 requests at each quality of generate, next to real names"
    parser.add_argument("--lists", action="store_true", help=lists)
    common.add_measuring_options(parser)
    return parser
