"""`NameGenerator`: new card names from a fine-tuned model."""

from __future__ import annotations

import math
import secrets
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.names import normal_form, shown_form
from flash_experts.data.prompts import Attributes
from flash_experts.generation.decoding import DecodedName, NameDecoder, evaluating
from flash_experts.generation.filters import (
    CARD_ALPHABET,
    AllowedCharacters,
    KnownNameFilter,
    NoTokenLeftError,
    StartsWith,
    WellFormed,
)
from flash_experts.generation.formatting import format_name
from flash_experts.generation.presets import Sampling, sampling_of
from flash_experts.generation.similarity import KnownNames
from flash_experts.generation.vocabulary import NameVocabulary
from flash_experts.generation.word_filters import BannedWords, MaxLength, MaxWords, NoRepeatedWords

LONGEST_NAME = 40  # characters; the longest serious card name has 33
_PATIENCE = 256  # names in a row that bring nothing new, before there are taken to be no more

FilterFactory = Callable[[NameVocabulary, int], LogitsProcessor]


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


@dataclass(frozen=True, slots=True)
class _Limits:
    """What `generate` was asked to hold, checked for contradictions that no search is needed to see."""

    starts_with: str | None
    max_words: int | None
    max_length: int
    banned_words: tuple[str, ...]

    def __post_init__(self) -> None:
        prefix = shown_form(self.starts_with or "")
        if len(prefix) > self.max_length:
            raise ValueError(
                f"starts_with {prefix!r} has {len(prefix)} characters, more than max_length {self.max_length}"
            )
        if self.max_words is not None and len(prefix.split()) > self.max_words:
            raise ValueError(f"starts_with {prefix!r} has more words than max_words {self.max_words}")

    def held_by(self, text: str) -> bool:
        """The last check, on the finished and formatted name."""
        prefix = shown_form(self.starts_with or "").casefold()
        return (
            len(text) <= self.max_length
            and (self.max_words is None or len(text.split()) <= self.max_words)
            and text.casefold().startswith(prefix)
        )


