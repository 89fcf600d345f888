"""The command line, ``flash-experts COMMAND``: one function for each command, heavy imports inside.

Every failure that a user can mend is a ValueError somewhere below; here it becomes one line and an exit status (2 for
a wrong command line, 1 for the rest). ``--debug`` shows the traceback as well.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

Command = Callable[[Namespace], None]


class _Parser(ArgumentParser):
    """One-line errors with the nearest name, and options spelled with dashes."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        text = " ".join(str(message).split()).replace("Parser key", "option")
        unknown = re.search(r"does not accept (?:option|key) '([^']+)'|unrecognized arguments?: --(\S+)", text)
        wrong = next(filter(None, unknown.groups()), "") if unknown else ""
        choice = re.search(r"invalid choice: '([^']+)' \(choose from (.*)\)", text)
        if wrong:
            key = wrong.split("=")[0].replace("-", "_")
            options = [option.lstrip("-").replace("-", "_") for option in self._option_string_actions]
            near = difflib.get_close_matches(key, options, n=1)
            text = f"unknown option {wrong!r}" + (f": did you mean {near[0]!r}?" if near else "")
        elif choice:
            near = difflib.get_close_matches(choice[1], re.findall(r"[\w-]+", choice[2]), n=1)
            text += f": did you mean {near[0]!r}?" if near else ""
        print(f"{self.prog.split(' [')[0]}: {text} (see --help)", file=sys.stderr)
        raise SystemExit(2)

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        return re.sub(r"--[a-z_.]+", lambda match: match[0].replace("_", "-"), super().format_help(*args, **kwargs))


# ---------------------------------------------------------------------------------------------------------- commands


def prepare(args: Namespace) -> None:
    """Clean card names and split them into data/mtg/*.jsonl, with meta.json."""
    from flash_experts.data.prepare import prepare as run

    meta = run(args.source, Path(args.out), include=args.include)
    counts = ", ".join(f"{count:,} {split}" for split, count in meta["counts"].items())
    _print_result(args, meta, f"{args.out}: {counts}")


def upcycle(args: Namespace) -> None:
    """Turn a dense GPT-2 into a mixture of experts that computes the same."""
    from flash_experts.training.build import build_model
    from flash_experts.training.model_config import ModelConfig

    if args.num_experts < 1:
        raise ValueError(f"--num-experts must be 1 or more, not {args.num_experts}")
    config = ModelConfig(
        num_experts=args.num_experts,
        num_experts_per_tok=args.num_experts_per_tok,
        moe_layer_freq=args.moe_layer_freq,
    )
    model, tokenizer = build_model(args.dense, config, cards=(), seed=args.seed)
    if model.config.num_experts != args.num_experts:
        raise ValueError(f"{args.dense} has experts already: upcycle takes a dense GPT-2")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    total = sum(parameter.numel() for parameter in model.parameters())
    text = f"{args.out}: {args.num_experts} experts, {total / 1e6:.1f}M parameters"
    _print_result(args, {"out": args.out, "parameters": total}, text)


def train(args: Namespace) -> None:
    """Train or fine-tune on the prepared names, into models/RUN. Started again, it goes on."""
    from dataclasses import asdict, replace

    from flash_experts.data.prepare import load_meta, load_split
    from flash_experts.samples import SampleNames
    from flash_experts.training.build import build_model
    from flash_experts.training.trainer import Trainer

    config = args.training if args.seed is None else replace(args.training, seed=args.seed)
    config.validate()
    cards = {split: load_split(args.data, split) for split in ("train", "validation")}
    model, tokenizer = build_model(args.base, args.model, cards["train"], config.seed)
    trainer = Trainer(
        model,
        tokenizer,
        cards["train"],
        cards["validation"],
        config,
        callbacks=[SampleNames()],
        data_info=load_meta(args.data),
    )
    result = trainer.train(resume=args.resume)
    if args.json:
        print(json.dumps(asdict(result), default=str, indent=2))
    if result.interrupted:
        raise KeyboardInterrupt


def evaluate(args: Namespace) -> None:
    """Measure a model: bits per character on held-out names, control, novelty, speed."""
    from flash_experts.evaluation import evaluate as run
    from flash_experts.evaluation import evaluate_names, format_evaluation, format_names, read_names

    if args.names is not None:
        named = evaluate_names(read_names(args.names), args.model, device=args.device)
        _print_result(args, named.to_json(), format_names(named))
        return
    result = run(args.model, args.data, samples=args.samples, seed=args.seed, device=args.device)
    _print_result(args, result.to_json(), format_evaluation(result))


def compare(args: Namespace) -> None:
    """Measure models side by side on the same data, and write a report."""
    from flash_experts.evaluation import compare as run
    from flash_experts.evaluation import format_comparison, write_report

    result = run(args.models, args.data, samples=args.samples, seed=args.seed, device=args.device)
    report = write_report(result, args.out)
    report.with_suffix(".json").write_text(json.dumps(result.to_json(), indent=2, ensure_ascii=False), "utf-8")
    _print_result(args, result.to_json(), f"{format_comparison(result)}\n\nThe report: {report}")


def generate(args: Namespace) -> None:
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


# ------------------------------------------------------------------------------------------------------------ output


def _print_result(args: Namespace, result: Any, text: str) -> None:
    print(json.dumps(result, indent=2, ensure_ascii=False) if args.json else text)


