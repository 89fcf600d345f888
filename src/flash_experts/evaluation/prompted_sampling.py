"""One name for each of many prompts, where `NameDecoder` draws many names for one.

Letters in the shapes: B rows still running, T tokens of a prompt, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel

from flash_experts.generation.presets import Sampling
from flash_experts.generation.sampling import draw, noise

_AT_ONCE = 256


def sample_each(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], end_id: int, max_new_tokens: int, seed: int
) -> list[list[int]]:
    """Draws tokens after each prompt, at temperature 1. For use in eval and inference mode.

    Prompts of equal length are computed together, so nothing is padded.

    Args:
        model: a causal LM of transformers that takes a `DynamicCache`.
        prompts: token ids, none of them empty.
        end_id: the token that ends a name.
        max_new_tokens: names are cut off there.
        seed: the same gives the same names.

    Returns:
        Tokens after each prompt, without the end symbol.
    """
    drawn: list[list[int]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = {}
    for index, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt), []).append(index)
    done = 0
    for _, members in sorted(by_length.items()):
        for start in range(0, len(members), _AT_ONCE):
            rows = members[start : start + _AT_ONCE]
            noise_BS2 = noise(seed, range(done, done + len(rows)), max_new_tokens).to(model.device)
            tokens = _sample_batch(model, [prompts[row] for row in rows], noise_BS2, end_id)
            for row, ids in zip(rows, tokens, strict=True):
                drawn[row] = ids
            done += len(rows)
    return drawn


def _sample_batch(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], noise_BS2: torch.Tensor, end_id: int
) -> list[list[int]]:
    """Tokens after each of B prompts of one length; ``noise_BS2`` has random numbers for each row and step."""
    cache = DynamicCache(config=model.config)
    inputs_BT = torch.tensor([list(prompt) for prompt in prompts], device=model.device)
    # The begin symbol is also the pad symbol: without a mask transformers would warn of padding.
    mask_BT = torch.ones_like(inputs_BT)
    running = torch.arange(len(prompts), device=model.device)
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in range(noise_BS2.shape[1]):
        out = model(inputs_BT, attention_mask=mask_BT, past_key_values=cache, use_cache=True, logits_to_keep=1)
        chosen_B, _ = draw(out.logits[:, -1].float(), noise_BS2[running, step], Sampling())
        going = (chosen_B != end_id).nonzero()[:, 0]
        if not len(going):
            break
        if len(going) < len(running):
            cache.batch_select_indices(going)
        running, chosen_B, mask_BT = running[going], chosen_B[going], mask_BT[going]
        for row, token in zip(running.tolist(), chosen_B.tolist(), strict=True):
            tokens[row].append(token)
        inputs_BT = chosen_B[:, None]
        mask_BT = torch.cat([mask_BT, mask_BT[:, :1]], dim=1)
    return tokens
