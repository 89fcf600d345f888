"""The fixed validation of a run."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Sequence
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.packing import PackedBatch, encode_cards, pack_all
from flash_experts.data.prompts import Attributes
from flash_experts.models.scoring import name_nats
from flash_experts.training.training_config import TrainingConfig

BITS_PER_CHAR = "validation/bits_per_char"
# What decides which model of a run is the best and is kept: the mean of the unconditional bits per character and those
# given all attributes. Names are asked for in both ways, and fine-tuning can improve one at the price of the other.
SELECTION = f"{BITS_PER_CHAR}_mean"


class Validation:
    """Names packed once, scored unconditionally and given all attributes.

    Args:
        cards: the validation split.
        tokenizer: the model's.
        max_names: how many to score, drawn by ``seed``; None for all.
        tokens_per_row: most tokens of a forward.
        seed: of the draw.
        process: this process and how many there are: each scores its share of the rows.

    Attributes:
        num_names: how many are scored.
        sha256: of these names and their prompts; equal for equal sets.
    """

    def __init__(
        self,
        cards: Sequence[Card],
        tokenizer: PreTrainedTokenizerBase,
        max_names: int | None,
        tokens_per_row: int,
        seed: int,
        process: tuple[int, int] = (0, 1),
    ):
        if max_names is not None and max_names < len(cards):
            cards = random.Random(f"validation/{seed}").sample(list(cards), max_names)
        self.num_names = len(cards)
        lines = sorted(f"{Attributes.of(card).prompt()} {card.name}\n" for card in cards)
        self.sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
        rank, world = process
        # Names of equal length side by side: attention lays a row out by its longest name.
        self._rows: dict[str, list[tuple[PackedBatch, bool]]] = {}
        for suffix, attributes_of in (("", lambda card: Attributes()), ("_given_attributes", Attributes.of)):
            names = sorted(encode_cards(cards, tokenizer, attributes_of), key=lambda name: name.num_inputs)
            self._rows[suffix] = share_of_rows(pack_all(names, tokens_per_row), rank, world)

    @classmethod
    def of(
        cls,
        cards: Sequence[Card],
        tokenizer: PreTrainedTokenizerBase,
        config: TrainingConfig,
        process: tuple[int, int],
    ) -> Validation | None:
        """The validation of a run, in rows as long as those it trains on; None without cards."""
        if not cards:
            return None
        tokens_per_row = math.ceil(config.tokens_per_batch / (config.gradient_accumulation_steps * process[1]))
        return cls(cards, tokenizer, config.validation_names, tokens_per_row, config.seed, process)

    def score(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """The metrics of a model on all names. Every process calls it, and all get the same.

        Sums are added up over the processes before anything is divided: a mean of their means would weigh the names
        of a process with few of them more than the others.
        """
        sums = self.sums(model, accelerator.device).to(accelerator.device)
        return self.metrics(cast(torch.Tensor, accelerator.reduce(sums, "sum")))

    @torch.no_grad()
    def sums(self, model: nn.Module, device: torch.device) -> torch.Tensor:
        """This process's (2, 3) float64 sums of nats, tokens and characters: unconditional, given all
        attributes.

        Add those of all processes and hand them to `metrics`.
        """
        totals = torch.zeros(len(self._rows), 3, dtype=torch.float64)
        for total, rows in zip(totals, self._rows.values(), strict=True):
            nats = torch.zeros((), device=device)
            for row, counts in rows:
                nats_N = name_nats(model, row.to(device))
                if counts:
                    nats += nats_N.sum()
                    total[1] += row.labels.numel()
                    total[2] += row.characters.sum()
            total[0] = nats.item()
        return totals

    def metrics(self, totals: torch.Tensor) -> dict[str, float]:
        """Nats per token and bits per character (the EOS token counts as one), of both kinds; `SELECTION`."""
        metrics = {}
        for suffix, (nats, tokens, characters) in zip(self._rows, totals.tolist(), strict=True):
            metrics[f"validation/loss{suffix}"] = nats / tokens
            metrics[f"{BITS_PER_CHAR}{suffix}"] = nats / math.log(2) / characters
        both = [metrics[f"{BITS_PER_CHAR}{suffix}"] for suffix in self._rows]
        return metrics | {SELECTION: sum(both) / len(both)}


def share_of_rows(rows: Sequence[PackedBatch], rank: int, world: int) -> list[tuple[PackedBatch, bool]]:
    """Every ``world``-th row from ``rank`` on, each with whether it counts. Every process gets as many: where weights
    are spread, all must take part in each forward. One without a row of its own computes the first for the others'
    sake."""
    share = [(rows[index], True) for index in range(rank, len(rows), world)]
    rounds = -(-len(rows) // world)
    return share + [(rows[0], False)] * (rounds - len(share))
