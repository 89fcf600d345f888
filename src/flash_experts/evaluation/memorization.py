"""Whether a model learned names or learned them by heart.

A name that is real may have been recalled or rightly guessed. What was never shown can only be guessed, so the rate at
which held-out names come out is what guessing gives. A model that has memorized nothing hits training names at that
same rate.
"""

from __future__ import annotations

import math
from collections.abc import Set
from dataclasses import dataclass

from flash_experts.evaluation.metrics import Estimate


@dataclass(frozen=True, slots=True)
class Memorization:
    """The hit ratio, and what it is made of.

    Attributes:
        train_hits: distinct training names among the samples.
        held_out_hits: distinct held-out names among them.
        ratio: hits in train per training name / hits in held-out per held-out name: 1 is no memorization, 10 says that
            nine of ten training names that came out were recalled. None where nothing was hit. With few hits the
            interval is wide: take 10,000 samples or more.
    """

    train_hits: int
    held_out_hits: int
    ratio: Estimate | None


def hit_ratio(samples: Set[str], train: Set[str], held_out: Set[str]) -> Memorization:
    """Measures memorization.

    Args:
        samples: distinct names of a model in `flash_experts.data.names.normal_form`.
        train: what it was trained on, in the same form.
        held_out: names of the same kind that it was not trained on. Names of other families would be guessed more
            rarely and pass for memorization.

    Returns:
        The ratio with half a hit added on each side (Haldane 1956), so that a model that hits no held-out name has
        one, and the interval of the logarithm's normal approximation (Katz et al. 1978).
    """
    held_out = held_out - train
    in_train, in_held_out = len(samples & train), len(samples & held_out)
    if not (in_train or in_held_out) or not train or not held_out:
        return Memorization(in_train, in_held_out, None)
    value = ((in_train + 0.5) / len(train)) / ((in_held_out + 0.5) / len(held_out))
    spread = 1.959964 * math.sqrt(1 / (in_train + 0.5) + 1 / (in_held_out + 0.5))
    return Memorization(in_train, in_held_out, Estimate(value, value * math.exp(-spread), value * math.exp(spread)))
