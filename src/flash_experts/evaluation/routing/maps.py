"""Router maps: which expert processes which token of given names, with load balance and entropy of each router.

The EOS token is never read, so it has no expert. With expert choice, the experts of a token depend on the batch, here
`TOKENS_PER_BATCH` tokens. A capacity factor drops tokens in training only; here they are counted.

Shape suffixes: T tokens of all names, E experts, K experts per token, L MoE layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.packing import EncodedName, encode_names, pack_all
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.evaluation.curves import finite_number
from flash_experts.evaluation.routing.specialization import (
    TOKEN_CLASSES,
    Specialization,
    Tokens,
    card_labels,
    specializations,
    token_labels,
)
from flash_experts.evaluation.scorers import TOKENS_PER_BATCH, check_lengths, known_attributes, scoring
from flash_experts.generation.filters.base import NameVocabulary
from flash_experts.models import router_metrics
from flash_experts.models.loading import load_config, load_model
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.moe_config import GPT2MoEConfig
from flash_experts.models.router import Router, routers_of
from flash_experts.released import model_folder
from flash_experts.training.tracking import METRICS_FILE, read_untrusted_metrics

_MOMENTS = 12  # points in training whose loads are shown, at most
_SETTINGS = (
    *("num_experts", "num_experts_per_tok", "num_shared_experts", "routing", "scoring_func", "capacity_factor"),
    *("router_aux_loss_coef", "router_bias_update_rate"),
)


@dataclass(frozen=True, slots=True)
class BlockRouting:
    """Routing of T tokens in one block.

    Attributes:
        chosen_TE: true where the token goes to the expert; else, ``gates_TE`` is 0.
        entropy: mean entropy of a token's routing probabilities / log E.
        top1: mean probability of a token's best expert.
        left_out: by name, the share of choices that the capacity factor would drop in training, or of tokens without an
            expert (expert choice).
    """

    block: int
    chosen_TE: npt.NDArray[np.bool_]
    gates_TE: npt.NDArray[np.float32]
    entropy: float
    top1: float
    left_out: dict[str, float]


@dataclass(frozen=True, slots=True)
class BlockMetrics:
    """Router metrics of one block.

    Attributes:
        load: over the mean load, on all tokens; ``load_of_names`` without BOS token and prompt.
        metrics: see `flash_experts.models.router_metrics.router_metrics`.
        together: coactivation: for each expert the share of its tokens that also go to each other expert.
        trouble: problem (such as routing collapse) and the setting to change.
    """

    block: int
    load: tuple[float, ...]
    load_of_names: tuple[float, ...]
    metrics: dict[str, float]
    together: tuple[tuple[float, ...], ...]
    trouble: str | None


@dataclass(frozen=True, slots=True)
class NameMap:
    """Experts of the tokens of one name, with BOS token and prompt.

    By block and token: (expert, gate) pairs, the largest gate first. Classes are from `TOKEN_CLASSES`.
    """

    name: str
    tokens: tuple[str, ...]
    classes: tuple[str, ...]
    experts: dict[int, tuple[tuple[tuple[int, float], ...], ...]]


@dataclass(frozen=True, slots=True)
class TrainingLoads:
    """Loads over the mean during training: by block, for some steps, of each expert."""

    steps: tuple[int, ...]
    loads: dict[int, tuple[tuple[float, ...], ...]]


@dataclass(frozen=True, slots=True)
class RouterMap:
    """Result of `inspect_router`; ``left_out_labels`` have too few tokens."""

    model: str
    settings: dict[str, Any]
    names: int
    tokens: int
    seed: int
    blocks: tuple[BlockMetrics, ...]
    specializations: tuple[Specialization, ...]
    left_out_labels: tuple[str, ...]
    maps: tuple[NameMap, ...]
    training: TrainingLoads | None

    @property
    def has_pairs(self) -> bool:
        """Whether a token can have several experts."""
        return self.settings["num_experts_per_tok"] > 1 or self.settings["routing"] == "expert_choice"

    def to_json(self) -> dict[str, Any]:
        tests = [asdict(each) | {"is_specialized": each.is_specialized} for each in self.specializations]
        return asdict(self) | {"specializations": tests}


def inspect_router(
    source: str | Path | GPT2MoEForCausalLM,
    names: Sequence[str],
    cards: Sequence[Card] | None = None,
    *,
    prompted: bool = True,
    shown: int = 24,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    device: str | torch.device | None = None,
) -> RouterMap:
    """Runs names through a model (folder, hub id, or object with ``tokenizer``) and analyzes its routers.

    Args:
        cards: those of the names, for labels by type and color.
        prompted: whether names are conditioned on their cards.
        shown: number of first names that get maps.

    Raises:
        ValueError: there are no names, one is too long, or the model has fewer than two experts.
    """
    if not names:
        raise ValueError("no names to inspect: give at least one")
    model, tokenizer, label = _load(source, tokenizer, device)
    attributes = [UNCONDITIONAL] * len(names)
    if cards is not None and prompted:
        attributes = known_attributes(model.config, [Attributes.of(card) for card in cards])
    encoded = encode_names(names, attributes, tokenizer)
    check_lengths(model, names, encoded)
    routing = route(model, encoded)
    tokens = Tokens.of(encoded, NameVocabulary(tokenizer, model.config.vocab_size).prompt_texts)
    labels = token_labels(tokens) + ([] if cards is None else card_labels(cards, tokens))
    found = specializations(
        labels, [each.chosen_TE for each in routing], [each.block for each in routing], tokens.name_T, seed=seed
    )
    tested = {each.title for each in found}
    folder = None if isinstance(source, GPT2MoEForCausalLM) else model_folder(source)
    return RouterMap(
        model=label,
        settings={field: getattr(model.config, field) for field in _SETTINGS},
        names=len(names),
        tokens=len(tokens.name_T),
        seed=seed,
        blocks=tuple(_metrics(each, tokens, model) for each in routing),
        specializations=tuple(found),
        left_out_labels=tuple(label.title for label in labels if label.title not in tested),
        maps=name_maps(names[:shown], tokens, routing),
        training=None if folder is None else read_loads(folder / METRICS_FILE),
    )


def check_has_experts(source: str | Path) -> None:
    """Raises a ValueError for a model without experts, before its weights are read."""
    if not isinstance(load_config(source), GPT2MoEConfig):
        raise ValueError(f"{source} has no experts, so no router: give an MoE model from upcycle or train")


def _load(
    source: str | Path | GPT2MoEForCausalLM,
    tokenizer: PreTrainedTokenizerBase | None,
    device: str | torch.device | None,
) -> tuple[GPT2MoEForCausalLM, PreTrainedTokenizerBase, str]:
    if isinstance(source, GPT2MoEForCausalLM):
        if tokenizer is None:
            raise ValueError("a model was given without its tokenizer: pass tokenizer=, or the path of both")
        model, label = source, source.config.model_type
    else:
        check_has_experts(source)
        loaded = load_model(source, device)
        assert isinstance(loaded, GPT2MoEForCausalLM)
        model, label, tokenizer = loaded, str(source), load_tokenizer(source, loaded.config.vocab_size)
    if model.config.num_experts == 1:
        raise ValueError(f"{label} has one expert in each layer: its router has nothing to choose")
    return model, tokenizer, label


def route(
    model: GPT2MoEForCausalLM, names: Sequence[EncodedName], tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[BlockRouting]:
    """Records routing; ``tokens_per_batch`` matters only to expert choice and capacity factors."""
    routers = routers_of(model)
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {block: [] for block in routers}

    def note(block: int, router: Router, *output: torch.Tensor) -> None:
        seen[block].append(_routing_of(router, *output))

    with scoring(model), router_metrics.listening(model, note):
        for row in pack_all(names, tokens_per_batch):
            inputs = row.to(model.device).inputs
            del inputs["logits_to_keep"]  # an argument of the output layer
            model.transformer(**inputs)
    return [_block_routing(block, routers[block], rows) for block, rows in seen.items()]


def _routing_of(
    router: Router, logits_TE: torch.Tensor, gates: torch.Tensor, choices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(T, E) choices, (T, E) gates, and sums of entropy, best probability and left-out tokens."""
    member_TE = router.membership(choices, len(logits_TE))
    gates_TE = router.dense_gates(gates, choices, len(logits_TE))
    logprobs_TE = router.log_scores(logits_TE).log_softmax(-1)
    entropy_T = -(logprobs_TE.exp() * logprobs_TE).sum(-1)
    left_out = router.left_out(logits_TE, choices, None)
    return member_TE.bool(), gates_TE, torch.stack([entropy_T.sum(), logprobs_TE.amax(-1).exp().sum(), left_out])


