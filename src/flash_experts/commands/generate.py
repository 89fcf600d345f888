"""``flash-experts generate``."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from jsonargparse import Namespace

from flash_experts.commands import common
from flash_experts.files import check_out_file, whole_file
from flash_experts.generation.name_files import BY_SUFFIX, Format
from flash_experts.generation.request import CARD, MODEL, OUTPUT, RULES, SAMPLING, UNGUIDED, NameRequest, Sampling
from flash_experts.options import defaults_of, kind_of, options_of, type_of
from flash_experts.released import default_model
from flash_experts.terminal import ProgressBar, escape_unencodable, one_line, say

if TYPE_CHECKING:
    from flash_experts.generation import GeneratedName
    from flash_experts.generation.card_files import CardRow
    from flash_experts.generation.generator import NameGenerator

_EACH_OF_A_SET = 5  # names for each card of a set: 20 for each of 250 cards are more than anyone reads
_MOST_REPORTED = 10  # rows of a set that are not understood
_OF_SPLIT = ("attribute_dropout", "data", "top_logits")  # options of --attributes-from alone
_RANDOM = ("count", "seed", "batch_size")  # what --attributes-from takes of a request besides the sampling


def run(args: Namespace) -> None:
    """Make up names for a card. None of them is a real card's."""
    if args.count is None:
        args.count = _EACH_OF_A_SET if args.cards is not None else defaults_of(NameRequest)["count"]
    if args.attributes_from is not None:
        _run_for_cards(args)
        return
    common.refuse_unused(make_parser(), args, _OF_SPLIT, "only --attributes-from uses it")
    if args.cards is not None:
        _run_for_set(args)
        return
    format, request = _format_of(args), _request_of(args)
    from flash_experts.generation.generator import completed_attributes
    from flash_experts.generation.name_files import NamedCard, write_mse, write_names

    generator = _generator(args)
    card = completed_attributes(request)
    names: Iterable[GeneratedName] = generator.answer(request)
    is_table = args.out is None and format is None and sys.stdout.isatty()
    if args.rank or is_table or (args.out is None and format == "json"):  # nothing is printed before the last name
        with ProgressBar("names", 0, args.count) as bar:
            names = list(bar.count(names))
        if args.rank:
            names.sort(key=lambda name: -name.score)
    if is_table:
        _print_table(names)
        return
    if args.out is None:
        write_names(names, card, sys.stdout, format or "text", args.raw_cells)
        return
    with _out_file(args.out, format) as file, ProgressBar("names", 0, args.count) as bar:
        if format == "mse":
            written = write_mse((NamedCard(name.text, card) for name in bar.count(names)), file)
        else:
            written = write_names(bar.count(names), card, file, format or "text", args.raw_cells)
    say(f"{_count(written, 'name')} written to {args.out}", sys.stderr)


def _run_for_set(args: Namespace) -> None:
    for name, option in options_of(NameRequest).items():
        if option.group == CARD and args[option.flag or name] is not None:
            make_parser().error(f"--cards has each card's own attributes: leave out --{option.flag or name}")
    common.refuse_unused(make_parser(), args, ["rank"], "--cards keeps the order of the cards")
    if args.out is None:
        make_parser().error("--cards writes a file: give --out NAMES.csv")
    format, request = _format_of(args), _request_of(args)
    rows = _rows_of(args.cards)
    from flash_experts.generation.card_sets import cards_of, name_rows, write_set
    from flash_experts.generation.name_files import write_mse

    given = {name: getattr(request, name) for name in options_of(NameRequest) if name not in ("count", "seed")}
    generator = _generator(args)
    seed = secrets.randbits(31) if request.seed is None else request.seed
    with ProgressBar("cards", 0, len(rows)) as bar:
        named = list(bar.count(name_rows(generator, rows, request.count, seed, **given)))
    with _out_file(args.out, format) as file:
        if format == "mse":
            write_mse(cards_of(named), file)
        else:
            write_set(named, file, format or "text", args.raw_cells)
    new, bad = sum(bool(one.names) for one in named), sum(bool(row.problem) for row in rows)
    say(f"{_count(new, 'new name')} for {_count(len(named), 'card')}, written to {args.out}", sys.stderr)
    for one in named:
        if one.problem and not one.row.problem:
            say(f"{one.row.where}: no name: {one.problem}", sys.stderr)
    if bad:
        raise ValueError(f"{_not_understood(args.cards, bad)}: correct them in {args.out} and name that file")


