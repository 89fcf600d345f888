"""The loss that a run minimizes."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F


class CausalLoss:
    """Cross-entropy with label smoothing, in the place of transformers' ``ForCausalLMLoss``.

    ``(1 - s) * nats + s * mean over the vocabulary of -log p`` (Szegedy et al. 2016, section 7). The sum over the
    labels is divided by ``num_items_in_batch``, as without smoothing. Validation and scoring do not call it.

    Args:
        smoothing: s, from 0 to under 1.
    """

    def __init__(self, smoothing: float):
        self.smoothing = smoothing

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Loss of (..., S, vocabulary) logits, a 0-dimensional float32; arguments as transformers' losses have them.

        Args:
            logits: of any floating type; the loss is computed in float32.
            labels: (..., S) int64, shifted here unless ``shift_labels`` is given.
            vocab_size: size of the last dimension.
            num_items_in_batch: what the sum is divided by; None for the number of labels.
            ignore_index: positions without a label.
            shift_labels: the label of each position.
        """
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        total = F.cross_entropy(
            logits.float().view(-1, vocab_size),
            targets,
            ignore_index=ignore_index,
            reduction="sum",
            label_smoothing=self.smoothing,
        )
        return total / ((targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)
