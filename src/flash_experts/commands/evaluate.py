"""``flash-experts evaluate``."""

from __future__ import annotations

from jsonargparse import Namespace

from flash_experts.commands.common import (
    CommandParser,
    add_measuring_options,
    check_samples,
    command_parser,
    print_result,
)


def run(args: Namespace) -> None:
    """Evaluate a model: bits per character on held-out names, control, novelty, speed."""
    from flash_experts.evaluation import evaluate as measure
    from flash_experts.evaluation import evaluate_names, format_evaluation, format_names, read_names

    check_samples(args)
    if args.names is not None:
        named = evaluate_names(read_names(args.names), args.model, args.data, device=args.device)
        print_result(args, named.to_json(), format_names(named))
        return
    result = measure(
        args.model, args.data, samples=args.samples, seed=args.seed, max_names=args.max_names, device=args.device
    )
    print_result(args, result.to_json(), format_evaluation(result))


def make_parser() -> CommandParser:
    parser = command_parser("evaluate", run)
    parser.add_argument("model", help="model folder, hub id, or ngram")
    parser.add_argument(
        "--names",
        type=str | None,
        default=None,
        help="file of names to measure instead of a model's, one per line (default: none)",
    )
    add_measuring_options(parser)
    return parser
