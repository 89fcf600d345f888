"""What names are asked to hold, checked for contradictions, and the filters that make them hold it."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, fields
from importlib.util import find_spec

from flash_experts.data.names import normal_form, shown_form
from flash_experts.generation.filters import (
    CARD_ALPHABET,
    AllowedCharacters,
    KnownNameFilter,
    NameFilter,
    WellFormed,
    at_least,
)
from flash_experts.generation.formatting import DANGLING_WORDS
from flash_experts.generation.limit_filters import MaxLength, MaxWords, MinLength, MinWords
from flash_experts.generation.regex_filter import MatchesRegex
from flash_experts.generation.text_filters import Contains, EndsWith, StartsWith
from flash_experts.generation.unwanted_words import found_in, missing_packages
from flash_experts.generation.vocabulary import NameVocabulary
from flash_experts.generation.word_filters import (
    Alliterates,
    BannedWords,
    NoProfanity,
    NoRealPlaces,
    NoRepeatedWords,
    UnwantedWords,
    alliterates,
    words_of,
)

MOST_CHARACTERS = 1000  # that max_length may be
LONGEST_NAME = 40  # characters; the longest serious card name has 33
# Filters that are on unless a field allows what they refuse: the field, what it is, the filter, the packages it needs.
_UNWANTED: tuple[tuple[str, str, type[UnwantedWords], tuple[str, ...]], ...] = (
    ("allow_profanity", "swear words", NoProfanity, ("better_profanity",)),
    ("allow_real_places", "places of the real world", NoRealPlaces, ("countryinfo", "tzdata")),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """What every name of a `NameGenerator.generate` call holds; None leaves one open. Case never matters.

    Attributes:
        starts_with: letters that names begin with, the last word perhaps unfinished.
        ends_with: letters that names end with; with a space before them, a word of their own.
        contains: letters that names have somewhere; with a space before them, at a word's start.
        regex: an expression that matches the whole name; see `MatchesRegex` for its syntax.
        min_words: words at least, counted by spaces.
        max_words: words at most.
        words: exactly so many; instead of the two before.
        min_length: characters at least.
        max_length: characters at most, and no word is cut for it. If None, names are cut at 40, which a trained
            model hardly ever reaches.
        banned_words: words that no name has.
        allow_profanity: lets swear words and slurs through.
        allow_real_places: lets countries, nations and large cities of the real world through.
        alliterate: all words begin with one letter, small ones ("of") aside, and there are two or more.
        min_distance: edit distance to every known card / the longer length, at least; 0 to under 1. Names
            nearer than that are dropped when they are finished.
    """

    starts_with: str | None = None
    ends_with: str | None = None
    contains: str | None = None
    regex: str | None = None
    min_words: int | None = None
    max_words: int | None = None
    words: int | None = None
    min_length: int | None = None
    max_length: int | None = None
    banned_words: Sequence[str] = ()
    allow_profanity: bool = False
    allow_real_places: bool = False
    alliterate: bool = False
    min_distance: float = 0.0

    def __post_init__(self) -> None:
        """Looks for contradictions.

        Raises:
            ValueError: a value is out of range, or no name can hold two of them.
        """
        if self.words is not None:
            if self.min_words is not None or self.max_words is not None:
                raise ValueError("words is the exact number: leave out min_words and max_words")
            at_least("words", self.words, 1, "a name has one word or more")
        for name in ("min_words", "max_words", "min_length", "max_length"):
            if (value := getattr(self, name)) is not None:
                at_least(name, value, 1, "a name has one or more")
        if self.longest > MOST_CHARACTERS:
            raise ValueError(f"max_length {self.longest} is more than a name can have: give {MOST_CHARACTERS} or less")
        if not 0 <= self.min_distance < 1:
            raise ValueError(f"min_distance is {self.min_distance}: it must be 0 or more, and under 1")
        if self.min_distance and find_spec("rapidfuzz") is None:
            raise ValueError("min_distance needs the package rapidfuzz: pip install rapidfuzz")
        least, most = self.word_limits
        if most is not None and least > most:
            raise ValueError(f"min_words {least} is more than max_words {most}")
        if self.min_length is not None and self.min_length > self.longest:
            raise ValueError(f"min_length {self.min_length} is more than max_length {self.longest}")
        if 2 * least - 1 > self.longest:
            raise ValueError(f"{least} words have {2 * least - 1} characters or more: max_length is {self.longest}")
        if self.alliterate and most == 1:
            raise ValueError("alliterate needs two words: max_words is 1")
        for name in ("starts_with", "ends_with", "contains"):
            self._check_text(name, getattr(self, name))

    @property
    def longest(self) -> int:
        """Characters at most."""
        return LONGEST_NAME if self.max_length is None else self.max_length

    @property
    def word_limits(self) -> tuple[int, int | None]:
        """Words at least and at most (None: any number)."""
        if self.words is not None:
            return self.words, self.words
        return self.min_words or 1, self.max_words

    def filters(self, vocabulary: NameVocabulary, prompt_length: int, known: Collection[str]) -> list[NameFilter]:
        """The filters of every name and those asked for.

        Args:
            vocabulary: as in `NameFilter`.
            prompt_length: as in `NameFilter`.
            known: normal forms of names that must not come out.

        Raises:
            ValueError: a filter cannot be made, such as for a regex that matches no name.
        """
        place = vocabulary, prompt_length
        given = "".join(filter(None, (self.starts_with, self.ends_with, self.contains)))
        alphabet = CARD_ALPHABET | set(shown_form(given)) | set(given.lower())
        least, most = self.word_limits
        filters: list[NameFilter] = [
            AllowedCharacters(*place, alphabet),
            WellFormed(*place),
            NoRepeatedWords(*place),
            KnownNameFilter(*place, known),
        ]
        if self.banned_words:
            filters.append(BannedWords(*place, self.banned_words))
        filters += [unwanted(*place) for unwanted in self._unwanted(warn=True)]
        if self.alliterate:
            filters.append(Alliterates(*place))
        if self.starts_with is not None:
            filters.append(StartsWith(*place, self.starts_with))
        if self.regex is not None:
            filters.append(MatchesRegex(*place, self.regex, self.longest, alphabet, self._as_regexes()))
        if self.contains is not None:
            filters.append(Contains(*place, self.contains, self.longest))
        if self.ends_with is not None:
            filters.append(EndsWith(*place, self.ends_with, self.longest))
        if least > 1:
            filters.append(MinWords(*place, least))
        if self.min_length is not None:
            filters.append(MinLength(*place, self.min_length))
        if most is not None:
            filters.append(MaxWords(*place, most))
        # A model at the start of its training ends no name: without a limit asked for, all of them would be dropped.
        return [*filters, MaxLength(*place, self.longest, drops=self.max_length is not None)]

    def held_by(self, text: str) -> bool:
        """The last check, on the finished and formatted name, of all but ``regex`` and ``min_distance``."""
        low, (least, most), num_words = text.lower(), self.word_limits, len(text.split())
        words = words_of(text)
        return (
            (self.min_length or 1) <= len(text) <= self.longest
            and least <= num_words <= (most or num_words)
            and low.startswith(shown_form(self.starts_with or "").lower())
            and (" " + low).endswith(_spaced(self.ends_with))
            and _spaced(self.contains) in " " + low
            and (not self.alliterate or alliterates(text))
            and not {normal_form(word) for word in self.banned_words}.intersection(words)
            and not any(found_in(unwanted.judge, text) for unwanted in self._unwanted())
        )

    def told(self) -> str:
        """The constraints in words, for messages."""
        given = {one.name: getattr(self, one.name) for one in fields(self)}
        defaults = {one.name: one.default for one in fields(self)}
        told = [f"{name}={value!r}" for name, value in given.items() if value != defaults[name] and value != []]
        return ", ".join([*told, *(() if self.max_length else (f"max_length={self.longest}",)), "no known card's name"])

    def _check_text(self, name: str, text: str | None) -> None:
        if text is None:
            return
        shown, most = shown_form(text), self.word_limits[1]
        if not shown:
            raise ValueError(f"{name} is blank: leave it out, or give letters")
        if len(shown) > self.longest:
            raise ValueError(f"{name} {shown!r} has {len(shown)} characters, more than max_length {self.longest}")
        if most is not None and len(shown.split()) > most:
            raise ValueError(f"{name} {shown!r} has more words than max_words {most}")
        if (found := WellFormed.BAD.search((" " if name == "starts_with" else "") + shown)) is not None:
            raise ValueError(f"{name} {shown!r}: no name has {found[0]!r} in it")
        self._check_unwanted(name, shown)
        if name == "ends_with":
            last, is_word = shown.split()[-1], _spaced(text)[0] == " " or " " in shown
            if shown[-1] in WellFormed.OPEN_END or (is_word and last.lower() in DANGLING_WORDS):
                raise ValueError(f"ends_with {shown!r}: no name ends on {last!r}")
        if self.alliterate and name == "starts_with" and len(shown.split()) > 1 and not alliterates(shown, least=1):
            raise ValueError(f"starts_with {shown!r} does not alliterate")

    def _check_unwanted(self, name: str, shown: str) -> None:
        """Whether a text that names must have holds a word that they must not have."""
        for field, what, unwanted, packages in _UNWANTED:
            if getattr(self, field) or missing_packages(*packages):
                continue
            # "Ass" may still become "Assassin"; the words before the last are what they are.
            may_go_on = name != "ends_with" and unwanted.judge(shown) == "refused"
            if found_in(unwanted.judge, shown.rpartition(" ")[0] if may_go_on else shown):
                raise ValueError(f"{name} {shown!r} is among the {what}: set {field} to have it in names")

    def _unwanted(self, warn: bool = False) -> Iterator[type[UnwantedWords]]:
        """The filters of words that nobody wants, without those that are allowed and those whose data is missing."""
        for field, what, unwanted, packages in _UNWANTED:
            if getattr(self, field):
                continue
            missing = missing_packages(*packages)
            if not missing:
                yield unwanted
            elif warn:
                install = " ".join(missing).replace("_", "-")
                warnings.warn(
                    f"{' and '.join(missing)} not installed: {what} are not filtered (pip install {install}, or set "
                    f"{field})",
                    stacklevel=6,
                )

    def _as_regexes(self) -> list[str]:
        """The other constraints as expressions, so that the automaton of ``regex`` sees contradictions."""
        least, most = self.word_limits
        found = []
        if least > 1 or most is not None:
            found.append(rf"[^ ]+( [^ ]+){{{least - 1},{'' if most is None else most - 1}}}")
        if self.min_length is not None:
            found.append(rf".{{{self.min_length},}}")
        if self.starts_with is not None:
            found.append(f"(?i:{_escaped(shown_form(self.starts_with))}).*")
        texts = [(self.ends_with, ""), (self.contains, ".*")]
        for text, after in texts:
            if text is not None:
                before = "(.* )?" if text[0].isspace() else ".*"
                found.append(f"{before}(?i:{_escaped(shown_form(text))}){after}")
        return found


def _spaced(text: str | None) -> str:
    """Lower case, with the space before it if there was one."""
    return "" if text is None else (" " if text[:1].isspace() else "") + shown_form(text).lower()


def _escaped(text: str) -> str:
    return "".join(f"\\u{{{ord(character):x}}}" for character in text)
