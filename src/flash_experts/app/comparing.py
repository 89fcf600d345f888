"""The same request to two sides, which differ in model, preset, or both."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from flash_experts.app.service import Playground, Progress
from flash_experts.app.settings import LARGEST_SEED, Settings


@dataclass(frozen=True, slots=True)
class Side:
    """What one side has of its own; None takes it from the settings (or the first model)."""

    model: str | None = None
    preset: str | None = None


def compare(playground: Playground, settings: Settings, sides: Sequence[Side]) -> Iterator[list[Progress | None]]:
    """Names of all sides, from the same seed, as they are found.

    Args:
        playground: has the models.
        settings: of all sides. A side with a preset of its own takes all sampling from it.
        sides: two or more.

    Yields:
        The progress of each side, None where a side has no name yet.

    Raises:
        ValueError: an unknown model or preset, or the constraints leave no name.
    """
    seed = secrets.randbelow(LARGEST_SEED + 1) if settings.seed is None else settings.seed
    settings = replace(settings, seed=seed)
    streams = [playground.names(_of_side(settings, side), side.model) for side in sides]
    progress: list[Progress | None] = [None] * len(sides)
    running = set(range(len(sides)))
    while running:
        for place in sorted(running):
            found = next(streams[place], None)
            if found is None:
                running.discard(place)
            else:
                progress[place] = found
                yield list(progress)


def _of_side(settings: Settings, side: Side) -> Settings:
    if not side.preset:
        return settings
    own: dict[str, Any] = dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "guidance"))
    return replace(settings, preset=side.preset, **own)
