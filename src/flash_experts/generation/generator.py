"""`NameGenerator`: new card names from a fine-tuned model."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypedDict, Unpack

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.prompts import NONE, Attributes, check_known, read_conditions
from flash_experts.generation.attribute_fit import fitness_of
from flash_experts.generation.constraints import Constraints
from flash_experts.generation.likeness import Resembles, examples_of, filled_in, shared_attributes
from flash_experts.generation.presets import Sampling, sampling_of
from flash_experts.generation.sampling import stream_seed
from flash_experts.generation.search import GeneratedName, NameSearch, Request
from flash_experts.generation.similarity import KnownNames
from flash_experts.generation.vocabulary import NameVocabulary

FilterFactory = Callable[[NameVocabulary, int], LogitsProcessor]


class Options(TypedDict, total=False):
    """Further arguments of `NameGenerator.generate`: settings of `Sampling`, fields of `Constraints`, and more.

    Every one may be None (or left out) for its default.
    """

    presets: str | Path | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    repetition_penalty: float | None
    guidance: float | None
    starts_with: str | None
    ends_with: str | None
    contains: str | None
    regex: str | None
    min_words: int | None
    max_words: int | None
    words: int | None
    min_length: int | None
    max_length: int | None
    banned_words: Sequence[str]
    allow_profanity: bool
    allow_real_places: bool
    alliterate: bool
    min_distance: float
    filters: Sequence[FilterFactory]
    rarity: str | None
    set_code: str | None
    released: int | None
    like: str | Sequence[str] | None
    best_by: str | None


_SAMPLING = {field.name for field in fields(Sampling)} | {"presets"}
_CONSTRAINTS = {field.name for field in fields(Constraints)}


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
    def from_pretrained(
        cls, source: str | Path, device: str | torch.device | None = None, dtype: torch.dtype = torch.float32
    ) -> NameGenerator:
        """Loads a model folder or hub id with its tokenizer; every real card is known.

        Args:
            source: what ``save_pretrained`` wrote, or a hub id.
            device: CUDA if there is one, when None.
            dtype: of the weights. In ``torch.bfloat16`` a CPU with AVX-512 takes about three quarters of the time with
                experts; the names of a seed are others for the rounding.

        Raises:
            ValueError: missing, damaged, or no causal LM.
        """
        from flash_experts.data.tokenizer import load_tokenizer
        from flash_experts.models.loading import load_model

        model = load_model(source, device, dtype)
        return cls(model, load_tokenizer(source, model.config.vocab_size))

    def generate(
        self,
        count: int = 20,
        type_line: str | None = None,
        colors: str | None = None,
        mana_value: int | None = None,
        preset: str = "balanced",
        seed: int | None = None,
        batch_size: int = 256,
        best_of: int = 1,
        **options: Unpack[Options],
    ) -> list[GeneratedName]:
        """New names for a card.

        The same seed gives the same names, whatever ``batch_size`` (up to rounding), and the first names of a
        larger ``count`` are those of a smaller one. Of one seed, each prompt has random numbers of its own.

        Args:
            count: how many names.
            type_line: such as "Legendary Creature — Goblin Warrior", or a part of it; None for any.
            colors: such as "R" or "WU", "C" for colorless; None for any.
            mana_value: None for any.
            preset: "conservative", "balanced", "creative", or one of the YAML file ``presets``.
            seed: a new one each time if None.
            batch_size: names computed at once. Many are faster (of 1,024 names of the released mixture, 256 at once 1.8
                times as fast as 64) and take more memory, 1 GB of cache for GPT-2 small.
            best_of: names drawn for each that is returned, the best one. More are better names and take as much
                longer.
            **options: `Options`: what names hold (see `Constraints`), how tokens are drawn (see `Sampling`;
                each overrides the preset's), and ``filters``: more filters, each called with (vocabulary,
                prompt length) and giving a LogitsProcessor, as the class of your own `NameFilter` does;
                ``rarity``, such as "rare", ``set_code``, such as "ZEN", and ``released``, a year, for models that
                learned them; ``like``, examples whose kind of card and pieces of words the names shall have, as a list
                or "Goblin Guide; Lightning Bolt"; ``best_by``, what is best in ``best_of``: "score" (the default: the
                highest `GeneratedName.score`, the most natural) or "fit" (the name that gives most evidence for what
                was told, see `AttributeJudge`).

        Returns:
            ``count`` names in the order they were found, or fewer, with a warning, if no more are found.

        Raises:
            ValueError: an argument is out of range, unknown, or unknown to the model, or the constraints leave no name
                at all.
        """
        found = self.stream(count, type_line, colors, mana_value, preset, seed, batch_size, best_of, **options)
        return list(found)

    def stream(
        self,
        count: int = 20,
        type_line: str | None = None,
        colors: str | None = None,
        mana_value: int | None = None,
        preset: str = "balanced",
        seed: int | None = None,
        batch_size: int = 256,
        best_of: int = 1,
        **options: Unpack[Options],
    ) -> Iterator[GeneratedName]:
        """The names of `generate` one by one, as they are found. Arguments are checked at once.

        Between two names the model is as it was before: it may be trained, or the stream left.

            for name in generator.stream(10_000, colors="R"):
                print(name.text, flush=True)
        """
        for name, value, least, most in (
            ("count", count, 0, 1_000_000),
            ("batch_size", batch_size, 1, 65_536),
            ("seed", seed or 0, 0, 2**63 - 1),
            ("best_of", best_of, 1, 1_000),
        ):
            if not least <= value <= most:
                raise ValueError(f"{name} is {value}: it must be from {least:,} to {most:,}")
        rarity, like = options.pop("rarity", None), options.pop("like", None)
        printing = options.pop("set_code", None), options.pop("released", None)
        best_by = options.pop("best_by", None) or "score"
        sampling, constraints, filters = _sorted_options(preset, options)
        examples = examples_of(like) if like else []
        attributes = attributes_asked_for(Attributes.parse(type_line, colors, mana_value, rarity, *printing), examples)
        check_known(attributes, read_conditions(self.model.config.to_dict()))
        prompt_ids, untold_ids = (
            [self.tokenizer.bos_token_id, *self.vocabulary.encode(told.prompt())] for told in (attributes, NONE)
        )
        processors: list[LogitsProcessor] = []
        processors += constraints.filters(self.vocabulary, len(prompt_ids), self.known.normal_forms)
        processors += [make(self.vocabulary, len(prompt_ids)) for make in filters]
        if examples:
            processors.append(Resembles(self.vocabulary, len(prompt_ids), examples))
        seed = stream_seed(secrets.randbits(63) if seed is None else seed, prompt_ids)
        fitness = fitness_of(best_by, best_of, attributes)
        request = Request(prompt_ids, untold_ids, sampling, constraints, processors, seed, batch_size, best_of, fitness)
        return NameSearch(self.model, self.vocabulary, self.known, request).names(count)


def attributes_asked_for(attributes: Attributes, examples: Sequence[str]) -> Attributes:
    """What the prompt tells: the attributes given, and where they are open what most of the examples share."""
    return filled_in(attributes, shared_attributes(examples)) if examples else attributes


def _sorted_options(preset: str, options: Options) -> tuple[Sampling, Constraints, Sequence[FilterFactory]]:
    """What the options say of sampling and of names, and more filters.

    Raises:
        TypeError: there is no such option.
        ValueError: a value is out of range, or contradicts another.
    """
    given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
    filters = given.pop("filters", ())
    sampling = {name: given.pop(name) for name in _SAMPLING.intersection(given)}
    unknown = given.keys() - _CONSTRAINTS
    if unknown:
        raise TypeError(f"generate() got an unexpected keyword argument {min(unknown)!r}")
    return sampling_of(preset, **sampling), Constraints(**given), filters
