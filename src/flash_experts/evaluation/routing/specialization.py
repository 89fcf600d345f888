"""Expert specialization: labels of tokens and cards, and permutation tests of whether routing depends on them.

Even a random router shows a pattern, so each statistic is compared with that after shuffling the labels:

    information   mutual information I(expert; label) in bits over the (token, expert) choices. Estimated from counts it
                  is biased upwards by about (E - 1)(G - 1) / (2 n ln 2) bits (Miller 1955), and by more for dependent
                  tokens; the mean over shuffles measures that bias.
    p-value       share of shuffles that are as extreme, corrected over all layers and labels by the largest
                  standardized statistic of each shuffle (Westfall and Young 1993, section 2.5).
    marks         cells whose share at most 5% of the shuffles exceed, in tables that are significant as a whole.

Shuffled units must be exchangeable: card types are shuffled between names, whose tokens share them; classes and
positions of tokens within each name.

Shape suffixes: T tokens, E experts, G groups of a label, L MoE layers, U shuffled units, B shuffles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from flash_experts.data.cards import COLOR_WORDS, TYPES, Card
from flash_experts.data.packing import EncodedName
from flash_experts.evaluation.metrics import FloatArray, IntArray, colors_of

TOKEN_CLASSES = ("BOS token", "prompt", "word start", "continuation", "punctuation")
BOS, PROMPT, WORD_START, CONTINUATION, PUNCTUATION = range(5)
SHUFFLES = 199
SIGNIFICANT = 0.05
_PLACES = ("1st", "2nd", "3rd", "4th", "5th", "6th", "7th and later")
_FREQUENT = 16  # most frequent tokens, tested individually
_BOS_TEXT = "[BOS]"
# Smaller groups are left out: their shares are noise.
FEWEST_TOKENS, FEWEST_NAMES = 20, 10


@dataclass(frozen=True, slots=True)
class LabelSet:
    """A label for each token.

    Attributes:
        label_T: group of each token, -1 for none.
        shuffled: unit of shuffling.
    """

    title: str
    groups: tuple[str, ...]
    label_T: IntArray
    shuffled: Literal["names", "within names", "tokens"]


@dataclass(frozen=True, slots=True)
class Specialization:
    """Dependence between the experts of one layer and one label.

    Attributes:
        share: of the choices that went to each expert, by group.
        marks: 1 (more than chance), -1 (less) or 0, by group and expert.
        shuffled: mean information of the shuffles; ``shuffled_high`` is their 95% quantile.
    """

    title: str
    block: int
    groups: tuple[str, ...]
    tokens: tuple[int, ...]
    share: tuple[tuple[float, ...], ...]
    marks: tuple[tuple[int, ...], ...]
    information: float
    shuffled: float
    shuffled_high: float
    p_value: float

    @property
    def is_specialized(self) -> bool:
        return self.p_value <= SIGNIFICANT


def mutual_information(counts_GE: npt.ArrayLike) -> FloatArray:
    """The mutual information in bits of (..., G, E) counts; 0 for empty tables."""
    counts = np.asarray(counts_GE, dtype=np.float64)
    total = np.maximum(counts.sum((-2, -1), keepdims=True), 1.0)
    joint = counts / total
    independent = joint.sum(-1, keepdims=True) * joint.sum(-2, keepdims=True)
    ratio = np.divide(joint, independent, out=np.ones_like(joint), where=joint > 0)
    return np.maximum((joint * np.log2(ratio)).sum((-2, -1)), 0.0)


def specializations(
    labels: Sequence[LabelSet],
    chosen_LTE: Sequence[npt.NDArray[np.bool_]],
    blocks: Sequence[int],
    name_T: IntArray,
    *,
    shuffles: int = SHUFFLES,
    seed: int = 0,
) -> list[Specialization]:
    """Tests every label against the experts of every layer, in the order of both.

    Args:
        labels: those with fewer than two large groups (`FEWEST_TOKENS`, `FEWEST_NAMES`) are left out.
        chosen_LTE: true where the token goes to the expert.
        name_T: ascending.
        shuffles: B; the smallest p-value is 1 / (B + 1).
    """
    if not blocks:
        return []
    rng = np.random.default_rng(seed)
    num_experts = chosen_LTE[0].shape[1]
    choices = np.concatenate([chosen.astype(np.float32) for chosen in chosen_LTE], axis=1)
    kept = [with_enough for label in labels if (with_enough := _large_groups(label, name_T)) is not None]
    tables = [
        _shuffled_tables(label, choices, name_T, shuffles, rng).reshape(
            shuffles + 1, len(label.groups), len(blocks), num_experts
        )
        for label in kept
    ]
    if not tables:
        return []
    # (B + 1, labels * L); the first of the B + 1 is not shuffled
    information = np.concatenate([mutual_information(table.swapaxes(1, 2)) for table in tables], axis=1)
    largest = _standardized(information).max(axis=1)
    found = []
    for index, (label, table) in enumerate(zip(kept, tables, strict=True)):
        marks_GLE = _marks(table)
        for layer, block in enumerate(blocks):
            own = information[:, index * len(blocks) + layer]
            exceeded = int((largest[1:] >= _standardized(own)[0]).sum())
            p_value = (1 + exceeded) / (shuffles + 1)
            found.append(_specialization(label, block, table[0, :, layer], marks_GLE[:, layer], own, p_value))
    return found


def _specialization(
    label: LabelSet, block: int, counts_GE: FloatArray, marks_GE: IntArray, information: FloatArray, p_value: float
) -> Specialization:
    """One layer. ``information`` is (B + 1,): of the counts, then of each shuffle."""
    share_GE = counts_GE / np.maximum(counts_GE.sum(1, keepdims=True), 1.0)
    sizes_G = np.bincount(label.label_T[label.label_T >= 0], minlength=len(label.groups))
    return Specialization(
        title=label.title,
        block=block,
        groups=label.groups,
        tokens=tuple(sizes_G.tolist()),
        share=tuple(map(tuple, share_GE.tolist())),
        marks=tuple(map(tuple, (marks_GE if p_value <= SIGNIFICANT else 0 * marks_GE).tolist())),
        information=float(information[0]),
        shuffled=float(information[1:].mean()),
        shuffled_high=float(np.quantile(information[1:], 0.95)),
        p_value=p_value,
    )


def _large_groups(label: LabelSet, name_T: IntArray) -> LabelSet | None:
    kept = []
    for group in range(len(label.groups)):
        mine = label.label_T == group
        names = len(np.unique(name_T[mine]))
        if mine.sum() >= FEWEST_TOKENS and (label.shuffled != "names" or names >= FEWEST_NAMES):
            kept.append(group)
    if len(kept) < 2:
        return None
    new_of_old = np.full(len(label.groups) + 1, -1)  # the last entry maps -1 (no label)
    new_of_old[kept] = np.arange(len(kept))
    return LabelSet(label.title, tuple(label.groups[g] for g in kept), new_of_old[label.label_T], label.shuffled)


def _shuffled_tables(
    label: LabelSet, choices: npt.NDArray[np.float32], name_T: IntArray, shuffles: int, rng: np.random.Generator
) -> FloatArray:
    """Counts choices by group and expert, (B + 1, G, L * E): unshuffled, then after each shuffle."""
    labelled = label.label_T >= 0
    label_U, units, names_U = label.label_T[labelled], choices[labelled], name_T[labelled]
    if label.shuffled == "names":
        starts = np.flatnonzero(np.diff(names_U, prepend=-1))
        units, label_U = np.add.reduceat(units, starts), label_U[starts]

    def shuffled_order() -> IntArray:
        if label.shuffled != "within names":
            return rng.permutation(len(label_U))
        # Keeps the order of the names and shuffles within each.
        return np.lexsort((rng.random(len(label_U)), names_U))

    one_hot = np.eye(len(label.groups), dtype=np.float32)
    orders = [np.arange(len(label_U)), *(shuffled_order() for _ in range(shuffles))]
    return np.stack([one_hot[label_U[order]].T @ units for order in orders]).astype(np.float64)


def _standardized(values: FloatArray) -> FloatArray:
    """Standardizes by mean and deviation of the shuffles; 0 where they do not vary."""
    mean, deviation = values[1:].mean(0), values[1:].std(0)
    return np.divide(values - mean, deviation, out=np.zeros_like(values), where=deviation > 1e-12)


def _marks(table: FloatArray) -> IntArray:
    """(G, L, E): 1 or -1 for significant cells of counts (B + 1, G, L, E), else 0."""
    # Shares, since a group's number of tokens changes with the names that a shuffle gives it.
    z = _standardized(table / np.maximum(table.sum(-1, keepdims=True), 1.0))
    limit = np.quantile(np.abs(z[1:]).max(axis=(1, 2, 3)), 0.95)
    return np.where(np.abs(z[0]) > limit, np.sign(z[0]), 0).astype(np.int64)


@dataclass(frozen=True, slots=True)
class Tokens:
    """All input tokens, one name after the other.

    Classes index `TOKEN_CLASSES`; places in the name count from 0, -1 for BOS token and prompt.
    """

    texts: tuple[str, ...]
    name_T: IntArray
    class_T: IntArray
    place_T: IntArray

    @classmethod
    def of(cls, names: Sequence[EncodedName], prompt_texts: Sequence[str]) -> Tokens:
        """``prompt_texts`` is of `NameVocabulary`."""
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
    """A token in print: spaces become "·", bytes of incomplete characters ``\\xc3``."""
    shown = (f"\\x{ord(c) - 0xDC00:02x}" if "\udc80" <= c <= "\udcff" else c for c in text.replace(" ", "·"))
    return "".join(shown)


def token_labels(tokens: Tokens) -> list[LabelSet]:
    """Labels by class, by place in the name, and by the token itself (the most frequent ones)."""
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
    """Labels within names by card type (an Artifact Creature is a Creature) and color."""
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
