"""The HTTP API: `/generate`, `/stream`, `/compare`, `/inspect`, `/settings` and `/options`. See docs/playground.md."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from functools import wraps
from inspect import isgeneratorfunction
from typing import Any, TypeVar

import gradio as gr
import numpy as np

from flash_experts.app.service import Inspection, Playground, Progress, Side, compare, inspect_name
from flash_experts.app.settings import MOST_NAMES, OPTIONS, Settings
from flash_experts.generation import PRESETS
from flash_experts.generation.name_files import row_of
from flash_experts.terminal import one_line

Each = TypeVar("Each")


def add_endpoints(playground: Playground, queue: str, concurrency: int) -> None:

    def generate(settings: dict[str, Any], model: str = "") -> dict[str, Any]:
        """New names. settings may have any of the fields of /options, or be {}.

        The returned seed reproduces the names.
        """
        return _progress_json(_last(playground.names(_settings(settings), _text("model", model))))

    def stream(settings: dict[str, Any], model: str = "") -> Iterator[dict[str, Any]]:
        """As /generate, with a result for each name as soon as it is found."""
        for progress in playground.names(_settings(settings), _text("model", model)):
            yield _progress_json(progress)

    def compare_sides(
        settings: dict[str, Any], model_a: str = "", preset_a: str = "", model_b: str = "", preset_b: str = ""
    ) -> list[dict[str, Any]]:
        """Names of two models, or of two presets, from the same seed."""
        sides = [
            Side(_text("model_a", model_a), _text("preset_a", preset_a)),
            Side(_text("model_b", model_b), _text("preset_b", preset_b)),
        ]
        progress = _last(compare(playground, _settings(settings), sides))
        return [_progress_json(side) for side in progress if side is not None]

    def inspect(name: str, settings: dict[str, Any], model: str = "") -> dict[str, Any]:
        """How a model reads a name: the likeliest tokens at each step, the experts of each token by block (null for a
        dense model), and attention[block][head][from][to]."""
        loaded = playground.model(_text("model", model))
        return _inspection_json(inspect_name(loaded, _text("name", name), _settings(settings)))

    def read_settings(text: str) -> dict[str, Any]:
        """The fields of a settings string."""
        return Settings.from_string(_text("text", text)).options()

    def options() -> dict[str, Any]:
        """Models, presets, limits, and the fields of settings with their defaults."""
        return {
            "models": list(playground.models),
            "presets": list(PRESETS),
            "limits": {"count": MOST_NAMES, "seconds": playground.time_limit},
            "settings": Settings().options(),
        }

    limits: dict[str, Any] = {"concurrency_id": queue, "concurrency_limit": concurrency}
    for function in (generate, stream, inspect):
        gr.api(with_client_errors(function), api_name=function.__name__, **limits)
    gr.api(with_client_errors(compare_sides), api_name="compare", **limits)
    gr.api(with_client_errors(read_settings), api_name="settings", **limits)
    gr.api(options, api_name="options", **limits)


def with_client_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its ValueErrors reported to the client in one line. Other errors stay on the server."""

    def reported(error: ValueError) -> gr.Error:
        return gr.Error(one_line(" ".join(str(error).split())), print_exception=False)

    @wraps(function)
    def called(*args: Any) -> Any:
        try:
            return function(*args)
        except ValueError as error:
            raise reported(error) from None

    @wraps(function)
    def streamed(*args: Any) -> Iterator[Any]:
        try:
            yield from function(*args)
        except ValueError as error:
            raise reported(error) from None

    return streamed if isgeneratorfunction(function) else called


def _settings(given: Any) -> Settings:
    if not isinstance(given, dict):
        raise ValueError('settings must be an object such as {"colors": "R"}')
    unknown = given.keys() - OPTIONS.keys()
    if unknown:
        raise ValueError(f"unknown setting {min(unknown)[:40]!r}: use {', '.join(OPTIONS)}")
    return Settings.from_values(given)


def _last(stream: Iterator[Each]) -> Each:
    [last] = deque(stream, maxlen=1)
    return last


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{name} must be text, not {type(value).__name__}")
    return value


def _progress_json(progress: Progress) -> dict[str, Any]:
    return {
        "names": [row_of(row.name) for row in progress.rows],
        "seed": progress.seed,
        "settings": progress.settings.to_string(),
        "seconds": round(progress.seconds, 3),
        "is_over": progress.is_over,
        "note": progress.note,
    }


def _inspection_json(found: Inspection) -> dict[str, Any]:
    experts = None
    if found.experts is not None:
        experts = {
            str(block): [[{"expert": expert, "gate": gate} for expert, gate in pairs] for pairs in tokens]
            for block, tokens in found.experts.experts.items()
        }
    return {
        "name": found.name,
        "prompt": found.prompt,
        "tokens": list(found.tokens),
        "prompt_length": found.prompt_length,
        "steps": [
            {
                "token": step.token,
                "probability": round(step.probability, 6),
                "rank": step.rank,
                "alternatives": [{"token": token, "probability": round(p, 6)} for token, p in step.alternatives],
            }
            for step in found.steps
        ],
        "num_experts": found.num_experts,
        "experts": experts,
        "attention": [np.round(weights_HTT, 4).tolist() for weights_HTT in found.attention],
    }
