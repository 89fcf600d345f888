"""`NameGenerator`: new card names from a model, and the search for acceptable ones in the stream of a seed."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.names import normal_form
from flash_experts.data.prompts import UNCONDITIONAL, Attributes, check_known, read_conditions
from flash_experts.generation.constraints import Constraints
from flash_experts.generation.decoding import DecodedName, Ends, NameDecoder
from flash_experts.generation.filters.base import NameVocabulary, NoTokenLeftError
from flash_experts.generation.filters.regex import MatchesRegex
from flash_experts.generation.request import NameRequest, Sampling
from flash_experts.generation.reranker import AttributeClassifier, Reranker
from flash_experts.generation.sampling import stream_seed
from flash_experts.generation.similarity import Resembles, examples_of, filled_in, shared_attributes
from flash_experts.generation.text_rules import format_name
from flash_experts.models.scoring import evaluating
from flash_experts.released import default_model

FilterFactory = Callable[[NameVocabulary, int], LogitsProcessor]
# When a search ends: tries in a row without a new name, fewer of them if most repeat the few names found so far,
# and tries altogether. Ordinary requests find a new name in nearly every try.
_TRIES_WITHOUT_NEW = 1024
_REPEATS, _REPEATS_PER_NAME = 128, 64
_MOST = 3 / 4
_TRIES, _TRIES_PER_NAME = 512, 64
_PART = 32  # names checked together
_ROWS_AT_ONCE = 64  # with 35,000 cards: 18 MB of similarities


@dataclass(frozen=True)
class KnownNames:
    """Names that are already on cards, in printed form."""

    names: tuple[str, ...]

    @cached_property
    def _name_of(self) -> dict[str, str]:
        forms: dict[str, str] = {}
        for name in self.names:
            forms.setdefault(normal_form(name), name)
        forms.pop("", None)  # names without letters or digits
        return forms

    @cached_property
    def normal_forms(self) -> frozenset[str]:
        return frozenset(self._name_of)

    def nearest(self, names: Sequence[str]) -> list[tuple[str | None, float]]:
        """The nearest known name of each, the first of equals, and their similarity; (None, 0.0) if no name is known.

        Similarity is 1 - edit distance / the longer length, of normal forms, in float64: limits are exact.
        """
        shown = list(self._name_of.values())
        if not shown:
            return [(None, 0.0)] * len(names)
        from rapidfuzz.distance import Levenshtein
        from rapidfuzz.process import cdist

        known, threads = list(self._name_of), torch.get_num_threads()
        found: list[tuple[str | None, float]] = []
        for start in range(0, len(names), _ROWS_AT_ONCE):
            queries = [normal_form(name) for name in names[start : start + _ROWS_AT_ONCE]]
            similarity = cdist(queries, known, scorer=Levenshtein.normalized_similarity, workers=threads, dtype=float)
            best = similarity.argmax(axis=1)
            found += [(shown[place], float(similarity[row, place])) for row, place in enumerate(best)]
        return found


class NameGenerator:
    """Generates names that are well-formed, distinct, and not yet on any card.

        generator = NameGenerator.from_pretrained("models/mtg-names")
        for name in generator.generate(20, type_line="Legendary Creature — Goblin", colors="R", seed=7):
            print(name.text, name.log_prob, name.nearest_card, name.similarity)

    A model in training is in eval mode only while names are made. Global random generators are not used.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        known_names: Iterable[str] | None = None,
    ) -> None:
        """Wraps a model trained on BOS token + prompt + " " + name + EOS token, and its byte-level BPE tokenizer.

        ``known_names`` are never generated (default: those of all real cards).
        """
        if isinstance(model, str | Path):
            raise ValueError("NameGenerator takes a model: load one from a folder with NameGenerator.from_pretrained")
        if known_names is None:
            from flash_experts.data.card_table import known_names as names_of_all_cards

            known_names = names_of_all_cards()
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = NameVocabulary(tokenizer, model.config.vocab_size)
        self.known = KnownNames(tuple(known_names))
        self.classifier: AttributeClassifier | None = None  # of the reranker; None for that of all real cards

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> NameGenerator:
        """Loads a model and its tokenizer, or raises a ValueError.

        Args:
            source: model folder or hub id (default: the newest released model, see `flash_experts.released`).
            device: default: CUDA if available.
            dtype: ``torch.bfloat16`` changes the names of a seed.
        """
        from flash_experts.data.tokenizer import load_tokenizer
        from flash_experts.models.loading import load_model

        source = default_model() if source is None else source
        model = load_model(source, device, dtype)
        return cls(model, load_tokenizer(source, model.config.vocab_size))

    def generate(
        self, count: int = 20, *, filters: Sequence[FilterFactory] = (), **options: Any
    ) -> list[GeneratedName]:
        """New names for a card.

        The same seed gives the same names for any ``batch_size`` (up to rounding), and a larger ``count`` only adds
        names. Warns if there are fewer.

        Args:
            filters: more token filters: subclasses of `NameFilter`, or functions (vocabulary, prompt length) ->
                LogitsProcessor.
            **options: fields of `NameRequest`, such as ``type_line="Creature — Goblin"``, ``seed=7``; None stands for
                the default.

        Raises:
            ValueError: a value is out of range, unknown or of a wrong type, or no name satisfies the constraints.
            TypeError: an option is unknown.
        """
        return list(self.stream(count, filters=filters, **options))

    def stream(
        self, count: int = 20, *, filters: Sequence[FilterFactory] = (), **options: Any
    ) -> Iterator[GeneratedName]:
        """The names of `generate` as they are found; the model may be trained between two of them."""
        return self.answer(NameRequest.of(count=count, **options), filters)

    def answer(self, request: NameRequest, filters: Sequence[FilterFactory] = ()) -> Iterator[GeneratedName]:
        """The names for a request, as `stream` gives them."""
        makers = _checked(filters)
        examples = examples_of(request.like) if request.like else []
        attributes = completed_attributes(request)
        check_known(attributes, read_conditions(self.model.config.to_dict()))
        prompt_ids, unconditional_ids = (
            [self.tokenizer.bos_token_id, *self.vocabulary.encode(given.prompt())]
            for given in (attributes, UNCONDITIONAL)
        )
        processors: list[LogitsProcessor] = []
        processors += request.filters(self.vocabulary, len(prompt_ids), self.known.normal_forms)
        processors += [make(self.vocabulary, len(prompt_ids)) for make in makers]
        if examples:
            processors.append(Resembles(self.vocabulary, len(prompt_ids), examples))
        search = NameSearch(
            model=self.model,
            vocabulary=self.vocabulary,
            known=self.known,
            prompt_ids=prompt_ids,
            unconditional_ids=unconditional_ids,
            sampling=request.sampling(),
            constraints=request,
            processors=processors,
            seed=stream_seed(secrets.randbits(63) if request.seed is None else request.seed, prompt_ids),
            batch_size=request.batch_size,
            best_of=request.num_candidates,
            reranker=Reranker(attributes, classifier=self.classifier),
        )
        return search.names(request.count)


