"""The rules that names follow, checked for contradictions, and the token filters that enforce them."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from flash_experts.data.names import normal_form, shown_form
from flash_experts.generation import text_rules
from flash_experts.options import at_least, option, problems_of

if TYPE_CHECKING:
    from flash_experts.generation.filters.base import NameFilter, NameVocabulary

RULES = "Rules for the names"
MOST_CHARACTERS = 1000  # highest max_length
LONGEST_NAME = 40  # characters; the longest serious card name has 33
_GAP = re.compile("___+")
_WORD_START = re.compile(r"(?<=[ -])[^\W\d_]")
# Words that no name has unless a field allows them: field, description, check.
_UNWANTED: tuple[tuple[str, str, text_rules.Check], ...] = (
    ("allow_profanity", "swear words", text_rules.profanity_at_end),
    ("allow_real_places", "places of the real world", text_rules.place_at_end),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Constraints:
    """The rules that every name of a request follows; None leaves one open.

    Case never matters. No name is a given text alone: it has more letters.

    A new rule is a field here, its filter in `filters`, and its last check in `held_by`.
    """

    starts_with: str | None = option(
        None, "letters at the start (default: any)", RULES, label="Starts with", page_bounds=(0, 40)
    )
    contains: str | None = option(
        None, 'letters anywhere; " Axe": at the start of a word (default: any)', RULES, label="Contains",
        page_bounds=(0, 40),
    )  # fmt: skip
    ends_with: str | None = option(
        None, 'letters at the end; " Axe": a whole word (default: any)', RULES, label="Ends with", page_bounds=(0, 40)
    )
    regex: str | None = option(
        None, 'regular expression for the whole name, such as ".* of the .*" (default: any)', RULES,
        label="Regular expression", placeholder=".* of the .*", hint="for the whole name", page_bounds=(0, 100),
    )  # fmt: skip
    pattern: str | None = option(
        None, 'name with gaps, each three or more "_", such as "___, the Storm ___" (default: none)', RULES,
        label="Name with gaps", placeholder="___, the Storm ___", hint="___ stands for what is to be filled in",
        page_bounds=(0, 60),
    )  # fmt: skip
    words: int | None = option(
        None, "exact number of words (default: any)", RULES, label="Exact number of words", page_bounds=(1, 8)
    )
    min_words: int | None = option(None, "fewest words (default: 1)", RULES, label="Fewest words", page_bounds=(1, 8))
    max_words: int | None = option(
        None, "most words (default: no limit)", RULES, label="Most words", page_bounds=(1, 8)
    )
    min_length: int | None = option(
        None, "fewest characters (default: 1)", RULES, label="Fewest characters", page_bounds=(1, 40)
    )
    max_length: int | None = option(
        None, "most characters (default: 40)", RULES, label="Most characters", page_bounds=(1, 40)
    )
    banned_words: Sequence[str] = option(
        (), "words that no name has, separated by commas, or --ban once per word", RULES, flag="ban",
        label="Banned words", placeholder="dragon, fire", page_bounds=(50, 30),
    )  # fmt: skip
    min_distance: float = option(
        0.0, "lowest edit distance from every real card, as a share of the length: 0.3 is 3 letters of 10", RULES,
        label="Distance from real cards", hint="share of letters that differ from any real card",
        slider=(0, 0.8, 0.05),
    )  # fmt: skip
    alliterate: bool = option(
        False, "start all words with the same letter", RULES, label="All words start with the same letter"
    )
    allow_profanity: bool = option(False, "allow swear words", RULES, label="Allow swear words")
    allow_real_places: bool = option(
        False, "allow countries, nations and large cities of the real world", RULES,
        label="Allow places of the real world",
    )  # fmt: skip

    def __post_init__(self) -> None:
        """Raises a ValueError if a value has a wrong type or range, or no name can follow two of the rules."""
        if problems := problems_of(self, type(self)):
            raise ValueError("; ".join(problems))
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
        self._check_pattern()

    @property
    def whole_regex(self) -> str | None:
        """``regex``, or ``pattern`` as a regular expression."""
        if self.pattern is None:
            return self.regex
        parts = enumerate(_GAP.split(shown_form(self.pattern)))
        return ".+".join(_as_on_cards(part, begins_word=place == 0) for place, part in parts)

    @property
    def has_text_after_gap(self) -> bool:
        """Whether ``pattern`` has fixed text after a gap, which the model fills without knowing what follows."""
        return any(part.strip() for part in _GAP.split(self.pattern or "")[1:])

    @property
    def longest(self) -> int:
        return LONGEST_NAME if self.max_length is None else self.max_length

    @property
    def has_room(self) -> bool:
        """Whether a name can have more letters than each given text."""
        texts = (self.starts_with, self.contains, self.ends_with)
        return all(text is None or len(shown_form(text)) < self.longest for text in texts)

    @property
    def word_limits(self) -> tuple[int, int | None]:
        """Words at least and at most (None: any number)."""
        if self.words is not None:
            return self.words, self.words
        return self.min_words or 1, self.max_words

    def filters(self, vocabulary: NameVocabulary, prompt_length: int, known: Collection[str]) -> list[NameFilter]:
        """The filters for these rules, and those that every name has; ``known`` are normal forms.

        Raises:
            ValueError: a filter cannot be made, such as for a regex that matches no name.
        """
        from flash_experts.generation.filters import base, limits, regex, text

        place = vocabulary, prompt_length
        texts = (self.starts_with, self.ends_with, self.contains, _GAP.sub("", self.pattern or ""))
        given = "".join(filter(None, texts))
        alphabet = text_rules.CARD_ALPHABET | set(shown_form(given)) | set(given.lower())
        least, most = self.word_limits
        found: list[NameFilter] = [
            base.AllowedCharacters(*place, alphabet),
            base.WellFormed(*place),
            text.NoRepeatedWords(*place),
            base.KnownNameFilter(*place, self._given_texts().union(known)),
        ]
        if self.banned_words:
            found.append(text.BannedWords(*place, self.banned_words))
        found += [text.UNWANTED[check](*place) for check in self._unwanted()]
        if self.alliterate:
            found.append(text.Alliterates(*place))
        if self.starts_with is not None:
            found.append(text.StartsWith(*place, self.starts_with))
        if self.whole_regex is not None:
            found.append(regex.MatchesRegex(*place, self.whole_regex, self.longest, alphabet, self._as_regexes()))
        if self.has_text_after_gap:
            before, *parts = _GAP.split(shown_form(self.pattern or ""))
            ends = bool(parts[-1].strip())
            found.append(text.LeadsTo(*place, before, [part for part in parts if part.strip()], ends))
        if self.contains is not None:
            found.append(text.Contains(*place, self.contains, self.longest))
        if self.ends_with is not None:
            found.append(text.EndsWith(*place, self.ends_with, self.longest))
        if least > 1:
            found.append(limits.MinWords(*place, least))
        if self.min_length is not None:
            found.append(limits.MinLength(*place, self.min_length))
        if most is not None:
            found.append(limits.MaxWords(*place, most))
        # A barely trained model never ends a name: with drops=True, its names would all be dropped.
        return [*found, limits.MaxLength(*place, self.longest, drops=self.max_length is not None)]

    def held_by(self, text: str) -> bool:
        """Whether a formatted name follows all rules but ``regex``, ``pattern`` and ``min_distance``."""
        low, (least, most), num_words = text.lower(), self.word_limits, len(text.split())
        words = text_rules.words_of(text)
        return (
            (self.min_length or 1) <= len(text) <= self.longest
            and least <= num_words <= (most or num_words)
            and low.startswith(shown_form(self.starts_with or "").lower())
            and (" " + low).endswith(_spaced(self.ends_with))
            and _spaced(self.contains) in " " + low
            and (not self.alliterate or text_rules.alliterates(text))
            and normal_form(text) not in self._given_texts()
            and not {normal_form(word) for word in self.banned_words}.intersection(words)
            and not any(text_rules.found_in(check, text) for check in self._unwanted())
        )

    def _given_texts(self) -> frozenset[str]:
        """Normal forms of the texts that names have in them: a name has more letters than such a text."""
        texts = (self.starts_with, self.contains, self.ends_with)
        return frozenset(normal_form(text) for text in texts if text is not None) - {""}

    def describe(self) -> str:
        rules = {each.name: (getattr(self, each.name), each.default) for each in fields(Constraints)}
        given = [f"{name}={value!r}" for name, (value, default) in rules.items() if value not in (default, [])]
        limit = [] if self.max_length else [f"max_length={self.longest}"]
        return ", ".join([*given, *limit, "no known card's name"])

    def _check_pattern(self) -> None:
        if self.pattern is None:
            return
        if self.regex is not None:
            raise ValueError("pattern and regex both describe the whole name: give one of them")
        if not _GAP.search(self.pattern):
            raise ValueError(f"pattern {self.pattern!r} has no gap: write ___ where words are to be filled in")
        parts = _GAP.split(shown_form(self.pattern))
        for place, part in enumerate(parts):
            if (found := text_rules.BAD_MARKS.search(part)) is not None:
                raise ValueError(f"pattern {self.pattern!r}: no name has {found[0]!r} in it")
            _check_characters(f"pattern {self.pattern!r}", part, begins_word=place == 0 or part[:1] == " ")
            _check_kept(f"pattern {self.pattern!r}", part, is_first=place == 0, is_last=place == len(parts) - 1)
            self._check_unwanted("pattern", part)

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
        if (found := text_rules.BAD_MARKS.search((" " if name == "starts_with" else "") + shown)) is not None:
            raise ValueError(f"{name} {shown!r}: no name has {found[0]!r} in it")
        begins_word = name == "starts_with" or text[0].isspace()
        _check_characters(f"{name} {shown!r}", shown, begins_word)
        self._check_unwanted(name, shown)
        self._check_banned(name, text)
        if name == "ends_with":
            last, is_word = shown.split()[-1], _spaced(text)[0] == " " or " " in shown
            if shown[-1] in text_rules.OPEN_END or (is_word and last.lower() in text_rules.DANGLING_WORDS):
                raise ValueError(f"ends_with {shown!r}: no name ends on {last!r}")
        is_first = name == "starts_with"
        _check_kept(f"{name} {shown!r}", shown if is_first else _spaced(text), is_first, is_last=name == "ends_with")
        if (
            self.alliterate
            and name == "starts_with"
            and len(shown.split()) > 1
            and not text_rules.alliterates(shown, least=1)
        ):
            raise ValueError(f"starts_with {shown!r} does not alliterate")

    def _check_banned(self, name: str, text: str) -> None:
        """Only whole words are banned: the first may be the end of a word, and the last its start."""
        words = text_rules.words_of(text)
        first = 0 if name == "starts_with" or text[0].isspace() else 1
        last = len(words) if name == "ends_with" else len(words) - 1
        if found := {normal_form(word) for word in self.banned_words}.intersection(words[first:last]):
            raise ValueError(f"{name} {shown_form(text)!r} has the banned word {min(found)!r}")

    def _check_unwanted(self, name: str, shown: str) -> None:
        for field, what, check in _UNWANTED:
            if getattr(self, field):
                continue
            # "Ass" may still become "Assassin"; the words before the last are final.
            is_unfinished = name != "ends_with" and check(shown) == "refused"
            if text_rules.found_in(check, shown.rpartition(" ")[0] if is_unfinished else shown):
                raise ValueError(f"{name} {shown!r} is among the {what}: set {field} to have it in names")

    def _unwanted(self) -> list[text_rules.Check]:
        return [check for field, _, check in _UNWANTED if not getattr(self, field)]

    def _as_regexes(self) -> list[str]:
        """The other constraints as regular expressions, so that the automaton of ``regex`` detects contradictions."""
        least, most = self.word_limits
        found = []
        if least > 1 or most is not None:
            found.append(rf"[^ ]+( [^ ]+){{{least - 1},{'' if most is None else most - 1}}}")
        if self.min_length is not None:
            found.append(rf".{{{self.min_length},}}")
        if self.starts_with is not None:
            found.append(f"(?i:{_escaped(shown_form(self.starts_with))}).*")
        for text, after in ((self.ends_with, ""), (self.contains, ".*")):
            if text is not None:
                before = "(.* )?" if text[0].isspace() else ".*"
                found.append(f"{before}(?i:{_escaped(shown_form(text))}){after}")
        return found


def _check_characters(what: str, text: str, begins_word: bool) -> None:
    if (found := text_rules.unknown_character(text, begins_word)) is not None:
        raise ValueError(f"{what}: no card's name has {found!r} in it")


def _check_kept(what: str, text: str, is_first: bool, is_last: bool) -> None:
    """Raises a ValueError if formatting removes a text from each name, as that of "//"."""
    sample = ("" if is_first else "X") + text + ("" if is_last else "x")
    if text.lower() not in text_rules.format_name(sample).lower():
        raise ValueError(f"{what}: names are written as on cards, which have no {text.strip()!r} there")


def _spaced(text: str | None) -> str:
    return "" if text is None else (" " if text[:1].isspace() else "") + shown_form(text).lower()


def _as_on_cards(text: str, begins_word: bool) -> str:
    """A regular expression for a text as given, with small or capital letters where words begin."""
    starts = {match.start() - 1 for match in _WORD_START.finditer((" " if begins_word else "x") + text)}
    forms = ({text[i].lower(), text[i].upper()} if i in starts else {text[i]} for i in range(len(text)))
    return "".join(f"[{_escaped(''.join(sorted(form)))}]" if len(form) > 1 else _escaped(*form) for form in forms)


def _escaped(text: str) -> str:
    return "".join(f"\\u{{{ord(character):x}}}" for character in text)
