"""Rows of a batch after one prompt: what of them is computed once, what each keeps, what follows each.

Letters in the shapes: B rows, T tokens of the prompt, V tokens of the vocabulary, K columns of the cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import DynamicCache, GPT2LMHeadModel, PreTrainedModel

from flash_experts.generation import gpt2_steps
from flash_experts.generation.ring_cache import RingCache


class Prompt:
    """A prompt, computed once for all names that follow it.

    Attributes:
        cache: its keys and values, one row.
        first_1V: logits of the first token after it, float32.
    """

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        """Computes it.

        Args:
            model: a causal LM of transformers that takes a `DynamicCache`, in eval mode.
            ids: begin symbol and prompt.
        """
        self.model = model
        self.cache = DynamicCache(config=model.config)
        ids_1T = torch.tensor([ids], device=model.device)
        # The begin symbol is also the pad symbol: without a mask transformers would warn of padding.
        mask = torch.ones_like(ids_1T)
        out = model(ids_1T, attention_mask=mask, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.first_1V = out.logits[:, -1].float()
        self.is_plain_gpt2 = gpt2_steps.takes(model)
        if self.is_plain_gpt2:
            dtype = gpt2_steps.dtype_between_products(model)
            layer: Any
            for layer in self.cache.layers:
                layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)


class PromptRows:
    """Rows that go on from one prompt, each at its own pace.

    Attributes:
        logits_BV: what follows each row, float32.
    """

    def __init__(self, prompt: Prompt, num_rows: int) -> None:
        self._prompt = prompt
        self._cache = RingCache(prompt.cache, num_rows)
        self.logits_BV = prompt.first_1V.expand(num_rows, -1)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps some rows, in this order."""
        self._cache.select(rows)

    def advance(self, tokens: Sequence[int], new: Sequence[int]) -> None:
        """Takes one more token of each row.

        Args:
            tokens: one a row.
            new: places of rows that begin again after the prompt; their tokens do not count.
        """
        if len(new) == len(tokens):
            self._cache = RingCache(self._prompt.cache, len(tokens))
            self.logits_BV = self._prompt.first_1V.expand(len(tokens), -1)
            return
        self._cache.replace(new)
        self.logits_BV = self._next_logits(tokens)
        if new:
            self.logits_BV[list(new)] = self._prompt.first_1V

    def _next_logits(self, tokens: Sequence[int]) -> torch.Tensor:
        """(B, V) what follows one more token of each row."""
        model = self._prompt.model
        tokens_B = torch.tensor(tokens, device=self.logits_BV.device)
        if self._prompt.is_plain_gpt2:
            return gpt2_steps.next_logits(cast(GPT2LMHeadModel, model), tokens_B, self._cache)
        mask_BK, positions_B1 = self._cache.step(tokens_B.device)
        out = model(
            tokens_B[:, None],
            attention_mask=mask_BK[:, None, None],
            position_ids=positions_B1,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: torch.Tensor = out.logits[:, -1].float()
        return logits_BV


def guided(told_BV: torch.Tensor, untold_BV: torch.Tensor, guidance: float) -> torch.Tensor:
    """Log-probabilities that stress what the prompt tells: classifier-free guidance.

    ``untold + guidance (told - untold)``, of log-probabilities (Ho and Salimans 2022; for language models Sanchez et
    al. 2023, Stay on topic with classifier-free guidance): 1 is the model as it is, 0 one that was told nothing.
    """
    untold_BV = untold_BV.log_softmax(dim=-1)
    return untold_BV + guidance * (told_BV.log_softmax(dim=-1) - untold_BV)