def _rows_of(path: str) -> list[CardRow]:
    """The cards of a set, after a line for each of the first that are not understood; a ValueError if all are not."""
    from flash_experts.generation.card_files import read_card_rows

    rows = read_card_rows(path)
    bad = [f"{row.where}: {row.problem}" for row in rows if row.problem]
    if len(bad) == len(rows) == 1:
        raise ValueError(bad[0])
    more = [f"and {len(bad) - _MOST_REPORTED} more"] if len(bad) > _MOST_REPORTED else []
    for problem in [*bad[:_MOST_REPORTED], *more]:
        say(common.shortened(one_line(problem)), sys.stderr)
    if all(row.name or row.problem for row in rows) and bad:
        raise ValueError(_not_understood(path, len(bad)))
    return rows


def _not_understood(path: str, bad: int) -> str:
    return f"{path}: {_count(bad, 'row')} {'is' if bad == 1 else 'are'} not understood"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


@contextmanager
def _out_file(out: str, format: Format | None) -> Iterator[Any]:
    """Opens the file to write: bytes for "mse", else text."""
    text: dict[str, Any] = {"mode": "w", "encoding": "utf-8", "newline": ""}
    with whole_file(out) as path, path.open(**({"mode": "wb"} if format == "mse" else text)) as file:
        escape_unencodable(file)  # JSON may have half a character, such as \ud83d
        yield file


def _generator(args: Namespace) -> NameGenerator:
    import torch

    from flash_experts import NameGenerator

    if args.dtype == "bfloat16":
        from flash_experts.kernels.cpu import has_bfloat16
        from flash_experts.models.loading import resolve_device

        if resolve_device(args.device).type == "cpu" and not has_bfloat16():
            say("this processor computes bfloat16 in software: float32 is faster here, and is used", sys.stderr)
            args.dtype = "float32"
    return NameGenerator.from_pretrained(args.model, args.device, getattr(torch, args.dtype))


def _request_of(args: Namespace) -> NameRequest:
    given = {name: args[known.flag or name] for name, known in options_of(NameRequest).items()}
    if args.raw and (args.best_of is not None or args.quality != defaults_of(NameRequest)["quality"]):
        make_parser().error("--raw gives samples as they come: leave out --quality and --best-of")
    if args.raw:
        given["quality"] = "fast"
    if args.raw or args.attributes_from is not None:  # the model's own distribution, unless something else is given
        given = UNGUIDED | {name: value for name, value in given.items() if value is not None}
    request = NameRequest.of(**given)
    request.sampling()  # both raise a ValueError before the model is loaded, which takes seconds
    request.attributes()
    return request


def _run_for_cards(args: Namespace) -> None:
    """Names for the attributes of a split's cards, as training data."""
    taken = {*_RANDOM, "preset", "presets", *options_of(Sampling)}
    for name, option in options_of(NameRequest).items():
        flag = option.flag or name
        if name not in taken and args[flag] not in (defaults_of(NameRequest)[name], []):
            make_parser().error(
                f"--attributes-from takes each card's own attributes and no filters: leave out --{flag}"
            )
    common.refuse_unused(make_parser(), args, ["cards"], "--attributes-from takes the cards of a split")
    common.refuse_unused(make_parser(), args, ["rank"], "--attributes-from writes names in the order of the cards")
    common.refuse_unused(make_parser(), args, ["raw_cells"], "--attributes-from writes no CSV")
    if args.out is None or Path(args.out).suffix.lower() != ".jsonl" or args.json or args.format:
        make_parser().error("--attributes-from writes a .jsonl file: give --out NAMES.jsonl alone")
    check_out_file(args.out, args.overwrite)
    from flash_experts.data.prepare import load_known_names, load_split
    from flash_experts.generation.sampled_names import SampledNames, write_sampled_names
    from flash_experts.models.loading import weights_sha256

    sampling = _request_of(args).sampling()
    request = SampledNames(
        args.count, args.seed or 0, args.attribute_dropout, sampling, args.batch_size, args.top_logits
    )
    args.model = default_model() if args.model is None else args.model
    cards = load_split(args.data, args.attributes_from)
    generator = _generator(args)
    sha256 = weights_sha256(args.model)
    source = {"model": sha256, "data": args.data, "split": args.attributes_from, "dtype": args.dtype}
    known = load_known_names(args.data)

    def report(names: int) -> None:
        say(f"{names:,} of {args.count:,} names", sys.stderr)

    written = write_sampled_names(generator, cards, known, request, Path(args.out), source, report, args.overwrite)
    say(f"{_count(written, 'name')} written to {args.out}", sys.stderr)


