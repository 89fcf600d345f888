"""Control accuracy: attribute classifiers recognize from a name alone the attributes that it was conditioned on.

Classifiers on character n-grams learn card type, color and legendary from training names. A good model is recognized as
often as real names; exaggerated names more often, which `SplitMetrics.control`, in bits, does not reward.

Shape suffixes: R resamples, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flash_experts.data.cards import COLOR_WORDS, Card
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.evaluation.metrics import Estimate

# The first matching type is the label: an artifact creature is named like a creature.
_TYPES = ("Creature", "Planeswalker", "Land", "Instant", "Sorcery", "Artifact", "Enchantment")
_FEWEST = 8  # held-out names of a class, at least
_RESAMPLES = 1000


class NameSampler(Protocol):
    """A model that generates names for attributes."""

    def sample(self, count: int, seed: int, attributes: Attributes = UNCONDITIONAL) -> list[str]: ...
    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Task:
    """One classification task: the label of a card (None leaves it out), and the attributes of a label's prompt."""

    name: str
    label_of: Callable[[Card], str | None]
    prompt_of: Callable[[str], Attributes]


def _type(card: Card) -> str | None:
    return next((one for one in _TYPES if one in card.types), None)


def _color(card: Card) -> str | None:
    return COLOR_WORDS[card.colors[0]] if card.colors is not None and len(card.colors) == 1 else None


def _legendary(card: Card) -> str | None:
    if "Creature" not in card.types:
        return None
    return "legendary" if "Legendary" in card.supertypes else "not legendary"


_LETTERS = {word: letter for letter, word in COLOR_WORDS.items()}
TASKS = (
    Task("type", _type, lambda label: Attributes(types=(label,))),
    Task("color", _color, lambda label: Attributes(colors=(_LETTERS[label],))),
    Task(
        "legendary creature",
        _legendary,
        lambda label: Attributes(supertypes=("Legendary",) if label == "legendary" else (), types=("Creature",)),
    ),
)


@dataclass(frozen=True, slots=True)
class Recognition:
    """Accuracy of a classifier; in ``plain`` each class is weighted by its share of the held-out cards."""

    names: int
    plain: Estimate
    balanced: Estimate
    by_class: dict[str, float]


@dataclass(frozen=True, slots=True)
class ControlMetrics:
    """Accuracy on one task.

    Attributes:
        model: on names conditioned on all attributes of held-out cards.
        alone: on names conditioned on this attribute only.
        real: on the real names of the held-out cards.
        majority: of always predicting the most common class.
    """

    task: str
    model: Recognition
    alone: Recognition
    real: Recognition
    majority: float


class AttributeClassifiers:
    """One attribute classifier per task, trained once and used for any number of models."""

    def __init__(self, train: Sequence[Card], held_out: Sequence[Card], tasks: Sequence[Task] = TASKS) -> None:
        """Trains the classifiers; ``held_out`` has cards of the same families. Needs scikit-learn."""
        self._held_out = held_out
        self.tasks = tasks
        self._classifiers = {task.name: _fit(train, task) for task in tasks}

    def measure(self, model: NameSampler, samples: int, seed: int) -> list[ControlMetrics]:
        """Classifies generated names: half for held-out cards (or all of those), half for one attribute alone.

        ``samples`` is the number of names in all; there may be fewer held-out cards. Leaves out tasks with one class
        among those.
        """
        classes = {task.name: self._classes(task) for task in self.tasks}
        of_each = max(1, samples // 2 // max(1, sum(map(len, classes.values()))))
        cards = self._held_out[: max(_FEWEST, samples // 2)]
        names = model.sample_each([Attributes.of(card) for card in cards], seed)
        metrics = []
        for task in self.tasks:
            shares = classes[task.name]
            if len(shares) < 2:
                continue
            alone = {label: model.sample(of_each, seed, task.prompt_of(label)) for label in shares}
            made: dict[str, list[str]] = {label: [] for label in shares}
            real: dict[str, list[str]] = {label: [] for label in shares}
            for card in self._held_out:
                if (label := task.label_of(card)) in real:
                    real[label].append(card.name)
            for card, name in zip(cards, names, strict=True):
                if (label := task.label_of(card)) in made:
                    made[label].append(name)
            of_model, of_alone, of_real = (self._recognition(task, found, shares) for found in (made, alone, real))
            metrics.append(ControlMetrics(task.name, of_model, of_alone, of_real, max(shares.values())))
        return metrics

    def _recognition(self, task: Task, names: dict[str, list[str]], shares: dict[str, float]) -> Recognition:
        return recognition({label: self.hits(task, label, some) for label, some in names.items() if some}, shares)

    def _classes(self, task: Task) -> dict[str, float]:
        """The labels that the classifier knows and enough held-out cards have, with their shares."""
        classifier = self._classifiers[task.name]
        if classifier is None:
            return {}
        labels = [task.label_of(card) for card in self._held_out]
        counts = {str(label): labels.count(str(label)) for label in classifier.classes_}
        kept = {label: count for label, count in counts.items() if count >= _FEWEST}
        return {label: count / sum(kept.values()) for label, count in kept.items()}

    def hits(self, task: Task, label: str, names: Sequence[str]) -> npt.NDArray[np.bool_]:
        """(N,) whether each name is classified as ``label``."""
        return np.asarray(self._classifiers[task.name].predict(names) == label)


def recognition(hits: dict[str, npt.NDArray[np.bool_]], shares: dict[str, float]) -> Recognition:
    """Accuracies with 95% bootstrap intervals over the names of each class, whose weights are ``shares``."""
    rng = np.random.default_rng(0)
    # The number of hits among n resampled names with accuracy p is binomial.
    drawn_RC = np.stack(
        [rng.binomial(some.size, some.mean(), size=_RESAMPLES) / some.size for some in hits.values()], axis=1
    )
    found_C = np.array([some.mean() for some in hits.values()])
    weights_C = np.array([shares[label] for label in hits])
    weights_C /= weights_C.sum()

    def estimate(weight_C: npt.NDArray[np.float64]) -> Estimate:
        low, high = np.percentile(drawn_RC @ weight_C, [2.5, 97.5])
        return Estimate(float(found_C @ weight_C), float(low), float(high))

    return Recognition(
        names=sum(some.size for some in hits.values()),
        plain=estimate(weights_C),
        balanced=estimate(np.full(len(hits), 1.0 / len(hits))),
        by_class={label: float(share) for label, share in zip(hits, found_C, strict=True)},
    )


def _fit(cards: Sequence[Card], task: Task) -> Any:
    """A linear support vector machine on character n-grams of words; None for fewer than two classes."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    labelled = [(card.name, label) for card in cards if (label := task.label_of(card)) is not None]
    if len({label for _, label in labelled}) < 2:
        return None
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), sublinear_tf=True, min_df=2, dtype=np.float32)
    # Balanced class weights, so that rare types such as instants are predicted too.
    classifier = make_pipeline(grams, LinearSVC(C=0.1, class_weight="balanced", random_state=0))
    names, labels = zip(*labelled, strict=True)
    return classifier.fit(names, labels)
