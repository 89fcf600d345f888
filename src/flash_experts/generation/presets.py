"""Named sampling settings, and the settings themselves."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn, applied in this order.

    Attributes:
        repetition_penalty: over 1 makes tokens that the name already has less likely (Keskar et al. 2019).
        temperature: over 1 flattens the distribution, under 1 sharpens it.
        top_k: only the k most likely tokens; 0 = all.
        top_p: only the likeliest tokens that together reach this probability (Holtzman et al. 2020); 1 = all.
        min_p: only tokens at least this likely relative to the likeliest (Nguyen et al. 2024); 0 = all.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}: it must be over 0 (try 0.1 for the likeliest names; "
                "greedy decoding could give only one)"
            )
        if self.top_k < 0:
            raise ValueError(f"top_k is {self.top_k}: it must be 1 or more, or 0 to keep all tokens")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: it must be over 0 and at most 1 (1 keeps all tokens)")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: it must be between 0 (keeps all tokens) and 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: it must be over 0")


PRESETS: dict[str, Sampling] = {
    "conservative": Sampling(temperature=0.7, top_k=50, top_p=0.9),
    "balanced": Sampling(temperature=0.95, top_k=200, top_p=0.97),
    "creative": Sampling(temperature=1.2, top_k=400, top_p=0.98, min_p=0.02),
}


def sampling_of(preset: str, **overrides: float | int | None) -> Sampling:
    """A preset's settings with those of ``overrides`` that are not None in their place.

    Raises:
        ValueError: no such preset (the nearest is named), or a setting out of range.
    """
    if preset not in PRESETS:
        near = difflib.get_close_matches(preset, PRESETS, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown preset {preset!r}: {hint}There are {', '.join(PRESETS)}")
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    return replace(PRESETS[preset], **given)
