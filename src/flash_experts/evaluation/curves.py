"""Training curves, from the metrics.jsonl that a run leaves beside its model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from flash_experts.training.curves import finite_number
from flash_experts.training.validation import BITS_PER_CHAR

_MOST_STEPS = 2**53


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A moment of a training run: what its metrics.jsonl says."""

    step: int
    seconds: float | None
    tokens: int | None
    train_loss: float | None
    validation_bits: float | None


def read_records(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl that have a step; none where there is no such file.

    It came with a model, perhaps from a stranger: what is no such line is skipped, as is one that a kill cut short.
    """
    if not path.is_file():
        return []
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int and abs(record["step"]) < _MOST_STEPS:
            records.append(record)
    return records


def read_curve(path: Path) -> list[CurvePoint]:
    """A run's metrics.jsonl as points in the order of steps; none where there is no such file.

    Evaluations are lines of their own and have no time: theirs is taken from the lines around. A step that was
    repeated after a resume counts as it was the last time.
    """
    points: dict[int, dict[str, Any]] = {}
    for record in read_records(path):
        points.setdefault(record["step"], {}).update(record)
    timed = {step: seconds for step, record in points.items() if (seconds := _number(record, "seconds")) is not None}
    return [
        CurvePoint(
            step=step,
            seconds=_seconds_at(step, timed),
            tokens=_number(record, "tokens"),
            train_loss=_number(record, "loss"),
            validation_bits=_number(record, BITS_PER_CHAR),
        )
        for step, record in sorted(points.items())
    ]


def _number(record: dict[str, Any], key: str) -> Any:
    """A value of a line if it is a finite number, else None."""
    return finite_number(record.get(key))


def _seconds_at(step: int, timed: dict[int, float]) -> float | None:
    """Seconds of training at a step; between timed ones in proportion, None past the last of them."""
    if step in timed:
        return timed[step]
    if not timed or step > max(timed):
        return None
    known = {0: 0.0, **timed}
    return float(np.interp(step, sorted(known), [known[at] for at in sorted(known)]))
