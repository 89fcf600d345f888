"""Philox, a counter-based random number generator (Salmon et al. 2011, "Parallel random numbers"), for dropout.

Flash attention does not store its dropout mask; the backward computes it again, tile by tile in another order. The
number of query i, key j, head h and sequence b is ``philox4x32_10(key=seed, counter=(j, i, b * H + h, 0))``, bit for
bit as `triton.language.philox`, so that all kernels drop the same weights.

Shape suffixes: B sequences, H heads, M queries, N keys.
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF  # 32-bit words are kept in int64: torch's uint32 has few operations
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_TO_UNIT = 4.6566127342e-10  # the largest float32 that keeps (2**31 - 1) times it under 1


def philox4x32(
    key: tuple[torch.Tensor, torch.Tensor], counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox-4x32 with 10 rounds: four random words from a key, the low and high word of the seed, and a counter.

    All are int64 tensors with values in [0, 2**32); shapes broadcast.
    """
    key_0, key_1 = key
    word_0, word_1, word_2, word_3 = counter
    for _ in range(_ROUNDS):
        # A product of two words needs unsigned 64 bits. int64 wraps around, and every bit stays right.
        product_0, product_2 = word_0 * _MULTIPLIERS[0], word_2 * _MULTIPLIERS[1]
        word_0 = ((product_2 >> 32) & _LOW) ^ word_1 ^ key_0
        word_2 = ((product_0 >> 32) & _LOW) ^ word_3 ^ key_1
        word_1, word_3 = product_2 & _LOW, product_0 & _LOW
        key_0, key_1 = (key_0 + _KEY_STEPS[0]) & _LOW, (key_1 + _KEY_STEPS[1]) & _LOW
    return word_0, word_1, word_2, word_3


def uniform(word: torch.Tensor) -> torch.Tensor:
    """Random words to float32 in [0, 1), as `triton.language.uint_to_uniform_float`."""
    # As signed 32-bit numbers, with a negative x folded onto -x - 1: 31 bits remain.
    folded = torch.where(word > 0x7FFFFFFF, _LOW - word, word)
    return folded.to(torch.float32) * _TO_UNIT


def dropout_keep_mask(
    seed: torch.Tensor, batch: int | range, heads: int, rows: int | range, cols: int | range, p: float
) -> torch.Tensor:
    """Dropout mask of attention weights, (B, H, M, N) bool, true where a weight is kept, with probability 1 - p.

    ``seed`` is (1,) int64. ``batch`` numbers the sequences, or documents of a packed sequence; ``rows`` and ``cols``
    are the positions of queries and keys within their sequence. An int n for one of them is ``range(n)``.
    """
    sequence_B, row_M, col_N = (_numbers(numbers, seed.device) for numbers in (batch, rows, cols))
    head_BH = sequence_B[:, None] * heads + torch.arange(heads, device=seed.device)
    counter = (
        col_N[None, None, None, :],
        row_M[None, None, :, None],
        head_BH[:, :, None, None] & _LOW,
        torch.zeros_like(seed),
    )
    word_BHMN, *_ = philox4x32((seed & _LOW, (seed >> 32) & _LOW), counter)
    return uniform(word_BHMN) > p


def _numbers(numbers: int | range, device: torch.device) -> torch.Tensor:
    numbers = range(numbers) if isinstance(numbers, int) else numbers
    return torch.arange(numbers.start, numbers.stop, device=device)
