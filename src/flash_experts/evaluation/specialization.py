"""Whether experts take tokens of a kind, told apart from chance.

A table of "expert by card type" shows a pattern even for a router that throws dice, and the more so the fewer tokens
there are. So every figure here stands beside the same figure after the labels were shuffled:

    information   I(expert; label) in bits, over the (token, expert) choices: 0 if the expert tells nothing about the
                  label. Estimated from counts it is biased upwards by about (E - 1)(G - 1) / (2 n ln 2) bits (Miller
                  1955), and by more where tokens hang together; the mean over shuffles is that bias, measured.
    p-value       how often a shuffle is as extreme, over all layers and labels of the page together (the largest
                  standardised figure of each shuffle: Westfall and Young 1993, section 2.5). With p <= 0.05 the chance
                  that a page of pure noise calls anything specialised is 5%.
    marks         cells whose share no more than 5% of the shuffles exceed in any cell of their label; only in tables
                  that pass the test as a whole.

What is shuffled must be exchangeable. A card's type belongs to all tokens of its name, which are not independent: types
change places between names. The class or place of a token changes places within its name.

Letters in the shapes: T tokens, E experts, G groups of a label, L layers with experts, U units that are shuffled,
B shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

SHUFFLES = 199
SIGNIFICANT = 0.05
# Smaller groups are left out: their shares are noise.
FEWEST_TOKENS, FEWEST_NAMES = 20, 10


@dataclass(frozen=True, slots=True)
class LabelSet:
    """A label for each token.

    Attributes:
        title: for example ``card type``.
        groups: names of the G groups.
        label_T: (T,) which group, -1 for none.
        shuffled: what changes places: ``names`` (all tokens of a name have one label), ``within names`` or ``tokens``.
    """

    title: str
    groups: tuple[str, ...]
    label_T: IntArray
    shuffled: Literal["names", "within names", "tokens"]


@dataclass(frozen=True, slots=True)
class Specialization:
    """What the experts of one layer have to do with one label.

    Attributes:
        title: of the label.
        block: of the layer, from 0.
        groups: names of the groups that have tokens enough.
        tokens: of each group.
        share: for each group the share of its choices that went to each expert.
        marks: for each group and expert 1 (more than chance), -1 (less) or 0; all 0 if the whole is chance.
        information: bits.
        shuffled: mean of the information after shuffling: what chance gives.
        shuffled_high: what 95% of the shuffles stay under.
        p_value: corrected for everything that is tested together.
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
        """Whether more than chance is at work."""
        return self.p_value <= SIGNIFICANT

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        return {name: getattr(self, name) for name in self.__slots__} | {"is_specialized": self.is_specialized}


def mutual_information(counts_GE: npt.ArrayLike) -> FloatArray:
    """Bits that one of two variables tells of the other, from (..., G, E) counts; 0 where there are none."""
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
    """Tests every label against the experts of every layer.

    Args:
        labels: those with fewer than two groups of enough tokens (`FEWEST_TOKENS`, `FEWEST_NAMES`) are left out.
        chosen_LTE: for each layer (T, E), true where the token is one of the expert's.
        blocks: the number of each layer.
        name_T: (T,) the name that each token belongs to, ascending.
        shuffles: B; the least p-value is 1 / (B + 1).
        seed: of the shuffles.

    Returns:
        For each label that is left all layers, in the order of both.
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
    # (B + 1, labels * L), the first of the B + 1 as it is
    information = np.concatenate([mutual_information(table.swapaxes(1, 2)) for table in tables], axis=1)
    largest = _standardized(information).max(axis=1)
    found = []
    for index, (label, table) in enumerate(zip(kept, tables, strict=True)):
        marks_GLE = _marks(table)
        for layer, block in enumerate(blocks):
            told = information[:, index * len(blocks) + layer]
            exceeded = int((largest[1:] >= _standardized(told)[0]).sum())
            p_value = (1 + exceeded) / (shuffles + 1)
            found.append(_specialization(label, block, table[0, :, layer], marks_GLE[:, layer], told, p_value))
    return found


def _specialization(
    label: LabelSet, block: int, counts_GE: FloatArray, marks_GE: IntArray, information: FloatArray, p_value: float
) -> Specialization:
    """The figures of one layer; ``information`` (B + 1,) is that of the counts and then of each shuffle."""
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
    """The label with its large groups alone; None if fewer than two are left."""
    kept = []
    for group in range(len(label.groups)):
        mine = label.label_T == group
        names = len(np.unique(name_T[mine]))
        if mine.sum() >= FEWEST_TOKENS and (label.shuffled != "names" or names >= FEWEST_NAMES):
            kept.append(group)
    if len(kept) < 2:
        return None
    new_of_old = np.full(len(label.groups) + 1, -1)  # the last is for no label, -1
    new_of_old[kept] = np.arange(len(kept))
    return LabelSet(label.title, tuple(label.groups[g] for g in kept), new_of_old[label.label_T], label.shuffled)


def _shuffled_tables(
    label: LabelSet, choices: npt.NDArray[np.float32], name_T: IntArray, shuffles: int, rng: np.random.Generator
) -> FloatArray:
    """(B + 1, G, L * E) choices of each group by expert: as they are, then after each shuffle."""
    labelled = label.label_T >= 0
    label_U, units, names_U = label.label_T[labelled], choices[labelled], name_T[labelled]
    if label.shuffled == "names":
        starts = np.flatnonzero(np.diff(names_U, prepend=-1))
        units, label_U = np.add.reduceat(units, starts), label_U[starts]

    def shuffled_order() -> IntArray:
        if label.shuffled != "within names":
            return rng.permutation(len(label_U))
        # Sorted by name, as they are already, and at random within each.
        return np.lexsort((rng.random(len(label_U)), names_U))

    one_hot = np.eye(len(label.groups), dtype=np.float32)
    orders = [np.arange(len(label_U)), *(shuffled_order() for _ in range(shuffles))]
    return np.stack([one_hot[label_U[order]].T @ units for order in orders]).astype(np.float64)


def _standardized(values: FloatArray) -> FloatArray:
    """Values (B + 1, ...) less the mean of the shuffles, over their standard deviation; 0 where they do not vary."""
    mean, deviation = values[1:].mean(0), values[1:].std(0)
    return np.divide(values - mean, deviation, out=np.zeros_like(values), where=deviation > 1e-12)


def _marks(table: FloatArray) -> IntArray:
    """(G, L, E) 1, -1 or 0 of counts (B + 1, G, L, E): shares beyond what 95% of the shuffles reach in any cell.

    Shares and not counts, since names differ in length, and a group's tokens with the names that it is dealt.
    """
    z = _standardized(table / np.maximum(table.sum(-1, keepdims=True), 1.0))
    limit = np.quantile(np.abs(z[1:]).max(axis=(1, 2, 3)), 0.95)
    return np.where(np.abs(z[0]) > limit, np.sign(z[0]), 0).astype(np.int64)
