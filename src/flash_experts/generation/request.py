"""`NameRequest`: everything that can be asked of a generator, each option declared once; `Sampling` and its presets.

The fields are arguments of `NameGenerator.generate`, options of ``flash-experts generate`` and its YAML files, and
controls of the playground. To add one: a field here (or in `Constraints` or `Sampling`), its use, and its test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from flash_experts.data.prompts import Attributes
from flash_experts.generation.constraints import RULES, Constraints
from flash_experts.options import option, options_of, problems_of, read_yaml
from flash_experts.terminal import did_you_mean

__all__ = [
    "CARD",
    "MODEL",
    "OUTPUT",
    "PRESETS",
    "RULES",
    "SAMPLING",
    "UNGUIDED",
    "NameRequest",
    "Sampling",
    "load_presets",
    "sampling_of",
]
CANDIDATES = {"fast": 1, "good": 8, "best": 32}  # names drawn for each one shown, by quality
# The same for a pattern with text after a gap, which few ways to fill the gap lead to.
_CANDIDATES_AFTER_GAP = {"fast": 1, "good": 32, "best": 64}
_IF_LEARNED = "for models that learned it (default: any)"
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
        hint="higher: more surprising names", slider=(0.1, 2, 0.05),
    )  # fmt: skip
    top_k: int = option(
        0, "number of most likely tokens to draw from; 0: all (default: the preset's)", SAMPLING, label="Top-k",
        hint="only the k most likely tokens; 0: all", slider=(0, 1000, 10),
    )  # fmt: skip
    top_p: float = option(
        1.0, "probability mass of the tokens to draw from; 1: all (default: the preset's)", SAMPLING, label="Top-p",
        hint="only the most likely tokens that add up to p; 1: all", slider=(0.05, 1, 0.01),
    )  # fmt: skip
    min_p: float = option(
        0.0, "lowest probability to draw, as a share of the highest; 0: all (default: the preset's)", SAMPLING,
        label="Min-p", hint="only tokens at least p times as likely as the best; 0: all", slider=(0, 0.5, 0.01),
    )  # fmt: skip
    repetition_penalty: float = option(
        1.0, "penalty of repeated tokens; 1: none (default: the preset's)", SAMPLING, label="Repetition penalty",
        hint="1: no penalty", slider=(0.8, 2, 0.05),
    )  # fmt: skip
    guidance: float = option(
        1.0, "weight of the card against no card: over 1 names follow it more, at twice the time; 1: off (default: the "
        "preset's)", SAMPLING,
        label="Guidance", hint="higher: closer to type and colors; 1: off", slider=(1, 3, 0.05),
    )  # fmt: skip

    def __post_init__(self) -> None:
        if problems := problems_of(self, Sampling):
            raise ValueError("; ".join(problems))
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
    """Presets of a YAML file that maps names to settings of `Sampling`, or a ValueError."""
    content = read_yaml(path)
    if not all(isinstance(one, dict) for one in content.values()):
        raise ValueError(f"{path}: presets are written as NAME: and under it temperature: 0.9, top_k: 50, ...")
    return {str(name): _sampling(settings, f"{path}: preset {name!r}") for name, settings in content.items()}


def _sampling(settings: dict[str, Any], where: str) -> Sampling:
    known = [field.name for field in fields(Sampling)]
    for name in settings:
        if name not in known:
            hint = did_you_mean(str(name), known, f"there are {', '.join(known)}")
            raise ValueError(f"{where}: unknown setting {name!r}: {hint}")
    try:
        return Sampling(**settings)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


UNGUIDED: dict[str, Any] = {"guidance": 1.0}  # options that keep a preset from guiding
PRESETS = load_presets(Path(__file__).with_name("presets.yaml"))


def sampling_of(preset: str, presets: str | Path | None = None, **overrides: float | int | None) -> Sampling:
    """A preset of `PRESETS` or of the file ``presets``, with ``overrides`` that are not None, or a ValueError."""
    known = PRESETS if presets is None else PRESETS | load_presets(presets)
    if preset not in known:
        hint = did_you_mean(preset, known, prefix=" ", cutoff=0.3)
        raise ValueError(f"unknown preset {preset!r}:{hint} There are {', '.join(known)}")
    given: dict[str, Any] = {name: value for name, value in overrides.items() if value is not None}
    return replace(known[preset], **given)


CARD, OUTPUT, MODEL = "The card", "Output", "The model"  # headings


def _override(name: str) -> Any:
    """A setting of `Sampling` that replaces the preset's where it is not None."""
    [known] = [each.metadata["option"] for each in fields(Sampling) if each.name == name]
    return field(default=None, metadata={"option": known})


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRequest(Constraints):
    """One request for names; None leaves an option open. Each field's `Option` has its help text, bounds and label.

    Raises:
        ValueError: a value is out of range, unknown, or contradicts another.
    """

    type_line: str | None = option(
        None, 'type line, such as "Legendary Creature — Goblin" (default: any)', CARD, label="Type line", flag="type",
        page_bounds=(0, 120),
    )  # fmt: skip
    colors: str | None = option(
        None, "letters of WUBRG, or C: colorless (default: any)", CARD, label="Colors", page_bounds=(0, 40)
    )
    mana_value: int | None = option(None, "mana value (default: any)", CARD, label="Mana value", page_bounds=(0, 16))
    rarity: str | None = option(None, f"rarity, such as rare, {_IF_LEARNED}", CARD, label="Rarity", page_bounds=(0, 20))
    set_code: str | None = option(
        None, f"set code, such as ZEN, {_IF_LEARNED}", CARD, label="Set", flag="set", page_bounds=(0, 10)
    )
    released: int | None = option(
        None, f"year of release, {_IF_LEARNED}", CARD, label="Year of release", page_bounds=(1993, 2100)
    )
    like: Sequence[str] | str | None = option(
        None, 'names to resemble, separated by ";": "Krenko, Mob Boss; Goblin Guide" (default: none)', CARD,
        label="Similar to these names", placeholder="Goblin Guide; Lightning Bolt", page_bounds=(20, 60),
    )  # fmt: skip
    preset: str = option(
        "balanced", "preset of the sampling options: conservative, balanced, creative, or one of --presets", SAMPLING,
        label="Style", page_bounds=(0, 40),
    )  # fmt: skip
    presets: str | Path | None = option(None, "YAML file with your own presets (default: none)", SAMPLING)
    temperature: float | None = _override("temperature")
    top_k: int | None = _override("top_k")
    top_p: float | None = _override("top_p")
    min_p: float | None = _override("min_p")
    repetition_penalty: float | None = _override("repetition_penalty")
    guidance: float | None = _override("guidance")
    quality: Literal["fast", "good", "best"] = option(
        "good", "names drawn for each one shown: fast 1; good 8; best 32, at 4 times the time of good",
        SAMPLING, label="Quality", labels=("fast: without choosing", "good: the best of 8", "best: the best of 32"),
    )  # fmt: skip
    best_of: int | None = option(
        None, "names drawn for each one shown (default: by quality)", SAMPLING, bounds=(1, 1_000)
    )
    seed: int | None = option(
        None, "random seed (default: a new one each run)", SAMPLING, label="Seed", bounds=(0, 2**63 - 1),
        page_bounds=(0, 2**31 - 1), hint="the same seed gives the same names; blank: a new seed each time",
    )  # fmt: skip
    count: int = option(
        20, "number of names", OUTPUT, label="Number of names", bounds=(0, 1_000_000), slider=(1, 100, 1),
    )  # fmt: skip
    batch_size: int = option(256, "names computed at once", MODEL, bounds=(1, 65_536))

    @classmethod
    def of(cls, **options: Any) -> NameRequest:
        """A request with these options; None and an empty list stand for the default.

        Raises a TypeError for an option that does not exist.
        """
        known = [each.name for each in fields(cls)]
        of_flag = {option.flag: name for name, option in options_of(cls).items() if option.flag}
        for name in options:
            if name not in known:
                hint = did_you_mean(of_flag.get(name, name), known, f"there are {', '.join(known)}")
                raise TypeError(f"unknown option {name!r}: {hint}")
        left_open = {
            name for name, value in options.items() if value is None or (isinstance(value, list) and not value)
        }
        return cls(**{name: value for name, value in options.items() if name not in left_open})

    @property
    def num_candidates(self) -> int:
        """Names drawn for each one shown."""
        by_quality = _CANDIDATES_AFTER_GAP if self.has_text_after_gap else CANDIDATES
        return by_quality[self.quality] if self.best_of is None else self.best_of

    def attributes(self) -> Attributes:
        """The attributes of the card, without those that `like` adds; raises a ValueError for an unknown one."""
        return Attributes.parse(self.type_line, self.colors, self.mana_value, self.rarity, self.set_code, self.released)

    def sampling(self) -> Sampling:
        """The preset with this request's own settings, or a ValueError."""
        own = {each.name: getattr(self, each.name) for each in fields(Sampling)}
        return sampling_of(self.preset, self.presets, **own)
