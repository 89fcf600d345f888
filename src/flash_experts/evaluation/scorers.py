"""The interface of evaluated models (`Scorer`), language models, and the n-gram baseline.

Shape suffixes: N names, B batch, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.names import normal_form
from flash_experts.data.packing import EncodedName, encode_name, encode_names, name_nats, pack_all
from flash_experts.data.prompts import UNCONDITIONAL, Attributes, drop_unknown, read_conditions
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.evaluation.curves import read_curve
from flash_experts.evaluation.metrics import FloatArray
from flash_experts.evaluation.ngram import ConditionalNGrams
from flash_experts.generation.decoding import NameDecoder
from flash_experts.generation.generator import NameGenerator
from flash_experts.generation.request import Sampling
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION, separates_packed_sequences
from flash_experts.models.loading import load_model
from flash_experts.models.router_metrics import count_loads, over_mean
from flash_experts.models.scoring import context_length, evaluating
from flash_experts.released import model_folder
from flash_experts.training.metrics import expert_shares, multiplied_parameters, training_flops
from flash_experts.training.tracking import METRICS_FILE


@dataclass(frozen=True, slots=True)
class ModelSize:
    """Parameters: all, and those active per token (k of E experts)."""

    total: int
    active: int


@dataclass(frozen=True, slots=True)
class Costs:
    """Memory, and training where metrics.jsonl records it.

    Attributes:
        memory_bytes: of parameters and buffers.
        training_tokens: with prompts, without those of the model that training started from.
        flops_per_token: training FLOPs per token, at most: 6 per active weight (Kaplan et al. 2020, section 2.1), with
            the output layer at every token and prompts computed for each name, without attention scores.
    """

    memory_bytes: int
    disk_bytes: int | None
    training_tokens: int | None
    training_seconds: float | None
    flops_per_token: float

    @property
    def training_flops(self) -> float | None:
        return None if self.training_tokens is None else self.flops_per_token * self.training_tokens


def parameter_counts(model: torch.nn.Module) -> ModelSize:
    """Counts parameters; tied ones count once."""
    shares, sizes = expert_shares(model), {parameter: parameter.numel() for parameter in model.parameters()}
    active = sum(size * shares.get(parameter, 1.0) for parameter, size in sizes.items())
    return ModelSize(sum(sizes.values()), round(active))


def costs_of(model: PreTrainedModel, folder: Path | None) -> Costs:
    """Measures a language model; ``folder`` is where it was loaded from."""
    held = {tensor.data_ptr(): tensor for tensor in (*model.parameters(), *model.buffers())}
    stored = [] if folder is None else [path.stat().st_size for path in folder.glob("*.safetensors")]
    points = [] if folder is None else read_curve(folder / METRICS_FILE)
    return Costs(
        memory_bytes=sum(tensor.numel() * tensor.element_size() for tensor in held.values()),
        disk_bytes=sum(stored) if stored else None,
        training_tokens=max((point.tokens for point in points if point.tokens), default=None),
        training_seconds=max((point.seconds for point in points if point.seconds), default=None),
        flops_per_token=training_flops(multiplied_parameters(model), 1, 1),
    )


TOKENS_PER_BATCH = 4096
_SAMPLED_AT_ONCE = 256
_MOST_NEW_TOKENS = 64
_MOST_LOGITS = 2**27  # logits in memory at once: 512 MiB


@dataclass(frozen=True, slots=True)
class PromptAttributes:
    """Attributes of requested names, as `NameGenerator.generate` takes them."""

    type_line: str | None = None
    colors: str | None = None
    mana_value: int | None = None

    def __str__(self) -> str:
        mana = None if self.mana_value is None else f"mana value {self.mana_value}"
        return ", ".join(part for part in (self.type_line, self.colors, mana) if part) or "unconditional"


class Scorer(Protocol):
    """A model that evaluation can score and sample."""

    @property
    def label(self) -> str:
        """Name of the model in tables and plots."""

    @property
    def size(self) -> ModelSize: ...
    @property
    def costs(self) -> Costs: ...
    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        """(N,) negative log-likelihood of each name and EOS given its attributes, in nats."""

    def sample(self, count: int, seed: int, attributes: Attributes = UNCONDITIONAL) -> list[str]:
        """Samples names from the unmodified distribution: temperature 1, no truncation, no filters."""

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        """Samples one such name per card."""

    def show(self, prompts: Sequence[PromptAttributes], count: int, seed: int, known: Sequence[str]) -> list[list[str]]:
        """Generates names for each prompt as `NameGenerator.generate` does by default, without known names.

        Its sampling has filters and chooses the best of 8; models that it does not support are sampled as they are.
        """

    def expert_loads(self, names: Sequence[str], attributes: Sequence[Attributes]) -> dict[str, tuple[float, ...]]:
        """The load of each expert over the mean, by block; empty without experts."""


class LanguageModel:
    """A causal language model with its tokenizer."""

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
        """Loads a folder or hub id, or raises a ValueError."""
        folder = model_folder(source)
        model = load_model(source, device)
        tokenizer = load_tokenizer(source, model.config.vocab_size)
        return cls(model, tokenizer, label or Path(source).name, folder)

    @property
    def size(self) -> ModelSize:
        return parameter_counts(self.model)

    @property
    def costs(self) -> Costs:
        return costs_of(self.model, self._folder)

    def nats(self, names: Sequence[str], attributes: Sequence[Attributes]) -> FloatArray:
        """See `Scorer.nats`; raises a ValueError if a name is longer than the model's context."""
        if not names:
            return np.empty(0)
        encoded = encode_names(names, known_attributes(self.model.config, attributes), self.tokenizer)
        check_lengths(self.model, names, encoded)
        # Packs names of similar length: on a CPU, attention pads a packed sequence to its longest name.
        order = sorted(range(len(encoded)), key=lambda index: encoded[index].num_inputs)
        ordered = [encoded[index] for index in order]
        with scoring(self.model):
            if separates_packed_sequences(self.model.config):
                rows = pack_all(ordered, TOKENS_PER_BATCH)
                scored = [name_nats(self.model, row.to(self.model.device)).cpu() for row in rows]
            else:
                scored = self._nats_of_padded(ordered)
        nats = np.empty(len(encoded))
        nats[order] = torch.cat(scored).double().numpy()
        return nats

    def _nats_of_padded(self, encoded: Sequence[EncodedName]) -> list[torch.Tensor]:
        """For models whose attention may not separate packed names."""
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

    def sample(self, count: int, seed: int, attributes: Attributes = UNCONDITIONAL) -> list[str]:
        """See `Scorer.sample`. Names have at most 64 tokens."""
        if not count:
            return []
        (known,) = known_attributes(self.model.config, [attributes])
        prompt = encode_name("", known, self.tokenizer)
        prompt_ids = prompt.ids[: prompt.prompt_length]
        most = self._most_new_tokens(len(prompt_ids))
        with scoring(self.model):
            end_id = self.tokenizer.eos_token_id
            decoder = NameDecoder(self.model, prompt_ids, end_id, Sampling(), [], most, seed)
            drawn = decoder.stream(range(count), _SAMPLED_AT_ONCE)
            return self._texts([list(name.ids) for name in drawn])

    def sample_each(self, attributes: Sequence[Attributes], seed: int) -> list[str]:
        if not attributes:
            return []
        known = known_attributes(self.model.config, attributes)
        encoded = encode_names([""] * len(known), known, self.tokenizer)
        prompts = [prompt.ids[: prompt.prompt_length] for prompt in encoded]
        most, end_id = self._most_new_tokens(max(map(len, prompts))), self.tokenizer.eos_token_id
        # So that equal prompts are adjacent and computed once.
        order = sorted(range(len(prompts)), key=lambda index: prompts[index])
        with scoring(self.model):
            ordered = [prompts[index] for index in order]
            decoder = NameDecoder(self.model, (), end_id, Sampling(), [], most, seed, prompts=ordered)
            texts = self._texts([list(name.ids) for name in decoder.stream(range(len(order)), _SAMPLED_AT_ONCE)])
        return [text for _, text in sorted(zip(order, texts, strict=True))]

    def _most_new_tokens(self, prompt_length: int) -> int:
        context = context_length(self.model.config)
        return _MOST_NEW_TOKENS if context is None else min(_MOST_NEW_TOKENS, context - prompt_length)

    def _texts(self, names: list[list[int]]) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(names, skip_special_tokens=True)]

    def show(self, prompts: Sequence[PromptAttributes], count: int, seed: int, known: Sequence[str]) -> list[list[str]]:
        """See `Scorer.show`. Without filters if they do not support the tokenizer."""
        try:
            generator = NameGenerator(self.model, self.tokenizer, known)
        except ValueError:
            return show_unfiltered(self, prompts, count, seed, known)
        return [[name.text for name in generator.generate(count, **asdict(prompt), seed=seed)] for prompt in prompts]

    def expert_loads(self, names: Sequence[str], attributes: Sequence[Attributes]) -> dict[str, tuple[float, ...]]:
        # Not the nats of a subclass, which may score with n-grams too.
        loads = count_loads(self.model, lambda: LanguageModel.nats(self, names, attributes))
        return {str(block): over_mean(load_E) for block, load_E in loads.items()}


