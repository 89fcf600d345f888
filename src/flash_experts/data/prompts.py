"""Attributes that generation is conditioned on, and the text prompt that carries them to the model."""

from __future__ import annotations

import itertools
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from flash_experts.data.cards import (
    COLOR_WORDS,
    COLORLESS,
    RARITIES,
    SUPERTYPES,
    TYPES,
    Card,
    parse_colors,
    parse_date,
    parse_rarity,
    parse_set_code,
)
from flash_experts.data.type_lines import parse_type_line
from flash_experts.options import type_problem
from flash_experts.terminal import nearest

MAX_MANA_VALUE = 10**7  # the most expensive card costs a million (Gleemax)


@dataclass(frozen=True, slots=True)
class Attributes:
    """Attributes that a name is conditioned on; None leaves one unspecified.

    The embedded table has no rarities, sets and years: they need a model trained on another source.
    """

    supertypes: tuple[str, ...] | None = None
    types: tuple[str, ...] | None = None
    subtypes: tuple[str, ...] | None = None
    colors: tuple[str, ...] | None = None  # letters in the order WUBRG; () for colorless
    mana_value: int | None = None
    rarity: str | None = None
    set_code: str | None = None  # such as "ZEN"
    released: int | None = None  # year

    @classmethod
    def of(cls, card: Card) -> Attributes:
        """All known attributes of a card."""
        year = None if card.released is None else int(card.released[:4])
        facts = (card.colors, card.mana_value, card.rarity, card.set_code, year)
        if not card.type_line:
            return cls(None, None, None, *facts)
        return cls(card.supertypes, card.types, card.subtypes, *facts)

    @classmethod
    def parse(
        cls,
        type_line: str | None,
        colors: str | None,
        mana_value: int | None,
        rarity: str | None = None,
        set_code: str | None = None,
        released: int | None = None,
    ) -> Attributes:
        """Parses attributes as users write them; None (or an empty text) leaves one unspecified.

        Raises:
            ValueError: a value is unknown (with a suggestion), malformed or of a wrong type.
                `check_known` checks what a model knows.
        """
        texts = {"type_line": type_line, "colors": colors, "rarity": rarity, "set_code": set_code}
        problems = [type_problem(name, value, str | None) for name, value in texts.items()]
        whole = {"mana_value": mana_value, "released": released}
        problems += [type_problem(name, value, int | None) for name, value in whole.items()]
        if any(problems):
            raise ValueError("; ".join(filter(None, problems)))
        if mana_value is not None and not 0 <= mana_value <= MAX_MANA_VALUE:
            raise ValueError(f"the mana value must be from 0 to {MAX_MANA_VALUE:,}, not {mana_value}")
        supertypes, types, subtypes = parse_type_line(type_line)
        year = None if released is None else int(parse_date(str(released)) or 0)
        optional = (parse_rarity(rarity), parse_set_code(set_code), year)
        return cls(supertypes, types, subtypes, parse_colors(colors), mana_value, *optional)

    def drop(self, rng: random.Random, probability: float) -> Attributes:
        """Drops each attribute with ``probability``, and all together with half of it (condition dropout), so that a
        model learns any subset of them. The number of draws from ``rng`` is always the same."""
        *single, everything = (rng.random() for _ in range(6))
        if everything < probability / 2:
            return UNCONDITIONAL
        # Optional attributes use the low bits of the first draws, which are independent of the high bits: more draws
        # would change what is dropped from all other cards, and with it every run on the embedded table.
        optional = (draw * 2**20 % 1 for draw in single[: len(OPTIONAL_ATTRIBUTES)])
        draws = zip(fields(self), (*single, *optional), strict=True)
        return Attributes(**{one.name: getattr(self, one.name) for one, draw in draws if draw >= probability})

    def prompt(self) -> str:
        """Plain text: ``"legendary creature goblin warrior, red, 3, rare, ZEN, 2009:"``; ``":"`` for unconditional.

        Types are in lower case and sets in capitals, as names never have them, so that a tokenizer can have one token
        per prompt word and spell names character by character.
        """
        parts = [" ".join((*(self.supertypes or ()), *(self.types or ()), *(self.subtypes or ()))).lower()]
        if self.colors is not None:
            parts.append(" ".join(COLOR_WORDS[color] for color in self.colors) or COLORLESS)
        printing = (self.mana_value, self.rarity, self.set_code, self.released)
        parts += [str(value) for value in printing if value is not None]
        return ", ".join(part for part in parts if part) + ":"


