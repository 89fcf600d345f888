"""The two kinds of models that are evaluated, behind one face: language models and n-grams."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.names import normal_form
from flash_experts.data.packing import EncodedName, encode_name, encode_names, pack_all
from flash_experts.data.prompts import Attributes
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.evaluation.metrics import FloatArray
from flash_experts.evaluation.ngram import NGramMixture
from flash_experts.generation.decoding import NameDecoder
from flash_experts.generation.generator import NameGenerator
from flash_experts.generation.presets import Sampling
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION
from flash_experts.models.loading import load_model
from flash_experts.models.moe_layer import Experts, MoELayer
from flash_experts.models.scoring import name_nats

TOKENS_PER_BATCH = 4096
_SAMPLED_AT_ONCE = 256
_MOST_NEW_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Prompt:
    """What names are asked for, in the words of `NameGenerator.generate`."""

    type_line: str | None = None
    colors: str | None = None
    mana_value: int | None = None

    def __str__(self) -> str:
        mana = None if self.mana_value is None else f"mana value {self.mana_value}"
        return ", ".join(part for part in (self.type_line, self.colors, mana) if part) or "nothing given"


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Parameters: all, and those that work on one token (of E experts only the k that it is sent to)."""

    total: int
    active: int


class Scorer(Protocol):
    """What evaluation asks of a model."""

    @property
    def label(self) -> str:
        """What tables and plots call the model."""

    @property
    def takes_attributes(self) -> bool:
        """Whether prompts of attributes change what the model expects."""

    @property
    def size(self) -> ModelSize: ...
    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        """(N,) negative log-likelihood of each name with its end symbol after its attributes, in nats."""

    def sample(self, count: int, seed: int) -> list[str]:
        """Names drawn from the model as it is: temperature 1, nothing cut off, known names not held back."""

    def show(self, prompts: Sequence[Prompt], count: int, seed: int, known: Sequence[str]) -> list[list[str]]:
        """Names as a user gets them, none known, for each prompt; none where the model cannot take it."""


class LanguageModel:
    """A causal language model of transformers with its tokenizer."""

    takes_attributes = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.label = label

    @classmethod
    def load(
        cls, source: str | Path, device: str | torch.device | None = None, label: str | None = None
    ) -> LanguageModel:
        """From a model folder or a hub id; raises ValueError as `load_model` and `load_tokenizer` do."""
        return cls(load_model(source, device), load_tokenizer(source), label or Path(source).name)

    @property
    def size(self) -> ModelSize:
        return parameter_counts(self.model)

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
            attributes: the prompt before each.
            tokens_per_batch: length of a packed row. It changes the speed, never the figures.

        Raises:
            ValueError: a name is longer than the model's context.
        """
        encoded = encode_names(names, attributes, self.tokenizer)
        self._check_lengths(names, encoded)
        # Rows of names of like length: on a CPU attention works on a row unpacked to its longest name.
        order = sorted(range(len(encoded)), key=lambda index: encoded[index].num_inputs)
        batches = pack_all([encoded[index] for index in order], tokens_per_batch)
        nats = np.empty(len(encoded))
        with _scoring(self.model):
            scored = [name_nats(self.model, batch.to(self.model.device)).cpu() for batch in batches]
        nats[order] = torch.cat(scored).double().numpy()
        return nats

    def sample(self, count: int, seed: int) -> list[str]:
        """See `Scorer.sample`. What has not ended after 48 tokens is cut off there."""
        prompt = encode_name("", Attributes(), self.tokenizer)
        prompt_ids = prompt.ids[: prompt.prompt_length]
        most = min(_MOST_NEW_TOKENS, self.model.config.max_position_embeddings - len(prompt_ids))
        names: list[str] = []
        with _scoring(self.model):
            end_id = self.tokenizer.eos_token_id
            decoder = NameDecoder(self.model, prompt_ids, end_id, Sampling(), [], most, seed)
            for start in range(0, count, _SAMPLED_AT_ONCE):
                drawn = decoder.decode(range(start, min(start + _SAMPLED_AT_ONCE, count)))
                texts = self.tokenizer.batch_decode([list(name.ids) for name in drawn], skip_special_tokens=True)
                names.extend(text.strip() for text in texts)
        return names

    def show(self, prompts: Sequence[Prompt], count: int, seed: int, known: Sequence[str]) -> list[list[str]]:
        """See `Scorer.show`."""
        generator = NameGenerator(self.model, self.tokenizer, known)
        return [
            [
                name.text
                for name in generator.generate(count, prompt.type_line, prompt.colors, prompt.mana_value, seed=seed)
            ]
            for prompt in prompts
        ]

    def _check_lengths(self, names: Sequence[str], encoded: Sequence[EncodedName]) -> None:
        context = self.model.config.max_position_embeddings
        for name, ids in zip(names, encoded, strict=True):
            if ids.num_inputs > context:
                raise ValueError(
                    f"{name[:40]!r}... takes {ids.num_inputs} tokens, the model's context has {context}: shorten it"
                )


def parameter_counts(model: torch.nn.Module) -> ModelSize:
    """Counts parameters, those shared by two modules once."""
    total = sum(parameter.numel() for parameter in model.parameters())
    idle = 0
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            experts: Experts = layer.experts
            held = sum(parameter.numel() for parameter in experts.parameters())
            idle += held - held * layer.router.top_k // experts.num_experts
    return ModelSize(total, total - idle)


@contextmanager
def _scoring(model: PreTrainedModel) -> Iterator[None]:
    """Eval and inference mode, and attention that keeps the names of a row apart; put back afterwards."""
    was_training, attention = model.training, model.config._attn_implementation
    if isinstance(model.config, GPT2Config):
        model.set_attn_implementation(ATTENTION_IMPLEMENTATION)
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)
        if isinstance(model.config, GPT2Config):
            model.set_attn_implementation(attention)


class NGramBaseline:
    """`NGramMixture` fitted on the training names. It knows no attributes."""

    label = "ngram"
    takes_attributes = False

    def __init__(self, train_names: Sequence[str]) -> None:
        self._model = NGramMixture(train_names)

    @property
    def size(self) -> ModelSize:
        return ModelSize(self._model.num_parameters, self._model.num_active_parameters)

    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        assert all(attribute == Attributes() for attribute in attributes), "n-grams take no attributes"
        return self._model.nats(names)

    def sample(self, count: int, seed: int) -> list[str]:
        return self._model.sample(count, seed)

    def show(self, prompts: Sequence[Prompt], count: int, seed: int, known: Sequence[str]) -> list[list[str]]:
        """See `Scorer.show`: answers only the prompt that gives nothing."""
        keys = {normal_form(name) for name in known}
        new = [name for name in self._model.sample(2 * count + 20, seed) if normal_form(name) not in keys]
        return [new[:count] if prompt == Prompt() else [] for prompt in prompts]
