"""``flash-experts generate``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from jsonargparse import Namespace

from flash_experts.commands.common import (
    CommandParser,
    add_device,
    add_model_family,
    add_overwrite,
    command_parser,
    default_model,
)
from flash_experts.files import check_out_file, whole_file
from flash_experts.plain_text import one_line, say

if TYPE_CHECKING:
    from flash_experts.generation import GeneratedName

# Options that go to NameGenerator under their own name.
_SAME_NAME = (
    *("count", "colors", "mana_value", "rarity", "like", "preset", "presets", "temperature", "top_k", "top_p", "min_p"),
    *("repetition_penalty", "guidance", "starts_with", "ends_with", "contains", "regex", "min_words", "max_words"),
    *(
        "words",
        "min_length",
        "max_length",
        "allow_profanity",
        "allow_real_places",
        "alliterate",
        "min_distance",
        "seed",
    ),
    *("best_of", "best_by", "released", "batch_size"),
)
# What --attributes-from does not take: what is asked of one card, and the filters.
_FOR_ONE_CARD = (
    *("type", "colors", "mana_value", "rarity", "set", "released", "like", "starts_with", "ends_with", "contains"),
    *("regex", "min_words", "max_words", "words", "min_length", "max_length", "allow_profanity", "alliterate"),
    *("min_distance", "ban", "rank", "allow_real_places"),
)


def run(args: Namespace) -> None:
    """Make up names for a card. None of them is a real card's."""
    if args.attributes_from is not None:
        _run_for_cards(args)
        return
    writer = _writer_of(args)
    import torch

    from flash_experts import NameGenerator

    options = {name: args[name] for name in _SAME_NAME}
    dtype = getattr(torch, args.dtype)
    generator = NameGenerator.from_pretrained(args.model or default_model(), args.device, dtype)
    names: Iterable[GeneratedName] = generator.stream(
        type_line=args.type, set_code=args.set, banned_words=args.ban, **options
    )
    if args.rank:
        names = sorted(names, key=lambda name: -name.score)
    if args.out is None:
        writer(names, sys.stdout)
        return
    with (
        whole_file(args.out) as path,
        _progress(args.count) as counted,
        path.open("w", encoding="utf-8", newline="") as file,
    ):
        written = writer(counted(names), file)
    say(f"{written} names written to {args.out}", sys.stderr)


def _run_for_cards(args: Namespace) -> None:
    """Names for the attributes of a split's cards, as training data."""
    given = [name for name in _FOR_ONE_CARD if args[name] not in (None, False, [], 0.0)]
    given += ["best_of"] if args.best_of != 1 else []
    if given:
        make_parser().error(
            f"--attributes-from takes each card's own attributes and no filters: leave out --{given[0]}"
        )
    if args.out is None or Path(args.out).suffix.lower() != ".jsonl" or args.json or args.csv:
        make_parser().error("--attributes-from writes a .jsonl file: give --out NAMES.jsonl alone")
    check_out_file(args.out, args.overwrite)
    import torch

    from flash_experts import NameGenerator
    from flash_experts.data.prepare import load_known_names, load_split
    from flash_experts.generation.presets import sampling_of
    from flash_experts.generation.sampled_names import SampledNames, write_sampled_names
    from flash_experts.models.folder_checks import weights_sha256

    drawing = {name: args[name] for name in ("presets", "temperature", "top_k", "top_p", "min_p")}
    sampling = sampling_of(args.preset, **drawing, repetition_penalty=args.repetition_penalty, guidance=args.guidance)
    request = SampledNames(args.count, args.seed or 0, args.attribute_dropout, sampling, args.batch_size)
    model, out = args.model or default_model(), Path(args.out)
    cards = load_split(args.data, args.attributes_from)
    generator = NameGenerator.from_pretrained(model, args.device, getattr(torch, args.dtype))
    source = {"model": weights_sha256(model), "data": args.data, "split": args.attributes_from, "dtype": args.dtype}
    known = load_known_names(args.data)

    def report(names: int) -> None:
        say(f"{names:,} of {args.count:,} names", sys.stderr)

    written = write_sampled_names(generator, cards, known, request, out, source, report, args.overwrite)
    say(f"{written} names written to {args.out}", sys.stderr)


# ------------------------------------------------------------------------------------------------------- the formats


