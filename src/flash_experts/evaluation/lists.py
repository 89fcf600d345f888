"""Lists of names as a user gets them, for requests of held-out cards, at each quality, next to real names.

In a good list, types and colors are recognized as often as in real ones, and words are as varied.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation.baselines import swapped_names
from flash_experts.evaluation.classifiers import (
    FEWEST_OF_A_SIDE,
    TASKS,
    ControlClassifiers,
    Detector,
    Separation,
    Task,
)
from flash_experts.evaluation.held_out import Reference, names_of
from flash_experts.evaluation.metrics import Estimate, near_duplicates, share, words
from flash_experts.generation.generator import NameGenerator
from flash_experts.generation.name_files import type_line_of
from flash_experts.generation.request import CANDIDATES
from flash_experts.generation.reranker import AttributeClassifier, cards_of_kind, content_words

PER_LIST = 20
REQUESTS = 50
REAL, SWAPPED = "real names", "swapped parts"


@dataclass(frozen=True, slots=True)
class ListMetrics:
    """Metrics of lists of names for the same requests.

    Attributes:
        recognized: share of names whose type, color, subtype or legendary a classifier recognizes, by task.
        separation: from real held-out names of the same requests; None for real names, and for very few.
        distinct_words: distinct content words / content words, averaged over lists.
        distinct_heads: distinct last content words / names, averaged over lists.
        unknown_words: share of names with a word that is on no training card; None without names.
        near_known: share within 0.2 edits per character of another real card; None without names.
        per_second: without loading; None for real names.
    """

    label: str
    names: int
    recognized: dict[str, Estimate]
    separation: Separation | None
    distinct_words: float
    distinct_heads: float
    unknown_words: Estimate | None
    near_known: Estimate | None
    per_second: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Request:
    """A type line and colors that at least `PER_LIST` held-out cards have."""

    type_line: str
    colors: str | None
    cards: tuple[Card, ...]

    def __str__(self) -> str:
        return f"{self.type_line}, {self.colors or 'any color'}"


def requests_of(cards: Sequence[Card], count: int = REQUESTS, per_list: int = PER_LIST, seed: int = 0) -> list[Request]:
    """Distinct requests of random cards, each as particular as ``per_list`` cards allow."""
    rng, found = random.Random(seed), dict[tuple[str, str | None], Request]()
    for card in rng.sample(cards, len(cards)):
        for given in _requests_for(card):
            request = _request(given, cards)
            if len(request.cards) >= per_list:
                some = tuple(rng.sample(request.cards, per_list))
                found.setdefault((request.type_line, request.colors), replace(request, cards=some))
                break
        if len(found) == count:
            break
    return list(found.values())


def _requests_for(card: Card) -> list[Attributes]:
    """What can be asked for a card, the most particular first."""
    own = Attributes(supertypes=card.supertypes, types=card.types, colors=card.colors)
    subtypes = [replace(own, subtypes=(one,)) for one in card.subtypes]
    return [*subtypes, *(replace(one, colors=None) for one in subtypes), own, replace(own, colors=None)]


def _request(given: Attributes, cards: Sequence[Card]) -> Request:
    of_kind = tuple(
        card
        for card in cards
        if card.supertypes == given.supertypes
        and card.types == given.types
        and set(given.subtypes or ()) <= set(card.subtypes)
        and given.colors in (None, card.colors)
    )
    return Request(type_line_of(given), None if given.colors is None else "".join(given.colors) or "C", of_kind)


class ListEvaluation:
    """Requests of the held-out cards, and the classifiers for their lists."""

    def __init__(self, reference: Reference, requests: int = REQUESTS, seed: int = 0) -> None:
        """Trains the classifiers; raises a ValueError for too few held-out cards."""
        if requests < 1:
            raise ValueError(f"requests must be 1 or more, not {requests}")
        # Of the same families as the training cards: in others, every second name has a word that no training card has.
        held_out = reference.test_iid
        self.requests = requests_of(held_out, requests, seed=seed)
        if not self.requests:
            raise ValueError(f"no {PER_LIST} held-out cards have a type in common: --lists needs more cards")
        self._classifiers = ControlClassifiers(reference.train, held_out, [*TASKS, _subtypes(reference.train)])
        self._detector = Detector(names_of(reference.train), names_of(held_out), seed)
        self._reranking = AttributeClassifier(reference.train)
        self._reference = reference
        self._seed = seed

    def real(self) -> ListMetrics:
        """The real held-out names of the requests."""
        return self._measure(REAL, [names_of(request.cards) for request in self.requests], None)

    def swapped(self) -> ListMetrics:
        """Names from the swap baseline of each kind (`flash_experts.evaluation.baselines`)."""
        lists = []
        for place, request in enumerate(self.requests):
            given = Attributes.parse(request.type_line, request.colors, None)
            names = names_of(cards_of_kind(self._reranking.cards, given))
            lists.append(swapped_names(names, PER_LIST, self._reference.known_keys, self._seed + place))
        return self._measure(SWAPPED, lists, None)

    def generated(self, generator: NameGenerator, progress: Callable[[str], object] = str) -> list[ListMetrics]:
        """A generator's lists at each quality. Its reranker knows the training cards only."""
        generator.classifier = self._reranking
        found = []
        for quality in CANDIDATES:
            progress(f"{len(self.requests)} lists of {PER_LIST} names, quality {quality} ...")
            start = time.perf_counter()
            lists = []
            for request in self.requests:
                given: dict[str, Any] = {"type_line": request.type_line, "colors": request.colors, "seed": self._seed}
                lists.append([name.text for name in generator.generate(PER_LIST, quality=quality, **given)])
            seconds = time.perf_counter() - start
            found.append(self._measure(quality, lists, sum(map(len, lists)) / seconds))
        return found

    def _measure(self, label: str, lists: Sequence[Sequence[str]], per_second: float | None) -> ListMetrics:
        names = [name for one in lists for name in one]
        is_real = label == REAL
        keys, known = list(map(normal_form, names)), sorted(self._reference.known_keys)
        near = near_duplicates(keys, known, at_least=2 if is_real else 1)
        unknown = [not self._reference.train_words.issuperset(words(name)) for name in names]
        real = [name for request in self.requests for name in names_of(request.cards)]
        return ListMetrics(
            label=label,
            names=len(names),
            recognized=self._recognized(lists),
            separation=None if is_real or len(names) < FEWEST_OF_A_SIDE else self._detector.separate(real, names),
            distinct_words=_mean([_distinct([content_words(name) for name in one]) for one in lists]),
            distinct_heads=_mean([_distinct([content_words(name)[-1:] for name in one]) for one in lists]),
            unknown_words=share(unknown) if names else None,
            near_known=share(near) if names else None,
            per_second=per_second,
        )

    def _recognized(self, lists: Sequence[Sequence[str]]) -> dict[str, Estimate]:
        """Shares of names recognized for the labels that all cards of a request have."""
        found = {}
        for task in self._classifiers.tasks:
            hits: list[bool] = []
            for request, names in zip(self.requests, lists, strict=True):
                label = task.label_of(_as_card(request))
                if label is not None and names:
                    hits += self._classifiers.hits(task, label, names).tolist()
            if hits:
                found[task.name] = share(hits)
        return found


