"""A KV cache for rows that begin and end at different times.

Every row reads the prompt's keys, computed once, and its own tokens' keys. Those lie in a ring of columns that all rows
share: step t writes column t mod R of each row. A row that ends is replaced by a new one at once, which sees only the
columns written since it began; nothing is moved or cleared.

Letters in the shapes: B rows, H heads, P tokens of the prompt, R columns of the ring, C width of a head.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import Cache, DynamicCache
from transformers.cache_utils import DynamicLayer

_FIRST_COLUMNS = 16  # many names have fewer tokens; for longer ones the ring grows
# By so many, not twofold: all columns are read at each step, and the attention of 64 rows in four layers of width 256
# takes two cores 1.5 times as long over 74 columns (39 MB, more than their cache has) as over 58.
_MORE_COLUMNS = 8


class _RingLayer(DynamicLayer):
    """Keys and values of one layer, (B, H, P + R, C), written in place at ``column``."""

    def __init__(self, prompt: DynamicLayer, num_rows: int, columns: int) -> None:
        super().__init__()
        assert prompt.keys is not None and prompt.values is not None
        self.lazy_initialization(prompt.keys, prompt.values)
        self.keys, self.values = (_with_columns(x, num_rows, columns) for x in (prompt.keys, prompt.values))
        self.column = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes one token of each row, and returns all columns."""
        return self.write(key_states[:, :, 0], value_states[:, :, 0])

    def write(self, keys_BHC: torch.Tensor, values_BHC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """As `update`, of keys and values without a dimension for their one place."""
        assert self.keys is not None and self.values is not None
        self.keys[:, :, self.column] = keys_BHC
        self.values[:, :, self.column] = values_BHC
        return self.keys, self.values


def _with_columns(prompt: torch.Tensor, num_rows: int, columns: int) -> torch.Tensor:
    """The prompt's (1 or B, H, P, C) as (B, H, P + R, C), zeros in the ring."""
    _, H, P, C = prompt.shape
    wide = prompt.new_zeros(num_rows, H, P + columns, C)
    wide[:, :, :P] = prompt
    return wide


class RingCache(Cache):
    """See the module's docstring.

    Attributes:
        begun: for each row the step after which it began: its first own token is of the next one.
    """

    def __init__(self, prompt: DynamicCache, num_rows: int) -> None:
        """Rows that all begin with the next step.

        Args:
            prompt: the prompt's cache, one row; not changed.
            num_rows: B.
        """
        layers = [layer for layer in prompt.layers if isinstance(layer, DynamicLayer)]
        assert len(layers) == len(prompt.layers), "every layer attends"
        self._rings = [_RingLayer(layer, num_rows, _FIRST_COLUMNS) for layer in layers]
        super().__init__(layers=list(self._rings))
        self._prompt_length = prompt.get_seq_length()
        self._now = -1
        self._written = [-1] * _FIRST_COLUMNS  # the step that wrote each column
        self.begun = [-1] * num_rows

    def step(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes room for one token of each row.

        Returns:
            The mask (B, P + R), true where a row may look, and the tokens' positions (B, 1).
        """
        self._now += 1
        if self._now - min(self.begun) > len(self._written):
            self._grow()
        column = self._now % len(self._written)
        self._written[column] = self._now
        for layer in self._rings:
            layer.column = self._prompt_length + column
        begun_B1 = torch.tensor(self.begun, device=device)[:, None]
        written_1R = torch.tensor(self._written, device=device)[None]
        prompt_BP = torch.ones(len(self.begun), self._prompt_length, dtype=torch.bool, device=device)
        mask_BK = torch.cat([prompt_BP, written_1R > begun_B1], dim=1)
        return mask_BK, self._prompt_length + self._now - begun_B1 - 1

    def write(self, layer: int, keys_BHC: torch.Tensor, values_BHC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Writes the step's keys and values into a layer, and returns all that it has: (B, H, P + R, C) twice."""
        return self._rings[layer].write(keys_BHC, values_BHC)

    def replace(self, rows: Sequence[int]) -> None:
        """These rows are given to new names, whose first own token comes with the step after the next."""
        for row in rows:
            self.begun[row] = self._now + 1

    def select(self, rows: torch.Tensor) -> None:
        """Keeps some rows, in this order."""
        self.begun = [self.begun[row] for row in rows.tolist()]
        for layer in self._rings:
            layer.batch_select_indices(rows)

    def _grow(self) -> None:
        """More columns; what a row has written goes to its new place."""
        columns = len(self._written) + _MORE_COLUMNS
        written = [-1] * columns
        old, new = [], []
        for column, step in enumerate(self._written):
            if step >= 0:
                written[step % columns] = step
                old.append(self._prompt_length + column)
                new.append(self._prompt_length + step % columns)
        for layer in self._rings:
            layer.keys, layer.values = (self._moved(x, old, new, columns) for x in (layer.keys, layer.values))
        self._written = written

    def _moved(self, x_BHKC: torch.Tensor | None, old: list[int], new: list[int], columns: int) -> torch.Tensor:
        assert x_BHKC is not None
        wide = _with_columns(x_BHKC[:, :, : self._prompt_length], x_BHKC.shape[0], columns)
        wide[:, :, new] = x_BHKC[:, :, old]
        return wide
