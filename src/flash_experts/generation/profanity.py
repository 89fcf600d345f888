"""Swear words and slurs that names are kept from."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from flash_experts.data.names import normal_form

# On the list, and yet on serious cards ("Wrath of God", "Strip Mine", "Hoar Shade"; 135 names): these stay.
PRINTED_ON_CARDS = frozenset(
    """bestial damn dong dummy god hell hoar kill lust murder naked organ pawn revue sadist sandbar slave snatch sniper
    snuff strip stroke thug tosser weed""".split()
)


@cache
def profane_words() -> frozenset[str]:
    """Normal forms of the single words on better-profanity's list (MIT; about 850), but `PRINTED_ON_CARDS`.

    Only whole words are compared: letters within words would refuse "Scunthorpe", and "Assassin" here.

    Raises:
        ModuleNotFoundError: better-profanity is not installed.
    """
    import better_profanity

    lines = (Path(better_profanity.__file__).parent / "profanity_wordlist.txt").read_text("utf-8").splitlines()
    words = {normal_form(line) for line in lines if line.strip().isalnum()}
    return frozenset(words - PRINTED_ON_CARDS - {""})