def _print_names(names: Sequence[Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "log-probability", "nearest card", "similarity")
    for name in names:
        table.add_row(name.text, f"{name.log_prob:.1f}", name.nearest_card, f"{name.similarity:.2f}")
    Console().print(table)


# ------------------------------------------------------------------------------------------------------- the parsers


def _command(name: str, run: Command) -> _Parser:
    parser = _Parser(prog=f"flash-experts {name}", description=run.__doc__, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _prepare_parser() -> _Parser:
    parser = _command("prepare", prepare)
    parser.add_argument("--source", default="embedded", help="embedded, or a csv, json, jsonl or txt file of cards")
    parser.add_argument("--out", default="data/mtg", help="folder to write")
    parser.add_argument("--include", type=list[str], default=[], help="[jokes,franchises]: keep what is left out")
    return parser


def _upcycle_parser() -> _Parser:
    parser = _command("upcycle", upcycle)
    parser.add_argument("dense", help="folder or hub id of a dense GPT-2")
    parser.add_argument("--num_experts", type=int, default=8, help="experts in each MoE layer")
    parser.add_argument("--num_experts_per_tok", type=int, default=2, help="experts that each token is sent to")
    parser.add_argument("--moe_layer_freq", type=int, default=2, help="1: experts in every block, 2: in every other")
    parser.add_argument("--out", required=True, help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of the routers' random weights")
    return parser


def _train_parser() -> _Parser:
    from flash_experts.training.model_config import ModelConfig
    from flash_experts.training.training_config import TrainingConfig

    parser = _command("train", train)
    parser.add_argument("--base", type=str | None, default=None, help="GPT-2 to start from; null: a new model")
    parser.add_argument("--data", default="data/mtg", help="folder that prepare wrote")
    parser.add_argument("--resume", type=str | None, default="auto", help="auto, a checkpoint, or null: start anew")
    parser.add_argument("--seed", type=int | None, default=None, help="short for --training.seed")
    parser.add_class_arguments(ModelConfig, "model")
    parser.add_class_arguments(TrainingConfig, "training")
    return parser


def _evaluate_parser() -> _Parser:
    parser = _command("evaluate", evaluate)
    parser.add_argument("model", help="model folder, hub id, or ngram")
    parser.add_argument("--names", type=str | None, default=None, help="measure this list, one name a line, instead")
    _add_measuring(parser)
    return parser


def _compare_parser() -> _Parser:
    parser = _command("compare", compare)
    parser.add_argument("models", nargs="+", help="model folders, hub ids, or ngram")
    parser.add_argument("--out", default="report.html", help="report to write, with its figures beside it as .json")
    _add_measuring(parser)
    return parser


def _add_measuring(parser: _Parser) -> None:
    parser.add_argument("--data", default="data/mtg", help="folder that prepare wrote")
    parser.add_argument("--samples", type=int, default=500, help="names to draw from each model")
    parser.add_argument("--seed", type=int, default=0, help="of drawing and shuffling")
    parser.add_argument("--device", type=str | None, default=None, help="cpu, cuda, cuda:1; the best there is")


def _generate_parser() -> _Parser:
    parser = _command("generate", generate)
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


COMMANDS: dict[str, tuple[Command, Callable[[], _Parser]]] = {
    "prepare": (prepare, _prepare_parser),
    "upcycle": (upcycle, _upcycle_parser),
    "train": (train, _train_parser),
    "evaluate": (evaluate, _evaluate_parser),
    "compare": (compare, _compare_parser),
    "generate": (generate, _generate_parser),
}


def _usage() -> str:
    lines = [f"  {name:10}{(run.__doc__ or '').splitlines()[0]}" for name, (run, _) in COMMANDS.items()]
    usage, hint = "usage: flash-experts COMMAND [options]", "flash-experts COMMAND --help: its options"
    return "\n".join([usage, "", *lines, "", hint])


def _dashes_to_underscores(argument: str) -> str:
    """``--top-k=5`` to ``--top_k=5``: both spellings are taken."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


# ------------------------------------------------------------------------------------------------------- the program


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 1 for an error, 2 for a wrong command line, 130 for Ctrl+C."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    name = arguments[0]
    if name == "--version":
        from flash_experts import __version__

        print(f"flash-experts {__version__}")
        return 0
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"use one of {', '.join(COMMANDS)}"
        print(f"flash-experts: no command {name!r}: {hint}", file=sys.stderr)
        return 2
    run, make_parser = COMMANDS[name]
    _quiet_libraries()
    try:
        parser = make_parser()
        args = parser.instantiate(parser.parse_args([_dashes_to_underscores(text) for text in arguments[1:]]))
        return _guarded(name, run, args)
    except SystemExit as stop:
        return int(stop.code or 0)


def _guarded(name: str, run: Command, args: Namespace) -> int:
    """Runs a command; a failure becomes one line on stderr."""
    try:
        run(args)
        return 0
    except KeyboardInterrupt:
        print(f"flash-experts {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, RuntimeError, MemoryError) as error:
        if args.debug:
            raise
        print(f"flash-experts {name}: {_explain(error)}", file=sys.stderr)
        return 1


def _explain(error: BaseException) -> str:
    """An error as one line that says what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, MemoryError) or "out of memory" in text or "can't allocate memory" in text:
        return "out of memory: lower --training.tokens-per-batch (or --batch-size), or take a smaller model"
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}"
    return text


def _quiet_libraries() -> None:
    """No progress bars and warnings of libraries between our lines, and no telemetry."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Our own warnings as one line; those of libraries are for developers."""
    if category is UserWarning:
        print(f"flash-experts: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