UNCONDITIONAL = Attributes()


def prompt_words(cards: Iterable[Card], at_least: int = 3) -> list[str]:
    """The vocabulary of prompts: types, colors, rarities; and subtypes, sets and years that ``at_least`` cards have,
    except sets and years that are words of names."""
    cards = list(cards)
    counts = Counter(name for card in cards for name in card.subtypes)
    subtypes = sorted(name for name, count in counts.items() if count >= at_least)
    words = " ".join((*SUPERTYPES, *TYPES, *COLOR_WORDS.values(), COLORLESS, *RARITIES, *subtypes)).lower().split()
    printings = [(one.set_code, one.released) for one in map(Attributes.of, cards)]
    words_of_names = {word for card in cards for word in re.findall(r"\w+", card.name)}
    for values in zip(*printings, strict=True):
        seen = Counter(str(value) for value in values if value is not None)
        words += sorted(word for word, count in seen.items() if count >= at_least and word not in words_of_names)
    return list(dict.fromkeys(words))


Conditions = dict[str, list[Any]]
CONDITIONS = "conditions"  # key in a model's configuration
OPTIONAL_ATTRIBUTES = {"rarity": "rarities", "set_code": "sets", "released": "years of release"}  # and their plurals


def collect_conditions(cards: Iterable[Card]) -> Conditions:
    """The sorted values of each optional attribute that occurs in cards."""
    attributes = [Attributes.of(card) for card in cards]
    found = {name: sorted({getattr(one, name) for one in attributes} - {None}) for name in OPTIONAL_ATTRIBUTES}
    return {name: values for name, values in found.items() if values}


def read_conditions(config: Mapping[str, Any]) -> Conditions:
    """What `collect_conditions` found for a model, from its configuration; a ValueError if malformed."""
    conditions = config.get(CONDITIONS, {})
    kinds = {name: int if name == "released" else str for name in OPTIONAL_ATTRIBUTES}
    if not isinstance(conditions, dict) or not all(
        name in kinds and isinstance(values, list) and all(type(value) is kinds[name] for value in values)
        for name, values in conditions.items()
    ):
        raise ValueError(f"config.json: {CONDITIONS} must hold lists of {', '.join(kinds)}")
    return conditions


def check_known(attributes: Attributes, conditions: Conditions) -> None:
    """Raises ValueError for optional attributes or values (with a suggestion) that a model was not trained with."""
    for name, plural in OPTIONAL_ATTRIBUTES.items():
        value, known = getattr(attributes, name), conditions.get(name, [])
        if value is None or value in known:
            continue
        if not known:
            raise ValueError(
                f"this model was not trained with {plural}: leave {value!r} out, or train on a source that has them "
                "(`flash-experts prepare --source scryfall`)"
            )
        if isinstance(value, int):
            near = min(known, key=lambda year: abs(year - value))
        else:
            near = nearest(value, known, cutoff=0.0)
        raise ValueError(
            f"{value!r} is not among the {plural} that this model was trained with: the nearest is {near!r}"
        )


def drop_unknown(attributes: Attributes, conditions: Conditions) -> Attributes:
    """Drops the attributes that `check_known` refuses: for a model that was not trained with them they are noise."""
    unknown = [name for name in OPTIONAL_ATTRIBUTES if getattr(attributes, name) not in conditions.get(name, [])]
    return replace(attributes, **dict.fromkeys(unknown)) if unknown else attributes


def texts_of_cards(cards: Sequence[Card]) -> list[str]:
    """Texts that cover all that a model reads or writes: names, and prompts of all, two, one and no attributes, which
    have all the pieces of other subsets."""
    texts = {" " + card.name for card in cards}
    names = tuple(field.name for field in fields(Attributes))
    for attributes in {Attributes.of(card) for card in cards}:
        given = [name for name in names if getattr(attributes, name) is not None]
        texts.add(attributes.prompt())
        for count in range(min(2, len(given)) + 1):
            for subset in itertools.combinations(given, count):
                texts.add(Attributes(**{name: getattr(attributes, name) for name in subset}).prompt())
    return sorted(texts)
