"""Control: can one tell from a name alone what it was asked for?

A classifier of character n-grams learns to tell card types, colors and legends from the names of training cards. Then
it reads the names of held-out cards, names that a model made for those same cards, and names that a model made when it
was told a type or color and nothing else. A model that names as Wizards does is recognized as often as Wizards.

More often is no better: a caricature is easy to recognize, and n-gram samples beat real names. The figure that cannot
be gamed is `flash_experts.evaluation.evaluate.SplitFigures.control`, in bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from flash_experts.data.cards import COLOR_WORDS, Card
from flash_experts.data.prompts import NONE, Attributes
from flash_experts.evaluation.metrics import Estimate

# An artifact creature is named as a creature; of the others the first of these decides.
_TYPES = ("Creature", "Planeswalker", "Land", "Instant", "Sorcery", "Artifact", "Enchantment")
_FEWEST = 8  # held-out names of a class that is judged
_RESAMPLES = 1000


class Samples(Protocol):
    """What control asks of a model."""

    def sample(self, count: int, seed: int, attributes: Attributes = NONE) -> list[str]: ...
    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]: ...


@dataclass(frozen=True, slots=True)
class Task:
    """One thing to tell from a name.

    Attributes:
        name: what it is.
        label_of: the label of a card; None for cards that are not asked about.
        prompt_of: what a model is told to make a name of a label.
    """

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
    """How often the classifier finds what was asked for.

    Attributes:
        names: how many were read.
        plain: share of names recognized, each class weighted as it is among held-out cards.
        balanced: mean over the classes of the share recognized.
        by_class: share recognized of each class.
    """

    names: int
    plain: Estimate
    balanced: Estimate
    by_class: dict[str, float]


@dataclass(frozen=True, slots=True)
class ControlFigures:
    """One task.

    Attributes:
        task: what is told from the names.
        model: names made for held-out cards, all of whose attributes were told.
        alone: names made when this one attribute was told.
        real: the names of those cards.
        majority: what always saying the commonest class would give.
    """

    task: str
    model: Recognition
    alone: Recognition
    real: Recognition
    majority: float


class ControlJudge:
    """Classifiers for every task, trained once and used on any number of models."""

    def __init__(self, train: Sequence[Card], held_out: Sequence[Card]) -> None:
        """Trains the classifiers.

        Args:
            train: cards whose names are learned from.
            held_out: cards that no model was trained on, of the same families as ``train``.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
        """
        self._held_out = held_out
        self._classifiers = {task.name: _fit(train, task) for task in TASKS}

    def judge(self, model: Samples, samples: int, seed: int) -> list[ControlFigures]:
        """Has a model make names for each class of each task, and reads them.

        Args:
            model: what makes them, at temperature 1.
            samples: names in all, half of them for held-out cards (or for all of these), half for one attribute alone.
            seed: of the drawing.

        Returns:
            A task each; a task with under two classes among the held-out cards is left out.
        """
        classes = {task.name: self._classes(task) for task in TASKS}
        of_each = max(1, samples // 2 // max(1, sum(map(len, classes.values()))))
        cards = self._held_out[: max(_FEWEST, samples // 2)]
        told = model.sample_each([Attributes.of(card) for card in cards], seed)
        figures = []
        for task in TASKS:
            shares = classes[task.name]
            if len(shares) < 2:
                continue
            alone = {label: model.sample(of_each, seed, task.prompt_of(label)) for label in shares}
            made: dict[str, list[str]] = {label: [] for label in shares}
            real: dict[str, list[str]] = {label: [] for label in shares}
            for card in self._held_out:
                if (label := task.label_of(card)) in real:
                    real[label].append(card.name)
            for card, name in zip(cards, told, strict=True):
                if (label := task.label_of(card)) in made:
                    made[label].append(name)
            figures.append(
                ControlFigures(
                    task=task.name,
                    model=self._recognition(task, made, shares),
                    alone=self._recognition(task, alone, shares),
                    real=self._recognition(task, real, shares),
                    majority=max(shares.values()),
                )
            )
        return figures

    def _recognition(self, task: Task, names: dict[str, list[str]], shares: dict[str, float]) -> Recognition:
        return recognition({label: self._hits(task, label, some) for label, some in names.items() if some}, shares)

    def _classes(self, task: Task) -> dict[str, float]:
        """Labels that the classifier knows and enough held-out cards have, with their shares of these cards."""
        classifier = self._classifiers[task.name]
        if classifier is None:
            return {}
        labels = [task.label_of(card) for card in self._held_out]
        counts = {str(label): labels.count(str(label)) for label in classifier.classes_}
        kept = {label: count for label, count in counts.items() if count >= _FEWEST}
        return {label: count / sum(kept.values()) for label, count in kept.items()}

    def _hits(self, task: Task, label: str, names: Sequence[str]) -> npt.NDArray[np.bool_]:
        return np.asarray(self._classifiers[task.name].predict(names) == label)


def recognition(hits: dict[str, npt.NDArray[np.bool_]], shares: dict[str, float]) -> Recognition:
    """Figures of what was recognized, with 95% bootstrap intervals over the names of each class.

    Args:
        hits: for each class, of each of its names whether it was recognized.
        shares: weight of each class in the plain figure.
    """
    rng = np.random.default_rng(0)
    # Resampling n names of which a share p is recognized recognizes a binomial number of them.
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
    """A linear classifier (a support vector machine) of the character n-grams of words; None for under two classes."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.pipeline import make_pipeline
    from sklearn.svm import LinearSVC

    labelled = [(card.name, label) for card in cards if (label := task.label_of(card)) is not None]
    if len({label for _, label in labelled}) < 2:
        return None
    grams = TfidfVectorizer(analyzer="char_wb", ngram_range=(1, 5), sublinear_tf=True, min_df=2, dtype=np.float32)
    # Classes weigh alike: instants are few, and should be found all the same.
    classifier = make_pipeline(grams, LinearSVC(C=0.1, class_weight="balanced", random_state=0))
    names, labels = zip(*labelled, strict=True)
    return classifier.fit(names, labels)
