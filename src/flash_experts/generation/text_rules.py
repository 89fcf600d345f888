"""Names as text: how cards print them, and what none has in it. Shared by the token filters and the final check.

The model's capitals stay unless they are wrong. A name without any capital gets all that cards would print.
"""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable
from functools import cache, lru_cache
from importlib.resources import files
from typing import Literal

from flash_experts.data.names import normal_form, shown_form

# Lower case within a name ("Wrath of the Reef"), capitalized as first or last word and after a colon.
SMALL_WORDS = frozenset(
    ("a", "an", "and", "as", "at", "but", "by", "for", "from", "in", "into", "of",
     "on", "or", "the", "to", "with")
)  # fmt: skip
# No name ends on one of these. ("Soldier On", "Barge In" and "Squeak By" are cards.)
DANGLING_WORDS = SMALL_WORDS - {"by", "in", "on"}
# Lower case as prepositions, capitalized as part of a verb ("Journey On Foot"): the model's choice stays.
_EITHER = frozenset({"in", "on", "by", "as", "but"})
# Particles of names that stay lower case where they are ("Starke en-Vec", "Fearless l'Cie").
_PARTICLE = re.compile(r"(?:en|il|bin)-|(?:de|da|del|di|du|van|von|der|den|le|la|el|al|yn|upon|l|d)(?:'|$)")

# In names without capitals. After a dash: "Two-Headed", but "Will-o'-the-Wisp" (of real names 887 and 14).
_PART = re.compile(r"(?<=-)[^\W_]+|(?<=\b[do]')[^\W_]{2,}")
_LOW_PARTICLE = re.compile(r"(?:en|il|bin)-")
_ROMAN = re.compile(r"(?:i{2,3}|iv|vi{1,3}|ix)$")

_LOOSE_START = " ,:;-/.!?&"
_LOOSE_END = " ,:;-/&"


def format_name(text: str) -> str:
    """A name as printed on a card; of "one // other" only the first face. Idempotent.

    " wrath  Of the reef ,tide-caller "  ->  "Wrath of the Reef, Tide-caller"
    """
    text = shown_form(text)
    face = next((face for face in re.split(r"/{2,}", text) if face.strip(_LOOSE_START)), "")
    face = re.sub(r" +(?=[,:;])", "", face)
    face = re.sub(r"(?<=[,;])(?=[^\s\d,;:])", " ", face)
    face = face.lstrip(_LOOSE_START).rstrip(_LOOSE_END)
    if face.islower():
        face = " ".join(_without_capitals(word) for word in face.split())
    words = face.split()
    last = len(words) - 1
    formatted: list[str] = []
    for place, word in enumerate(words):
        if place == 0 or formatted[-1].endswith((":", "!", "?")):
            formatted.append(_capital(word))
        else:
            formatted.append(_word(word, is_last=place == last, after_comma=formatted[-1].endswith(",")))
    return " ".join(formatted)


def _word(word: str, is_last: bool, after_comma: bool) -> str:
    """A word after the first. After a comma, cards have both cases: "Aang, the Last", "Aang, A Lot"."""
    low = word.lower()
    if low in SMALL_WORDS and not is_last:
        return word if after_comma or low in _EITHER else low
    return word if _PARTICLE.match(word) else _capital(word)


def _without_capitals(word: str) -> str:
    """With capitals after the first letter: "two-headed" -> "two-Headed"."""
    if _ROMAN.match(word):
        return word.upper()
    parts = _PART.sub(lambda part: part[0] if part[0] in SMALL_WORDS | {"o"} else _capital(part[0]), word)
    is_name = not _LOW_PARTICLE.match(word) and _PARTICLE.match(word)
    return _capital(parts) if is_name else parts


def _capital(word: str) -> str:
    """Its first letter as a capital ("lava-Axe" -> "Lava-Axe", "'em" -> "'Em")."""
    for place, character in enumerate(word):
        if character.isalnum():
            high = character.upper()
            return word[:place] + (high if len(high) == 1 else character) + word[place + 1 :]
    return word


# ------------------------------------------------------------------------------------------------ letters and words

