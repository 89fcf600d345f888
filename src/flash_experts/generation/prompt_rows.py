"""Rows of a batch, each after its prompt: what is computed once, what each row keeps, what follows it.

Shape suffixes: B rows, T tokens of a prompt, V tokens of the vocabulary, K columns of the cache.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from flash_experts.generation import gpt2_steps, llama_steps
from flash_experts.generation.ring_cache import RingCache

_COMPUTED_AHEAD = 128  # prompts, where each name has its own: enough for full matmuls, few enough for memory


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt, computed once for all names that follow it.

    Attributes:
        cache: its keys and values, one row.
        first_V: logits of the first token after it, float32.
    """

    cache: DynamicCache
    first_V: torch.Tensor


class Prompts:
    """The prompts that the names of a stream follow, computed a few at a time when the first name wants them."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[Sequence[int]]) -> None:
        """Nothing is computed yet.

        Args:
            model: a causal LM of transformers that takes a `DynamicCache`, in eval mode.
            ids: BOS token and prompt of each name, by the name's index; or of all names, if there is only one.
        """
        self.model = model
        self.longest = max(map(len, ids))
        self._ids = ids
        self._computed: dict[tuple[int, ...], Prompt] = {}
        self._steps = next((steps for steps in (gpt2_steps, llama_steps) if steps.takes(model)), None)

    def of(self, name: int) -> Prompt:
        """The prompt of a name. Names are asked for in the order of their indices, so former prompts are dropped."""
        place = 0 if len(self._ids) == 1 else name
        ids = tuple(self._ids[place])
        if ids not in self._computed:
            coming = dict.fromkeys(tuple(one) for one in islice(self._ids, place, place + 8 * _COMPUTED_AHEAD))
            by_length: dict[int, list[tuple[int, ...]]] = {}
            for one in islice(coming, _COMPUTED_AHEAD):
                by_length.setdefault(len(one), []).append(one)
            self._computed = {}
            for together in by_length.values():  # of one length: nothing is padded
                self._computed.update(zip(together, self._compute(together), strict=True))
        return self._computed[ids]

    def next_logits(self, tokens_B: torch.Tensor, cache: RingCache) -> torch.Tensor:
        """(B, V) what follows one more token of each row."""
        if self._steps is not None:
            return self._steps.next_logits(self.model, tokens_B, cache)
        mask_BK, positions_B1 = cache.step(tokens_B.device)
        out = self.model(
            tokens_B[:, None],
            attention_mask=mask_BK[:, None, None],
            position_ids=positions_B1,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits_BV: torch.Tensor = out.logits[:, -1].float()
        return logits_BV

    def _compute(self, ids: Sequence[Sequence[int]]) -> list[Prompt]:
        """Prompts of one length."""
        cache = DynamicCache(config=self.model.config)
        ids_BT = torch.tensor(ids, device=self.model.device)
        # The BOS token is also the padding token: without a mask transformers would warn of padding.
        mask = torch.ones_like(ids_BT)
        out = self.model(ids_BT, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
        first_BV = out.logits[:, -1].float()
        layer: Any
        if self._steps is not None:
            dtype = self._steps.dtype_between_products(self.model)
            for layer in cache.layers:
                layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
        prompts = []
        for row in range(len(ids)):
            one: Any = DynamicCache(config=self.model.config)
            for index, layer in enumerate(cache.layers):
                one.update(layer.keys[row : row + 1], layer.values[row : row + 1], index)
            prompts.append(Prompt(one, first_BV[row]))
        return prompts


class PromptRows:
    """Rows that continue their prompts, each at its own pace.

    Attributes:
        logits_BV: what follows each row, float32.
    """

    def __init__(self, prompts: Prompts, names: Sequence[int]) -> None:
        """Rows at the end of their prompts.

        Args:
            prompts: of the stream.
            names: the index of each row's name.
        """
        self._prompts = prompts
        self._begin(names)

    def _begin(self, names: Sequence[int]) -> None:
        rows = [self._prompts.of(name) for name in names]
        self._cache = RingCache([row.cache for row in rows], self._prompts.longest)
        is_one = all(row is rows[0] for row in rows)
        first = rows[0].first_V.expand(len(rows), -1) if is_one else torch.stack([row.first_V for row in rows])
        self.logits_BV = first

    def select(self, rows: torch.Tensor) -> None:
        """Keeps some rows, in this order."""
        self._cache.select(rows)

    def advance(self, tokens: Sequence[int], new: Mapping[int, int]) -> None:
        """Takes one more token of each row.

        Args:
            tokens: one a row.
            new: the index of the name that begins in a place; the tokens of these rows do not count.
        """
        if len(new) == len(tokens):
            self._begin([new[place] for place in range(len(tokens))])
            return
        prompts = [self._prompts.of(name) for name in new.values()]
        self._cache.replace(list(new), [prompt.cache for prompt in prompts])
        self.logits_BV = self._prompts.next_logits(torch.tensor(tokens, device=self.logits_BV.device), self._cache)
        if new:
            self.logits_BV[list(new)] = torch.stack([prompt.first_V for prompt in prompts])


def guided(told_BV: torch.Tensor, untold_BV: torch.Tensor, guidance: float) -> torch.Tensor:
    """Log-probabilities that stress what the prompt tells: classifier-free guidance.

    ``untold + guidance (told - untold)``, of log-probabilities (Ho and Salimans 2022; for language models Sanchez et
    al. 2023, Stay on topic with classifier-free guidance): 1 is the model as it is, 0 one that was told nothing.
    """
    untold_BV = untold_BV.log_softmax(dim=-1)
    return untold_BV + guidance * (told_BV.log_softmax(dim=-1) - untold_BV)
