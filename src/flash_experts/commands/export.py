"""``flash-experts export``."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, add_overwrite, command_parser, print_result
from flash_experts.files import check_out_folder

FORMATS = {"hub": "a folder that transformers loads without flash-experts, with trust_remote_code=True"}


def run(args: Namespace) -> None:
    """Write a model for use without flash-experts: hub, a folder with the code that it needs."""
    from flash_experts.models.hub_export import export_for_hub

    check_out_folder(args.out, args.overwrite, args.model)
    files = export_for_hub(args.model, Path(args.out), args.overwrite)
    print_result(args, {"out": args.out, "code": files}, f"{args.out}: {args.model} with {', '.join(files)}")


def make_parser() -> CommandParser:
    parser = command_parser("export", run)
    formats = "; ".join(f"{name}: {what}" for name, what in FORMATS.items())
    parser.add_argument("format", choices=tuple(FORMATS), help=formats)
    parser.add_argument("model", help="model folder or hub id of an MoE model")
    parser.section("Output")
    parser.add_argument("--out", required=True, help="output folder")
    add_overwrite(parser)
    return parser
