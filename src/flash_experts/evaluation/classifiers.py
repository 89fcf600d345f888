"""Two tests of generated names with classifiers: are attributes recognized, and are names real or generated?

Control: linear support vector machines on character n-grams learn card type, color and legendary from training names. A
good model's names are recognized as often as real names; exaggerated names more often.

Detection is a classifier two-sample test. The weak classifier, a logistic regression on character n-grams, detects
spelling only. The strong one, gradient boosting, also has bits under character n-gram models and the number, rarity and
length of words. An area under the ROC curve (AUC) of 0.5 is chance; real names against each other show the noise. A
copy of the training set passes the weak classifier: see the hit ratio of memorization.

Shape suffixes: N names, F features, C classes.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from flash_experts.data.cards import COLOR_WORDS, Card
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation.metrics import NATS_PER_BIT, Estimate, FloatArray, auc_estimate, wilson, words
from flash_experts.evaluation.ngram import KneserNey
from flash_experts.evaluation.scorers import Scorer
from flash_experts.generation.text_rules import SMALL_WORDS

# The first matching type is the label: an artifact creature is named like a creature.
_TYPES = ("Creature", "Planeswalker", "Land", "Instant", "Sorcery", "Artifact", "Enchantment")
_FEWEST_OF_A_CLASS = 8  # held-out names of a class, at least
FOLDS = 5
_INNER_FOLDS = 4
_HALVINGS = 3  # random halvings of the real names
_ORDERS = (3, 6)  # of the character n-gram models
_SMALL_WORDS = SMALL_WORDS - {"but"}  # without it, as when the released models were measured
FEWEST_OF_A_SIDE = 40  # names of each side, at least


@dataclass(frozen=True, slots=True)
class Task:
    """The label of a card (None leaves it out), and the attributes of a label's prompt."""

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
    """Accuracy; in ``plain`` each class is weighted by its share of the held-out cards."""

    names: int
    plain: Estimate
    balanced: Estimate
    by_class: dict[str, float]


@dataclass(frozen=True, slots=True)
class ControlMetrics:
    """Accuracy on one task.

    Attributes:
        model: on names given all attributes of held-out cards.
        alone: on names given this attribute only.
        real: on the names of the held-out cards.
        majority: of always predicting the most common class.
    """

    task: str
    model: Recognition
    alone: Recognition
    real: Recognition
    majority: float