def _write_lines(names: Iterable[GeneratedName], file: TextIO) -> int:
    return _each(names, lambda name: say(one_line(name.text), file))


def _write_jsonl(names: Iterable[GeneratedName], file: TextIO) -> int:
    from flash_experts.generation.tables import row_of

    return _each(names, lambda name: say(json.dumps(row_of(name), ensure_ascii=False), file))


def _write_csv(names: Iterable[GeneratedName], file: TextIO, raw: bool = False) -> int:
    from flash_experts.generation.tables import write_csv

    return write_csv(names, file, raw)


def _write_json(names: Iterable[GeneratedName], file: TextIO) -> int:
    from flash_experts.generation.tables import row_of

    rows = [row_of(name) for name in names]
    say(json.dumps(rows, indent=2, ensure_ascii=False), file)
    return len(rows)


def _write_table(names: Iterable[GeneratedName], file: TextIO) -> int:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from flash_experts.generation.tables import row_of

    table = Table("name", "fits type", "log-probability", "a character", "nearest card", "similarity")
    for row in map(row_of, names):
        fit = f"{row['fits_type']} {row['fits_probability']:.0%}"
        numbers = f"{row['log_prob']:.1f}", f"{row['score']:.2f}", f"{row['similarity']:.2f}"
        name, nearest = (Text(one_line(row[column] or "")) for column in ("text", "nearest_card"))
        table.add_row(name, Text(fit), numbers[0], numbers[1], nearest, numbers[2])
    Console(file=file).print(table)
    return table.row_count


def _each(names: Iterable[GeneratedName], write: Callable[[GeneratedName], object]) -> int:
    written = 0
    for name in names:
        write(name)
        written += 1
    return written


_BY_SUFFIX = {".txt": _write_lines, ".csv": _write_csv, ".json": _write_json, ".jsonl": _write_jsonl}


def _writer_of(args: Namespace) -> Callable[[Iterable[GeneratedName], TextIO], int]:
    """How the names are written: by flag, by the file's suffix, else a table for people and lines for pipes."""
    if args.json and args.csv:
        make_parser().error("--json and --csv: choose one")
    if args.out is not None:
        check_out_file(args.out, args.overwrite)
        suffix = Path(args.out).suffix.lower()
        if suffix not in _BY_SUFFIX:
            make_parser().error(f"--out {args.out}: the file name must end in {', '.join(_BY_SUFFIX)}")
        if args.json or args.csv:
            make_parser().error("--out chooses the format by its suffix: leave out --json and --csv")
        return partial(_write_csv, raw=args.raw_cells) if suffix == ".csv" else _BY_SUFFIX[suffix]
    if args.json:
        return _write_json
    if args.csv:
        return partial(_write_csv, raw=args.raw_cells)
    return _write_table if sys.stdout.isatty() else _write_lines