def show_unfiltered(
    scorer: Scorer, prompts: Sequence[PromptAttributes], count: int, seed: int, known: Sequence[str]
) -> list[list[str]]:
    """Up to ``count`` distinct unknown names per prompt, in at most 4 * ``count`` draws."""
    keys = {normal_form(name) for name in known} | {""}
    shown = []
    for prompt in prompts:
        attributes = Attributes.parse(prompt.type_line, prompt.colors, prompt.mana_value)
        drawn = scorer.sample(4 * count, seed, attributes)
        new = {normal_form(name): name for name in reversed(drawn) if normal_form(name) not in keys}
        shown.append(list(reversed(new.values()))[:count])
    return shown


def known_attributes(config: PretrainedConfig, attributes: Sequence[Attributes]) -> list[Attributes]:
    """The attributes that a model was trained on; cards of another source may have more."""
    conditions = read_conditions(config.to_dict())
    return [drop_unknown(each, conditions) for each in attributes]


def check_lengths(model: PreTrainedModel, names: Sequence[str], encoded: Sequence[EncodedName]) -> None:
    """Raises a ValueError if a name exceeds the model's context."""
    context = context_length(model.config)
    for name, ids in zip(names, encoded, strict=True):
        if context is not None and ids.num_inputs > context:
            raise ValueError(
                f"{name[:40]!r}... takes {ids.num_inputs} tokens, the model's context has {context}: shorten it"
            )


@contextmanager
def scoring(model: PreTrainedModel) -> Iterator[None]:
    """Sets eval mode, inference mode and packed attention, and restores them afterwards."""
    attention = model.config._attn_implementation
    if separates_packed_sequences(model.config):
        model.set_attn_implementation(ATTENTION_IMPLEMENTATION)
    try:
        with evaluating(model), torch.inference_mode():
            yield
    finally:
        if separates_packed_sequences(model.config):
            model.set_attn_implementation(attention)


class NGramBaseline(ConditionalNGrams):
    """The n-gram baseline as a `Scorer`. It ignores mana values."""

    label = "ngram"

    @property
    def size(self) -> ModelSize:
        return ModelSize(self.num_parameters, self.num_active_parameters)

    @property
    def costs(self) -> Costs:
        """Eight bytes per parameter, and no training."""
        return Costs(8 * self.num_parameters, None, None, None, 0.0)

    def show(self, prompts: Sequence[PromptAttributes], count: int, seed: int, known: Sequence[str]) -> list[list[str]]:
        return show_unfiltered(self, prompts, count, seed, known)

    def expert_loads(self, names: Sequence[str], attributes: Sequence[Attributes]) -> dict[str, tuple[float, ...]]:
        return {}
