"""A ring KV cache for continuous batching: rows that begin and end at different times.

The first columns hold each row's prompt. Step t writes column t mod R of the others, for all rows. A finished row is
replaced at once by a new one, which attends only to columns written since it began.

Shape suffixes: B rows, H key/value heads, P tokens of the longest prompt, R columns of the ring, K = P + R, C head dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

_FIRST_COLUMNS = 16  # many names have fewer tokens; for longer ones the ring grows
_MORE_COLUMNS = 8  # small steps, not doubling: every step of decoding reads all columns


class _RingLayer(DynamicLayer):
    """Keys and values of one layer, (B, H, P + R, C)."""

    def __init__(self, prompt: DynamicLayer, num_rows: int, columns: int) -> None:
        super().__init__()
        assert prompt.keys is not None and prompt.values is not None
        self.lazy_initialization(prompt.keys, prompt.values)
        self.keys, self.values = (_zeros(x, num_rows, columns) for x in (prompt.keys, prompt.values))
        self.column = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.write(key_states[:, :, 0], value_states[:, :, 0])

    def write(self, keys_BHC: torch.Tensor, values_BHC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one token per row, and returns all columns."""
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self.column] = keys_BHC
        self.values[:, :, self.column] = values_BHC
        return self.keys, self.values

    def put(self, rows: Sequence[int] | slice, prompt: DynamicLayer) -> None:
        assert self.keys is not None and self.values is not None
        assert prompt.keys is not None and prompt.values is not None
        length = prompt.keys.shape[2]
        self.keys[rows, :, :length] = prompt.keys
        self.values[rows, :, :length] = prompt.values


def _zeros(like_BHKC: torch.Tensor, num_rows: int, columns: int) -> torch.Tensor:
    return like_BHKC.new_zeros(num_rows, like_BHKC.shape[1], columns, like_BHKC.shape[3])


class RingCache(Cache):
    """The ring KV cache (see the module)."""

    def __init__(self, prompts: Sequence[DynamicCache], longest: int) -> None:
        """Rows with equal prompts share the object; ``longest`` is P, now or later."""
        num_rows, layers = len(prompts), _layers(prompts[0])
        self._rings = [_RingLayer(layer, num_rows, longest + _FIRST_COLUMNS) for layer in layers]
        super().__init__(layers=list(self._rings))
        self._longest = longest
        self._now = -1
        self._written = [-1] * _FIRST_COLUMNS  # the step that wrote each column
        self.begun = [-1] * num_rows  # the last step before each row's first own token
        self._prompts: list[DynamicCache | None] = [None] * num_rows
        self._lengths = [0] * num_rows
        self._put(range(num_rows), prompts)

    def step(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes room for a token per row; returns a mask (B, P + R), true where visible, and position ids (B, 1)."""
        self._now += 1
        if self._now - min(self.begun) > len(self._written):
            self._grow()
        column = self._now % len(self._written)
        self._written[column] = self._now
        for layer in self._rings:
            layer.column = self._longest + column
        begun_B1 = torch.tensor(self.begun, device=device)[:, None]
        lengths_B1 = torch.tensor(self._lengths, device=device)[:, None]
        written_1R = torch.tensor(self._written, device=device)[None]
        prompt_BP = torch.arange(self._longest, device=device)[None] < lengths_B1
        mask_BK = torch.cat([prompt_BP, written_1R > begun_B1], dim=1)
        return mask_BK, lengths_B1 + self._now - begun_B1 - 1

    def write(self, layer: int, keys_BHC: torch.Tensor, values_BHC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the step's keys and values; returns all of the layer."""
        return self._rings[layer].write(keys_BHC, values_BHC)

    def replace(self, rows: Sequence[int], prompts: Sequence[DynamicCache]) -> None:
        """Gives finished rows to new names, whose first own token comes at the step after next."""
        for row in rows:
            self.begun[row] = self._now + 1
        self._put(rows, prompts)

    def select(self, rows: torch.Tensor) -> None:
        """Keeps some rows, in this order."""
        kept = rows.tolist()
        self.begun = [self.begun[row] for row in kept]
        self._prompts = [self._prompts[row] for row in kept]
        self._lengths = [self._lengths[row] for row in kept]
        for layer in self._rings:
            layer.batch_select_indices(rows)

    def _put(self, rows: Sequence[int], prompts: Sequence[DynamicCache]) -> None:
        places: dict[int, list[int]] = {}
        by_id = {id(prompt): prompt for prompt in prompts}
        for row, prompt in zip(rows, prompts, strict=True):
            if self._prompts[row] is not prompt:
                self._prompts[row], self._lengths[row] = prompt, prompt.get_seq_length()
                places.setdefault(id(prompt), []).append(row)
        for key, of_prompt in places.items():
            # Writing to a slice is faster than to a list of rows.
            where = slice(None) if len(of_prompt) == len(self.begun) else of_prompt
            for ring, layer in zip(self._rings, _layers(by_id[key]), strict=True):
                ring.put(where, layer)

    def _grow(self) -> None:
        columns = len(self._written) + _MORE_COLUMNS
        written = [-1] * columns
        old, new = list(range(self._longest)), list(range(self._longest))
        for column, step in enumerate(self._written):
            if step >= 0:
                written[step % columns] = step
                old.append(self._longest + column)
                new.append(self._longest + step % columns)
        for layer in self._rings:
            for name in ("keys", "values"):
                before_BHKC = getattr(layer, name)
                wide = _zeros(before_BHKC, len(before_BHKC), self._longest + columns)
                wide[:, :, new] = before_BHKC[:, :, old]
                setattr(layer, name, wide)
        self._written = written


def _layers(prompt: DynamicCache) -> list[DynamicLayer]:
    layers = [layer for layer in prompt.layers if isinstance(layer, DynamicLayer)]
    assert len(layers) == len(prompt.layers), "every layer attends"
    return layers
