"""Inspection of a model on one name: next-token probabilities, attention weights, and the experts of each token.

The tokens are those of the tokenizer; a generated name may, rarely, have been made from others.

Shape suffixes: T tokens that the model reads (BOS token, prompt, name), V tokens of the vocabulary, H heads, S tokens
of the name and its EOS token.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from flash_experts.app.service import LoadedModel
from flash_experts.app.settings import Settings
from flash_experts.data.names import normal_form, shown_form
from flash_experts.data.packing import encode_name
from flash_experts.data.prompts import check_known, read_conditions
from flash_experts.evaluation.routing.maps import NameMap, name_maps, route
from flash_experts.evaluation.routing.specialization import Tokens, shown_text
from flash_experts.evaluation.scorers import check_lengths
from flash_experts.generation.generator import completed_attributes
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.scoring import evaluating

ALTERNATIVES = 5
LONGEST_NAME = 60  # characters
EOS_TEXT = "[EOS]"


@dataclass(frozen=True, slots=True)
class Step:
    """The model's prediction of one token of the name, or of its EOS token.

    Attributes:
        probability: at temperature 1, before filters.
        rank: from 1.
    """

    token: str
    probability: float
    rank: int
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Inspection:
    """What `inspect_name` found.

    Attributes:
        name: the name in Unicode normal form, as the model read it.
        prompt_length: number of ``tokens`` before the name, BOS token included.
        steps: predictions of the name's tokens and its EOS token.
        attention: per block (H, T, T) float32; the first t + 1 weights of row t, those of query t, sum to 1.
        experts: the experts of each token; None for a dense model.
    """

    name: str
    prompt: str
    tokens: tuple[str, ...]
    prompt_length: int
    steps: tuple[Step, ...]
    attention: tuple[npt.NDArray[np.float32], ...]
    experts: NameMap | None
    num_experts: int


def inspect_name(loaded: LoadedModel, name: str, settings: Settings) -> Inspection:
    """Inspects a model, which it locks, on a name after the prompt that the settings make.

    Raises:
        ValueError: the name is blank or too long, the model does not return attention weights, or has not learned the
            set, year or rarity.
    """
    name = shown_form(name)
    if not normal_form(name):
        raise ValueError("no name to inspect: give one with letters")
    if len(name) > LONGEST_NAME:
        raise ValueError(f"the name has {len(name)} characters: the most is {LONGEST_NAME}")
    generator = loaded.generator
    model = generator.model
    attributes = completed_attributes(settings)
    check_known(attributes, read_conditions(model.config.to_dict()))
    encoded = encode_name(name, attributes, generator.tokenizer)
    check_lengths(model, [name], [encoded])
    texts = generator.vocabulary.prompt_texts
    tokens = Tokens.of([encoded], texts)
    with loaded.lock:
        logits_TV, attention = _read(model, encoded.ids[:-1])
        routing = route(model, [encoded]) if isinstance(model, GPT2MoEForCausalLM) else None
    steps = _steps(logits_TV[encoded.prompt_length - 1 :], encoded.ids[encoded.prompt_length :], texts)
    return Inspection(
        name=name,
        prompt=attributes.prompt(),
        tokens=tokens.texts,
        prompt_length=encoded.prompt_length,
        steps=steps,
        attention=attention,
        experts=None if routing is None else name_maps([name], tokens, routing)[0],
        num_experts=0 if routing is None else model.config.num_experts,
    )


def _read(model: PreTrainedModel, ids: tuple[int, ...]) -> tuple[torch.Tensor, tuple[npt.NDArray[np.float32], ...]]:
    """(T, V) float32 logits, and (H, T, T) attention weights of each block."""
    with evaluating(model), torch.inference_mode(), _eager_attention(model):
        ids_1T = torch.tensor([ids], device=model.device)
        mask_1T = torch.ones_like(ids_1T)  # the BOS token is also the padding token
        out = model(ids_1T, attention_mask=mask_1T, output_attentions=True, use_cache=False)
    if not out.attentions or any(block is None for block in out.attentions):
        raise ValueError("this model does not return attention weights")
    return out.logits[0].float().cpu(), tuple(block[0].float().cpu().numpy() for block in out.attentions)


@contextmanager
def _eager_attention(model: PreTrainedModel) -> Iterator[None]:
    """Switches to eager attention, since fused kernels never materialize the attention weights."""
    implementation = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(implementation)


def _steps(logits_SV: torch.Tensor, ids: tuple[int, ...], texts: tuple[str, ...]) -> tuple[Step, ...]:
    """The predictions of S tokens, the EOS token last, with alternatives."""

    def shown(token: int) -> str:
        return EOS_TEXT if token == ids[-1] else shown_text(texts[token]) or f"[{token}]"

    steps = []
    for probs_V, token in zip(logits_SV.softmax(-1), ids, strict=True):
        top, top_ids = probs_V.topk(ALTERNATIVES)
        alternatives = tuple((shown(other), p) for other, p in zip(top_ids.tolist(), top.tolist(), strict=True))
        rank = int((probs_V > probs_V[token]).sum()) + 1
        steps.append(Step(shown(token), float(probs_V[token]), rank, alternatives))
    return tuple(steps)
