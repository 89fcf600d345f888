"""The swap baseline, and models mixed with the n-gram baseline.

``swap`` exchanges the parts of two real names of the kind: "Goblin Guide" + "Raging Kobold" -> "Goblin Kobold". Both
read well, so a model has to beat it. ``MODEL+ngram`` is ``p(name) = w * p_model(name) + (1 - w) * p_ngram(name)``.

Shape suffixes: N names.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Collection, Iterable, Sequence

import numpy as np

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.evaluation.metrics import FloatArray
from flash_experts.evaluation.ngram import Kind, kinds_of
from flash_experts.evaluation.scorers import LanguageModel, ModelSize, NGramBaseline
from flash_experts.generation.text_rules import format_name

_JOINTS = (", ", " of the ", " of ", " ")  # where a name is cut, the first that it has
_FEWEST = 40  # names of a kind whose parts are exchanged; with fewer, attributes are left out
# Kinds of attributes that are left out, one after another.
_LEFT_OUT = ((), ("color",), ("color", "supertype"), ("color", "supertype", "subtype"))
SUFFIX = "+ngram"
_PARTS_WEIGHTS = np.linspace(0.01, 0.5, 50)  # of the parts, next to the n-grams
_MODEL_WEIGHTS = np.linspace(0.5, 0.99, 50)
_VALIDATION = 1000  # validation names that choose the weights, at most


def parts_of(name: str) -> tuple[str, str, str] | None:
    """First part, joint and second part; None for one word, or more than two without a joint."""
    for joint in _JOINTS:
        first, found, second = name.partition(joint)
        if found and first and second:
            return (first, joint, second) if joint != " " or " " not in second else None
    return None


class _Parts:
    def __init__(self, names: Iterable[str]) -> None:
        pairs: dict[str, list[tuple[str, str]]] = {}
        for name in names:
            if (parts := parts_of(name)) is not None:
                pairs.setdefault(parts[1], []).append((parts[0], parts[2]))
        # Only joints that at least two names have.
        self._pairs = {joint: each for joint, each in pairs.items() if len(each) > 1}
        self._joints = [joint for joint, each in self._pairs.items() for _ in each]
        self._firsts = {joint: Counter(first for first, _ in each) for joint, each in self._pairs.items()}
        self._seconds = {joint: Counter(second for _, second in each) for joint, each in self._pairs.items()}

    def __bool__(self) -> bool:
        return bool(self._joints)

    def draw(self, rng: random.Random) -> str:
        """The first part of one name and the second of another with the same joint."""
        joint = rng.choice(self._joints)
        (first, _), (_, second) = rng.choice(self._pairs[joint]), rng.choice(self._pairs[joint])
        return format_name(first + joint + second)

    def nats(self, name: str) -> float:
        first, joint, second = parts_of(name) or ("", "", "")
        if joint not in self._pairs or not (self._firsts[joint][first] and self._seconds[joint][second]):
            return math.inf
        of_joint = len(self._pairs[joint])
        firsts, seconds = self._firsts[joint][first], self._seconds[joint][second]
        return -sum(map(math.log, (of_joint / len(self._joints), firsts / of_joint, seconds / of_joint)))


def swapped_names(names: Iterable[str], count: int, known: Collection[str], seed: int = 0) -> list[str]:
    """Up to ``count`` distinct swapped names, without those whose normal forms are ``known``."""
    parts, rng, found = _Parts(names), random.Random(seed), dict[str, str]()
    for _ in range(50 * count if parts else 0):
        text = parts.draw(rng)
        key = normal_form(text)
        if key not in known:
            found.setdefault(key, text)
        if len(found) == count:
            break
    return list(found.values())


class SwapBaseline(NGramBaseline):
    """The swap baseline; the n-grams are for parts that no training name of the kind has.

    ``p(name) = w * p(joint) p(first | joint) p(second | joint) + (1 - w) * p_ngram(name)``.
    """

    label = "swap"

    def __init__(self, train: Sequence[Card], validation: Sequence[Card]) -> None:
        """Chooses the weight on validation cards."""
        if not validation:
            raise ValueError("no validation names: the weight of the swapped parts is chosen on them")
        self._train = [card.name for card in train]
        self._of_kind: dict[Kind, set[int]] = {}
        for place, card in enumerate(train):
            for kind in kinds_of(Attributes.of(card)):
                self._of_kind.setdefault(kind, set()).add(place)
        self._parts: dict[tuple[Kind, ...], _Parts] = {}
        if not self._parts_for(UNCONDITIONAL):
            raise ValueError("no two training names have a joint in common, such as of: swap needs some")
        super().__init__(train)
        cards = validation[:_VALIDATION]
        names, given = [card.name for card in cards], [Attributes.of(card) for card in cards]
        self.weight = _best_weight(self._own_nats(names, given), super().nats(names, given), _PARTS_WEIGHTS)

    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        weight_N = np.full(len(names), self.weight)
        return mixed(self._own_nats(names, attributes), super().nats(names, attributes), weight_N)

    def _own_nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        pairs = zip(names, attributes, strict=True)
        return np.array([self._parts_for(given).nats(name) for name, given in pairs], dtype=float)

    def sample(self, count: int, seed: int, attributes: Attributes = UNCONDITIONAL) -> list[str]:
        parts, rng = self._parts_for(attributes), random.Random(seed)
        return [parts.draw(rng) for _ in range(count)]

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        rng = random.Random(seed)
        return [self._parts_for(given).draw(rng) for given in attributes]

    def _parts_for(self, attributes: Attributes) -> _Parts:
        """The parts of names with these attributes, which are left out while there are few."""
        kinds = tuple(kinds_of(attributes))
        if kinds not in self._parts:
            for left_out in _LEFT_OUT:
                sets = [self._of_kind.get(kind, set()) for kind in kinds if kind[0] not in left_out]
                places = set.intersection(*sets) if sets else set(range(len(self._train)))
                parts = _Parts(self._train[place] for place in sorted(places))
                if parts and len(places) >= _FEWEST:
                    break
            else:
                parts = _Parts(self._train)
            self._parts[kinds] = parts
        return self._parts[kinds]


class MixedWithNGrams(LanguageModel):
    """A language model and the n-gram baseline, with a weight for names with a prompt and one without.

    The n-grams change only the nats and the size: names, costs and expert loads are the model's.
    """

    def __init__(self, model: LanguageModel, baseline: NGramBaseline, validation: Sequence[Card]) -> None:
        """Chooses the weights on validation cards."""
        if not validation:
            raise ValueError("no validation names: the weight of the n-grams is chosen on them")
        label = model.label if model.label.endswith(SUFFIX) else model.label + SUFFIX
        super().__init__(model.model, model.tokenizer, label, model._folder)
        self._baseline = baseline
        cards = validation[:_VALIDATION]
        names, given = [card.name for card in cards], [Attributes.of(card) for card in cards]
        self.unconditional, self.conditional = (
            _best_weight(model.nats(names, attributes), baseline.nats(names, attributes), _MODEL_WEIGHTS)
            for attributes in ([UNCONDITIONAL] * len(names), given)
        )

    @property
    def size(self) -> ModelSize:
        one, other = super().size, self._baseline.size
        return ModelSize(one.total + other.total, one.active + other.active)

    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        weight_N = np.array([self.unconditional if one == UNCONDITIONAL else self.conditional for one in attributes])
        return mixed(super().nats(names, attributes), self._baseline.nats(names, attributes), weight_N)


def mixed(first_N: FloatArray, second_N: FloatArray, weight_N: FloatArray) -> FloatArray:
    """The nats (N,) of a mixture; ``weight_N`` is that of the first, between 0 and 1."""
    assert ((weight_N > 0) & (weight_N < 1)).all()
    return -np.logaddexp(np.log(weight_N) - first_N, np.log1p(-weight_N) - second_N)


def _best_weight(first_N: FloatArray, second_N: FloatArray, weights: FloatArray) -> float:
    totals = [mixed(first_N, second_N, np.full(len(first_N), weight)).sum() for weight in weights]
    return float(weights[int(np.argmin(totals))])


def without_suffix(model: str) -> str | None:
    """The model's part of ``MODEL+ngram``; None without the suffix."""
    return model.removesuffix(SUFFIX) if model.endswith(SUFFIX) and len(model) > len(SUFFIX) else None
