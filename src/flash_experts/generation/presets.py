"""Named sampling settings, and the settings themselves."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from flash_experts.options import option
from flash_experts.plain_text import did_you_mean
from flash_experts.settings_files import read_yaml

SAMPLING = "Sampling"  # heading of its options
_MOST_GUIDANCE = 10


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is drawn.

    Applied in this order: guidance, repetition penalty, temperature, top-k, top-p (nucleus sampling, Holtzman et al.
    2020), min-p (Nguyen et al. 2024).
    """

    temperature: float = option(
        1.0, "temperature, higher for more surprising names (default: the preset's)", SAMPLING, label="Temperature",
        hint="higher: more surprising names", page_bounds=(0.05, 3), slider=(0.1, 2, 0.05),
    )  # fmt: skip
    top_k: int = option(
        0, "number of most likely tokens to draw from; 0: all (default: the preset's)", SAMPLING, label="Top-k",
        hint="only the k most likely tokens; 0: all", page_bounds=(0, 10_000), slider=(0, 1000, 10),
    )  # fmt: skip
    top_p: float = option(
        1.0, "probability mass of the tokens to draw from; 1: all (default: the preset's)", SAMPLING, label="Top-p",
        hint="only the most likely tokens that add up to p; 1: all", page_bounds=(0.01, 1), slider=(0.05, 1, 0.01),
    )  # fmt: skip
    min_p: float = option(
        0.0, "lowest probability to draw, as a share of the highest; 0: all (default: the preset's)", SAMPLING,
        label="Min-p", hint="only tokens at least p times as likely as the best; 0: all", page_bounds=(0, 1),
        slider=(0, 0.5, 0.01),
    )  # fmt: skip
    repetition_penalty: float = option(
        1.0, "penalty of repeated tokens; 1: none (default: the preset's)", SAMPLING, label="Repetition penalty",
        hint="1: no penalty", page_bounds=(0.5, 3), slider=(0.8, 2, 0.05),
    )  # fmt: skip
    guidance: float = option(
        1.0, "weight of type and colors over 1, at twice the time; 1: off (default: the preset's)", SAMPLING,
        label="Guidance", hint="higher: closer to type and colors; 1: off", page_bounds=(0, 5), slider=(1, 3, 0.1),
    )  # fmt: skip

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
                f"guidance is {self.guidance}: it must be from 0 (unconditional) to {_MOST_GUIDANCE} "
                "(1 is the model as it is)"
            )


def load_presets(path: str | Path) -> dict[str, Sampling]:
    """Presets of a YAML file that maps names to settings of `Sampling`.

    Raises:
        ValueError: the file is missing or not such YAML, or a setting is unknown or out of range.
    """
    content = read_yaml(path)
    if not all(isinstance(one, dict) for one in content.values()):
        raise ValueError(f"{path}: presets are written as NAME: and under it temperature: 0.9, top_k: 50, ...")
    return {str(name): _sampling(settings, f"{path}: preset {name!r}") for name, settings in content.items()}


def _sampling(settings: dict[str, Any], where: str) -> Sampling:
    known = [field.name for field in fields(Sampling)]
    for name, value in settings.items():
        if name not in known:
            hint = did_you_mean(str(name), known, f"there are {', '.join(known)}")
            raise ValueError(f"{where}: unknown setting {name!r}: {hint}")
        if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else int | float):
            raise ValueError(f"{where}: {name} must be a number, not {value!r}")
    try:
        return Sampling(**settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


PRESETS = load_presets(Path(__file__).with_name("presets.yaml"))


def sampling_of(preset: str, presets: str | Path | None = None, **overrides: float | int | None) -> Sampling:
    """The settings of a preset of `PRESETS` or of the file ``presets``, replaced by ``overrides`` that are not None.

    Raises:
        ValueError: the preset is unknown, or a setting is out of range.
    """
    known = PRESETS if presets is None else PRESETS | load_presets(presets)
    if preset not in known:
        hint = did_you_mean(preset, known, prefix=" ", cutoff=0.3)
        raise ValueError(f"unknown preset {preset!r}:{hint} There are {', '.join(known)}")
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    return replace(known[preset], **given)
