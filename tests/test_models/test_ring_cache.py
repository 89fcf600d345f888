"""The ring KV cache against a list of tokens per row."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import DynamicCache

from flash_experts.models.ring_cache import RingCache


def prompt(number: int, length: int) -> tuple[DynamicCache, list[float]]:
    """A prompt's cache, and its keys."""
    keys = [float(-100 * number - place) for place in range(length)]
    cache = DynamicCache()
    keys_1HTC = torch.tensor(keys)[None, None, :, None]
    cache.update(keys_1HTC, -keys_1HTC, 0)
    return cache, keys


@pytest.mark.parametrize("seed", range(6))
def test_each_row_sees_its_prompt_and_its_own_tokens(seed: int) -> None:
    """Rows are replaced and dropped at any time; the ring wraps around, and grows for rows that last longer."""
    rng = random.Random(seed)
    prompts = [prompt(number, length) for number, length in enumerate((2, 4, 1), start=1)]
    chosen = [rng.choice(prompts) for _ in range(5)]
    cache = RingCache([one for one, _ in chosen], longest=4)
    prompt_of = [keys for _, keys in chosen]
    own: list[list[float]] = [[] for _ in chosen]
    lasting = 0
    for step in range(150):
        if step in (40, 90):
            kept = rng.sample(range(len(own)), len(own) - 1)
            cache.select(torch.tensor(kept))
            prompt_of, own = [prompt_of[row] for row in kept], [own[row] for row in kept]
        # The first row lasts long after the ring has wrapped around.
        new = [row for row in range(len(own)) if rng.random() < 0.1 and (row > 0 or step < 30)]
        chosen = [rng.choice(prompts) for _ in new]
        cache.replace(new, [one for one, _ in chosen])
        for row, (_, keys) in zip(new, chosen, strict=True):
            prompt_of[row], own[row] = keys, []
        mask_BK, positions_B1 = cache.step(torch.device("cpu"))
        keys_BHC = torch.tensor([10.0 * step + row for row in range(len(own))])[:, None, None]
        keys_BHKC, values_BHKC = cache.write(0, keys_BHC, -keys_BHC)
        assert torch.equal(values_BHKC[:, :, mask_BK.any(0)], -keys_BHKC[:, :, mask_BK.any(0)])
        for row in range(len(own)):
            if row not in new:  # a new row's first own token comes at the next step
                assert positions_B1[row] == len(prompt_of[row]) + len(own[row])
                own[row].append(float(keys_BHC[row]))
            seen = keys_BHKC[row, 0, mask_BK[row], 0].tolist()
            assert sorted(seen) == sorted(prompt_of[row] + own[row])
            lasting = max(lasting, len(own[row]))
    assert lasting > 32, "the ring has grown, and was full at the time"