class ControlClassifiers:
    """One classifier per task, for any number of models."""

    def __init__(self, train: Sequence[Card], held_out: Sequence[Card], tasks: Sequence[Task] = TASKS) -> None:
        """Trains the classifiers; ``held_out`` has cards of the same families.

        ``tasks`` then has those with two classes or more among the training cards.
        """
        self._held_out = held_out
        fitted = {task.name: _fit(train, task) for task in tasks}
        self._classifiers = {name: classifier for name, classifier in fitted.items() if classifier is not None}
        self.tasks = [task for task in tasks if task.name in self._classifiers]

    def measure(self, model: Scorer, samples: int, seed: int) -> list[ControlMetrics]:
        """Classifies up to ``samples`` generated names: half for held-out cards, half for one attribute alone.

        Leaves out tasks with one class, and those that no sampled card has a label of.
        """
        classes = {task.name: self._classes(task) for task in self.tasks}
        of_each = max(1, samples // 2 // max(1, sum(map(len, classes.values()))))
        cards = self._held_out[: max(_FEWEST_OF_A_CLASS, samples // 2)]
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
            if not any(made.values()):  # few samples, and none for a card with a label
                continue
            of_model, of_alone, of_real = (
                recognition({label: self.hits(task, label, some) for label, some in found.items() if some}, shares)
                for found in (made, alone, real)
            )
            metrics.append(ControlMetrics(task.name, of_model, of_alone, of_real, max(shares.values())))
        return metrics

    def _classes(self, task: Task) -> dict[str, float]:
        """The labels that enough held-out cards have, with their shares."""
        labels = [task.label_of(card) for card in self._held_out]
        counts = {str(label): labels.count(str(label)) for label in self._classifiers[task.name].classes_}
        kept = {label: count for label, count in counts.items() if count >= _FEWEST_OF_A_CLASS}
        return {label: count / sum(kept.values()) for label, count in kept.items()}

    def hits(self, task: Task, label: str, names: Sequence[str]) -> npt.NDArray[np.bool_]:
        """(N,) whether each name is classified as ``label``."""
        return np.asarray(self._classifiers[task.name].predict(names) == label)


def recognition(hits: dict[str, npt.NDArray[np.bool_]], shares: dict[str, float]) -> Recognition:
    """Accuracies with 95% intervals from Wilson's of each class (Zou and Donner 2008); ``shares`` are weights."""
    found_C = np.array([some.mean() for some in hits.values()])
    low_C, high_C = np.array([wilson(int(some.sum()), some.size) for some in hits.values()]).T
    weights_C = np.array([shares[label] for label in hits])
    weights_C /= weights_C.sum()

    def estimate(weight_C: npt.NDArray[np.float64]) -> Estimate:
        value = float(found_C @ weight_C)
        below, above = (float(np.linalg.norm(weight_C * (bound_C - found_C))) for bound_C in (low_C, high_C))
        return Estimate(value, max(0.0, value - below), min(1.0, value + above))

    return Recognition(
        names=sum(some.size for some in hits.values()),
        plain=estimate(weights_C),
        balanced=estimate(np.full(len(hits), 1.0 / len(hits))),
        by_class={label: float(share) for label, share in zip(hits, found_C, strict=True)},
    )


def _fit(cards: Sequence[Card], task: Task) -> Any:
    """A linear support vector machine; None for fewer than two classes."""
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


@dataclass(frozen=True, slots=True)
class Separation:
    """AUC of both classifiers on two lists of names."""

    names: int
    weak: Estimate
    strong: Estimate


@dataclass(frozen=True, slots=True)
class Detection:
    """Generated against real held-out names, and two halves of the real names against each other."""

    generated: Separation
    real: Separation


class Detector:
    """Classifies names as real or generated."""

    def __init__(self, train: Sequence[str], real: Sequence[str], seed: int = 0) -> None:
        """Fits n-gram models and word counts; ``real`` are held-out names of the same families as ``train``."""
        self._models = [KneserNey(train, order) for order in _ORDERS]
        self._word_counts = Counter(word for name in train for word in words(name))
        self._real = list(real)
        self._seed = seed

    def detect(self, generated: Sequence[str]) -> Detection | None:
        """Classifies generated names against as many real ones; None for fewer than 40 generated or 80 real names."""
        count = min(len(generated), len(self._real))
        if count < FEWEST_OF_A_SIDE or len(self._real) < 2 * FEWEST_OF_A_SIDE:
            return None
        return Detection(self.separate(self._real[:count], generated[:count]), self._halves)

    @cached_property
    def _halves(self) -> Separation:
        rng, half = np.random.default_rng(self._seed), len(self._real) // 2
        found = []
        for _ in range(_HALVINGS):
            shuffled = [self._real[index] for index in rng.permutation(len(self._real))]
            found.append(self.separate(shuffled[:half], shuffled[half : 2 * half]))
        return Separation(half, _mean([one.weak for one in found]), _mean([one.strong for one in found]))

    def separate(self, real: Sequence[str], other: Sequence[str]) -> Separation:
        """The cross-validated AUC of both classifiers."""
        from sklearn.model_selection import StratifiedKFold

        names = [*real, *other]
        labels_N = np.repeat([0, 1], [len(real), len(other)])
        grams = _grams(names)
        of_words = np.array([self._of_words(name) for name in names])
        features_NF = np.concatenate([*(self._bits(model, names) for model in self._models), of_words], axis=1)
        weak_N, strong_N = np.empty(len(names)), np.empty(len(names))
        for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=self._seed).split(grams, labels_N):
            weak_N[test] = _weak_scores(grams[train], labels_N[train], grams[test])
            # The strong classifier is trained on out-of-fold scores of the weak one (stacking).
            inner = np.empty(len(train))
            folds = StratifiedKFold(_INNER_FOLDS, shuffle=True, random_state=self._seed)
            for fit, score in folds.split(train, labels_N[train]):
                inner[score] = _weak_scores(grams[train[fit]], labels_N[train[fit]], grams[train[score]])
            strong_N[test] = _strong_scores(
                np.column_stack([features_NF[train], inner]),
                labels_N[train],
                np.column_stack([features_NF[test], weak_N[test]]),
            )
        return Separation(len(real), auc_estimate(weak_N, labels_N), auc_estimate(strong_N, labels_N))

    @staticmethod
    def _bits(model: KneserNey, names: Sequence[str]) -> FloatArray:
        """Total and mean bits of each name, and of its three worst characters and EOS."""
        rows = []
        for probability in model.symbol_probabilities(names):
            bits = -np.log(probability) / NATS_PER_BIT
            worst = np.sort(bits)[::-1][:3]
            rows.append([bits.sum(), bits.mean(), *worst, *[0.0] * (3 - len(worst)), bits[-1]])
        return np.array(rows)

    def _of_words(self, name: str) -> list[float]:
        found = words(name)
        counts = [self._word_counts[word] for word in found if word not in _SMALL_WORDS] or [0]
        lengths = [len(word) for word in found] or [0]
        return [
            len(name),
            len(found),
            sum(word in _SMALL_WORDS for word in found),
            max(lengths),
            min(lengths),
            math.log1p(min(counts)),
            math.log1p(max(counts)),
            sum(map(math.log1p, counts)) / len(counts),
            sum(not count for count in counts),
            len(found) - len(set(found)),
            "," in name,
            "'" in name,
            "-" in name,
        ]


def _mean(estimates: Sequence[Estimate]) -> Estimate:
    """Averages also the bounds: the halves share names, so the interval does not shrink."""
    value, low, high = np.mean([[one.value, one.low, one.high] for one in estimates], axis=0).tolist()
    return Estimate(value, low, high)


def _grams(names: Sequence[str]) -> Any:
    """Sparse TF-IDF features of character n-grams, with markers for BOS and EOS."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    grams = TfidfVectorizer(
        analyzer="char", ngram_range=(1, 4), lowercase=False, sublinear_tf=True, min_df=2, dtype=np.float32
    )
    return grams.fit_transform([f"\x02{name}\x03" for name in names])


def _weak_scores(grams: Any, labels_N: npt.NDArray[np.int64], others: Any) -> FloatArray:
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(C=3.0, solver="liblinear", random_state=0)
    return np.asarray(classifier.fit(grams, labels_N).decision_function(others))


def _strong_scores(features_NF: FloatArray, labels_N: npt.NDArray[np.int64], others: FloatArray) -> FloatArray:
    from sklearn.ensemble import HistGradientBoostingClassifier

    classifier = HistGradientBoostingClassifier(
        learning_rate=0.05,
        max_iter=120,
        max_leaf_nodes=12,
        l2_regularization=1.0,
        early_stopping=False,
        random_state=0,
    )
    return np.asarray(classifier.fit(features_NF, labels_N).decision_function(others))
