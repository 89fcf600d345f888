"""``flash-experts benchmark``."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from jsonargparse import Namespace

from flash_experts import benchmarks
from flash_experts.commands.common import CommandParser, command_parser, print_result

TOPICS = benchmarks.TOPICS | {"all": "each of them, recorded by machine and compared with what was recorded"}


def run(args: Namespace) -> None:
    """Measure speed against other implementations in the same run."""
    report = _module(args.topic).run(args)
    print_result(args, report.to_json(), report.text)


def _module(topic: str) -> Any:
    return importlib.import_module(f"{benchmarks.__name__}.{'everything' if topic == 'all' else topic}")


def topic_parser(topic: str) -> CommandParser:
    """Parser for the options of a topic."""
    module = _module(topic)
    parser = command_parser(f"benchmark {topic}", module.run)
    module.add_options(parser)
    return parser


class _TopicParser(CommandParser):
    """Reads the topic, then its options with the topic's parser."""

    def parse_args(self, args: Sequence[str] | None = None, *others: Any, **options: Any) -> Namespace:  # type: ignore[override]
        arguments = list(args or ())
        topic = next((text for text in arguments if text in TOPICS), None)
        if topic is None:
            return super().parse_args(arguments, *others, **options)
        arguments.remove(topic)
        namespace = topic_parser(topic).parse_args(arguments, *others, **options)
        namespace.topic = topic
        return namespace


def make_parser() -> CommandParser:
    parser = _TopicParser(
        prog="flash-experts benchmark",
        description=run.__doc__,
        epilog="flash-experts help benchmark TOPIC: the options of a topic",
        allow_abbrev=False,
    )
    help_text = "; ".join(f"{name}: {what}" for name, what in TOPICS.items())
    parser.add_argument("topic", choices=tuple(TOPICS), help=help_text)
    return parser
