"""``flash-experts benchmark``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, command_parser, print_result

TOPICS = {
    "attention": "our kernels, PyTorch's SDPA and FlexAttention, transformers' eager attention, flash-attn",
    "moe": "an MoE layer: ours, transformers' three ways, a dense MLP, packages found installed",
    "train": "fine-tuning GPT-2 small on names: ours, transformers' Trainer",
    "generate": "names per second: ours, transformers' generate",
}


def run(args: Namespace) -> None:
    """Measure speed against other implementations in the same run."""
    report = _module(args.topic).run(args)
    print_result(args, report.to_json(), report.text)


def _module(topic: str) -> Any:
    return importlib.import_module(f"flash_experts.benchmarks.{topic}")


class _TopicParser(CommandParser):
    """Reads the topic, and with a parser of its own the options of that topic."""

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Namespace:  # type: ignore[override]
        arguments = list(args or ())
        topic = next((text for text in arguments if text in TOPICS), None)
        if topic is None:
            return super().parse_args(arguments, *others, **options)
        arguments.remove(topic)
        module = _module(topic)
        parser = command_parser(f"benchmark {topic}", module.run)
        module.add_options(parser)
        namespace = parser.parse_args(arguments, *others, **options)
        namespace.topic = topic
        return namespace


def make_parser() -> CommandParser:
    parser = _TopicParser(
        prog="flash-experts benchmark",
        description=f"{run.__doc__} With --config FILE.yaml, --json, --out FILE.json, --plot FILE.png, --device D.",
        epilog="flash-experts benchmark TOPIC --help: its options",
        allow_abbrev=False,
    )
    help_text = "; ".join(f"{name}: {what}" for name, what in TOPICS.items())
    parser.add_argument("topic", choices=tuple(TOPICS), help=help_text)
    return parser
