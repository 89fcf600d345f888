"""`NameRequest`: everything that can be asked of a generator, each option declared once.

`NameGenerator.generate` takes these fields as keyword arguments, ``flash-experts generate`` and its YAML files as
options, and the playground as controls and shared settings. To add one: a field here (or in `Constraints` or
`Sampling`), its use, and its test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from flash_experts.data.prompts import Attributes
from flash_experts.generation.constraints import RULES, Constraints
from flash_experts.generation.presets import SAMPLING, Sampling, sampling_of
from flash_experts.options import option, problems_of

CARD, OUTPUT, MODEL = "The card", "Output", "The model"  # headings
__all__ = ["CARD", "MODEL", "OUTPUT", "RULES", "SAMPLING", "NameRequest"]
CANDIDATES = {"fast": 1, "good": 8, "best": 32}  # names drawn for each one shown, by quality
# The same for a pattern with text after a gap, which few ways to fill the gap lead to.
_CANDIDATES_AFTER_GAP = {"fast": 1, "good": 32, "best": 64}
_IF_LEARNED = "for models that learned it (default: any)"


def _override(name: str) -> Any:
    """A setting of `Sampling` that replaces the preset's where it is not None."""
    [known] = [each.metadata["option"] for each in fields(Sampling) if each.name == name]
    return field(default=None, metadata={"option": known})


@dataclass(frozen=True, slots=True, kw_only=True)
class NameRequest(Constraints):
    """One request for names: the card, how names are drawn, the rules that they follow, and how many.

    None leaves an option open. Each field's `Option` has its help text, bounds and label.

    Raises:
        ValueError: a value is out of range, unknown, or contradicts another.
        TypeError: an option is unknown.
    """

    type_line: str | None = option(
        None, 'type line, such as "Legendary Creature — Goblin" (default: any)', CARD, label="Type line", flag="type",
        page_bounds=(0, 120),
    )  # fmt: skip
    colors: str | None = option(
        None, "letters of WUBRG, or C: colorless (default: any)", CARD, label="Colors", page_bounds=(0, 40)
    )
    mana_value: int | None = option(None, "mana value (default: any)", CARD, label="Mana value", page_bounds=(0, 20))
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
        "good", "names drawn for each one shown: fast 1, as they come; good 8; best 32, at 4 times the time of good",
        SAMPLING, label="Quality", labels=("fast: as they come", "good: the best of 8", "best: the best of 32"),
    )  # fmt: skip
    best_of: int | None = option(
        None, "names drawn for each one shown (default: by quality)", SAMPLING, bounds=(1, 1_000)
    )
    seed: int | None = option(
        None, "random seed (default: a new one each run)", SAMPLING, label="Seed", bounds=(0, 2**63 - 1),
        page_bounds=(0, 2**31 - 1), hint="the same seed gives the same names; blank: a new seed each time",
    )  # fmt: skip
    count: int = option(
        20, "number of names", OUTPUT, label="Number of names", bounds=(0, 1_000_000), page_bounds=(1, 100),
        slider=(1, 100, 1),
    )  # fmt: skip
    batch_size: int = option(256, "names computed at once", MODEL, bounds=(1, 65_536))

    def __post_init__(self) -> None:
        if problems := problems_of(self, NameRequest):
            raise ValueError("; ".join(problems))
        Constraints.__post_init__(self)

    @classmethod
    def of(cls, **options: Any) -> NameRequest:
        """A request with these options; None and an empty list stand for the default."""
        return cls(**{name: value for name, value in options.items() if value is not None and value != []})

    @property
    def num_candidates(self) -> int:
        """Names drawn for each one shown: more where text follows a gap of ``pattern``."""
        by_quality = _CANDIDATES_AFTER_GAP if self.has_text_after_gap else CANDIDATES
        return by_quality[self.quality] if self.best_of is None else self.best_of

    def attributes(self) -> Attributes:
        """The attributes of the card, without those that `like` adds.

        Raises:
            ValueError: a type, color, rarity, set or year is unknown.
        """
        return Attributes.parse(self.type_line, self.colors, self.mana_value, self.rarity, self.set_code, self.released)

    def sampling(self) -> Sampling:
        """The preset, with this request's own settings.

        Raises:
            ValueError: the preset is unknown, or a setting is out of range.
        """
        own = {each.name: getattr(self, each.name) for each in fields(Sampling)}
        return sampling_of(self.preset, self.presets, **own)
