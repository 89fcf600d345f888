"""What chapter 6b and its solutions share: schedules of names in slots, a watched decoder, a ring cache by hand, draws
that depend on the batch, FLOPs and bytes of a forward pass.

Shape suffixes: B rows (slots), H heads of keys and values, P tokens of the prompt, R columns of the ring, C head dim, V tokens
of the vocabulary, K candidates.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
from chapter_watching import Traffic
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from flash_experts.generation import Sampling
from flash_experts.generation.decoding import NameDecoder, Prompts
from flash_experts.generation.sampling import candidates, draw, noise
from flash_experts.kernels import cpu
from flash_experts.models.decode_step import next_logits

LONGEST = 48  # tokens of a name at most
Steps = list[list[int | None]]  # the name in each slot at each step, None where a slot waits


def static(draws: Sequence[int], slots: int) -> Steps:
    """Batches whose slots wait until the longest name has ended; ``draws`` has the steps of each name."""
    steps: Steps = []
    for first in range(0, len(draws), slots):
        batch = range(first, min(first + slots, len(draws)))
        steps += [[n if t < draws[n] else None for n in batch] for t in range(max(draws[n] for n in batch))]
    return steps


def refilled(draws: Sequence[int], slots: int) -> Steps:
    """Continuous batching: a slot whose name has ended gets the next one."""
    waiting = iter(range(len(draws)))
    now, left = [next(waiting, None) for _ in range(slots)], list(draws)
    steps: Steps = []
    while any(n is not None for n in now):
        steps.append(list(now))
        for slot, n in enumerate(now):
            if n is not None:
                left[n] -= 1
                now[slot] = n if left[n] else next(waiting, None)
    return steps


class WatchedDecoder(NameDecoder):
    """The package's decoder, which notes the names in its batch at each step."""

    def __init__(self, model: Any, prompt_ids: Sequence[int], eos_id: int, seed: int) -> None:
        super().__init__(model, prompt_ids, eos_id, Sampling(), (), LONGEST, seed)
        self.steps: list[list[int]] = []

    def filtered(self, rows: Sequence[Any], logits_BV: torch.Tensor) -> torch.Tensor:
        self.steps.append([row.index for row in rows])
        return super().filtered(rows, logits_BV)

    def names(self, number: int, slots: int) -> list[tuple[int, ...]]:
        """Token ids of the first names of the seed."""
        return [name.ids for name in self.stream(range(number), slots)]