class NameGenerator:
    """Generates names that are well-formed, distinct and not yet on any card.

        generator = NameGenerator.from_pretrained("models/mtg-names")
        for name in generator.generate(20, type_line="Legendary Creature — Goblin", colors="R", seed=7):
            print(name.text, name.log_prob, name.nearest_card, name.similarity)

    The model may be one in training: it is put into eval mode while names are made and back afterwards, and
    no global random generator is touched.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        known_names: Iterable[str] | None = None,
    ) -> None:
        """Wraps a model.

        Args:
            model: a causal LM that learned begin symbol + prompt + " " + name + end symbol.
            tokenizer: the model's, byte-level BPE.
            known_names: names that must not come out; every real card's if None; empty to allow all.

        Raises:
            ValueError: model and tokenizer do not fit, or the tokenizer is of another kind.
        """
        if tokenizer.bos_token_id is None:
            raise ValueError("the tokenizer has no begin symbol: set tokenizer.bos_token to that of training")
        if known_names is None:
            from flash_experts.data.cards import known_names as names_of_all_cards

            known_names = names_of_all_cards()
        self.model = model
        self.tokenizer = tokenizer
        self.vocabulary = NameVocabulary(tokenizer, model.config.vocab_size)
        self.known = KnownNames(tuple(known_names))

    @classmethod
    def from_pretrained(cls, source: str | Path, device: str | torch.device | None = None) -> NameGenerator:
        """Loads a model folder or hub id with its tokenizer; every real card is known.

        Args:
            source: what ``save_pretrained`` wrote, or a hub id.
            device: CUDA if there is one, when None.

        Raises:
            ValueError: missing, damaged, or no causal LM.
        """
        from flash_experts.data.tokenizer import load_tokenizer
        from flash_experts.models.loading import load_model

        return cls(load_model(source, device), load_tokenizer(source))

    def generate(
        self,
        count: int = 20,
        type_line: str | None = None,
        colors: str | None = None,
        mana_value: int | None = None,
        preset: str = "balanced",
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        starts_with: str | None = None,
        max_words: int | None = None,
        max_length: int | None = None,
        seed: int | None = None,
        batch_size: int = 64,
        banned_words: Sequence[str] = (),
        filters: Sequence[FilterFactory] = (),
    ) -> list[GeneratedName]:
        """New names for a card.

        The same seed gives the same names, whatever ``batch_size`` (up to rounding), and the first names of a
        larger ``count`` are those of a smaller one.

        Args:
            count: how many names.
            type_line: such as "Legendary Creature — Goblin Warrior", or a part of it; None for any.
            colors: such as "R" or "WU", "C" for colorless; None for any.
            mana_value: None for any.
            preset: "conservative", "balanced" or "creative".
            temperature: see `Sampling` for this and the next four; each overrides the preset's.
            top_k: 0 keeps all tokens.
            top_p: 1 keeps all tokens.
            min_p: 0 keeps all tokens.
            repetition_penalty: 1 is none.
            starts_with: letters that the names begin with, the last word perhaps unfinished.
            max_words: words at most, counted by spaces.
            max_length: characters at most; 40 if None.
            seed: a new one each time if None.
            batch_size: names computed at once.
            banned_words: words that no name shall contain.
            filters: more filters; each is called with (vocabulary, prompt length) and gives a
                LogitsProcessor, as the class of your own `NameFilter` does.

        Returns:
            ``count`` names, or fewer, with a warning, if no more are found.

        Raises:
            ValueError: an argument is out of range or unknown, or the constraints leave no name at all.
        """
        _check_least(count=(count, 0), batch_size=(batch_size, 1), seed=(0 if seed is None else seed, 0))
        sampling = sampling_of(
            preset,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
        )
        length = LONGEST_NAME if max_length is None else max_length
        limits = _Limits(starts_with, max_words, length, tuple(banned_words))
        prompt_ids = self._prompt_ids(Attributes.parse(type_line, colors, mana_value))
        processors = self._filters(limits, len(prompt_ids))
        processors += [make(self.vocabulary, len(prompt_ids)) for make in filters]
        seed = secrets.randbits(63) if seed is None else seed
        accepted = self._search(count, limits, prompt_ids, sampling, processors, seed, batch_size)
        nearest = self.known.nearest([text for text, _ in accepted])
        return [
            GeneratedName(text, log_prob, card, similarity)
            for (text, log_prob), (card, similarity) in zip(accepted, nearest, strict=True)
        ]

    def _prompt_ids(self, attributes: Attributes) -> list[int]:
        return [self.tokenizer.bos_token_id, *self.vocabulary.encode(attributes.prompt())]

    def _filters(self, limits: _Limits, prompt_length: int) -> list[LogitsProcessor]:
        """The filters of every name and those asked for."""
        vocabulary = self.vocabulary
        alphabet = CARD_ALPHABET | set(shown_form(limits.starts_with or ""))
        filters: list[LogitsProcessor] = [
            AllowedCharacters(vocabulary, prompt_length, alphabet),
            WellFormed(vocabulary, prompt_length),
            NoRepeatedWords(vocabulary, prompt_length),
            KnownNameFilter(vocabulary, prompt_length, self.known.normal_forms),
            MaxLength(vocabulary, prompt_length, limits.max_length),
        ]
        if limits.max_words is not None:
            filters.append(MaxWords(vocabulary, prompt_length, limits.max_words))
        if limits.banned_words:
            filters.append(BannedWords(vocabulary, prompt_length, limits.banned_words))
        if limits.starts_with is not None:
            filters.append(StartsWith(vocabulary, prompt_length, limits.starts_with))
        return filters

    def _search(
        self,
        count: int,
        limits: _Limits,
        prompt_ids: list[int],
        sampling: Sampling,
        processors: Sequence[LogitsProcessor],
        seed: int,
        batch_size: int,
    ) -> list[tuple[str, float]]:
        """The first ``count`` good names of the seed's stream, in its order, with their log-probabilities.

        Only the order of the stream decides what is taken and when to give up, never how it was cut into
        batches.
        """
        accepted: dict[str, tuple[str, float]] = {}
        tried = without_news = whole = 0
        if not count:
            return []
        with evaluating(self.model), torch.no_grad():
            steps = self._steps(len(prompt_ids), limits.max_length)
            decoder = NameDecoder(self.model, prompt_ids, self.vocabulary.end_id, sampling, processors, steps, seed)
            while len(accepted) < count and without_news < _PATIENCE:
                rate = max(len(accepted), 1) / max(tried, 1)
                wanted = math.ceil(1.05 * (count - len(accepted)) / rate)
                batch = range(tried, tried + min(wanted, batch_size))
                for name in decoder.decode(batch):
                    tried += 1
                    whole += name.is_whole
                    text = self._accept(name, limits)
                    key = normal_form(text) if text else ""
                    if key and key not in accepted:
                        accepted[key] = text, name.log_prob
                        without_news = 0
                    else:
                        without_news += 1
                    if len(accepted) == count or without_news == _PATIENCE:
                        break
        if not whole:
            raise NoTokenLeftError(f"no name can be made: {_told(limits)} leave nothing. Loosen one of them")
        if len(accepted) < count:
            warnings.warn(
                f"found {len(accepted)} of {count} names: the last {_PATIENCE} tries gave nothing new. "
                "Loosen the constraints, or take a higher temperature",
                stacklevel=3,
            )
        return list(accepted.values())

    def _steps(self, prompt_length: int, max_length: int) -> int:
        """Tokens a name can have: at worst four bytes a character, a space, an end; within the context."""
        room = self.model.config.max_position_embeddings - prompt_length
        if room < 2:
            raise ValueError(
                f"the prompt takes {prompt_length} tokens, the model's context has "
                f"{self.model.config.max_position_embeddings}: shorten the type line"
            )
        return min(4 * max_length + 2, room)

    def _accept(self, name: DecodedName, limits: _Limits) -> str:
        """The finished text of a name, or "" if it must not come out (whatever the filters did)."""
        text = self.vocabulary.decode(name.ids) if name.is_whole else ""
        if not text.isprintable():  # bytes that make no character
            return ""
        text = format_name(text)
        key = normal_form(text)
        return text if key and key not in self.known.normal_forms and limits.held_by(text) else ""


def _check_least(**arguments: tuple[int, int]) -> None:
    for name, (value, least) in arguments.items():
        if value < least:
            raise ValueError(f"{name} is {value}: it must be {least} or more")


def _told(limits: _Limits) -> str:
    """The constraints in words, for messages."""
    told = [f"max_length={limits.max_length}", "no name of a known card"]
    if limits.starts_with is not None:
        told.append(f"starts_with={limits.starts_with!r}")
    if limits.max_words is not None:
        told.append(f"max_words={limits.max_words}")
    if limits.banned_words:
        told.append(f"banned_words={list(limits.banned_words)}")
    return ", ".join(told)