def evaluate_lists(
    model: str | Path,
    data: str | Path = "data/mtg",
    *,
    seed: int = 0,
    requests: int = REQUESTS,
    device: str | None = None,
    progress: Callable[[str], object] = str,
) -> list[ListMetrics]:
    """Measures the real names, the swap baseline, and the lists of a model at each quality.

    ``progress`` is called with a line before each.
    """
    generator = NameGenerator.from_pretrained(model, device)
    lists = ListEvaluation(Reference.load(Path(data)), requests, seed)
    return [lists.real(), lists.swapped(), *lists.generated(generator, progress)]


def _as_card(request: Request) -> Card:
    given, first = Attributes.parse(request.type_line, request.colors, None), request.cards[0]
    return replace(first, subtypes=given.subtypes or (), colors=given.colors)


def _subtypes(cards: Sequence[Card], most: int = 25) -> Task:
    common = [subtype for subtype, _ in Counter(one for card in cards for one in card.subtypes).most_common(most)]

    def label_of(card: Card) -> str | None:
        return next((one for one in card.subtypes if one in common), None)

    return Task("subtype", label_of, lambda label: Attributes(subtypes=(label,)))


def _distinct(items: Sequence[Sequence[str]]) -> float:
    flat = [item for some in items for item in some]
    return len(set(flat)) / max(1, len(flat))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
