"""The swap baseline: parts of two real names of the kind, exchanged. Both parts read well, so a model has to beat it.

"Goblin Guide" + "Raging Kobold"  ->  "Goblin Kobold";   "Wrath of God" + "Hand of Honor"  ->  "Wrath of Honor"
"""

from __future__ import annotations

import random
from collections.abc import Collection, Iterable

from flash_experts.data.names import normal_form
from flash_experts.generation.formatting import format_name

_JOINTS = (", ", " of the ", " of ", " ")  # where a name is cut, the first that it has


def parts_of(name: str) -> tuple[str, str, str] | None:
    """First part, joint and second part of a name; None for one word, or more than two without a joint."""
    for joint in _JOINTS:
        first, found, second = name.partition(joint)
        if found and first and second:
            return (first, joint, second) if joint != " " or " " not in second else None
    return None


def swapped_names(names: Iterable[str], count: int, known: Collection[str], seed: int = 0) -> list[str]:
    """Up to ``count`` distinct names, each the first part of one name and the second of another with the same joint.

    Args:
        names: real names of the kind.
        known: normal forms of names that are left out.
    """
    by_joint: dict[str, list[tuple[str, str]]] = {}
    for name in names:
        if (parts := parts_of(name)) is not None:
            by_joint.setdefault(parts[1], []).append((parts[0], parts[2]))
    pairs = [(joint, part) for joint, parts in by_joint.items() if len(parts) > 1 for part in parts]
    rng, found = random.Random(seed), dict[str, str]()
    for _ in range(50 * count if pairs else 0):
        joint, (first, _own) = rng.choice(pairs)
        text = format_name(first + joint + rng.choice(by_joint[joint])[1])
        key = normal_form(text)
        if key not in known:
            found.setdefault(key, text)
        if len(found) == count:
            break
    return list(found.values())
