"""Builds data/told: the phrases of data/english that are most like names, each told what card it could be.

    pip install scikit-learn
    python scripts/tell_phrases.py                          # after scripts/build_pretraining_text.py

A model that has read half a million phrases with nothing told learns English and not to listen: 22,000 names are too
few to teach what makes a name red or a land. So here

- the phrases are ordered by how much likelier an n-gram model of the training names finds them than one of the phrases
  (Moore and Lewis 2010, Intelligent selection of language model training data), and the first ones are kept;
- a classifier of the training names' words and character n-grams says of each what type and color its card would have.
  One pair is drawn, by the square of its probability: what is doubtful is told seldom;
- where most training cards that have a word in their names share a subtype ("elvish": Elf), so do phrases with it.

This is pseudo-labelling (Lee 2013): the classifier, which reads whole names, teaches the model, which writes them
letter by letter. It sees the training split alone, so nothing held out is told. Names and rules text stay as they are
in data/english; names are read so often as is asked for.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from build_pretraining_text import NAME_COPIES, write

from flash_experts.data.cards import TYPES, Card
from flash_experts.data.prepare import load_split
from flash_experts.evaluation.ngram import KneserNey

ORDER = 5  # of the n-gram models that choose phrases
SHARPNESS = 2.0  # power of the classifier's probabilities
FEWEST = 20  # cards of a pair of type and color
FEWEST_WORDS = 3  # training names that have a word which tells a subtype
PAIRS_AT_ONCE = 20_000  # phrases classified at once
Pair = tuple[str, tuple[str, ...]]  # type, and colors: one or none


def name_likeness(phrases: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.float64]:
    """Bits per character by which an n-gram model of names is ahead of one of (half the) phrases, for each phrase."""
    alphabet = sorted(set("".join([*phrases, *names])))
    of_names, of_phrases = KneserNey(names, ORDER, alphabet), KneserNey(phrases[::2], ORDER, alphabet)
    bits = [
        np.array([-np.log2(probabilities).mean() for probabilities in model.symbol_probabilities(phrases)])
        for model in (of_names, of_phrases)
    ]
    return bits[1] - bits[0]


def pair_of(card: Card) -> Pair | None:
    """What the classifier tells of a name: None for cards of several colors, or of types that are no cards' alone."""
    types = [one for one in TYPES if one in card.types]
    if not types or card.colors is None or len(card.colors) > 1:
        return None
    return ("Creature" if "Creature" in types else types[0]), card.colors


def train_classifier(cards: Sequence[Card]) -> tuple[Any, list[Pair]]:
    """A logistic regression from names to pairs; and the pairs in the order of its classes."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import SGDClassifier
    from sklearn.pipeline import make_pipeline, make_union

    counts = Counter(pair_of(card) for card in cards)
    pairs = [pair for pair, count in sorted(counts.items(), key=str) if pair is not None and count >= FEWEST]
    index = {pair: place for place, pair in enumerate(pairs)}
    known = [(card.name, index[pair]) for card in cards if (pair := pair_of(card)) in index]
    grams = make_union(
        TfidfVectorizer(min_df=2, sublinear_tf=True, dtype=np.float32),
        TfidfVectorizer(analyzer="char_wb", ngram_range=(2, 5), min_df=3, sublinear_tf=True, dtype=np.float32),
    )
    model = SGDClassifier(loss="log_loss", alpha=2e-5, max_iter=12, tol=None, random_state=0, average=True)
    names, labels = zip(*known, strict=True)
    return make_pipeline(grams, model).fit(names, labels), pairs


def telling_words(cards: Sequence[Card]) -> dict[str, tuple[str, ...]]:
    """For each word (in lower case) the subtypes that more than half of the creatures named with it have."""
    seen: Counter[str] = Counter()
    shared: Counter[tuple[str, str]] = Counter()
    for card in cards:
        if card.types == ("Creature",):
            for word in set(card.name.lower().replace(",", "").split()):
                seen[word] += 1
                shared.update((word, subtype) for subtype in card.subtypes)
    told: dict[str, tuple[str, ...]] = {}
    for (word, subtype), count in shared.items():
        if count >= FEWEST_WORDS and count > seen[word] / 2:
            told[word] = (*told.get(word, ()), subtype)
    return told


def tell(phrases: Sequence[Card], cards: Sequence[Card], rng: np.random.Generator) -> list[Card]:
    """The phrases with types, subtypes and colors of cards that they could be the names of."""
    classifier, pairs = train_classifier(cards)
    words = telling_words(cards)
    told = []
    for start in range(0, len(phrases), PAIRS_AT_ONCE):
        some = phrases[start : start + PAIRS_AT_ONCE]
        weight_NP = classifier.predict_proba([phrase.name for phrase in some]) ** SHARPNESS
        below_NP = np.cumsum(weight_NP, axis=1)
        drawn_N = (rng.random((len(some), 1)) * below_NP[:, -1:] > below_NP).sum(axis=1)
        for phrase, place in zip(some, drawn_N.tolist(), strict=True):
            kind, colors = pairs[place]
            subtypes: tuple[str, ...] = ()
            if kind == "Creature":
                found = [subtype for word in phrase.name.lower().split() for subtype in words.get(word, ())]
                subtypes = tuple(dict.fromkeys(found))
            line = f"{kind} — {' '.join(subtypes)}" if subtypes else kind
            told.append(replace(phrase, type_line=line, types=(kind,), subtypes=subtypes, colors=colors))
    return told


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument(
        "--english", type=Path, default=Path("data/english"), help="what build_pretraining_text.py wrote"
    )
    parser.add_argument("--data", type=Path, default=Path("data/mtg"), help="folder that prepare wrote")
    parser.add_argument("--phrases", type=int, default=250_000, help="phrases that are kept")
    parser.add_argument("--name-copies", type=int, default=NAME_COPIES + 1, help="how often the names stand there")
    parser.add_argument("--seed", type=int, default=0, help="of the types and colors drawn")
    parser.add_argument("--out", type=Path, default=Path("data/told"))
    args = parser.parse_args()
    train, validation = (load_split(args.data, split) for split in ("train", "validation"))
    texts = load_split(args.english, "train")
    phrases = [card for card in texts if not card.source_id.startswith("embedded:")]
    likeness = name_likeness([card.name for card in phrases], [card.name for card in train])
    kept = [phrases[place] for place in sorted(np.argsort(-likeness, kind="stable")[: args.phrases].tolist())]
    told = tell(kept, train, np.random.default_rng(args.seed))
    rules = texts[len(phrases) : len(texts) - NAME_COPIES * len(train)]
    write(args.out, {"train": [*told, *rules, *train * args.name_copies], "validation": validation})
    print(f"{args.out}: {len(told):,} of {len(phrases):,} phrases told, names {args.name_copies} times")


if __name__ == "__main__":
    main()
