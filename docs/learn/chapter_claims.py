"""Claims of the prose that the run checks."""

from __future__ import annotations


def holds(sentence: str, condition: object) -> None:
    """Prints a sentence of the prose with its verdict.

    Raises:
        AssertionError: the numbers of this run contradict the sentence.
    """
    print(f"{'[holds]' if condition else '[FAILS]'} {sentence}")
    if not condition:
        raise AssertionError(f"this run contradicts: {sentence}")


def verdict(low: float, high: float, below: str, above: str, neither: str) -> str:
    """The sentence for an interval of a difference: all below 0, all above 0, or 0 inside."""
    return below if high < 0 else above if low > 0 else neither