# Letters and punctuation of real cards. Digits, "&", "." and quotes are rare and mostly from other franchises: pass an
# alphabet to allow them. Each letter has its capital, because formatting capitalizes names.
_ACCENTED = "áàâäéèêëíîïñóôöúûü"
CARD_ALPHABET = frozenset(string.ascii_letters + " ,'-:!?" + _ACCENTED + _ACCENTED.upper())
# All characters of known names, jokes and other franchises included. No name can be asked for with another one.
KNOWN_CHARACTERS = frozenset(string.ascii_letters + string.digits + " !\"&'()+,-./:;?_" + "àáâäéíîïñóöúûüÉō")
# Bytes of incomplete characters, as `NameVocabulary` decodes them.
PARTIAL_BYTES = "".join(map(chr, range(0xDC80, 0xDD00)))
# "refused": the last word must not end here. "dropped": no longer word that starts with it is acceptable either.
Verdict = Literal["refused", "dropped"] | None
Check = Callable[[str], Verdict]  # takes a text, perhaps unfinished
# On the profanity list but also on serious cards ("Wrath of God", "Strip Mine", "Hoar Shade"; 135 names): allowed.
PRINTED_ON_CARDS = frozenset(
    """bestial damn dong dummy god hell hoar kill lust murder naked organ pawn revue sadist sandbar slave snatch sniper
    snuff strip stroke thug tosser weed""".split()
)
# Stems that are refused inside words. The lookarounds spare "scrap", "snigger", "congenital" and the like
# (the Scunthorpe problem); tests check them against every word of the real cards.
_INSIDE = r"""bitch|blowjob|bollock|bukkak|circlejerk|clitor|cocksuck|cunnilin|(?<!s)cunt|dildo|ejaculat|faggot|fellat|
    fuck|gangbang|(?<!con)genital|handjob|hentai|hitler|jackass|jizz|masturbat|menstru|molest|motherf|nipple|orgasm|
    paedophil|pedophil|penis|pissed|pissing|porn|prostitut|pussy|schlong|scrotum|sexual|slut|smegma|sperm|testicle|
    uterine|uterus|vagin(?!g)|vulva|whore|(?<!s)crap|(?<!monte)negro|(?<!s)nigg|(?<!ka)shit|(?<!s)wank"""
# Stems that are refused only where a word starts: "drape", "Essex" and "assassin" are fine.
_AT_START = r"""arse(?!n)|ass(?:face|hat|hole|munch|wipe)|boob(?!y)|butt(?:fuck|head|hole|ock|plug)|
    cock(?!at|er|l|ney|pit|roach|sc|sp|sure|t|y)|dick(?!en)|fart(?!h)|homo(?:phob|sex)|horny|incest|kike|labia|nazi|
    nude|piss|poop|pub(?:es|ic)|puss(?:y|ie)|queer|rape|raping|rapist|rectal|rectum|retard|semen|sex(?!t)|sodom|
    tampon|tit(?:s$|t[iy])|turd|twat|urin(?:al|e)"""
_STEMS = re.compile(f"(?:{_INSIDE})|^(?:{_AT_START})", re.VERBOSE)
# On the lists of places but also words of fantasy or everyday English: allowed.
_NO_PLACES = frozenset(
    """act anchorage arctic baku brokenhill canary casey cayenne center central channelislander currie chile
    christmasisland
    cookislander cookislands coralharbour
    eastern east easter flyingfishcove general goosebay harbin island islander
    ivorycoast jersey knox lowerprinces midway mountain muscat north oral pacific phoenix polish rainyriver resolute
    male reunion roadtown sitka sofia south southpole stateof swiftcurrent tellcity thebottom thevalley thunderbay troll
    turkey virgin virginislands wake wellington west westisland yap""".split()
)
_NATIONS = """america american arabia arabian britain england english europe european scotland scottish wales
    persia persian roman parisian texan californian welsh""".split()  # on the lists only within longer names
_START_OF_WORD = 6  # letters of a place that no word may start with ("Norwaybound")
# Longer words of everyday English that start with a place.
_NO_STARTS = frozenset("german japan moroni pacific paris shanghai".split())
_COUNTRY_FACT = re.compile(r'"(?:name|capital|demonym)": "([^"]*)"')
_USA = "united_states_of_america.json"
_CONTINENTS = ("Africa", "America", "Asia", "Atlantic", "Australia", "Europe", "Indian", "Pacific")
_MOST_WORDS = 4  # words of a place: "Dar es Salaam"
WORD = re.compile(r"[^\W_]+")
# Spaces and punctuation that no name has.
BAD_MARKS = re.compile(rf" [ ,:;!?.\-]|[,:;][^ ]|-[^\w{PARTIAL_BYTES}]|''|[!?][\w']")
OPEN_END = " ,:;-'&"  # no name ends with one of these


