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
        text = " ".join(str(message).split())
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

    def format_help(self) -> str:
        return re.sub(r"--[a-z_.]+", lambda match: match[0].replace("_", "-"), super().format_help())


# ---------------------------------------------------------------------------------------------------------- commands


def prepare(args: Namespace) -> None:
    """Clean card names and split them: data/mtg/{train,validation,test,test_iid}.jsonl and meta.json."""
    from flash_experts.data.prepare import prepare as run

    meta = run(args.source, Path(args.out), include=args.include or ())
    if args.json:
        print(json.dumps(meta, indent=2, ensure_ascii=False))
        return
    counts = meta["counts"]
    print(f"{args.out}: " + ", ".join(f"{count:,} {split}" for split, count in counts.items()))


def upcycle(args: Namespace) -> None:
    """Turn a dense GPT-2 (folder or hub id) into a mixture of experts that computes the same."""
    from flash_experts.data.tokenizer import load_tokenizer
    from flash_experts.training.build import ModelConfig, build_model

    fields = ("num_experts", "num_experts_per_tok", "moe_layer_freq")
    config = ModelConfig(**{name: args[name] for name in fields})
    if config.num_experts < 1:
        raise ValueError(f"--num-experts must be 1 or more, not {config.num_experts}")
    model, tokenizer = build_model(args.dense, config, cards=(), seed=args.seed)
    if load_tokenizer(args.dense).get_vocab() != tokenizer.get_vocab():
        raise AssertionError("the base's tokenizer is kept")
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    total = sum(parameter.numel() for parameter in model.parameters())
    _print_result(args, {"out": args.out, "parameters": total}, f"{args.out}: {total / 1e6:.1f}M parameters")
