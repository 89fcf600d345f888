"""Share of names with an unknown word: not in Hunspell's en_US dictionary, not on any training card.

    pip install spylls          # Hunspell in Python, with its en_US dictionary
    flash-experts generate --attributes-from test_iid --attribute-dropout 0 --count 2000 --out names.jsonl
    python benchmarks/unknown_words.py names.jsonl

Legendary cards are left out: their names may be invented. The real names of test_iid are counted as well.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from functools import cache

from flash_experts.data.cards import Card
from flash_experts.data.prepare import load_cards, load_split

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")


def words_of(name: str) -> list[str]:
    """Splits a name into words without possessive 's; hyphenated words are split."""
    return [re.sub(r"['’]s?$", "", word) for word in _WORD.findall(name)]


def knows_word(training: Iterable[Card]) -> Callable[[str], bool]:
    from spylls.hunspell import Dictionary

    english = Dictionary.from_files("en_US")
    on_cards = {word.lower() for card in training for word in words_of(card.name)}

    @cache
    def knows(word: str) -> bool:
        return word.lower() in on_cards or english.lookup(word.lower()) or english.lookup(word)

    return knows


def share_of_unknown(cards: Iterable[Card], knows: Callable[[str], bool]) -> tuple[int, list[str]]:
    """Returns the number of non-legendary names, and those with an unknown word."""
    names = [card.name for card in cards if "Legendary" not in card.supertypes and "," not in card.name]
    return len(names), [name for name in names if not all(map(knows, words_of(name)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", help="JSONL files of names, from generate --attributes-from")
    parser.add_argument("--data", default="data/mtg", help="folder written by prepare")
    args = parser.parse_args()
    knows = knows_word(load_split(args.data, "train"))
    groups = [("real names, test_iid", load_split(args.data, "test_iid"))]
    groups += [(file, load_cards(file)) for file in args.files]
    for label, cards in groups:
        count, unknown = share_of_unknown(cards, knows)
        print(f"{label}: {len(unknown) / count:.1%} of {count:,} non-legendary names ({'; '.join(unknown[:12])}, ...)")


if __name__ == "__main__":
    main()
