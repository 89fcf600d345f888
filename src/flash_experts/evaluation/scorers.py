"""What is evaluated, behind one face, and language models behind it (`baseline` has the n-grams).

Letters in the shapes: N names, B names of a batch, T tokens, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.names import normal_form
from flash_experts.data.packing import EncodedName, encode_name, encode_names, pack_all
from flash_experts.data.prompts import NONE, Attributes, known_part, read_conditions
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.evaluation.costs import Costs, ModelSize, costs_of, parameter_counts
from flash_experts.evaluation.metrics import FloatArray
from flash_experts.generation.decoding import NameDecoder
from flash_experts.generation.generator import NameGenerator
from flash_experts.generation.presets import Sampling
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION, keeps_packed_apart
from flash_experts.models.loading import load_model
from flash_experts.models.modes import evaluating
from flash_experts.models.router_hooks import count_loads
from flash_experts.models.router_metrics import over_mean
from flash_experts.models.scoring import context_length, name_nats

TOKENS_PER_BATCH = 4096
_SAMPLED_AT_ONCE = 256
_MOST_NEW_TOKENS = 64
_MOST_LOGITS = 2**27  # at once: 512 MiB


@dataclass(frozen=True, slots=True)
class Prompt:
    """What names are asked for, in the words of `NameGenerator.generate`."""

    type_line: str | None = None
    colors: str | None = None
    mana_value: int | None = None

    def __str__(self) -> str:
        mana = None if self.mana_value is None else f"mana value {self.mana_value}"
        return ", ".join(part for part in (self.type_line, self.colors, mana) if part) or "nothing given"


class Scorer(Protocol):
    """What evaluation asks of a model."""

    @property
    def label(self) -> str:
        """What tables and plots call the model."""

    @property
    def size(self) -> ModelSize: ...
    @property
    def costs(self) -> Costs: ...
    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        """(N,) negative log-likelihood of each name with its end symbol after its attributes, in nats."""

    def sample(self, count: int, seed: int, attributes: Attributes = NONE) -> list[str]:
        """Names drawn from the model as it is: temperature 1, nothing cut off, known names not held back."""

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        """One such name for each of many cards."""

    def show(self, prompts: Sequence[Prompt], count: int, seed: int, known: Sequence[str]) -> list[list[str]]:
        """Names as a user gets them, none known, for each prompt."""

    def expert_loads(self, names: Sequence[str], attributes: Sequence[Attributes]) -> dict[str, tuple[float, ...]]:
        """Load of each expert over the mean, by the number of the block; empty without experts."""


class LanguageModel:
    """A causal language model of transformers with its tokenizer."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str, folder: Path | None = None
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.label = label
        self._folder = folder

    @classmethod
    def load(
        cls, source: str | Path, device: str | torch.device | None = None, label: str | None = None
    ) -> LanguageModel:
        """From a model folder or a hub id; raises ValueError as `load_model` and `load_tokenizer` do."""
        folder = Path(source) if Path(source).is_dir() else None
        model = load_model(source, device)
        tokenizer = load_tokenizer(source, model.config.vocab_size)
        return cls(model, tokenizer, label or Path(source).name, folder)

    @property
    def size(self) -> ModelSize:
        return parameter_counts(self.model)

    @property
    def costs(self) -> Costs:
        return costs_of(self.model, self._folder)

    def nats(
        self,
        names: Sequence[str],
        attributes: Sequence[Attributes],
        *,
        tokens_per_batch: int = TOKENS_PER_BATCH,
    ) -> FloatArray:
        """See `Scorer.nats`.

        Args:
            names: what to score.
            attributes: the prompt before each. Sets, years and rarities that the model never read of are left out.
            tokens_per_batch: length of a packed row. It changes the speed, never the figures.

        Raises:
            ValueError: a name is longer than the model's context.
        """
        encoded = encode_names(names, self._known(attributes), self.tokenizer)
        check_lengths(self.model, names, encoded)
        # Rows of names of like length: on a CPU attention works on a row unpacked to its longest name.
        order = sorted(range(len(encoded)), key=lambda index: encoded[index].num_inputs)
        ordered = [encoded[index] for index in order]
        with scoring(self.model):
            if keeps_packed_apart(self.model.config):
                rows = pack_all(ordered, tokens_per_batch)
                scored = [name_nats(self.model, row.to(self.model.device)).cpu() for row in rows]
            else:
                scored = self._nats_of_padded(ordered)
        nats = np.empty(len(encoded))
        nats[order] = torch.cat(scored).double().numpy()
        return nats

    def _nats_of_padded(self, encoded: Sequence[EncodedName]) -> list[torch.Tensor]:
        """Nats of names of a model that is not known to keep the names of a packed row apart."""
        longest = max(name.num_inputs for name in encoded)
        together = max(1, _MOST_LOGITS // (longest * self.model.config.vocab_size))
        scored = []
        for start in range(0, len(encoded), together):
            names = encoded[start : start + together]
            length = max(name.num_inputs for name in names)
            padded = [[*name.ids, *[self.tokenizer.pad_token_id] * (length + 1 - len(name.ids))] for name in names]
            ids_BT = torch.tensor(padded, device=self.model.device)
            place_T = torch.arange(length, device=self.model.device)
            ends_B1 = torch.tensor([[name.num_inputs] for name in names], device=self.model.device)
            starts_B1 = torch.tensor([[name.prompt_length - 1] for name in names], device=self.model.device)
            logits_BTV = self.model(ids_BT[:, :-1], attention_mask=(place_T < ends_B1).long(), use_cache=False).logits
            nats_BT = F.cross_entropy(logits_BTV.float().transpose(1, 2), ids_BT[:, 1:], reduction="none")
            scored.append(nats_BT.where((place_T >= starts_B1) & (place_T < ends_B1), 0.0).sum(dim=1).cpu())
        return scored

    def sample(self, count: int, seed: int, attributes: Attributes = NONE) -> list[str]:
        """See `Scorer.sample`. What has not ended after 64 tokens is cut off there."""
        (told,) = self._known([attributes])
        prompt = encode_name("", told, self.tokenizer)
        prompt_ids = prompt.ids[: prompt.prompt_length]
        most = self._most_new_tokens(len(prompt_ids))
        with scoring(self.model):
            end_id = self.tokenizer.eos_token_id
            decoder = NameDecoder(self.model, prompt_ids, end_id, Sampling(), [], most, seed)
            drawn = decoder.stream(range(count), _SAMPLED_AT_ONCE)
            return self._texts([list(name.ids) for name in drawn])

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        """See `Scorer.sample_each`."""
        encoded = encode_names([""] * len(attributes), self._known(attributes), self.tokenizer)
        prompts = [prompt.ids[: prompt.prompt_length] for prompt in encoded]
        most, end_id = self._most_new_tokens(max(map(len, prompts))), self.tokenizer.eos_token_id
        order = sorted(range(len(prompts)), key=lambda index: prompts[index])  # equal prompts are computed once
        with scoring(self.model):
            ordered = [prompts[index] for index in order]
            decoder = NameDecoder(self.model, (), end_id, Sampling(), [], most, seed, prompts=ordered)
            texts = self._texts([list(name.ids) for name in decoder.stream(range(len(order)), _SAMPLED_AT_ONCE)])
        return [text for _, text in sorted(zip(order, texts, strict=True))]

    def _known(self, attributes: Sequence[Attributes]) -> list[Attributes]:
        return known_attributes(self.model.config, attributes)

    def _most_new_tokens(self, prompt_length: int) -> int:
        context = context_length(self.model.config)
        return _MOST_NEW_TOKENS if context is None else min(_MOST_NEW_TOKENS, context - prompt_length)

    def _texts(self, names: list[list[int]]) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(names, skip_special_tokens=True)]

    def show(self, prompts: Sequence[Prompt], count: int, seed: int, known: Sequence[str]) -> list[list[str]]:
        """See `Scorer.show`. Without the filters where the tokenizer is of a kind that they do not know."""
        try:
            generator = NameGenerator(self.model, self.tokenizer, known)
        except ValueError:
            return show_unfiltered(self, prompts, count, seed, known)
        return [
            [
                name.text
                for name in generator.generate(count, prompt.type_line, prompt.colors, prompt.mana_value, seed=seed)
            ]
            for prompt in prompts
        ]

    def expert_loads(self, names: Sequence[str], attributes: Sequence[Attributes]) -> dict[str, tuple[float, ...]]:
        """See `Scorer.expert_loads`."""
        loads = count_loads(self.model, lambda: self.nats(names, attributes))
        return {str(block): over_mean(load_E) for block, load_E in loads.items()}


