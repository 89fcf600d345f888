"""Real or generated? Two classifiers try to tell, on names that they were not trained on.

The weak one, a logistic regression on character n-grams, is fooled by anything that spells well: samples of an n-gram
model pass it. The strong one, gradient boosting, is told what spelling hides: how surprising a letter model finds the
name and its most surprising letters, whether its words are words, how rare they are, how long. The area under the ROC
curve (AUC) is the chance that a generated name scores higher than a real one: 0.5 is that of a coin.

Real names against real names are always judged too: what they score beside 0.5 is the noise of the judge. A copy of
the training set passes the weak one (the strong one knows the training names' letters and words), so a memorization
figure belongs beside them.

Letters in the shapes: N names, F features.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from flash_experts.evaluation.metrics import NATS_PER_BIT, Estimate, FloatArray, auc_estimate, words
from flash_experts.evaluation.ngram import KneserNey

FOLDS = 5
_INNER_FOLDS = 4
_HALVINGS = 3  # of the real names
_ORDERS = (3, 6)  # of the letter models
_SMALL_WORDS = frozenset("a an and as at by for from in into of on or the to with".split())
_FEWEST = 40  # names of each side; fewer say nothing


@dataclass(frozen=True, slots=True)
class Separation:
    """How well two lists of names are told apart: AUC of the weak and of the strong classifier.

    Attributes:
        names: of each list.
        weak: logistic regression on character n-grams.
        strong: gradient boosting on n-gram bits, words, lengths and the score of the weak one.
    """

    names: int
    weak: Estimate
    strong: Estimate


@dataclass(frozen=True, slots=True)
class Detection:
    """A model's names against real held-out ones, and two halves of the real ones against each other."""

    generated: Separation
    real: Separation


class Detector:
    """Tells names from real ones."""

    def __init__(self, train: Sequence[str], real: Sequence[str], seed: int = 0) -> None:
        """Sets up the features.

        Args:
            train: training names; they tell what letters and words are usual.
            real: held-out names of the same families, none of them in ``train``.
            seed: of the folds, and of the halves of the real names.
        """
        self._models = [KneserNey(train, order) for order in _ORDERS]
        self._word_counts = Counter(word for name in train for word in words(name))
        self._real = list(real)
        self._seed = seed

    def detect(self, generated: Sequence[str]) -> Detection | None:
        """Tries to tell generated names from as many real ones.

        Returns:
            None where there are fewer than 40 names of either.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
        """
        count = min(len(generated), len(self._real))
        if count < _FEWEST or len(self._real) < 2 * _FEWEST:
            return None
        return Detection(self._separate(self._real[:count], generated[:count]), self._halves)

    @cached_property
    def _halves(self) -> Separation:
        """Real names against real names: the mean over some ways to halve them, since one may be unlucky."""
        rng, half = np.random.default_rng(self._seed), len(self._real) // 2
        found = []
        for _ in range(_HALVINGS):
            shuffled = [self._real[index] for index in rng.permutation(len(self._real))]
            found.append(self._separate(shuffled[:half], shuffled[half : 2 * half]))
        return Separation(half, _mean([one.weak for one in found]), _mean([one.strong for one in found]))

    def _separate(self, real: Sequence[str], other: Sequence[str]) -> Separation:
        from sklearn.model_selection import StratifiedKFold

        names = [*real, *other]
        labels_N = np.repeat([0, 1], [len(real), len(other)])
        grams = _grams(names)
        features_NF = self._features(names)
        weak_N, strong_N = np.empty(len(names)), np.empty(len(names))
        for train, test in StratifiedKFold(FOLDS, shuffle=True, random_state=self._seed).split(grams, labels_N):
            weak_N[test] = _weak_scores(grams[train], labels_N[train], grams[test])
            # The strong one learns from scores that the weak one gave to names it had not seen.
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

    def _features(self, names: Sequence[str]) -> FloatArray:
        """(N, F) what a name looks like."""
        columns = [self._bits(model, names) for model in self._models]
        columns.append(np.array([self._of_words(name) for name in names]))
        return np.concatenate(columns, axis=1)

    @staticmethod
    def _bits(model: KneserNey, names: Sequence[str]) -> FloatArray:
        """Bits of a name in all, a letter, of its three worst letters, and of its end."""
        rows = []
        for probability in model.symbol_probabilities(names):
            bits = -np.log(probability) / NATS_PER_BIT
            worst = np.sort(bits)[::-1][:3]
            rows.append([bits.sum(), bits.mean(), *worst, *[0.0] * (3 - len(worst)), bits[-1]])
        return np.array(rows)

    def _of_words(self, name: str) -> list[float]:
        """Numbers of words and letters, and how usual the words are."""
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
    """The mean of figures, with intervals as wide as each has: halves of one list share their names."""
    value, low, high = np.mean([[one.value, one.low, one.high] for one in estimates], axis=0).tolist()
    return Estimate(value, low, high)


def _grams(names: Sequence[str]) -> Any:
    """(N, n-grams) sparse: character n-grams of names, begin and end marked. No label takes part."""
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
