"""The search for good names in the stream of names that a seed gives."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from transformers import LogitsProcessor, PreTrainedModel

from flash_experts.data.names import normal_form
from flash_experts.generation.constraints import Constraints
from flash_experts.generation.decoding import DecodedName, NameDecoder
from flash_experts.generation.filters import NoTokenLeftError
from flash_experts.generation.formatting import format_name
from flash_experts.generation.presets import Sampling
from flash_experts.generation.regex_filter import MatchesRegex
from flash_experts.generation.similarity import KnownNames
from flash_experts.generation.vocabulary import NameVocabulary
from flash_experts.models.modes import evaluating

_PATIENCE = 1024  # names in a row that bring nothing new, before there are taken to be no more
_PART = 32  # names that are looked at together


@dataclass(frozen=True, slots=True)
class GeneratedName:
    """A new card name.

    Attributes:
        text: the name as it would stand on a card.
        log_prob: the model's own log-probability of its tokens and its end, in nats. Nothing that sampling
            and filters did counts, so names of different settings compare.
        nearest_card: the real card with the most similar name; None if the generator knows no names.
        similarity: to that card: 1 - edit distance / the longer length, under 1.
    """

    text: str
    log_prob: float
    nearest_card: str | None
    similarity: float

    @property
    def score(self) -> float:
        """Log-probability a character, the end counted as one: how natural the name is, long or short."""
        return self.log_prob / (len(self.text) + 1)


@dataclass(frozen=True, slots=True)
class Request:
    """All that one search needs.

    Attributes:
        prompt_ids: begin symbol and prompt.
        untold_ids: begin symbol and the prompt that tells nothing.
        sampling: how tokens are drawn.
        constraints: what names hold.
        processors: the filters of the constraints, and more.
        seed: of the stream.
        batch_size: names computed at once.
        best_of: names drawn for each that is given.
        fitness: of names, by which the best is chosen; None goes by `GeneratedName.score`.
    """

    prompt_ids: Sequence[int]
    untold_ids: Sequence[int]
    sampling: Sampling
    constraints: Constraints
    processors: Sequence[LogitsProcessor]
    seed: int
    batch_size: int
    best_of: int
    fitness: Callable[[Sequence[str]], npt.NDArray[np.float64]] | None = None


class NameSearch:
    """Finds the good names of a seed's stream, in its order.

    Only the order of the stream decides what is taken and when to give up, never how it was cut into batches.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: NameVocabulary, known: KnownNames, request: Request) -> None:
        """Checks that the prompt leaves room.

        Raises:
            ValueError: it does not.
        """
        self._model = model
        self._vocabulary = vocabulary
        self._known = known
        self._request = request
        self._regex = next((one for one in request.processors if isinstance(one, MatchesRegex)), None)
        self._steps = _steps(model, len(request.prompt_ids), request.constraints.longest)
        self._decoder: NameDecoder | None = None
        self._stream: Iterator[DecodedName] | None = None
        self._seen: set[str] = set()
        self._tried = self._without_news = self._whole = 0

    def names(self, count: int) -> Iterator[GeneratedName]:
        """The first ``count`` good names, as they are found; fewer, with a warning, if there are no more.

        Of each ``best_of`` that were found one is given, the fittest.

        Raises:
            NoTokenLeftError: the constraints leave no name at all.
        """
        given, group, best_of = 0, list[GeneratedName](), self._request.best_of
        while given < count and self._without_news < _PATIENCE:
            group += self._next_batch((count - given) * best_of - len(group))
            is_over = self._without_news >= _PATIENCE
            ready = len(group) if is_over else len(group) // best_of * best_of
            best = self._fittest_of_each(group[:ready])[: count - given]
            group, given = group[ready:], given + len(best)
            yield from self._with_nearest(best)
        if count and not self._whole:
            raise NoTokenLeftError(
                f"no name can be made: {self._request.constraints.told()} leave nothing. Loosen one of them"
            )
        if given < count:
            warnings.warn(
                f"found {given} of {count} names: the last {_PATIENCE} tries gave nothing new. "
                "Loosen the constraints, or take a higher temperature",
                stacklevel=3,
            )

    def _fittest_of_each(self, names: Sequence[GeneratedName]) -> list[GeneratedName]:
        """One of each ``best_of`` names in a row; the last few may be fewer."""
        fitness = self._request.fitness
        fit_N = [name.score for name in names] if fitness is None else fitness([name.text for name in names]).tolist()
        starts = range(0, len(names), self._request.best_of)
        groups = [range(start, min(start + self._request.best_of, len(names))) for start in starts]
        return [names[max(group, key=lambda index: fit_N[index])] for group in groups]

    def _next_batch(self, wanted: int) -> list[GeneratedName]:
        """What is new and good among the next names of the stream: ``wanted`` names at most."""
        batch = self._decode(wanted)
        texts = [self._accept(name) for name in batch]
        far = self._far_enough(texts)
        found: list[GeneratedName] = []
        for name, text in zip(batch, texts, strict=True):
            self._tried += 1
            self._whole += name.is_whole
            key = normal_form(text)
            if key and key not in self._seen and text in far:
                self._seen.add(key)
                found.append(GeneratedName(text, name.log_prob, None, 0.0))
                self._without_news = 0
            else:
                self._without_news += 1
            if len(found) == wanted or self._without_news == _PATIENCE:
                break
        return found

    def _decode(self, wanted: int) -> list[DecodedName]:
        """The next few names of the stream. It is planned for as many as should bring what is wanted."""
        # Entered for each part anew: between them the caller has the model and PyTorch's gradient mode as they were.
        part = min(_PART, self._request.batch_size)
        with evaluating(self._model), torch.no_grad():
            names = list(islice(self._stream, part)) if self._stream is not None else []
            if not names:
                rate = max(len(self._seen), 1) / max(self._tried, 1)
                size = max(math.ceil(1.05 * wanted / rate), 1)
                indices = range(self._tried, self._tried + size)
                self._stream = self._make_decoder().stream(indices, self._request.batch_size)
                names = list(islice(self._stream, part))
        return names

    def _make_decoder(self) -> NameDecoder:
        request = self._request
        if self._decoder is None:
            self._decoder = NameDecoder(
                self._model,
                request.prompt_ids,
                self._vocabulary.end_id,
                request.sampling,
                request.processors,
                self._steps,
                request.seed,
                request.untold_ids,
            )
        return self._decoder

    def _accept(self, name: DecodedName) -> str:
        """The finished text of a name, or "" if it must not come out (whatever the filters did)."""
        text = self._vocabulary.decode(name.ids) if name.is_whole else ""
        if not text.isprintable():  # bytes that make no character
            return ""
        text = format_name(text)
        key = normal_form(text)
        good = key and key not in self._known.normal_forms and self._request.constraints.held_by(text)
        return text if good and (self._regex is None or self._regex.matches(text)) else ""

    def _far_enough(self, texts: Sequence[str]) -> frozenset[str]:
        """Those of the texts that keep ``min_distance`` from every known card."""
        most = 1 - self._request.constraints.min_distance
        if most == 1:
            return frozenset(texts)
        new = [text for text in dict.fromkeys(texts) if text and normal_form(text) not in self._seen]
        return frozenset(text for text, (_, near) in zip(new, self._known.nearest(new), strict=True) if near <= most)

    def _with_nearest(self, names: Sequence[GeneratedName]) -> list[GeneratedName]:
        nearest = self._known.nearest([name.text for name in names])
        return [
            replace(name, nearest_card=card, similarity=similarity)
            for name, (card, similarity) in zip(names, nearest, strict=True)
        ]


def _steps(model: PreTrainedModel, prompt_length: int, max_length: int) -> int:
    """Tokens a name can have: at worst four bytes a character, a space, an end; within the context."""
    context = model.config.max_position_embeddings
    room = context - prompt_length
    if room < 2:
        raise ValueError(
            f"the prompt takes {prompt_length} tokens, the model's context has {context}: shorten the type line"
        )
    return min(4 * max_length + 2, room)
