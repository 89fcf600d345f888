"""Random numbers that are a pure function of a seed and a position (Salmon et al. 2011, "Parallel random numbers").

Flash attention never stores which weights its dropout kept: the backward must find the same ones again, tile by tile
and in another order. A counter-based generator gives that for nothing. The number of query i, key j, head h and
sequence b is ``philox4x32_10(key=seed, counter=(j, i, b * H + h, 0))``, whoever asks and when. This module computes
it with torch's integers, bit for bit as `triton.language.philox` does, so that all kernels drop the same weights.

Letters in the shapes: B sequences, H heads, M queries, N keys.
"""

from __future__ import annotations

import torch

_LOW = 0xFFFFFFFF  # a word has 32 bits; it is kept in an int64, as torch's uint32 knows few operations
_MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85
_ROUNDS = 10
_TO_UNIT = 4.6566127342e-10  # the largest float32 that keeps (2**31 - 1) times it under 1


def philox4x32(
    key: tuple[torch.Tensor, torch.Tensor], counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Philox-4x32 with 10 rounds.

    Args:
        key: low and high word of the seed, int64 tensors with values in [0, 2**32).
        counter: four words, likewise; all shapes broadcast together.

    Returns:
        Four random words, int64 with values in [0, 2**32).
    """
    key_0, key_1 = key
    word_0, word_1, word_2, word_3 = counter
    for _ in range(_ROUNDS):
        # A product of two words needs 64 bits without a sign. int64 wraps around, which leaves every bit right.
        product_0, product_2 = word_0 * _MULTIPLIERS[0], word_2 * _MULTIPLIERS[1]
        word_0 = ((product_2 >> 32) & _LOW) ^ word_1 ^ key_0
        word_2 = ((product_0 >> 32) & _LOW) ^ word_3 ^ key_1
        word_1, word_3 = product_2 & _LOW, product_0 & _LOW
        key_0, key_1 = (key_0 + _KEY_STEPS[0]) & _LOW, (key_1 + _KEY_STEPS[1]) & _LOW
    return word_0, word_1, word_2, word_3


def uniform(word: torch.Tensor) -> torch.Tensor:
    """Random words to float32 in [0, 1), as `triton.language.uint_to_uniform_float`."""
    # As a signed 32-bit number; a negative x is folded onto -x - 1, so 31 bits remain.
    folded = torch.where(word > 0x7FFFFFFF, _LOW - word, word)
    return folded.to(torch.float32) * _TO_UNIT


def dropout_keep_mask(
    seed: torch.Tensor, batch: int | range, heads: int, rows: int | range, cols: int | range, p: float
) -> torch.Tensor:
    """Which attention weights a dropout keeps.

    Args:
        seed: (1,) int64.
        batch: numbers b of the sequences (rows of a batch, or documents of a packed row); an int n is ``range(n)``.
        heads: H, query heads in all.
        rows: positions i of the queries within their sequence; an int n is ``range(n)``.
        cols: positions j of the keys, likewise.
        p: probability that a weight is dropped.

    Returns:
        (B, H, M, N) bool on the seed's device, true where the weight stays (and is to be divided by 1 - p).
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