def _block_routing(block: int, router: Router, rows: Sequence[tuple[torch.Tensor, ...]]) -> BlockRouting:
    member, gates, sums = zip(*rows, strict=True)
    chosen_TE = torch.cat(member).cpu().numpy()
    entropy, top1, left_out = (torch.stack(sums).double().sum(0) / len(chosen_TE)).tolist()
    left = router.left_out_rate(left_out, 1)
    return BlockRouting(
        block, chosen_TE, torch.cat(gates).cpu().numpy(), entropy / math.log(router.num_experts), top1, left
    )


def _metrics(routing: BlockRouting, tokens: Tokens, model: GPT2MoEForCausalLM) -> BlockMetrics:
    chosen = routing.chosen_TE.astype(np.float64)
    pairs_EE = chosen.T @ chosen
    load_E = torch.from_numpy(chosen.sum(0))
    metrics = router_metrics.load_metrics(load_E) | router_metrics.pair_metrics(torch.from_numpy(pairs_EE))
    metrics |= {"entropy": routing.entropy, "top1": routing.top1} | routing.left_out
    trouble = None
    if load_E.mean() >= router_metrics.FEWEST_CHOICES:
        trouble = router_metrics.diagnose_loads(load_E, model.config.num_experts_per_tok)
    return BlockMetrics(
        block=routing.block,
        load=router_metrics.over_mean(load_E),
        load_of_names=router_metrics.over_mean(torch.from_numpy(chosen[tokens.place_T >= 0].sum(0))),
        metrics=metrics,
        together=tuple(map(tuple, (pairs_EE / np.maximum(pairs_EE.diagonal()[:, None], 1)).tolist())),
        trouble=trouble and f"{trouble}: {router_metrics.advice(model.config)}",
    )


