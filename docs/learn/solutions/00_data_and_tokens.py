# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Solutions of chapter 0, data and tokens

# %%
import math
import random
import sys
from collections.abc import Iterator
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import numpy as np
from chapter_claims import holds, verdict
from chapter_tokens import tokens_of, unigram_bits
from chapter_tools import cards, table, teacher_names
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist
from tokenizers import pre_tokenizers

from flash_experts.data import splits
from flash_experts.data.names import normal_form
from flash_experts.data.splits import families, near_pairs, split_by_family
from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.evaluation.ngram import KneserNey, sample_mixture

parts = {split: cards(split) for split in ("train", "validation", "test_iid", "test")}
train, test = ([card.name for card in parts[split]] for split in ("train", "test"))

# %% [markdown]
# ## 1. Longest match

# %%
cut = pre_tokenizers.ByteLevel(add_prefix_space=False)


def longest_match(text: str, vocabulary: dict[str, int]) -> list[str]:
    units = []
    for word, _ in cut.pre_tokenize_str(text):
        start = 0
        while start < len(word):
            end = next(end for end in range(len(word), start, -1) if word[start:end] in vocabulary)
            units.append(word[start:end])
            start = end
    return units


rows, shorter, differ = [], {}, {}
for size in (512, 2048, 8192):
    tokenizer = train_tokenizer([" " + name for name in train], size)
    vocabulary = tokenizer.get_vocab()
    pairs = [(tokenizer.tokenize(" " + name), longest_match(" " + name, vocabulary)) for name in test]
    differ[size] = np.mean([a != b for a, b in pairs])
    by_merges, by_length = (np.mean([len(pair[side]) for pair in pairs]) for side in (0, 1))
    shorter[size] = 1 - by_length / by_merges
    rows.append([f"{size:,}", f"{differ[size]:.0%}", f"{by_merges:.2f}", f"{by_length:.2f}", f"{shorter[size]:+.1%}"])
table(["tokens", "names cut otherwise", "tokens a name, merges", "longest match", "saved"], rows)
example = next(pair for pair in pairs if pair[0] != pair[1])
print("by merges:", *example[0], "  longest match:", *example[1])
holds("a good part of the names is cut otherwise", min(differ.values()) > 0.05)
holds("and yet the two differ by less than 5% in length", max(map(abs, shorter.values())) < 0.05)

# %% [markdown]
# The order of merges is greedy as well, so neither cut is the shortest one. Both spell the same text. But a model must be used with the cut that it was trained with: the other one gives it sequences that it
# has never seen.
#
# ## 2. A tokenizer that has read the test

# %%
characters = sum(len(name) + 1 for name in test)
rows, found = [], {}
for label, names in {"training names": train, "training and test names": [*train, *test]}.items():
    tokenizer = train_tokenizer([" " + name for name in names], 8192)
    train_L, test_L = tokens_of(tokenizer, train), tokens_of(tokenizer, test)
    found[label] = len(test_L) / len(test) - 1, unigram_bits(train_L, test_L, len(tokenizer)) / characters
    rows.append([label, *(f"{value:.3f}" for value in found[label])])
table(["merges from", "tokens a test name", "bits per character"], rows)
(length, bits), (leaked_length, leaked_bits) = found.values()
print(f"tokens {leaked_length / length - 1:+.1%}, bits per character {leaked_bits / bits - 1:+.1%}")
holds("test names become shorter", leaked_length < length)
holds("and seem easier", leaked_bits < bits)

# %% [markdown]
# The unigram model has never counted a test name, and yet it seems better: the vocabulary carries their rare words. That is a leak, and a
# tokenizer of the training names avoids it for nothing.
#
# ## 3. Which rule finds the relatives?
#
# The package's rules, with one replaced by nothing at a time. Relatives are those of all three rules.

# %%
every = [card for part in parts.values() for card in part]
names = [card.name for card in every]
close = list(near_pairs([normal_form(name) for name in names]))  # the slow rule, once


def cached(keys: list[str]) -> Iterator[tuple[int, int]]:
    return iter(close)


def no_pairs(keys: list[str]) -> Iterator[tuple[int, int]]:
    return iter(())


def no_comma(name: str) -> str:
    return name.replace(",", "")


