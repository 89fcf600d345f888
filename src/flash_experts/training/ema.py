"""An exponential moving average of the weights, which is often better than the weights themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from flash_experts.training.sharding import local_part, part_like


class WeightAverage:
    """The average of the weights over the last steps: ``a = d a + (1 - d) w`` after each step.

    ``d = min(decay, (1 + n) / (10 + n))`` after n steps, so that the first, bad weights are soon forgotten (the warm-up
    of TensorFlow's ExponentialMovingAverage). Buffers are not averaged, nor weights that are frozen.

    Args:
        model: whose weights are averaged; they begin as they are now.
        decay: d in the long run: about the last 1 / (1 - decay) steps count.
    """

    def __init__(self, model: nn.Module, decay: float):
        self._decay = decay
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._averages = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def decay_after(self, step: int) -> float:
        """d after ``step`` optimizer steps."""
        return min(self._decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Takes in the weights as they are after optimizer step ``step`` (from 1)."""
        weights = [local_part(weight) for weight in self._weights.values()]
        averages = [local_part(average) for average in self._averages.values()]
        torch._foreach_lerp_(averages, weights, 1 - self.decay_after(step))

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The model has the averages while this is open, and its own weights, to the bit, after it."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # The values change places, not the tensors: a compiled or distributed model holds on to its tensors.
        for name, weight in self._weights.items():
            mine, average = local_part(weight), local_part(self._averages[name])
            kept = mine.clone()
            mine.copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return dict(self._averages)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        if state.keys() != self._averages.keys():
            first = sorted(state.keys() ^ self._averages.keys())[0]
            raise ValueError(f"the averages are of other weights: {first} differs")
        for name, average in self._averages.items():
            if state[name].shape != average.shape:
                raise ValueError(f"the average of {name} has another shape")
            average.copy_(part_like(state[name], average))