def name_maps(names: Sequence[str], tokens: Tokens, routing: Sequence[BlockRouting]) -> tuple[NameMap, ...]:
    """Maps each token of the first names to its experts."""
    maps = []
    for index, name in enumerate(names):
        mine = np.flatnonzero(tokens.name_T == index).tolist()
        maps.append(
            NameMap(
                name=name,
                tokens=tuple(tokens.texts[at] for at in mine),
                classes=tuple(TOKEN_CLASSES[tokens.class_T[at]] for at in mine),
                experts={each.block: tuple(_experts_of(each, at) for at in mine) for each in routing},
            )
        )
    return tuple(maps)


def _experts_of(routing: BlockRouting, token: int) -> tuple[tuple[int, float], ...]:
    experts = np.flatnonzero(routing.chosen_TE[token])
    pairs = [(int(expert), round(float(routing.gates_TE[token, expert]), 4)) for expert in experts]
    return tuple(sorted(pairs, key=lambda pair: -pair[1]))


def read_loads(path: Path) -> TrainingLoads | None:
    """Reads expert loads during training from metrics.jsonl, averaged over up to 12 intervals; None if not recorded.

    Of a repeated step, the last values count.
    """
    steps: dict[int, dict[int, list[float]]] = {}
    for record in read_untrusted_metrics(path):
        try:
            loads = _loads_of(record)
        except (ValueError, KeyError, TypeError, OverflowError):  # not a number, or experts are missing
            continue
        if loads:
            steps[record["step"]] = loads
    if not steps:
        return None
    order = sorted(steps)
    shape = {block: len(loads) for block, loads in steps[order[-1]].items()}
    order = [step for step in order if {block: len(loads) for block, loads in steps[step].items()} == shape]
    parts = [part.tolist() for part in np.array_split(order, min(len(order), _MOMENTS))]
    means = {
        block: tuple(tuple(np.mean([steps[step][block] for step in part], axis=0).tolist()) for part in parts)
        for block in sorted(shape)
    }
    return TrainingLoads(tuple(part[-1] for part in parts), means)


def _loads_of(record: dict[str, Any]) -> dict[int, list[float]]:
    """Collects ``router/3/load/0``, ``router/3/load/1``, ... of a line, by block."""
    found: dict[int, dict[int, float]] = {}
    for key, value in record.items():
        match key.split("/"):
            case ["router", block, "load", expert]:
                if finite_number(value) is None:
                    raise ValueError(f"{key} is {value!r}")
                found.setdefault(int(block), {})[int(expert)] = float(value)
    return {block: [loads[expert] for expert in range(len(loads))] for block, loads in found.items()}