class ToyRing:
    """A ring cache for names of one prompt: `next_logits` takes it as it takes the package's."""

    def __init__(self, prompt: DynamicCache, rows: int, columns: int) -> None:
        self.P, self.R, self.now = prompt.get_seq_length(), columns, -1
        self.begun_B1 = torch.full((rows, 1), -1)  # the last step before the row's first own token
        self.layers = []
        for layer in prompt.layers:
            both_2HPC = torch.stack([layer.keys[0], layer.values[0]])
            empty_2HRC = both_2HPC.new_zeros(2, both_2HPC.shape[1], columns, both_2HPC.shape[3])
            self.layers.append(torch.cat([both_2HPC, empty_2HRC], 2)[:, None].repeat(1, rows, 1, 1, 1))

    def step(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        self.now += 1
        written_R = self.now - (self.now - torch.arange(self.R)) % self.R
        sees_prompt_BP = torch.ones(len(self.begun_B1), self.P, dtype=torch.bool)
        return torch.cat([sees_prompt_BP, written_R > self.begun_B1], 1), self.P + self.now - self.begun_B1 - 1

    def write(self, layer: int, keys_BHC: torch.Tensor, values_BHC: torch.Tensor) -> torch.Tensor:
        self.layers[layer][:, :, :, self.P + self.now % self.R] = torch.stack([keys_BHC, values_BHC])
        return self.layers[layer]

    def restart(self, rows: list[int]) -> None:
        self.begun_B1[rows] = self.now + 1


def names_by_hand(
    prompts: Prompts, number: int, slots: int, sampling: Sampling, eos_id: int, seed: int, columns: int = 24
) -> list[tuple[int, ...]]:
    """Token ids of the first names of the seed, with `ToyRing`; no name may be longer than ``LONGEST``."""
    prompt, waiting = prompts.of(0), count(slots)
    ring, logits_BV = ToyRing(prompt.cache, slots, columns), prompt.first_V.expand(slots, -1)
    now, ids = list(range(slots)), defaultdict(list)
    while min(now) < number:
        ages = [len(ids[n]) for n in now]
        tokens_B, _ = draw(logits_BV, noise(seed, now, LONGEST)[range(slots), ages], sampling)
        ended = (tokens_B == eos_id).nonzero()[:, 0].tolist()
        for slot, token in enumerate(tokens_B.tolist()):
            if slot in ended:
                now[slot] = next(waiting)
            else:
                ids[now[slot]].append(token)
        ring.restart(ended)
        logits_BV = next_logits(prompts.model, tokens_B, ring)
        logits_BV[ended] = prompt.first_V
    return [tuple(ids[n]) for n in range(number)]


def experts_read(chosen_XNSE: torch.Tensor, steps: Steps) -> float:
    """The mean share of experts that a step reads; steps in which a slot waits or starts are left out.

    Args:
        chosen_XNSE: 1 where MoE layer X sends token S of name N to expert E, else 0.
        steps: a schedule of the names.
    """
    age, shares = dict.fromkeys(range(chosen_XNSE.shape[1]), -1), []
    for row in steps:
        age |= {n: age[n] + 1 for n in row if n is not None}
        if all(n is not None and age[n] > 0 for n in row):  # at age 0 a name is drawn from the prompt's logits
            met_XBE = chosen_XNSE[:, torch.tensor(row), torch.tensor([age[n] - 1 for n in row])]
            shares.append(met_XBE.amax(1).mean().item())
    return sum(shares) / len(shares)


def different_draws(one_BV: torch.Tensor, other_BV: torch.Tensor, sampling: Sampling) -> float:
    """The probability that `draw` gives another token for the second logits, with the same random numbers.

    Draws invert the cumulative probabilities: a token is drawn where the random number is in its interval. A token that
    a cut leaves out is drawn again, so there it does not matter which one it was.
    """
    probs_BK, ids_BK = candidates(one_BV, sampling)
    kept_BV = probs_BK > 0 if ids_BK is None else torch.zeros(one_BV.shape).scatter(1, ids_BK, probs_BK) > 0
    both_2BV = torch.stack([one_BV, other_BV]).double() / sampling.temperature
    again_B = 1 - (both_2BV[0].softmax(-1) * kept_BV).sum(-1)
    in_both_B, in_one_B = _shared(both_2BV, kept_BV)
    second_B = 1 - _shared(both_2BV.masked_fill(~kept_BV, -torch.inf), kept_BV)[0]
    return (in_one_B - 2 * in_both_B + again_B * second_B).clamp(min=0).mean().item()


def _shared(logits_2BV: torch.Tensor, kept_BV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """How much of the kept tokens' intervals agree, and the sum of both lengths, (B,) each."""
    ends_2BV = logits_2BV.softmax(-1).cumsum(-1)
    starts_2BV = F.pad(ends_2BV, (1, 0))[..., :-1]
    agree_BV = (ends_2BV.amin(0) - starts_2BV.amax(0)).clamp(min=0)
    return (agree_BV * kept_BV).sum(-1), ((ends_2BV - starts_2BV).sum(0) * kept_BV).sum(-1)


class _Moved(Traffic):
    """Without the embedding's lookup, which reads a few rows, and would be counted with its whole table."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        is_lookup = func is torch.ops.aten.embedding.default
        return func(*args, **(kwargs or {})) if is_lookup else super().__torch_dispatch__(func, types, args, kwargs)


@contextmanager
def plain_operations(model: Any) -> Iterator[None]:
    """Attention and experts of single matmuls, none in oneDNN, whose calls PyTorch's counter of FLOPs does not know."""
    config, has_onednn = model.config, cpu._ONEDNN
    attention, experts = config._attn_implementation, getattr(config, "_experts_implementation", None)
    model.set_attn_implementation("eager")
    config._experts_implementation, cpu._ONEDNN = "eager", False
    try:
        yield
    finally:
        model.set_attn_implementation(attention)
        config._experts_implementation, cpu._ONEDNN = experts, has_onednn


def counted(model: Any, function: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, int, int]:
    """What the function returns, the FLOPs of its matmuls, and the bytes that its operations read and write."""
    with plain_operations(model), FlopCounterMode(display=False) as flops, _Moved() as moved:
        out = function()
    return out, flops.get_total_flops(), moved.bytes
