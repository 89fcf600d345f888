"""Real or generated: a classifier two-sample test of generated names, with two cross-validated classifiers.

The weak classifier, a logistic regression on character n-grams, detects spelling only. The strong classifier, gradient
boosting, also has bits under character n-gram models and the number, rarity and length of words. An area under the ROC
curve (AUC) of 0.5 is chance; real names against other real names show the noise. A copy of the training set passes the
weak classifier, so read the AUC together with the hit ratio of memorization.

Shape suffixes: N names, F features.
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
from flash_experts.generation.reranking.ngram import KneserNey

FOLDS = 5
_INNER_FOLDS = 4
_HALVINGS = 3  # random halvings of the real names
_ORDERS = (3, 6)  # of the character n-gram models
_SMALL_WORDS = frozenset("a an and as at by for from in into of on or the to with".split())
_FEWEST = 40  # names of each side, at least


@dataclass(frozen=True, slots=True)
class Separation:
    """AUC of the weak and the strong classifier on two lists of names."""

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
        """Fits the features.

        Args:
            train: training names, for the n-gram models and word counts.
            real: held-out names of the same families, none of them in ``train``.
        """
        self._models = [KneserNey(train, order) for order in _ORDERS]
        self._word_counts = Counter(word for name in train for word in words(name))
        self._real = list(real)
        self._seed = seed

    def detect(self, generated: Sequence[str]) -> Detection | None:
        """Classifies generated names against equally many real ones; None for fewer than 40 generated or 80 real names.

        Raises:
            ModuleNotFoundError: scikit-learn is not installed.
        """
        count = min(len(generated), len(self._real))
        if count < _FEWEST or len(self._real) < 2 * _FEWEST:
            return None
        return Detection(self.separate(self._real[:count], generated[:count]), self._halves)

    @cached_property
    def _halves(self) -> Separation:
        """Averages over random halvings of the real names."""
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
        features_NF = self._features(names)
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

    def _features(self, names: Sequence[str]) -> FloatArray:
        columns = [self._bits(model, names) for model in self._models]
        columns.append(np.array([self._of_words(name) for name in names]))
        return np.concatenate(columns, axis=1)

    @staticmethod
    def _bits(model: KneserNey, names: Sequence[str]) -> FloatArray:
        """Total and mean bits of each name, bits of its three worst characters and of its EOS."""
        rows = []
        for probability in model.symbol_probabilities(names):
            bits = -np.log(probability) / NATS_PER_BIT
            worst = np.sort(bits)[::-1][:3]
            rows.append([bits.sum(), bits.mean(), *worst, *[0.0] * (3 - len(worst)), bits[-1]])
        return np.array(rows)

    def _of_words(self, name: str) -> list[float]:
        """Counts and lengths of words, and how common they are."""
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
    """Averages estimates and their bounds: the halves share names, so the interval does not shrink."""
    value, low, high = np.mean([[one.value, one.low, one.high] for one in estimates], axis=0).tolist()
    return Estimate(value, low, high)


def _grams(names: Sequence[str]) -> Any:
    """Sparse TF-IDF features of character n-grams, with markers for BOS and EOS. No labels are used."""
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
