"""Which expert took which token of given names, as numbers. `router_report` draws them.

Names are packed into rows and go through the blocks alone: no logits are computed. The end symbol of a name is
predicted and never read, so no expert takes it; the last token of the name is where it is predicted.

With expert choice a token's experts depend on the tokens that stand in the same row, here `TOKENS_PER_BATCH` of them. A
capacity drops nothing outside of training; what a training forward of such a row would drop is counted.

Letters in the shapes: T tokens of all names, E experts, K experts per token, L layers with experts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.packing import EncodedName, encode_names, pack_all
from flash_experts.data.prompts import NONE, Attributes, known_part, read_conditions
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.evaluation.curves import read_records
from flash_experts.evaluation.router_tokens import TOKEN_CLASSES, Tokens, card_labels, token_labels
from flash_experts.evaluation.scorers import TOKENS_PER_BATCH, check_lengths, scoring
from flash_experts.evaluation.specialization import Specialization, specializations
from flash_experts.generation.vocabulary import NameVocabulary
from flash_experts.models.loading import load_model
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.models.router import ExpertChoiceRouter, Router
from flash_experts.models.router_hooks import listening, routers_of
from flash_experts.models.router_metrics import (
    FEWEST_CHOICES,
    advice,
    find_trouble,
    load_metrics,
    over_mean,
    pair_metrics,
)
from flash_experts.training.tracking import METRICS_FILE

_MOMENTS = 12  # of a training, at most, whose loads are shown
_SETTINGS = (
    *("num_experts", "num_experts_per_tok", "num_shared_experts", "routing", "scoring_func", "capacity_factor"),
    *("router_aux_loss_coef", "router_bias_update_rate"),
)


@dataclass(frozen=True, slots=True)
class BlockRouting:
    """What the router of one block did with T tokens.

    Attributes:
        block: from 0.
        chosen_TE: (T, E) true where the token is one of the expert's.
        gates_TE: (T, E) float32, 0 where it is not.
        entropy: mean entropy of a token's probabilities, as a share of log E.
        top1: mean probability of a token's best expert.
        left_out: share of the choices that a capacity would drop in training, or of the tokens that no expert took
            (expert choice); None where neither can be.
    """

    block: int
    chosen_TE: npt.NDArray[np.bool_]
    gates_TE: npt.NDArray[np.float32]
    entropy: float
    top1: float
    left_out: float | None


@dataclass(frozen=True, slots=True)
class BlockFigures:
    """Numbers of one block. Those of `flash_experts.models.router_metrics.router_metrics`, and what a run does not log.

    Attributes:
        block: from 0.
        load: of each expert over the mean, all tokens that the model reads.
        load_of_names: the same of the names' own tokens, without BOS token and prompt.
        metrics: ``load_cv``, ``max_load``, ``load_entropy``, ``entropy``, ``top1``, and where there are such
            ``max_pair``, ``pair_entropy``, ``drop_rate`` or ``untaken_rate``.
        together: for each expert the share of its tokens that each other one took too; 1 on the diagonal.
        trouble: what is wrong and the setting to change, or None.
    """

    block: int
    load: tuple[float, ...]
    load_of_names: tuple[float, ...]
    metrics: dict[str, float]
    together: tuple[tuple[float, ...], ...]
    trouble: str | None


@dataclass(frozen=True, slots=True)
class NameMap:
    """Which experts took the tokens of one name.

    Attributes:
        name: as it is shown.
        tokens: texts of the tokens that are read, BOS token and prompt among them.
        classes: of `TOKEN_CLASSES`, of each token.
        experts: by block, for each token its experts and their gates, the largest gate first.
    """

    name: str
    tokens: tuple[str, ...]
    classes: tuple[str, ...]
    experts: dict[int, tuple[tuple[tuple[int, float], ...], ...]]


@dataclass(frozen=True, slots=True)
class TrainingLoads:
    """Load over a training: of each block, for some moments, of each expert, over the mean."""

    steps: tuple[int, ...]
    loads: dict[int, tuple[tuple[float, ...], ...]]


@dataclass(frozen=True, slots=True)
class RouterMap:
    """All that `inspect_router` found.

    Attributes:
        model: its name.
        settings: of the configuration, what routing depends on.
        names: how many.
        tokens: how many were read.
        seed: of the shuffles.
        blocks: figures of each block with experts.
        specializations: label by label, block by block.
        left_out_labels: labels that have too few tokens to tell anything.
        maps: of the first names.
        training: None without a record of it.
    """

    model: str
    settings: dict[str, Any]
    names: int
    tokens: int
    seed: int
    blocks: tuple[BlockFigures, ...]
    specializations: tuple[Specialization, ...]
    left_out_labels: tuple[str, ...]
    maps: tuple[NameMap, ...]
    training: TrainingLoads | None

    @property
    def has_pairs(self) -> bool:
        """Whether a token may have several experts."""
        return self.settings["num_experts_per_tok"] > 1 or self.settings["routing"] == "expert_choice"

    def to_json(self) -> dict[str, Any]:
        """Plain values, ready for json.dumps."""
        own = {name: getattr(self, name) for name in ("model", "settings", "names", "tokens", "seed")}
        maps = [{key: getattr(each, key) for key in NameMap.__slots__} for each in self.maps]
        training = self.training and {key: getattr(self.training, key) for key in TrainingLoads.__slots__}
        return {
            **own,
            "blocks": [{key: getattr(each, key) for key in BlockFigures.__slots__} for each in self.blocks],
            "specializations": [each.to_json() for each in self.specializations],
            "left_out_labels": list(self.left_out_labels),
            "maps": maps,
            "training": training,
        }


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
    """Sends names through a model and looks at its routers.

    Args:
        source: a folder, a hub id, or a model (then with ``tokenizer``).
        names: to look at.
        cards: of the names, in their order, for labels by type and color; None if unknown.
        prompted: tell the cards' attributes in the prompt; otherwise, and without cards, the prompt tells nothing.
        shown: make maps of this many names, the first.
        seed: of the shuffles.
        tokenizer: the model's, where ``source`` is a model.
        device: where to load a model to; CUDA if there is one, when None.

    Raises:
        ValueError: no names, a name that is too long, a model without experts or with one alone, no such model.
    """
    if not names:
        raise ValueError("no names to look at: give at least one")
    model, tokenizer, label = _load(source, tokenizer, device)
    attributes = [NONE] * len(names)
    if cards is not None and prompted:
        conditions = read_conditions(model.config.to_dict())
        attributes = [known_part(Attributes.of(card), conditions) for card in cards]
    encoded = encode_names(names, attributes, tokenizer)
    check_lengths(model, names, encoded)
    routing = route(model, encoded)
    tokens = Tokens.of(encoded, NameVocabulary(tokenizer, model.config.vocab_size).prompt_texts)
    labels = token_labels(tokens) + ([] if cards is None else card_labels(cards, tokens))
    found = specializations(
        labels, [each.chosen_TE for each in routing], [each.block for each in routing], tokens.name_T, seed=seed
    )
    told = {each.title for each in found}
    return RouterMap(
        model=label,
        settings={field: getattr(model.config, field) for field in _SETTINGS},
        names=len(names),
        tokens=len(tokens.name_T),
        seed=seed,
        blocks=tuple(_figures(each, tokens, model) for each in routing),
        specializations=tuple(found),
        left_out_labels=tuple(label.title for label in labels if label.title not in told),
        maps=name_maps(names[:shown], tokens, routing),
        training=None if isinstance(source, GPT2MoEForCausalLM) else read_loads(Path(source) / METRICS_FILE),
    )


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
        loaded = load_model(source, device)
        if not isinstance(loaded, GPT2MoEForCausalLM):
            raise ValueError(f"{source} has no experts, so no router: inspect takes what upcycle or train wrote")
        model, label, tokenizer = loaded, str(source), load_tokenizer(source, loaded.config.vocab_size)
    if model.config.num_experts == 1:
        raise ValueError(f"{label} has one expert in each layer: its router has nothing to choose")
    return model, tokenizer, label


# ------------------------------------------------------------------------------------------------------------ routing


def route(
    model: GPT2MoEForCausalLM, names: Sequence[EncodedName], tokens_per_batch: int = TOKENS_PER_BATCH
) -> list[BlockRouting]:
    """Which expert took which token, block by block.

    Args:
        model: any mode; it is evaluated.
        names: T tokens in all, the end symbols not counted.
        tokens_per_batch: of a row. It matters to expert choice and to capacities alone.
    """
    routers = routers_of(model)
    seen: dict[int, list[tuple[torch.Tensor, ...]]] = {block: [] for block in routers}

    def note(block: int, router: Router, *output: torch.Tensor) -> None:
        seen[block].append(_routing_of(router, *output))

    with scoring(model), listening(model, note):
        for row in pack_all(names, tokens_per_batch):
            inputs = row.to(model.device).inputs
            del inputs["logits_to_keep"]  # of the head, which is not asked
            model.transformer(**inputs)
    return [_block_routing(block, routers[block], rows) for block, rows in seen.items()]


def _routing_of(
    router: Router, logits_TE: torch.Tensor, gates: torch.Tensor, choices: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Of one forward, on its device: (T, E) choices, (T, E) gates, and sums of entropy, best probability, left out."""
    member_TE = router.membership(choices, len(logits_TE))
    gates_TE = torch.zeros_like(member_TE)
    by_choice = gates_TE.T if isinstance(router, ExpertChoiceRouter) else gates_TE
    by_choice.scatter_(1, choices, gates.to(gates_TE.dtype))
    logprobs_TE = router.log_scores(logits_TE).log_softmax(-1)
    entropy_T = -(logprobs_TE.exp() * logprobs_TE).sum(-1)
    left_out = router.left_out(logits_TE, choices, None)
    return member_TE.bool(), gates_TE, torch.stack([entropy_T.sum(), logprobs_TE.amax(-1).exp().sum(), left_out])


