"""`NameGenerator`: new card names from a fine-tuned model."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.prompts import UNCONDITIONAL, Attributes, check_known, read_conditions
from flash_experts.generation.filters.base import NameVocabulary
from flash_experts.generation.request import NameRequest
from flash_experts.generation.reranker import AttributeClassifier, Reranker
from flash_experts.generation.sampling import stream_seed
from flash_experts.generation.search import GeneratedName, NameSearch
from flash_experts.generation.similarity import KnownNames, Resembles, examples_of, filled_in, shared_attributes
from flash_experts.released import default_model

FilterFactory = Callable[[NameVocabulary, int], LogitsProcessor]


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
        if tokenizer.bos_token_id is None:
            raise ValueError("the tokenizer has no BOS token: set tokenizer.bos_token to that of training")
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
            ValueError: a value is out of range or unknown, or no name satisfies the constraints.
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
        examples = examples_of(request.like) if request.like else []
        attributes = completed_attributes(request)
        check_known(attributes, read_conditions(self.model.config.to_dict()))
        prompt_ids, unconditional_ids = (
            [self.tokenizer.bos_token_id, *self.vocabulary.encode(given.prompt())]
            for given in (attributes, UNCONDITIONAL)
        )
        processors: list[LogitsProcessor] = []
        processors += request.filters(self.vocabulary, len(prompt_ids), self.known.normal_forms)
        processors += [make(self.vocabulary, len(prompt_ids)) for make in filters]
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


def completed_attributes(request: NameRequest) -> Attributes:
    """The given attributes, completed by what most of the names to resemble share."""
    given = request.attributes()
    return filled_in(given, shared_attributes(examples_of(request.like))) if request.like else given
