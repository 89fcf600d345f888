"""Named sampling settings, and the settings themselves."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flash_experts.data.yaml_files import read_yaml

_MOST_GUIDANCE = 10


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn, applied in this order.

    Attributes:
        guidance: how much the prompt counts: over 1 names show more of what was told, and vary less; twice the work
            (`flash_experts.generation.prompt_rows.guided`).
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
    guidance: float = 1.0

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
        if not 0 <= self.guidance <= _MOST_GUIDANCE:
            raise ValueError(
                f"guidance is {self.guidance}: it must be from 0 (nothing told counts) to {_MOST_GUIDANCE} "
                "(1 is the model as it is)"
            )


def load_presets(path: str | Path) -> dict[str, Sampling]:
    """Presets of a YAML file: names, and under each the settings of `Sampling` that it has.

    Raises:
        ValueError: there is no such file, it is no such YAML, or a setting is unknown or out of range.
    """
    content = read_yaml(path)
    if not all(isinstance(one, dict) for one in content.values()):
        raise ValueError(f"{path}: presets are written as NAME: and under it temperature: 0.9, top_k: 50, ...")
    return {str(name): _sampling(settings, f"{path}: preset {name!r}") for name, settings in content.items()}


def _sampling(settings: dict[str, Any], where: str) -> Sampling:
    known = [field.name for field in fields(Sampling)]
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise ValueError(f"{where}: unknown setting {name!r}: {hint}")
        if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else int | float):
            raise ValueError(f"{where}: {name} must be a number, not {value!r}")
    try:
        return Sampling(**settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


PRESETS = load_presets(Path(__file__).with_name("presets.yaml"))


def sampling_of(preset: str, presets: str | Path | None = None, **overrides: float | int | None) -> Sampling:
    """A preset's settings with those of ``overrides`` that are not None in their place.

    Args:
        preset: its name.
        presets: a YAML file of more presets; see `load_presets`.
        **overrides: settings of `Sampling`.

    Raises:
        ValueError: no such preset (the nearest is named), or a setting out of range.
    """
    known = PRESETS if presets is None else PRESETS | load_presets(presets)
    if preset not in known:
        near = difflib.get_close_matches(preset, known, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown preset {preset!r}: {hint}There are {', '.join(known)}")
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    return replace(known[preset], **given)
