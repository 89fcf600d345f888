"""What a run records: the hooks of callbacks, and metrics.jsonl."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.files import whole_file

METRICS_FILE = "metrics.jsonl"
_MAX_BYTES = 2**30  # of a metrics.jsonl
_MAX_STEP = 2**53


class Callback:
    """Hooks of a run, on the main process alone; they may draw random numbers."""

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        """Before the first step. ``run_info`` is what `run.json` holds."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Every ``log_every`` steps: loss, learning rate, speed, router statistics."""

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each validation."""

    def on_sample(self, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        """Every ``sample_every`` steps, in eval mode. Returns sample names, which are shown and kept."""
        return ()

    def on_names(self, step: int, groups: Mapping[str, Sequence[str]]) -> None:
        """A step's sample names in groups: ``new``, ``in train``, ``in validation``."""

    def on_end(self, summary: Mapping[str, object]) -> None:
        """After the last step, or when interrupted."""


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, in order of steps, each step and event once."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, event: str, values: Mapping[str, object]) -> None:
        """Adds ``{"event": event, **values}``; ``values`` includes the step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}, ensure_ascii=False) + "\n")

    def truncate(self, step: int) -> None:
        """Removes lines after ``step``, which a resumed run writes again, and a line cut off by a kill."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if parse_metrics(line, "step")["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, TypeError):
                continue
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def parse_metrics(text: str, *fields: str) -> dict[str, Any]:
    """Parses a line of metrics.jsonl; ValueError if it is not a JSON object with these fields."""
    try:
        line: dict[str, Any] = json.loads(text)
        for field in fields:
            line[field]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return line


def read_metrics(path: str | Path, event: str | None = None) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl, one event (train, validation, samples) or all; skips a last line that a kill truncated.

    Raises:
        ValueError: there is no such file, it is not UTF-8 text or too large, or a line is damaged (``file:line``).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no {path}: give the folder of a run that `flash-experts train` wrote")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has more than {_MAX_BYTES:,} bytes: it is not the metrics.jsonl of a run")
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not the metrics.jsonl of a run: it is not UTF-8 text") from error
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(parse_metrics(text, "event", "step"))
        except ValueError as error:
            if number == len(texts) and lines:
                break  # the run is still writing, or was killed
            raise ValueError(f"{path}:{number} is not a line of metrics: {error}") from error
    return [line for line in lines if event in (None, line["event"])]


def read_untrusted_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines that have a step, and skips all others; empty if there is no such file."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = parse_metrics(text, "step")
        except ValueError:
            continue
        if type(line["step"]) is int and abs(line["step"]) < _MAX_STEP:
            lines.append(line)
    return lines