def _checked(filters: Sequence[FilterFactory]) -> list[FilterFactory]:
    if not isinstance(filters, Iterable):
        raise ValueError(f"filters must be a list, such as [MyFilter], not {filters!r:.60}")
    found = list(filters)
    for make in found:
        if isinstance(make, LogitsProcessor) or not callable(make):
            raise ValueError(
                f"filters has {make!r:.60}: give a subclass of NameFilter, or a function (vocabulary, prompt length) "
                "-> LogitsProcessor"
            )
    return found


def completed_attributes(request: NameRequest) -> Attributes:
    """The given attributes, completed by what most of the names to resemble share."""
    given = request.attributes()
    return filled_in(given, shared_attributes(examples_of(request.like))) if request.like else given


@dataclass(frozen=True, slots=True)
class GeneratedName:
    """A new card name.

    Attributes:
        log_prob: of its tokens and the EOS token, in nats, independent of sampling and filters.
        nearest_card: the real card with the most similar name; None if the generator knows no names.
        similarity: 1 - edit distance to ``nearest_card`` / the longer length; under 1.
    """

    text: str
    log_prob: float
    nearest_card: str | None
    similarity: float

    @property
    def score(self) -> float:
        """Log-probability per character, the EOS token counted as one."""
        return self.log_prob / (len(self.text) + 1)


