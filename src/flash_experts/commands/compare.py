"""``flash-experts compare``."""

from __future__ import annotations

import json

from jsonargparse import Namespace

from flash_experts.commands import common
from flash_experts.extras import require
from flash_experts.files import check_out_folder

_REPORT = "report.html"


def run(args: Namespace) -> None:
    """Compare models on the same data and write a report."""
    from flash_experts.evaluation import compare as measure
    from flash_experts.evaluation import format_comparison, write_plots
    from flash_experts.evaluation.report import render_report, write_pages

    report = common.out_file(args, _REPORT, also=(".json",))
    common.check_samples(args)
    if report is not None:
        require("the report of compare", "matplotlib")
    if args.png is not None:
        check_out_folder(args.png, args.overwrite, option="--png")
    result = measure(
        args.models, args.data, samples=args.samples, seed=args.seed, max_names=args.max_names, device=args.device
    )
    if report is not None:
        metrics = json.dumps(result.to_json(), indent=2, ensure_ascii=False)
        write_pages({report: render_report(result), report.with_suffix(".json"): metrics})
    text = f"{format_comparison(result)}\n\nThe report: {report}"
    if args.png is not None:
        text += "\nIts plots: " + ", ".join(map(str, write_plots(result, args.png)))
    common.print_result(args, result.to_json(), text)


def make_parser() -> common.CommandParser:
    parser = common.command_parser("compare", run)
    parser.add_argument(
        "models", nargs="+", help="model folders, hub ids, MODEL+ngram, or the baselines ngram and swap"
    )
    parser.section("What is measured")
    common.add_measuring_options(parser)
    parser.section("Output")
    common.add_out_file(parser, _REPORT, "report file, with its numbers next to it as .json")
    parser.add_optional("--png", "folder for the plots as PNG files (default: none)")
    return parser