@contextmanager
def _progress(count: int) -> Iterator[Callable[[Iterable[GeneratedName]], Iterable[GeneratedName]]]:
    """Counts names on a bar on stderr, where a person watches."""
    if not sys.stderr.isatty():
        yield lambda names: names
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("names"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield lambda names: bar.track(names, total=count)


# ------------------------------------------------------------------------------------------------------- the options


def make_parser() -> CommandParser:
    parser = command_parser("generate", run)
    _add_card(parser)
    _add_sampling(parser)
    _add_constraints(parser)
    _add_output(parser)
    _add_model(parser)
    return parser


def _add_card(parser: CommandParser) -> None:
    parser.section("The card")
    line = 'type line, such as "Legendary Creature — Goblin" (default: any)'
    parser.add_argument("--type", type=str | None, default=None, help=line)
    parser.add_argument(
        "--colors", type=str | None, default=None, help="letters of WUBRG, or C: colorless (default: any)"
    )
    parser.add_argument("--mana_value", type=int | None, default=None, help="mana value (default: any)")
    learned = "for models that learned it (default: any)"
    parser.add_argument("--rarity", type=str | None, default=None, help=f"rarity, such as rare, {learned}")
    parser.add_argument("--set", type=str | None, default=None, help=f"set code, such as ZEN, {learned}")
    parser.add_argument("--released", type=int | None, default=None, help=f"year of release, {learned}")
    like = 'names to resemble, separated by ";": "Krenko, Mob Boss; Goblin Guide" (default: none)'
    parser.add_argument("--like", type=str | None, default=None, help=like)
    split = "split, such as train, whose cards are the prompts, for training data (default: none)"
    parser.add_argument("--attributes_from", type=str | None, default=None, help=split)
    dropout = "probability that an attribute of such a prompt is left out"
    parser.add_argument("--attribute_dropout", type=float, default=0.3, help=dropout)
    parser.add_argument("--data", default="data/mtg", help="folder written by prepare, for --attributes-from")


def _add_sampling(parser: CommandParser) -> None:
    parser.section("Sampling")
    presets = "conservative, balanced, creative, or one of --presets"
    parser.add_argument("--preset", default="balanced", help=f"preset of the sampling options: {presets}")
    own = "YAML file with your own presets (default: none)"
    parser.add_argument("--presets", type=str | None, default=None, help=own)
    for name, kind, text in (
        ("temperature", float, "temperature, higher for more surprising names"),
        ("top_k", int, "number of most likely tokens to draw from; 0: all"),
        ("top_p", float, "probability mass of the tokens to draw from; 1: all"),
        ("min_p", float, "lowest probability to draw, as a share of the highest; 0: all"),
        ("repetition_penalty", float, "penalty of repeated tokens; 1: none"),
        ("guidance", float, "weight of type and colors over 1, at twice the time; 1: off"),
    ):
        parser.add_argument(f"--{name}", type=kind | None, default=None, help=f"{text} (default: the preset's)")
    parser.add_argument("--best_of", type=int, default=1, help="candidates per name, of which the best is kept")
    best = "best candidate: score, the most natural; fit, the closest to type and colors"
    parser.add_argument("--best_by", choices=("score", "fit"), default="score", help=best)
    parser.add_argument("--rank", action="store_true", help="sort by log-probability per character, most natural first")
    parser.add_argument("--seed", type=int | None, default=None, help="random seed (default: a new one each run)")


def _add_constraints(parser: CommandParser) -> None:
    parser.section("Rules for the names")
    for name, kind, text in (
        ("starts_with", str, "letters at the start (default: any)"),
        ("ends_with", str, 'letters at the end; " Axe": a whole word (default: any)'),
        ("contains", str, 'letters anywhere; " Axe": at the start of a word (default: any)'),
        ("regex", str, 'regular expression for the whole name, such as ".* of the .*" (default: any)'),
        ("words", int, "exact number of words (default: any)"),
        ("min_words", int, "fewest words (default: 1)"),
        ("max_words", int, "most words (default: no limit)"),
        ("min_length", int, "fewest characters (default: 1)"),
        ("max_length", int, "most characters (default: 40)"),
    ):
        parser.add_argument(f"--{name}", type=kind | None, default=None, help=text)
    parser.add_argument("--alliterate", action="store_true", help="start all words with the same letter")
    distance = "lowest edit distance from every real card, as a share of the length: 0.3 is 3 letters of 10"
    parser.add_argument("--min_distance", type=float, default=0.0, help=distance)
    ban = "words that no name has, separated by commas, or --ban once per word"
    parser.add_argument("--ban", type=list[str], default=[], help=ban)
    parser.add_argument("--allow_profanity", action="store_true", help="allow swear words")
    places = "allow countries, nations and large cities of the real world"
    parser.add_argument("--allow_real_places", action="store_true", help=places)


def _add_output(parser: CommandParser) -> None:
    parser.section("Output")
    parser.add_argument("--count", type=int, default=20, help="number of names")
    out = "file to write: .csv, .json, .jsonl or .txt (default: print the names)"
    parser.add_argument("--out", type=str | None, default=None, help=out)
    add_overwrite(parser)
    parser.add_argument("--csv", action="store_true", help="print CSV")
    raw = "write CSV cells as they are, without the apostrophe before what a spreadsheet takes for a formula"
    parser.add_argument("--raw_cells", action="store_true", help=raw)


def _add_model(parser: CommandParser) -> None:
    parser.section("The model")
    model = "model folder or hub id (default: the newest released model in models/)"
    parser.add_argument("--model", type=str | None, default=None, help=model)
    add_model_family(parser)
    add_device(parser)
    dtype = "data type of the weights; bfloat16 is faster on newer CPUs and rounds, so a seed gives other names"
    parser.add_argument("--dtype", type=Literal["float32", "bfloat16"], default="float32", help=dtype)
    parser.add_argument("--batch_size", type=int, default=256, help="names computed at once")