def leaks(**without: object) -> tuple[int, float]:
    """The families, and the share of test names with a relative in training, under the package's split with other rules."""
    saved = {name: getattr(splits, name) for name in without}
    for name, value in without.items():
        setattr(splits, name, value)
    count, split = len(families(names)), split_by_family(every)
    for name, value in saved.items():
        setattr(splits, name, value)
    side = {card.name: part for part, some in split.parts.items() for card in some}
    tested = [index for index, name in enumerate(names) if side[name] == "test"]
    learns = [
        any(side[names[other]] in ("train", "test_iid") for other in groups[family_of[index]]) for index in tested
    ]
    return count, float(np.mean(learns))


splits.near_pairs = cached
groups = families(names)
family_of = {index: place for place, group in enumerate(groups) for index in group}
changes: dict[str, dict[str, object]] = {
    "all three": {},
    "without rare words": {"RARE_WORD": range(0)},
    "without legends": {"shown_form": no_comma},
    "without small distances": {"near_pairs": no_pairs},
}
results = {label: leaks(**change) for label, change in changes.items()}
splits.near_pairs = near_pairs
table(["rules", "families", "test names with a relative in training"],
      [[label, f"{count:,}", f"{share:.0%}"] for label, (count, share) in results.items()])  # fmt: skip
holds("with all three there is no leak", results["all three"][1] == 0)
holds("every rule finds families that the others do not", all(of[0] > len(groups) for of in list(results.values())[1:]))
holds("rare words prevent most leaks", max(results, key=lambda label: results[label][1]) == "without rare words")

# %% [markdown]
# Most families are held together by rare words. Legends often share a rare word as well, so that rule alone adds little.
#
# ## 4. Near misses
#
# Neither list has real cards: they were removed from the teacher's names, and are removed from the n-gram's, which has read the
# training names alone. A sample of the training names shows how often each comes near to names that it has read.


# %%
def near(made: list[str], real: list[str]) -> int:
    """How many made names are within a fifth of the longer one's length of a real one, in normal form."""
    count, length_of = 0, np.array([len(name) for name in real])
    for start in range(0, len(made), 1000):
        some = made[start : start + 1000]
        most = np.maximum(length_of, np.array([len(name) for name in some])[:, None]) // 5
        away = cdist(some, real, scorer=Levenshtein.distance, score_cutoff=9, dtype=np.uint8)
        count += int((away <= np.minimum(most, 9)).any(axis=1).sum())
    return count


COUNT = 15_000
keys = {split: [normal_form(card.name) for card in part] for split, part in parts.items()}
known = set().union(*keys.values())
drawn = map(normal_form, sample_mixture([KneserNey(train, 6)], 2 * COUNT, np.random.default_rng(0)))
home = [split for split, part in parts.items() for _ in part]
apart = not any({home[i], home[j]} in ({"train", "test"}, {"test_iid", "test"}) for i, j in close)
holds("no training name is that near to a test name, so a near miss is not a copy of one", apart)
makers = {
    "teacher": [normal_form(card.name) for card in teacher_names(COUNT)],
    "n-gram": [key for key in dict.fromkeys(drawn) if key and key not in known][:COUNT],
}
sample = random.Random(0).sample(keys["train"], len(keys["test"]))
counts = {maker: (near(made, keys["test"]), near(made, sample)) for maker, made in makers.items()}
rows = [[maker, f"{len(makers[maker]):,}", *of, f"{of[0] / of[1]:.2f}"] for maker, of in counts.items()]
table(["made by", "names", "near a test name", f"near one of {len(sample):,} training names", "ratio"], rows)
holds("no made name is a real one", not any(known.intersection(made) for made in makers.values()))
(a, b), (c, d) = counts.values()
middle = math.log(a / b / (c / d))
half = 1.96 * math.sqrt(1 / a + 1 / b + 1 / c + 1 / d)  # as for counts of rare events
print(f"the teacher's ratio over the n-gram's: {math.exp(middle):.2f}, "
      f"95% interval {math.exp(middle - half):.2f} to {math.exp(middle + half):.2f}:",
      verdict(middle - half, middle + half, "the teacher comes near to test names less often than its training explains",
              "the teacher comes near to test names more often than its training explains", "no difference shown"))  # fmt: skip

# %% [markdown]
# An n-gram cannot have read a test name. A teacher that had memorized test names from the web would come near to them more often, for
# each near miss of a training name. The comparison is rough: the counts are small, and the more a maker copies from training, the
# smaller is its ratio. And it does not see a teacher that finds test names likelier without writing them. For that one needs
# cards printed after its pretraining ([results](../../results.md)).
