"""A test for readers: which of these names are real cards?"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

REAL = "a real card"
_OF_EACH_KIND = 12  # real names, and generated ones of all models together


@dataclass(frozen=True, slots=True)
class BlindName:
    """A name of the test, and what made it: `REAL`, or the label of a model."""

    text: str
    source: str


def make_blind_test(
    samples: Mapping[str, Sequence[str]], real: Sequence[str], is_known: Callable[[str], bool], seed: int
) -> tuple[BlindName, ...]:
    """Draws names for the test: half real, half generated, the models in turn, in random order.

    Args:
        samples: names of each model, by its label. Known ones are left out: they would be real.
        real: held-out names.
        is_known: whether a name is a card already.
        seed: the same seed gives the same test.

    Returns:
        As many of each kind as there are, 12 at most (or one for each model). Nothing where a kind has none.
    """
    rng = random.Random(seed)
    new = {
        label: [name for name in dict.fromkeys(names) if name and not is_known(name)]
        for label, names in samples.items()
    }
    wanted = max(_OF_EACH_KIND, len(samples))
    generated: dict[str, BlindName] = {}
    for place in range(max(map(len, new.values()), default=0)):
        for label, names in new.items():
            if place < len(names) and len(generated) < wanted:
                generated.setdefault(names[place], BlindName(names[place], label))
    count = min(len(generated), len(real))
    chosen = [BlindName(name, REAL) for name in rng.sample(list(real), count)] + list(generated.values())[:count]
    rng.shuffle(chosen)
    return tuple(chosen)