def show_unfiltered(
    scorer: Scorer, prompts: Sequence[Prompt], count: int, seed: int, known: Sequence[str]
) -> list[list[str]]:
    """Distinct samples for each prompt that are no known name; fewer than ``count`` if so many are not found soon."""
    keys = {normal_form(name) for name in known} | {""}
    shown = []
    for prompt in prompts:
        attributes = Attributes.parse(prompt.type_line, prompt.colors, prompt.mana_value)
        drawn = scorer.sample(4 * count, seed, attributes)
        new = {normal_form(name): name for name in reversed(drawn) if normal_form(name) not in keys}
        shown.append(list(reversed(new.values()))[:count])
    return shown


def known_attributes(config: PretrainedConfig, attributes: Sequence[Attributes]) -> list[Attributes]:
    """What a model can be conditioned on: cards of another source than its own may have more."""
    conditions = read_conditions(config.to_dict())
    return [known_part(each, conditions) for each in attributes]


def names_fit(
    config: PretrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    attributes: Sequence[Attributes],
) -> list[bool]:
    """Whether each name fits into a model's context after its prompt."""
    context = context_length(config)
    encoded = encode_names(names, known_attributes(config, attributes), tokenizer)
    return [context is None or name.num_inputs <= context for name in encoded]


def check_lengths(model: PreTrainedModel, names: Sequence[str], encoded: Sequence[EncodedName]) -> None:
    """Refuses names that do not fit into the model's context.

    Raises:
        ValueError: the first that does not.
    """
    context = context_length(model.config)
    for name, ids in zip(names, encoded, strict=True):
        if context is not None and ids.num_inputs > context:
            raise ValueError(
                f"{name[:40]!r}... takes {ids.num_inputs} tokens, the model's context has {context}: shorten it"
            )


@contextmanager
def scoring(model: PreTrainedModel) -> Iterator[None]:
    """Eval and inference mode, and attention that keeps the names of a row apart; put back afterwards."""
    attention = model.config._attn_implementation
    if keeps_packed_apart(model.config):
        model.set_attn_implementation(ATTENTION_IMPLEMENTATION)
    try:
        with evaluating(model), torch.inference_mode():
            yield
    finally:
        if keeps_packed_apart(model.config):
            model.set_attn_implementation(attention)
