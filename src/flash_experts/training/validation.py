"""Validation: bits per character of a fixed set of held-out names, unconditional and given all attributes."""

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
from flash_experts.data.packing import PackedBatch, encode_cards, name_nats, pack_all
from flash_experts.data.prompts import Attributes
from flash_experts.training.tracking import BITS_PER_CHAR, SELECTION
from flash_experts.training.training_config import TrainingConfig


class Validation:
    """A fixed draw of validation names, packed once.

    Args:
        max_names: names to score, drawn by ``seed``; None for all.
        tokens_per_row: most tokens of a packed batch.
        process: rank and number of processes, which share the batches.

    Attributes:
        sha256: hash of the scored names and their prompts.
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
        # Names of similar length together: attention pads a packed row to its longest name.
        self._batches: dict[str, list[tuple[PackedBatch, bool]]] = {}
        for suffix, attributes_of in (("", lambda card: Attributes()), ("_given_attributes", Attributes.of)):
            names = sorted(encode_cards(cards, tokenizer, attributes_of), key=lambda name: name.num_inputs)
            self._batches[suffix] = share_of_batches(pack_all(names, tokens_per_row), rank, world)

    @classmethod
    def of(
        cls,
        cards: Sequence[Card],
        tokenizer: PreTrainedTokenizerBase,
        config: TrainingConfig,
        process: tuple[int, int],
    ) -> Validation | None:
        """The validation of a run, in packed batches as large as its micro-batches; None without cards."""
        if not cards:
            return None
        tokens_per_row = math.ceil(config.tokens_per_batch / (config.gradient_accumulation_steps * process[1]))
        return cls(cards, tokenizer, config.validation_names, tokens_per_row, config.seed, process)

    def score(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """The metrics, equal on all processes. Every process must call it."""
        # Sums are all-reduced before the division: a mean of means would give more weight to a process with few names.
        sums = self.sums(model, accelerator.device).to(accelerator.device)
        return self.metrics(cast(torch.Tensor, accelerator.reduce(sums, "sum")))

    @torch.no_grad()
    def sums(self, model: nn.Module, device: torch.device) -> torch.Tensor:
        """This process's sums of nats, tokens and characters, (2, 3) float64: unconditional, given all attributes."""
        totals = torch.zeros(len(self._batches), 3, dtype=torch.float64)
        for total, batches in zip(totals, self._batches.values(), strict=True):
            nats = torch.zeros((), device=device)
            for batch, counts in batches:
                nats_N = name_nats(model, batch.to(device))
                if counts:
                    nats += nats_N.sum()
                    total[1] += batch.labels.numel()
                    total[2] += batch.characters.sum()
            total[0] = nats.item()
        return totals

    def metrics(self, totals: torch.Tensor) -> dict[str, float]:
        """Nats per token, bits per character (the EOS token counts as one), and `SELECTION`."""
        metrics = {}
        for suffix, (nats, tokens, characters) in zip(self._batches, totals.tolist(), strict=True):
            metrics[f"validation/loss{suffix}"] = nats / tokens
            metrics[f"{BITS_PER_CHAR}{suffix}"] = nats / math.log(2) / characters
        both = [metrics[f"{BITS_PER_CHAR}{suffix}"] for suffix in self._batches]
        return metrics | {SELECTION: sum(both) / len(both)}


def share_of_batches(batches: Sequence[PackedBatch], rank: int, world: int) -> list[tuple[PackedBatch, bool]]:
    """Every ``world``-th batch from ``rank`` on, each with whether it counts.

    All processes get equally many, as sharded weights need: one that has no batch left computes the first again,
    uncounted.
    """
    share = [(batches[index], True) for index in range(rank, len(batches), world)]
    rounds = -(-len(batches) // world)
    return share + [(batches[0], False)] * (rounds - len(share))
