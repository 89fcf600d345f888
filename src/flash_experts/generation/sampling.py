"""Token sampling: temperature, top-k, top-p (nucleus) and min-p on a batch, with a random number per row.

Shape suffixes: B batch rows, V tokens of the vocabulary, K candidates, A rows that are drawn again.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from flash_experts.generation.request import Sampling

_NUCLEUS_WIDTHS = (512, 4096)  # top-p alone: the mass of so many tokens usually reaches p, and sorting all is slow
_BLOCK = 128  # probabilities that are summed at once


def stream_seed(seed: int, prompt_ids: Sequence[int]) -> int:
    """The seed of a prompt's own stream, so that lists for several prompts do not all start alike."""
    entropy = [seed, len(prompt_ids), *prompt_ids]  # the length, because zeros at the end would not count
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def noise(seed: int, indices: Sequence[int], steps: int) -> torch.Tensor:
    """(len(indices), steps, 2) float64 uniform in [0, 1): row i depends on ``seed`` and ``indices[i]`` alone.

    So a name depends on batch and device by rounding alone. The second number is for a token that is drawn again.
    """
    rows = [np.random.default_rng((seed, index)).random((steps, 2)) for index in indices]
    return torch.from_numpy(np.stack(rows))


def draw(scores_BV: torch.Tensor, noise_B2: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws one token per row with temperature, top-k, top-p and min-p.

    Rejection sampling avoids most sorting: only rows whose token, drawn from the whole vocabulary, is not a candidate
    draw again from their candidates. Draws invert the cumulative distribution in the order of token ids, which rounding
    does not change. With another batch size the sums differ in their last digits: of draws without a cut, one in some
    hundreds is another token (docs/learn/06b_kv_cache.py).

    Args:
        scores_BV: float32 logits, minus infinity where a token is forbidden.
        noise_B2: from `noise`.

    Returns:
        (B,) tokens, and (B,) bool: rows without any possible token.
    """
    dead_B = scores_BV.amax(-1) == -torch.inf
    probs_BV = (scores_BV if sampling.temperature == 1 else scores_BV / sampling.temperature).softmax(-1)
    tokens_B = _invert(probs_BV, noise_B2[:, 0])
    again = _doubtful(probs_BV, tokens_B, sampling).nonzero()[:, 0]
    if len(again):
        probs_AK, ids_AK = candidates(scores_BV[again], sampling)
        first_A, second_A = tokens_B[again], _invert(probs_AK, noise_B2[again, 1])
        if ids_AK is None:
            is_in_A = probs_AK.gather(1, first_A[:, None])[:, 0] > 0
        else:
            is_in_A = ((ids_AK == first_A[:, None]) & (probs_AK > 0)).any(-1)
            second_A = ids_AK.gather(1, second_A[:, None])[:, 0]
        tokens_B[again] = torch.where(is_in_A, first_A, second_A)
    return tokens_B, dead_B


def _invert(probs_BK: torch.Tensor, noise_B: torch.Tensor) -> torch.Tensor:
    """(B,) first places where the cumulative probabilities (up to a factor per row) exceed the random number."""
    K = probs_BK.shape[1]
    # Sums of blocks show in which block that is, so that only one block of each row is cumulated.
    whole = K - K % _BLOCK
    blocks = [probs_BK[:, :whole].unflatten(1, (-1, _BLOCK)).sum(-1)] if whole else []
    if whole < K:
        blocks.append(probs_BK[:, whole:].sum(-1, keepdim=True))
    ends_BN = torch.cat(blocks, dim=1).cumsum(-1, dtype=torch.float64)
    target_B1 = noise_B[:, None].to(ends_BN) * ends_BN[:, -1:]
    block_B1 = torch.searchsorted(ends_BN, target_B1, right=True).clamp_(max=ends_BN.shape[1] - 1)
    before_B1 = torch.nn.functional.pad(ends_BN, (1, 0)).gather(1, block_B1)
    place_BW = block_B1 * _BLOCK + torch.arange(_BLOCK, device=probs_BK.device)
    probs_BW = probs_BK.gather(1, place_BW.clamp(max=K - 1)).masked_fill(place_BW >= K, 0)
    within_BW = probs_BW.cumsum(-1, dtype=torch.float64)
    # A target that rounding puts at the end of its block must still find a token that is possible.
    last_B1 = torch.nextafter(within_BW[:, -1:], torch.zeros_like(target_B1))
    found_B1 = torch.searchsorted(within_BW, torch.minimum(target_B1 - before_B1, last_B1), right=True)
    return (block_B1 * _BLOCK + found_B1)[:, 0].clamp_(max=K - 1)


def _doubtful(probs_BV: torch.Tensor, tokens_B: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """(B,) bool: tokens that are not candidates, or for which only sorting can decide."""
    own_B1 = probs_BV.gather(1, tokens_B[:, None])
    is_doubtful_B = own_B1[:, 0] < sampling.min_p * probs_BV.amax(-1)
    limits_k = 0 < sampling.top_k < probs_BV.shape[-1]
    if limits_k or sampling.top_p < 1:
        likelier_BV = _greater(probs_BV, own_B1)
        if limits_k:
            is_doubtful_B |= likelier_BV.sum(-1) >= sampling.top_k
        if sampling.top_p < 1:
            mass_B, least_B = likelier_BV.mul_(probs_BV).sum(-1), torch.ones_like(probs_BV[:, 0])
            if limits_k:  # top-p is a share of the top-k mass, for which only a lower bound is known
                high_BV = _greater(probs_BV, 1 / (4 * sampling.top_k), out=likelier_BV)
                too_many_B = high_BV.sum(-1) > sampling.top_k
                least_B = high_BV.mul_(probs_BV).sum(-1).masked_fill_(too_many_B, 0)
            is_doubtful_B |= mass_B >= sampling.top_p * least_B
    return is_doubtful_B


def _greater(probs_BV: torch.Tensor, than: torch.Tensor | float, out: torch.Tensor | None = None) -> torch.Tensor:
    """(B, V) 1 where greater, else 0, in the dtype of the probabilities.

    On a CPU PyTorch takes three times as long to compare into bool, and again to sum or multiply bool.
    """
    out = torch.empty_like(probs_BV) if out is None else out
    return torch.gt(probs_BV, than, out=out)


def candidates(scores_BV: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The tokens that top-k, top-p and min-p keep of rows with a possible token.

    Returns:
        (B, K) float32 probabilities up to a factor per row, 0 if not kept, and (B, K) their ascending token ids, or
        None where K is V.
    """
    vocab_size = scores_BV.shape[-1]
    scaled_BV = scores_BV / sampling.temperature
    probs_BV = (scaled_BV - scaled_BV.amax(-1, keepdim=True)).exp()
    total_B1 = probs_BV.sum(-1, keepdim=True)
    limits_k = 0 < sampling.top_k < vocab_size
    widths = (sampling.top_k,) if limits_k else _NUCLEUS_WIDTHS if sampling.top_p < 1 else ()
    for width in widths:
        if width >= vocab_size:
            break
        ids_BK = scores_BV.topk(width, dim=-1).indices.sort(dim=-1).values
        probs_BK = probs_BV.gather(1, ids_BK)
        mass_B1 = probs_BK.sum(-1, keepdim=True)
        if limits_k:  # top-p is a share of what top-k left
            return _cut(probs_BK, mass_B1, sampling), ids_BK
        if (mass_B1 >= sampling.top_p * total_B1).all():
            return _cut(probs_BK, total_B1, sampling), ids_BK
    return _cut(probs_BV, total_B1, sampling), None


def _cut(probs_BK: torch.Tensor, total_B1: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """Zeroes what top-p and min-p remove; ``total_B1`` is the mass that top-p is a share of."""
    if sampling.top_p < 1:
        sorted_BK, order_BK = probs_BK.sort(dim=-1, descending=True)
        before_BK = sorted_BK.cumsum(dim=-1) - sorted_BK  # mass of the likelier ones: the first always stays
        out_BK = before_BK >= sampling.top_p * total_B1
        probs_BK = probs_BK.masked_fill(torch.zeros_like(out_BK).scatter(1, order_BK, out_BK), 0.0)
    if sampling.min_p > 0:
        least_B1 = sampling.min_p * probs_BK.amax(-1, keepdim=True)
        probs_BK = probs_BK.masked_fill(probs_BK < least_B1, 0.0)
    return probs_BK
