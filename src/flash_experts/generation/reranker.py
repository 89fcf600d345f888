"""Best-of-n reranking: more names are drawn than are shown, and the best are chosen, also by their words.

    score(name) = (log p(name | card) + START + match_weight * match(name)) / (characters + 1)
                  - fault_weight * (flaws(name) + borrowed(name) + repetition(name, list so far))

in nats per character, the EOS token counted as one.

- match: for each given attribute (type, supertype, subtype, colors), naive Bayes on character n-grams compares real
  cards with it and without it, ``log p(name | with) - log p(name | without)``.
- borrowed: 1 for the name of a real legend's character.
- repetition keeps the words of a list as varied as those of real cards (maximal marginal relevance; Carbonell and
  Goldstein 1998).

docs/experiments.md has what each part is worth.

Shape suffixes: N names, G character n-grams in them, U distinct n-grams.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache, cached_property, lru_cache, partial
from typing import Generic, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import Attributes
from flash_experts.generation.similarity import real_cards
from flash_experts.generation.text_rules import SMALL_WORDS, words_of

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Scorer = Callable[[Sequence[str]], FloatArray]  # N names to their match scores (N,), in nats

_ORDERS = range(2, 6)  # characters of an n-gram
_PER_CHARACTER = sum(_ORDERS)  # n-grams that contain a given character: together they count as one
_PRIOR = 40_000  # n-grams of all names, added to those of either group of cards; chosen on the validation names
_CODE_BITS = 9  # bits of a character; five characters fit into 63 bits
# The first characters of a name cost a model about 3 nats, whatever follows: without this, long names would win.
START_NATS = 3.0
_MOST_WAITING = 256  # candidates kept for later choices
_FEWEST = 40  # real cards that show how often a word repeats; with fewer, attributes are left out
_ECHO = 4  # letters: words of a name that start with the same four echo each other
_LONE_LETTER = re.compile(r"(?<![^\s])[B-HJ-NP-WYZ](?![^\s,])")
_INNER_CAPITAL = re.compile(r"(?<=[a-z])[A-Z]")


class AttributeClassifier:
    """Scores how well names match attributes."""

    def __init__(self, cards: Iterable[Card]) -> None:
        self.cards = tuple(cards)
        ngrams_G, self._name_G = character_ngrams([card.name for card in self.cards])
        self._ngrams_U, self._index_G = np.unique(ngrams_G, return_inverse=True)
        seen_U = np.bincount(self._index_G, minlength=len(self._ngrams_U))
        self._usual_U = seen_U / max(1, seen_U.sum())

    def scorer(self, attributes: Attributes) -> Scorer:
        """The match score for these attributes; zeros where no card has any of them."""
        odds_U = np.zeros(len(self._ngrams_U) + 1)
        for has in questions_of(attributes):
            mine_N = np.array([has(card) for card in self.cards], dtype=bool)
            if mine_N.any():
                odds_U += self._log_odds(mine_N)

        def score(names: Sequence[str]) -> FloatArray:
            ngrams_G, name_G = character_ngrams(names)
            odds_G = odds_U[_places(self._ngrams_U, ngrams_G)]
            return np.bincount(name_G, odds_G, minlength=len(names)).astype(np.float64, copy=False)

        return score

    def _log_odds(self, mine_N: np.ndarray) -> FloatArray:
        """(U + 1,) log odds of n-grams in the chosen names against the others, the last for unseen ones."""
        logs = []
        for some_N in (mine_N, ~mine_N):
            seen_U = np.bincount(self._index_G[some_N[self._name_G]], minlength=len(self._ngrams_U))
            shares_U = np.append(seen_U / self._usual_U + _PRIOR, _PRIOR)
            logs.append(np.log(shares_U) - np.log(seen_U.sum() + _PRIOR))
        return (logs[0] - logs[1]) / _PER_CHARACTER


@cache
def real_card_classifier() -> AttributeClassifier:
    """The classifier of all serious cards in the embedded table, made once."""
    return AttributeClassifier(real_cards())


def questions_of(attributes: Attributes) -> list[Callable[[Card], bool]]:
    """Whether a card has each of the attributes that names can match."""
    questions: list[Callable[[Card], bool]] = []
    for field in ("supertypes", "types", "subtypes"):
        questions += [partial(_has, field, one) for one in getattr(attributes, field) or ()]
    if attributes.supertypes == ():
        questions.append(lambda card: not card.supertypes)
    if attributes.colors is not None:
        questions.append(lambda card: card.colors == attributes.colors)
    return questions


def _has(field: str, one: str, card: Card) -> bool:
    return one in getattr(card, field)


def character_ngrams(names: Sequence[str]) -> tuple[IntArray, IntArray]:
    """(G,) a number for each character n-gram, ends included, and (G,) its name."""
    texts = [f"\n{name.lower()}\n" for name in names]
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), dtype=np.uint32).astype(np.int64)
    codes = np.minimum(codes, (1 << _CODE_BITS) - 1)
    owner = np.repeat(np.arange(len(texts)), [len(text) for text in texts])
    ngrams, owners = [], []
    for order in _ORDERS:
        last = owner[order - 1 :]
        starts = np.flatnonzero(owner[: len(last)] == last)
        ngram = np.zeros(len(starts), dtype=np.int64)
        for offset in range(order):
            ngram = ngram << _CODE_BITS | codes[starts + offset]
        ngrams.append(ngram)
        owners.append(owner[starts])
    return np.concatenate(ngrams), np.concatenate(owners)


def _places(known_U: IntArray, ngrams_G: IntArray) -> IntArray:
    """(G,) the place of each n-gram among the known ones, which ascend, or U."""
    index_G = np.searchsorted(known_U, ngrams_G)
    return np.where(np.append(known_U, -1)[index_G] == ngrams_G, index_G, len(known_U))


@lru_cache(maxsize=1 << 14)  # each waiting candidate is asked for again at each choice
def content_words(name: str) -> tuple[str, ...]:
    """The distinct words of a name that matter for repetition, in the singular."""
    words = (word.removesuffix("s") if len(word) > 3 else word for word in words_of(name))
    return tuple(dict.fromkeys(word for word in words if len(word) > 1 and word not in SMALL_WORDS))


def flaws(name: str) -> int:
    """Counts what almost no real name has: echoes ("Angelic Angel"), lone letters, inner capitals."""
    words = re.split(r"[\s-]+", name)
    stems = [stem for word in words if len(stem := normal_form(word.removesuffix("'s"))[:_ECHO]) == _ECHO]
    return len(stems) - len(set(stems)) + len(_LONE_LETTER.findall(name)) + len(_INNER_CAPITAL.findall(name))


def character_of(name: str) -> str:
    """``krenko`` for "Krenko, Mob Boss"; "" without a comma."""
    before, comma, _ = name.partition(",")
    return normal_form(before) if comma else ""


class WordRepetition:
    """How far a candidate repeats words of the names chosen so far.

    A word may be in ``max(1, share of real names that have it * names chosen)`` of them.
    """

    def __init__(self, names: Iterable[str]) -> None:
        of_each = [content_words(name) for name in names]
        counts = Counter(word for words in of_each for word in words)
        self._share = {word: count / len(of_each) for word, count in counts.items()}
        self._chosen: Counter[str] = Counter()
        self._names = 0

    def add(self, name: str) -> None:
        self._chosen.update(content_words(name))
        self._names += 1

    def excess(self, name: str) -> float:
        """Occurrences over what is usual, such as 1 for the second use of a rare word."""
        return sum(
            max(0.0, self._chosen[word] + 1 - max(1.0, self._share.get(word, 0.0) * (self._names + 1)))
            for word in content_words(name)
        )


def cards_of_kind(cards: Iterable[Card], attributes: Attributes) -> list[Card]:
    """The cards with these attributes; while they are few, attributes are left out, the most particular first."""
    cards = list(cards)
    without: tuple[dict[str, None], ...] = (
        {}, {"colors": None}, {"supertypes": None}, {"subtypes": None}, {"types": None},
    )  # fmt: skip
    for each in without:
        attributes = replace(attributes, **each)
        found = [card for card in cards if _has_all(card, attributes)]
        if len(found) >= _FEWEST:
            return found
    return cards


def _has_all(card: Card, attributes: Attributes) -> bool:
    typed = all(
        set(getattr(attributes, field) or ()) <= set(getattr(card, field))
        for field in ("supertypes", "types", "subtypes")
    )
    return typed and attributes.colors in (None, card.colors)


class Candidate(Protocol):
    """A name to choose from."""

    @property
    def text(self) -> str: ...
    @property
    def log_prob(self) -> float: ...


C = TypeVar("C", bound=Candidate)


class Reranker(Generic[C]):
    """Chooses names one after another from the candidates added so far, for one request."""

    def __init__(
        self,
        attributes: Attributes,
        match_weight: float = 0.2,
        fault_weight: float = 0.25,
        classifier: AttributeClassifier | None = None,
    ) -> None:
        """``classifier``: of the cards that names are compared with (default: all real ones). The weights were chosen
        on validation cards."""
        self._attributes, self._given = attributes, classifier
        self._match_weight, self._fault_weight = match_weight, fault_weight
        self._waiting: list[C] = []
        self._score_N: FloatArray = np.empty(0)

    def add(self, candidates: Sequence[C]) -> None:
        self._waiting += candidates
        self._score_N = np.append(self._score_N, self.scores(candidates))
        if len(self._waiting) > _MOST_WAITING:
            kept = np.sort(np.argsort(-self._score_N, kind="stable")[:_MOST_WAITING])
            self._waiting, self._score_N = [self._waiting[index] for index in kept], self._score_N[kept]

    def choose(self) -> C | None:
        """Takes the best waiting candidate; None if none waits."""
        if not self._waiting:
            return None
        repetition_N = np.array([self._repetition.excess(one.text) for one in self._waiting])
        best = int(np.argmax(self._score_N - self._fault_weight * repetition_N))
        self._score_N = np.delete(self._score_N, best)
        chosen = self._waiting.pop(best)
        self._repetition.add(chosen.text)
        return chosen

    def scores(self, candidates: Sequence[C]) -> FloatArray:
        """The scores (N,) of candidates, apart from repetition."""
        if not candidates:
            return np.empty(0)
        texts = [one.text for one in candidates]
        nats_N = np.array([one.log_prob for one in candidates]) + START_NATS
        if self._match_weight and questions_of(self._attributes):
            nats_N += self._match_weight * self._match(texts)
        faults_N = np.array([flaws(text) + (character_of(text) in known_characters()) for text in texts])
        return nats_N / np.array([len(text) + 1 for text in texts]) - self._fault_weight * faults_N

    @cached_property
    def _match(self) -> Scorer:
        return self._classifier.scorer(self._attributes)

    @cached_property
    def _classifier(self) -> AttributeClassifier:
        return self._given or real_card_classifier()

    @cached_property
    def _repetition(self) -> WordRepetition:
        return WordRepetition([card.name for card in cards_of_kind(self._classifier.cards, self._attributes)])


@cache
def known_characters() -> frozenset[str]:
    """The characters of real legends, as `character_of` writes them."""
    return frozenset(character_of(card.name) for card in real_card_classifier().cards) - {""}