def _print_table(names: Iterable[GeneratedName]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flash_experts.generation.name_files import row_of

    table = Table("name", "log-probability", "per character", "nearest card", "similarity")
    for row in map(row_of, names):
        name, nearest = (Text(one_line(row[column] or "")) for column in ("text", "nearest_card"))
        table.add_row(name, f"{row['log_prob']:.1f}", f"{row['score']:.2f}", nearest, f"{row['similarity']:.2f}")
    Console(file=sys.stdout).print(table)


def _format_of(args: Namespace) -> Format | None:
    """The format by option or the file's suffix; None for a table for people and lines for pipes."""
    format: Format | None = args.format
    if args.json and format not in (None, "json"):
        make_parser().error(f"--json and --format {format}: choose one")
    format = "json" if args.json else format
    suffix = "" if args.out is None else Path(args.out).suffix.lower()
    if (format or BY_SUFFIX.get(suffix)) != "csv":
        common.refuse_unused(make_parser(), args, ["raw_cells"], "only CSV has cells")
    if args.out is None:
        if format == "mse":
            make_parser().error("a set of Magic Set Editor is not text: give --out NAMES.mse-set")
        return format
    check_out_file(args.out, args.overwrite)
    if format is None and suffix not in BY_SUFFIX:
        make_parser().error(f"--out {args.out}: the file name must end in {', '.join(BY_SUFFIX)}, or give --format")
    if args.json:
        make_parser().error("--out chooses the format by its suffix: leave out --json")
    return format or BY_SUFFIX[suffix]


def make_parser() -> common.CommandParser:
    parser = common.command_parser("generate", run)
    more = {CARD: _add_data, SAMPLING: _add_rank, RULES: None, OUTPUT: _add_output, MODEL: _add_model}
    for group, add in more.items():
        parser.section(group)
        _add_request(parser, group)
        if add is not None:
            add(parser)
    return parser


def _add_request(parser: common.CommandParser, group: str) -> None:
    """The options of `NameRequest` under one heading, as they are declared."""
    for name, known in options_of(NameRequest).items():
        if known.group != group:
            continue
        flag, kind, default = f"--{known.flag or name}", kind_of(NameRequest, name), defaults_of(NameRequest)[name]
        if name == "count":  # --cards has a default of its own
            help = f"{known.help} (default: {default}; with --cards {_EACH_OF_A_SET} for each card)"
            parser.add_optional(flag, help, int)
        elif kind == "flag":
            parser.add_argument(flag, action="store_true", help=known.help)
        elif kind == "list" and default is not None:
            parser.add_argument(flag, type=list[str], default=[], help=known.help)
        else:  # a list without a default is one text, because its entries may have commas
            hint: Any = str if kind == "list" else type_of(NameRequest, name)
            hint = hint | None if default is None and hint is not str else hint  # a text may be "null"
            parser.add_argument(flag, type=hint, default=default, help=known.help)


def _add_data(parser: common.CommandParser) -> None:
    cards = "CSV or JSON file of a set's cards, all of which get names: --count for each, 5 by default (default: none)"
    parser.add_optional("--cards", cards)
    split = (
        "split, such as train, whose cards are the prompts, for training data, with seed 0 unless given (default: none)"
    )
    parser.add_optional("--attributes_from", split)
    dropout = "probability that an attribute of such a prompt is left out"
    parser.add_argument("--attribute_dropout", type=float, default=0.3, help=dropout)
    parser.add_argument("--data", default="data/mtg", help="folder written by prepare, for --attributes-from")
    top = "most likely tokens of each position to keep next to --out, for distillation with --attributes-from"
    parser.add_argument("--top_logits", type=int, default=0, help=top)


def _add_rank(parser: common.CommandParser) -> None:
    raw = "the model's own samples as they come: --quality fast, without a preset's guidance"
    parser.add_argument("--raw", action="store_true", help=raw)
    parser.add_argument("--rank", action="store_true", help="sort by log-probability per character, most natural first")


def _add_output(parser: common.CommandParser) -> None:
    out = f"file to write: {', '.join(BY_SUFFIX)} (default: print the names)"
    parser.add_optional("--out", out)
    common.add_overwrite(parser)
    formats = "format; mse: Magic Set Editor, cockatrice: its XML (default: by the suffix of --out, else text)"
    parser.add_optional("--format", formats, Format)
    raw = "write CSV cells as they are, without the apostrophe before what a spreadsheet takes for a formula"
    parser.add_argument("--raw_cells", action="store_true", help=raw)


def _add_model(parser: common.CommandParser) -> None:
    model = "model folder or hub id (default: the newest released model)"
    parser.add_optional("--model", model)
    common.add_model_family(parser)
    common.add_device(parser)
    dtype = "data type of the weights; bfloat16, if the processor has it, is faster, and a seed gives other names"
    parser.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32", help=dtype)
