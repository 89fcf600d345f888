"""Training curves, from the metrics.jsonl that a run leaves beside its model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

BITS_PER_CHAR = "validation/bits_per_char"  # the key in metrics.jsonl


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """A moment of a training run: what its metrics.jsonl says."""

    step: int
    seconds: float | None
    tokens: int | None
    train_loss: float | None
    validation_bits: float | None


def read_curve(path: Path) -> list[CurvePoint]:
    """A run's metrics.jsonl as points in the order of steps; none where there is no such file.

    Evaluations are lines of their own and have no time: theirs is taken from the lines around. A line cut
    short (the run was killed while it wrote) is skipped. A step that was repeated after a resume counts as it
    was the last time.
    """
    if not path.is_file():
        return []
    points: dict[int, dict[str, Any]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            points.setdefault(record["step"], {}).update(record)
    timed = {step: record["seconds"] for step, record in points.items() if "seconds" in record}
    return [
        CurvePoint(
            step=step,
            seconds=_seconds_at(step, timed),
            tokens=record.get("tokens"),
            train_loss=record.get("loss"),
            validation_bits=record.get(BITS_PER_CHAR),
        )
        for step, record in sorted(points.items())
    ]


def _seconds_at(step: int, timed: dict[int, float]) -> float | None:
    """Seconds of training at a step; between timed ones in proportion, None past the last of them."""
    if step in timed:
        return timed[step]
    if not timed or step > max(timed):
        return None
    known = {0: 0.0, **timed}
    return float(np.interp(step, sorted(known), [known[at] for at in sorted(known)]))
