"""``flash-experts configs``."""

from __future__ import annotations

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, add_overwrite, command_parser, print_result
from flash_experts.files import check_out_file, whole_file
from flash_experts.released import configurations, summary_of


def run(args: Namespace) -> None:
    """List the configurations for --config, or print or copy one, to edit it."""
    known = configurations()
    if args.name is None:
        if args.out is not None:
            raise ValueError(f"--out copies one configuration: name it ({', '.join(known)})")
        summaries = {name: summary_of(path) for name, path in known.items()}
        width = max(map(len, summaries), default=0) + 2
        print_result(args, summaries, "\n".join(f"{name:{width}}{text}" for name, text in summaries.items()))
        return
    content = known[args.name].read_text("utf-8")
    if args.out is None:
        print_result(args, {"name": args.name, "content": content}, content.rstrip())
        return
    check_out_file(args.out, args.overwrite)
    with whole_file(args.out) as path:
        path.write_text(content, "utf-8")
    print_result(args, {"name": args.name, "out": args.out}, f"{args.out}: a copy of {args.name}")


def make_parser() -> CommandParser:
    parser = command_parser("configs", run)
    names = tuple(configurations())
    parser.add_argument("name", nargs="?", choices=names, help="configuration to print or copy (default: list all)")
    parser.section("Output")
    parser.add_optional("--out", "file to copy it to (default: print it)")
    add_overwrite(parser)
    return parser