def _block_routing(block: int, router: Router, rows: Sequence[tuple[torch.Tensor, ...]]) -> BlockRouting:
    member, gates, sums = zip(*rows, strict=True)
    chosen_TE = torch.cat(member).cpu().numpy()
    entropy, top1, left_out = (torch.stack(sums).double().sum(0) / len(chosen_TE)).tolist()
    left: float | None = None
    if isinstance(router, ExpertChoiceRouter):
        left = left_out
    elif router.capacity_factor is not None:
        left = left_out / router.top_k
    return BlockRouting(
        block, chosen_TE, torch.cat(gates).cpu().numpy(), entropy / math.log(router.num_experts), top1, left
    )


def _figures(routing: BlockRouting, tokens: Tokens, model: GPT2MoEForCausalLM) -> BlockFigures:
    chosen = routing.chosen_TE.astype(np.float64)
    pairs_EE = chosen.T @ chosen
    load_E = torch.from_numpy(chosen.sum(0))
    metrics = load_metrics(load_E) | pair_metrics(torch.from_numpy(pairs_EE))
    metrics |= {"entropy": routing.entropy, "top1": routing.top1}
    if routing.left_out is not None:
        metrics["untaken_rate" if model.config.routing == "expert_choice" else "drop_rate"] = routing.left_out
    trouble = None
    if load_E.mean() >= FEWEST_CHOICES:
        trouble = find_trouble(load_E, model.config.num_experts_per_tok)
    return BlockFigures(
        block=routing.block,
        load=over_mean(load_E),
        load_of_names=over_mean(torch.from_numpy(chosen[tokens.place_T >= 0].sum(0))),
        metrics=metrics,
        together=tuple(map(tuple, (pairs_EE / np.maximum(pairs_EE.diagonal()[:, None], 1)).tolist())),
        trouble=trouble and f"{trouble}: {advice(model.config)}",
    )


def name_maps(names: Sequence[str], tokens: Tokens, routing: Sequence[BlockRouting]) -> tuple[NameMap, ...]:
    """Token by token, the experts of the first names: ``names`` are those of ``tokens``, or fewer."""
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


# ---------------------------------------------------------------------------------------------------------- training


def read_loads(path: Path) -> TrainingLoads | None:
    """Loads over a training, at up to 12 moments, from its metrics.jsonl; None where they are not recorded.

    Each moment is the mean of the lines since the one before. A step that a resumed run repeated counts as the last
    time.
    """
    steps: dict[int, dict[int, list[float]]] = {}
    for record in read_records(path):
        try:
            loads = _loads_of(record)
        except (ValueError, KeyError, TypeError, OverflowError):  # no number, or not of every expert
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
    """``router/3/load/0``, ``router/3/load/1``, ... of a line, by block."""
    found: dict[int, dict[int, float]] = {}
    for key, value in record.items():
        match key.split("/"):
            case ["router", block, "load", expert]:
                found.setdefault(int(block), {})[int(expert)] = float(value)
    return {block: [loads[expert] for expert in range(len(loads))] for block, loads in found.items()}
