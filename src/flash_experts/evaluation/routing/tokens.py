"""Texts, classes and labels of the tokens of names, for `flash_experts.evaluation.routing.maps`.

Shape suffixes: T input tokens of all names (with BOS tokens and prompts, without EOS tokens).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flash_experts.data.cards import COLOR_WORDS, TYPES, Card
from flash_experts.data.packing import EncodedName
from flash_experts.evaluation.metrics import colors_of
from flash_experts.evaluation.routing.specialization import FEWEST_TOKENS, LabelSet

IntArray = npt.NDArray[np.int64]
TOKEN_CLASSES = ("BOS token", "prompt", "word start", "continuation", "punctuation")
BOS, PROMPT, WORD_START, CONTINUATION, PUNCTUATION = range(5)
_PLACES = ("1st", "2nd", "3rd", "4th", "5th", "6th", "7th and later")
_FREQUENT = 16  # most frequent tokens, tested individually
_BOS_TEXT = "[BOS]"


@dataclass(frozen=True, slots=True)
class Tokens:
    """All input tokens, one name after the other: ``texts`` to print, indices of the name and of the class in
    `TOKEN_CLASSES`, and the position in the name, from 0; -1 for BOS token and prompt."""

    texts: tuple[str, ...]
    name_T: IntArray
    class_T: IntArray
    place_T: IntArray

    @classmethod
    def of(cls, names: Sequence[EncodedName], prompt_texts: Sequence[str]) -> Tokens:
        """Lists the tokens of encoded names; ``prompt_texts`` has the text of each id, from `NameVocabulary`."""
        texts: list[str] = []
        rows: list[tuple[int, int, int]] = []
        for index, name in enumerate(names):
            for at, token in enumerate(name.ids[:-1]):
                text = prompt_texts[token].lstrip() if at == 1 else prompt_texts[token]
                place = at - name.prompt_length
                if at == 0:
                    kind = BOS
                elif place < 0:
                    kind = PROMPT
                else:
                    kind = _class_in_name(text, place)
                texts.append(_BOS_TEXT if at == 0 else shown_text(text))
                rows.append((index, kind, max(place, -1)))
        name_T, class_T, place_T = np.array(rows, dtype=np.int64).T
        return cls(tuple(texts), name_T, class_T, place_T)


def _class_in_name(text: str, place: int) -> int:
    visible = text.strip()
    # A surrogate is a byte of an incomplete character, which counts as a letter.
    if visible and not any(character.isalnum() or "\udc80" <= character <= "\udcff" for character in visible):
        return PUNCTUATION
    return WORD_START if place == 0 or text.startswith(" ") else CONTINUATION


def shown_text(text: str) -> str:
    """Makes a token printable: spaces become "·", bytes of incomplete characters ``\\xc3``."""
    shown = (f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in text.replace(" ", "·"))
    return "".join(shown)


def token_labels(tokens: Tokens) -> list[LabelSet]:
    """Labels tokens by class, by position in the name, and by the token itself (the most frequent ones)."""
    in_name_T = tokens.place_T >= 0
    place_T = np.where(in_name_T, np.minimum(tokens.place_T, len(_PLACES) - 1), -1)
    counted = Counter(text for text, inside in zip(tokens.texts, in_name_T, strict=True) if inside)
    frequent = tuple(text for text, count in counted.most_common(_FREQUENT) if count >= FEWEST_TOKENS)
    index = {text: place for place, text in enumerate(frequent)}
    pairs = zip(tokens.texts, in_name_T, strict=True)
    token_T = np.array([index.get(text, -1) if inside else -1 for text, inside in pairs], dtype=np.int64)
    return [
        LabelSet("token class", TOKEN_CLASSES, tokens.class_T, "within names"),
        LabelSet("place in the name", _PLACES, place_T, "within names"),
        LabelSet("token", frequent, token_T, "tokens"),
    ]


def card_labels(cards: Sequence[Card], tokens: Tokens) -> list[LabelSet]:
    """Labels the tokens within names by card type (an Artifact Creature is a Creature) and color."""
    in_name_T = tokens.place_T >= 0
    types = [next((name for name in reversed(TYPES) if name in card.types), None) for card in cards]
    colors = [next(iter(colors_of(card)), None) for card in cards]
    colors = [COLOR_WORDS.get(color, color) if color is not None else None for color in colors]
    labels = []
    orders = (("card type", types, TYPES), ("color", colors, (*COLOR_WORDS.values(), "multicolor", "colorless")))
    for title, values, order in orders:
        groups = tuple(name for name in order if name in values)
        value_N = np.array([-1 if value is None else groups.index(value) for value in values], dtype=np.int64)
        labels.append(LabelSet(title, groups, np.where(in_name_T, value_N[tokens.name_T], -1), "names"))
    return labels