def found_in(check: Check, name: str) -> bool:
    """Whether a finished name has a word that a check refuses."""
    return any(check(name[: word.end()]) for word in WORD.finditer(name))


@cache
def profane_words() -> frozenset[str]:
    """Normal forms of the single words on better-profanity's list (MIT), except `PRINTED_ON_CARDS`."""
    lines = (files("better_profanity") / "profanity_wordlist.txt").read_text("utf-8").splitlines()
    words = {normal_form(line) for line in lines if line.strip().isalnum()}
    return frozenset(words - PRINTED_ON_CARDS - {""})


def profanity_at_end(name: str) -> Verdict:
    """Whether the last word of a text, perhaps unfinished, has a swear word or slur in it."""
    return _profanity_of(name.rpartition(" ")[2])


@lru_cache(maxsize=1 << 16)
def _profanity_of(word: str) -> Verdict:
    """Checks a word as a whole, and its part after the last hyphen or apostrophe."""
    parts = {normal_form(word), *map(normal_form, WORD.findall(word)[-1:])}
    if any(_STEMS.search(part) for part in parts):
        return "dropped"
    return "refused" if any(_listed(part, profane_words()) for part in parts) else None


@cache
def real_places() -> frozenset[str]:
    """Normal forms of places, except words of fantasy or everyday English.

    Countries, capitals, demonyms and states of the USA from countryinfo (MIT), large cities and continents from tzdata
    (Apache-2.0).
    """
    found = set(_NATIONS)
    for country in (files("countryinfo") / "data").iterdir():
        if country.name.endswith(".json"):
            text = country.read_text("utf-8")
            facts = _COUNTRY_FACT.findall(text)
            if country.name == _USA:
                facts += json.loads(text)["provinces"]
            found |= _normal(part for fact in facts for part in re.split("[,/(]", fact))
    zones = [zone.split("/") for zone in (files("tzdata") / "zones").read_text("utf-8").split()]
    found |= _normal(part.replace("_", " ") for zone in zones if zone[0] in _CONTINENTS for part in zone)
    return frozenset(place for place in found - _NO_PLACES if len(place) > 3)


@cache
def _starts_of_places() -> frozenset[str]:
    return frozenset(place for place in real_places() - _NO_STARTS if len(place) >= _START_OF_WORD)


@lru_cache(maxsize=1 << 16)
def place_at_end(name: str) -> Verdict:
    """Whether a text, perhaps unfinished, ends with a place of the real world of up to four words."""
    words = [normal_form(word) for word in WORD.findall(name.replace("'", ""))[-_MOST_WORDS:]]
    if not words:
        return None
    starts, last = _starts_of_places(), words[-1]
    if any(last[:length] in starts for length in range(_START_OF_WORD, len(last) + 1)):
        return "dropped"
    endings = ("".join(words[-count:]) for count in range(1, len(words) + 1))
    return "refused" if any(_listed(ending, real_places()) for ending in endings) else None


def _normal(texts: Iterable[str]) -> set[str]:
    return {normal_form(text) for text in texts if text.isascii() or text.isprintable()}


def _listed(word: str, words: frozenset[str]) -> bool:
    return word in words or (len(word) > 4 and word[-1] == "s" and word[:-1] in words)


def alliterates(text: str, least: int = 2) -> bool:
    """Whether a text has ``least`` words, all with the same first letter; small words do not count."""
    forms = [normal_form(word) for word in text.split() if word.lower() not in SMALL_WORDS]
    return len(forms) >= least and len({form[:1] for form in forms}) == 1 and all(forms)


def unknown_character(text: str, begins_word: bool) -> str | None:
    """The first character that no known name has in any case, or as a capital where a word of the text begins with it;
    ``begins_word``: whether the text itself does."""
    for character in text:
        if KNOWN_CHARACTERS.isdisjoint((character, character.lower(), character.upper())):
            return character
    begun = text.split() if begins_word else text.split()[1:]
    initials = (next(filter(str.isalnum, word), "").upper() for word in begun)
    return next((initial for initial in initials if not KNOWN_CHARACTERS.issuperset(initial)), None)


def words_of(text: str) -> list[str]:
    """The words of a text: letters and digits, in normal form."""
    return [normal_form(word) for word in WORD.findall(text)]