@dataclass(kw_only=True)
class NameSearch:
    """Finds the acceptable names of a seed's stream, in its order, independent of the batch size.

    Attributes:
        prompt_ids: BOS token and prompt.
        unconditional_ids: the same without attributes, for guidance.
        processors: filters of ``constraints``, and others.
        best_of: candidates drawn per name returned.
    """

    model: PreTrainedModel
    vocabulary: NameVocabulary
    known: KnownNames
    prompt_ids: Sequence[int]
    unconditional_ids: Sequence[int]
    sampling: Sampling
    constraints: Constraints
    processors: Sequence[LogitsProcessor]
    seed: int
    batch_size: int
    best_of: int
    reranker: Reranker[GeneratedName]

    def __post_init__(self) -> None:
        """Raises a ValueError if the prompt fills the model's context."""
        context, length = self.model.config.max_position_embeddings, len(self.prompt_ids)
        if context - length < 2:
            raise ValueError(
                f"the prompt takes {length} tokens, the model's context has {context}: shorten the type line"
            )
        # Four bytes per character, a space and the EOS token.
        self._steps = min(4 * self.constraints.longest + 2, context - length)
        self._regex = next((one for one in self.processors if isinstance(one, MatchesRegex)), None)
        self._stream: Iterator[DecodedName] | None = None
        self._seen: set[str] = set()
        self._tried = self._tries_since_new = self._repeats_since_new = self._whole = 0

    @cached_property
    def _decoder(self) -> NameDecoder:
        return NameDecoder(
            self.model,
            self.prompt_ids,
            self.vocabulary.eos_id,
            self.sampling,
            self.processors,
            self._steps,
            self.seed,
            self.unconditional_ids,
        )

    @cached_property
    def _ends(self) -> Ends:
        return Ends(self._decoder)

    def names(self, count: int) -> Iterator[GeneratedName]:
        """The first ``count`` acceptable names, one chosen after every ``best_of`` candidates.

        Warns if it finds fewer; raises a NoTokenLeftError if no name satisfies the constraints.
        """
        given = 0
        while given < count and not self._is_over and self.constraints.has_room:
            chosen = self._choose(self._next_batch(count * self.best_of - len(self._seen)), count - given)
            given += len(chosen)
            yield from self._with_nearest(chosen)
        if count and not self._whole:
            raise NoTokenLeftError(
                f"no name can be made with {self.constraints.describe()}: loosen one of these constraints"
            )
        if given < count:
            last, seen = self._tries_since_new, len(self._seen)
            why = f"the last {last} tries gave no new name"
            if self._ends.are_all:
                why = f"there are no others, as {self._tried} tries show"
            elif last < min(_TRIES_WITHOUT_NEW, _REPEATS):
                why = f"only {seen} of {self._tried} tries gave a new name"
            warnings.warn(
                f"found {given} of {count} names: {why}. Loosen the constraints or raise the temperature", stacklevel=3
            )

    @property
    def _is_over(self) -> bool:
        """Whether so many tries gave so few new names that hardly any more will come."""
        last, seen = self._tries_since_new, len(self._seen)
        are_all_found = self._repeats_since_new >= max(_MOST * last, _REPEATS, _REPEATS_PER_NAME * seen)
        is_long = last >= _TRIES_WITHOUT_NEW or self._tried >= _TRIES + _TRIES_PER_NAME * seen
        return is_long or are_all_found or self._ends.are_all

    def _choose(self, found: Sequence[GeneratedName], wanted: int) -> list[GeneratedName]:
        """The names chosen after these candidates, however many come at once; if no more will come, all that wait."""
        best_of, reranker = self.best_of, self.reranker
        if best_of == 1:
            return list(found)
        chosen: list[GeneratedName | None] = []
        before, start = len(self._seen) - len(found), 0
        for end in range(best_of - before % best_of, len(found) + 1, best_of):
            reranker.add(found[start:end])
            chosen.append(reranker.choose())
            start = end
        reranker.add(found[start:])
        if self._is_over:
            chosen += [reranker.choose() for _ in range(wanted - len(chosen))]
        return [name for name in chosen if name is not None]

    def _next_batch(self, wanted: int) -> list[GeneratedName]:
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
                self._tries_since_new = self._repeats_since_new = 0
            else:
                self._tries_since_new += 1
                self._repeats_since_new += key in self._seen
            if len(found) == wanted or self._is_over:
                break
        if len(found) < wanted:
            with evaluating(self.model), torch.no_grad():
                self._ends.add(batch)
        return found

    def _decode(self, wanted: int) -> list[DecodedName]:
        """The next names of the stream, as many as the acceptance rate so far suggests."""
        # Entered again for each part: in between, the caller finds the model and the gradient mode unchanged.
        part = min(_PART, self.batch_size)
        with evaluating(self.model), torch.no_grad():
            names = list(islice(self._stream, part)) if self._stream is not None else []
            if not names:
                rate = max(len(self._seen), 1) / max(self._tried, 1)
                size = max(math.ceil(1.05 * wanted / rate), 1)
                indices = range(self._tried, self._tried + size)
                self._stream = self._decoder.stream(indices, self.batch_size)
                names = list(islice(self._stream, part))
        return names

    def _accept(self, name: DecodedName) -> str:
        """The formatted text of a name, or "" if it is not acceptable, whatever the filters did."""
        text = self.vocabulary.decode(name.ids) if name.is_whole else ""
        if not text.isprintable():  # bytes that make no character
            return ""
        text = format_name(text)
        key = normal_form(text)
        good = key and key not in self.known.normal_forms and self.constraints.held_by(text)
        return text if good and (self._regex is None or self._regex.matches(text)) else ""

    def _far_enough(self, texts: Sequence[str]) -> frozenset[str]:
        most = 1 - self.constraints.min_distance
        if most == 1:
            return frozenset(texts)
        new = [text for text in dict.fromkeys(texts) if text and normal_form(text) not in self._seen]
        return frozenset(text for text, (_, near) in zip(new, self.known.nearest(new), strict=True) if near <= most)

    def _with_nearest(self, names: Sequence[GeneratedName]) -> list[GeneratedName]:
        nearest = self.known.nearest([name.text for name in names])
        return [
            replace(name, nearest_card=card, similarity=similarity)
            for name, (card, similarity) in zip(names, nearest, strict=True)
        ]
