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
# # 0. Data and tokens
#
# **The question: what does the model read, and how is it kept honest?**
#
# A model sees neither cards nor letters. It sees integers, and their order. This chapter follows a card from the source file to
# those integers: cleaning, tokens, splits, the training row. The tokenizer decides what a loss is counted in, and the split decides
# what a held-out name is. The other chapters take both as given, so this one is first. The [glossary](../glossary.md) has the terms.
# Lines that begin with `[holds]` are sentences of this text that the run has checked.

# %%
import json
import random
from collections import Counter
from collections.abc import Mapping
from itertools import chain, pairwise

import matplotlib.pyplot as plt
import numpy as np
import torch
from chapter_claims import holds
from chapter_models import mean_and_error
from chapter_tokens import bits_per_character_of, draw_lines, draw_row, halves, tokens_of, unigram_bits
from chapter_tools import cards, load_base, quote, show, shown, table, teacher_names
from tokenizers import pre_tokenizers

from flash_experts.data.cleaning import clean
from flash_experts.data.names import normal_form
from flash_experts.data.packing import encode_cards, name_nats, pack
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.data.sources import load_source
from flash_experts.data.splits import families, split_by_family
from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.evaluation.metrics import bits_estimate
from flash_experts.training.training_config import TrainingConfig

model, tokenizer = load_base()
parts = {split: cards(split) for split in ("train", "validation", "test_iid", "test")}
names_of = {split: [card.name for card in part] for split, part in parts.items()}
train, test = names_of["train"], names_of["test"]
print("names:", ", ".join(f"{len(part):,} in {split}" for split, part in parts.items()))

# %% [markdown]
# ## The picture first
#
# Three cards of one training row, a line for each. A box is a token that the model reads, with its position below it. The blue text
# is what it has to predict there. Grey boxes have no target: the prompt is read and not learned.

# %%
three = encode_cards([parts["train"][index] for index in (0, 4, 6)], tokenizer)
figure, axis = plt.subplots(figsize=(12, 3.4))
draw_row(axis, three, tokenizer)
axis.set_title("inputs (boxes) and targets (blue) of three cards")
show(figure, "00_row")
row = pack(three)
print(f"{row.num_tokens} tokens are read, {len(row.labels)} have a target")
holds("positions begin at 0 in each name", all(row.position_ids[0, start] == 0 for start in row.cu_seq_lens[:-1]))
holds("the targets are the names and their EOS tokens",
      row.labels.tolist() == [token for name in three for token in name.ids[name.prompt_length :]])  # fmt: skip

# %% [markdown]
# ## From a file to names
#
# A source has rows. A row may have two faces, and each face is a name. Cleaning drops what is not a card of the game, and names that
# are there already. Names are compared in their normal form, so a different spelling does not make a name new.

# %%
raw = load_source("embedded").rows
cleaned = clean(raw)
print(f"{len(raw):,} rows, {cleaned.faces:,} faces, {len(cleaned.cards):,} names")
print("dropped:", ", ".join(f"{count:,} {reason}" for reason, count in cleaned.dropped.items()))
alike = "Lim-Dûl's Vault", "Lim-Dul\u2019s  vault"
holds(f"{alike[0]!r} and {alike[1]!r} are one name", len(set(map(normal_form, alike))) == 1)
holds("every face is kept or counted", cleaned.faces == len(cleaned.cards) + sum(cleaned.dropped.values()))
every = list(chain(*names_of.values()))
holds("the four files have all names, each once", sorted(card.name for card in cleaned.cards) == sorted(every))

# %% [markdown]
# ## Bytes and merges
#
# Which units should a model read? **Words** give short sequences, but a new name often has a new word, for which a model of words has
# no number. **Bytes** are 256 units that spell everything, but sequences are long. **Byte-pair encoding** (BPE,
# [Sennrich et al. 2016](https://arxiv.org/abs/1508.07909)) begins with bytes, and makes the most frequent pair of neighbors a new
# unit, again and again:
#
# $$ (a, b) = \underset{(x, y)}{\text{argmax}} \; \sum_w n_w \cdot \#\{i : w_i = x,\; w_{i+1} = y\} \qquad \text{then } a\,b \text{ becomes one unit} $$
#
# | symbol | is |
# | --- | --- |
# | w, n | a word as a sequence of units, and how often it occurs |
# | x, y | two units; of equally frequent pairs the one with the older units is taken |
#
# A regular expression cuts texts into words first, each with the space before it. No merge crosses a word. A byte is shown as a character,
# the space as Ġ.

# %%
cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
text = " Lim-Dûl's Vault"
print([word for word, _ in cut.pre_tokenize_str(text)], f"{len(text)} characters, {len(text.encode())} bytes")


def merged(units: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    """The units of a word after one merge, from left to right."""
    out: list[str] = []
    for unit in units:
        if out and (out[-1], unit) == pair:
            out[-1] += unit
        else:
            out.append(unit)
    return tuple(out)


def learn_merges(count_of: Mapping[str, int], merges: int) -> list[tuple[str, str]]:
    """The merges of words that occur so often, in order. Pairs are counted once, and corrected at each merge."""
    age = {unit: place for place, unit in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    units_of = {word: tuple(word) for word in count_of}
    pairs: Counter[tuple[str, str]] = Counter()
    for word, units in units_of.items():
        for pair in pairwise(units):
            pairs[pair] += count_of[word]
    learned = []
    for _ in range(merges):
        best = max(pairs, key=lambda pair: (pairs[pair], -age[pair[0]], -age[pair[1]]))
        learned.append(best)
        age.setdefault("".join(best), len(age))
        for word in [word for word in count_of if "".join(best) in word]:
            for pair in pairwise(units_of[word]):
                pairs[pair] -= count_of[word]
            units_of[word] = merged(units_of[word], best)
            for pair in pairwise(units_of[word]):
                pairs[pair] += count_of[word]
    return learned


def cut_by_hand(text: str) -> list[str]:
    """The units of a new text: the merges are applied in the order in which they were learned."""
    words = [tuple(word) for word, _ in cut.pre_tokenize_str(text)]
    for pair in by_hand:
        words = [merged(word, pair) for word in words]
    return list(chain(*words))


texts = [" " + name for name in train]  # a name stands after its prompt and a space
by_hand = learn_merges(Counter(word for text in texts for word, _ in cut.pre_tokenize_str(text)), 300)
package = train_tokenizer(texts, 256 + 1 + 300)
theirs = [tuple(pair) for pair in json.loads(package.backend_tokenizer.to_str())["model"]["merges"]]
print("the first merges:", " ".join("+".join(pair) for pair in by_hand[:12]))
print("and the last:    ", " ".join("+".join(pair) for pair in by_hand[-12:]))
quote(train_tokenizer)
holds("the 300 merges by hand are the package's, in the same order", by_hand == theirs)
print(" ".join(cut_by_hand(" Zndrsplt, Eye of Wisdom")))
same = [cut_by_hand(" " + name) == package.tokenize(" " + name) for name in test[:200]]
holds("200 held-out names are cut as the package cuts them", all(same))
odd = " Æther ☃ goblins"
holds("a text that no card has comes back: every byte is known", package.decode(package(odd)["input_ids"]) == odd)
words = {word for name in train for word in name.split()}
iid, new = (np.mean([not words.issuperset(name.split()) for name in names_of[s]]) for s in ("test_iid", "test"))
print(f"{len(words):,} words in training; names with another word: {iid:.0%} of test_iid, {new:.0%} of test")
holds("training's words do not spell a third of test_iid, nor half of test", iid > 1 / 3 and new > 1 / 2)

# %% [markdown]
# ## How many merges, and a loss in which unit?
#
# More merges give shorter sequences, and embeddings a larger share of a model's weights. To see what they do to a loss, take a unigram
# model: each token has the share that it has in training, whatever stands before it.
#
# $$ p_v = \frac{c_v + 1/2}{\sum_u (c_u + 1/2)} \qquad
# \text{bits per token} = \frac{-\sum_{l} \log_2 p_{v_l}}{L} \qquad
# \text{bits per character} = \frac{-\sum_{l} \log_2 p_{v_l}}{\sum_n (\text{characters of name}_n + 1)} $$
#
# | symbol | shape | is |
# | --- | --- | --- |
# | c, p | (V,) | counts in the training names, EOS among them, and shares; V is the size of the vocabulary |
# | v | (L,) | the tokens of all held-out names, each followed by EOS, which counts as a character |
#
# Both have the same sum. The tokenizer sets what the first is divided by, the names alone what the second is.

# %%
width, characters = model.config.n_embd, sum(len(name) + 1 for name in test)
rest = sum(weight.numel() for weight in model.parameters()) - len(tokenizer) * width  # all weights but the embeddings
kinds = {f"{size:,} asked for": train_tokenizer(texts, size) for size in (257, 512, 2048, 8192, 32768)}
RELEASED, rows, found = "the released models'", [], {}
for label, kind in (kinds | {RELEASED: tokenizer}).items():
    V, train_L, test_L = len(kind), tokens_of(kind, train), tokens_of(kind, test)
    lengths, bits = (len(train_L) / len(train) - 1, len(test_L) / len(test) - 1), unigram_bits(train_L, test_L, V)
    found[label] = V, *lengths, bits / len(test_L), bits / characters
    rows.append([label, f"{V:,}", f"{V * width / (V * width + rest):.0%}", *(f"{x:.2f}" for x in found[label][1:])])
table(["tokens", "V", "share of weights", "per name: train", "test", "bits per token", "per character"], rows)
V_K, train_K, test_K, per_token_K, per_character_K = zip(*(found[label] for label in kinds), strict=True)
figure, axes = plt.subplots(1, 2, figsize=(11, 2.8))
scale = {"xscale": "log", "xlabel": "size of the vocabulary", "ylim": (0, None)}
draw_lines(axes[0], V_K, {"training": train_K, "test": test_K}, "o- s--", title="length", ylabel="tokens", **scale)
units = {"bits per token": per_token_K, "bits per character": per_character_K}
draw_lines(axes[1], V_K, units, "o- s--", title="unigram models on test, in two units", ylabel="bits", **scale)
show(figure, "00_vocabulary")
holds("in bits per token fewer merges are always better", all(a < b for a, b in pairwise(per_token_K)))
holds("in bits per character more are, up to 8,192 at least", all(a > b for a, b in pairwise(per_character_K[:-1])))
saved, larger = 1 - per_character_K[-1] / per_character_K[-2], V_K[-1] / V_K[-2]
print(f"the last {V_K[-1] - V_K[-2]:,} tokens save {saved:.1%} of the bits, for {larger:.1f} times the embeddings")

# %% [markdown]
# After the last merge no pair is left that occurs twice. A loss per token compares models of one tokenizer only. Bits per character
# compare all of them, so this project reports those ([chapter 7](07_evaluation.py)).
#
# The left figure has a warning. **A tokenizer is fit to its data like any model.** With more merges training names get shorter than
# held-out ones, since their rare words become tokens. So the package learns merges from the training split alone. The released
# models have their teacher's tokenizer, which was made from other texts:

# %%
gap = {label: of[2] / of[1] - 1 for label, of in found.items()}
print("test names are longer by:", ", ".join(f"{share:+.1%} ({label})" for label, share in gap.items()))
holds("the gap grows with the merges", all(gap[a] < gap[b] for a, b in pairwise(kinds)))
holds("a tokenizer from other texts has hardly any", abs(gap[RELEASED]) < 0.02)

# %% [markdown]
# ## Why a random split misleads
#
# A held-out name should be one that the model cannot look up. Card names come in families: a legend has several cards, and a made-up
# word returns. With a random split most of a family trains and the rest is tested. The package puts names into one family if they
# share a rare word (two to five names have it) or a legend's first name, or differ in few letters. A family is in one split.

# %%
quote(split_by_family)
home = [split for split, names in names_of.items() for _ in names]
groups = families(every)
sides = [{home[index].replace("test_iid", "train") for index in group} for group in groups]
holds("no family is in two of train, validation and test", all(len(side) == 1 for side in sides))
in_test = [[every[index] for index in group] for group in groups if home[group[0]] == "test"]
for group in [group for group in in_test if len(group) == 4][:3]:
    print("  a family:", "; ".join(group))
rng = random.Random(0)
drawn = set(rng.sample(range(len(every)), len(every) // 10))
related = [any(other not in drawn for other in group) for group in groups for index in group if index in drawn]
print(f"of a random tenth of the names, {np.mean(related):.0%} have a relative among the others")
holds("a random split leaves a third of its test, or more, with relatives in training", np.mean(related) > 1 / 3)
largest = max(groups, key=len)
print(f"the largest family has {len(largest)} names:", "; ".join(every[index] for index in rng.sample(largest, 6)))

# %% [markdown]
# The largest family shows a limit of the rule: rare words chain names that have little in common. The other limit matters more. Names
# that share a common word (Goblin, Dragon) stay unrelated, though one helps to guess the other.
#
# **What is a relative in training worth?** The held-out names stay the same: half of each test family. An n-gram model
# ([chapter 7](07_evaluation.py)) is fit twice: before, to training names; after, to as many, of which some were replaced by the other
# halves. Names alone in their family are the control. The others have the rare words, so they are harder to begin with.

# %%
held = halves(in_test, rng)
before = rng.sample(train, len(train))
after = [*before[len(held.others) :], *held.others]
has_S, ORDERS = held.has_relatives_S, (2, 3, 4, 6, 8)
print(f"{len(has_S):,} names, {has_S.sum()} with a relative; {len(held.others)} training names are replaced")
found = {order: [bits_per_character_of(held, fit_to, order) for fit_to in (before, after)] for order in ORDERS}
columns = {"relatives, before": (0, 1), "relatives, after": (1, 1), "alone, before": (0, 2), "alone, after": (1, 2)}
value = {label: [found[order][when][case] for order in ORDERS] for label, (when, case) in columns.items()}
rows = [[order, *(f"{of[place]:.3f}" for of in value.values())] for place, order in enumerate(ORDERS)]
table(["order", *columns], rows)
figure, axis = plt.subplots(figsize=(7.5, 3))
labels = {"xlabel": "order of the n-gram", "ylabel": "bits per character"}
draw_lines(axis, ORDERS, value, "ro- rs-- bo- bs--", title="before and after relatives join training", **labels)
show(figure, "00_relatives")
gain = {case: [found[order][0][case] - found[order][1][case] for order in ORDERS] for case in (1, 2)}
gain_S = (found[6][0][0] - found[6][1][0]) / held.characters_S
per_family = [gain_S[held.family_S == family].mean() for family in np.unique(held.family_S[has_S])]
mean, error = mean_and_error(torch.tensor(per_family))
print(f"order 6, mean of {len(per_family)} families: {mean:.3f} ± {error:.3f} bits per character saved")
holds("names alone hardly change", all(abs(each) < 0.01 for each in gain[2]))
holds("names with relatives need fewer bits, beyond the interval", mean - error > 0)
holds("from order 3 on: the longer the context, the larger the gain", all(a < b for a, b in pairwise(gain[1][1:])))
ahead = [found[6][when][1] - found[8][when][1] for when in (0, 1)]
print("order 8 is better than order 6 by {:.3f} before; after, it seems better by {:.3f}".format(*ahead))
holds("so a leak favors the model that memorizes more", ahead[1] > ahead[0])

# %% [markdown]
# The interval is over families, since the names of one family are not independent. It does not cover another choice of halves.
#
# **Two tests for two questions.** `test` has families that training has not seen. `test_iid` is a random sample of the names of
# training families: new cards of known worlds. It also shows **memorization**: a training name and one of `test_iid` are drawn
# alike, so what a model gains on the first is memory.

# %%
scores = {}
for split in ("train", "test_iid", "test"):
    encoded = encode_cards(random.Random(0).sample(parts[split], 200), tokenizer, lambda card: UNCONDITIONAL)
    rows = [pack(encoded[start : start + 50]) for start in range(0, 200, 50)]
    with torch.no_grad():
        nats_N = torch.cat([name_nats(model, row) for row in rows])
    scores[split] = bits_estimate(nats_N, [name.characters for name in encoded])
print("the released dense model, bits per character:", ", ".join(f"{s} {bits:.2f}" for s, bits in scores.items()))
known, iid, new = scores.values()
holds("fewest for training names, most for new families", known.high < iid.low and iid.value < new.value)
taught = {normal_form(card.name) for card in teacher_names(4000)}
held_out = {normal_form(name) for name, split in zip(every, home, strict=True) if split != "train"}
print(f"{len(taught):,} of the teacher's names, {len(held_out):,} held-out names, {len(taught & held_out)} in both")
holds("none of these names of the teacher is held out", not taught & held_out)

# %% [markdown]
# **Contamination** is what no split can repair. The teacher was pretrained on the web, which has card names. Held-out names were
# removed from what it wrote, as checked on a part, and cards printed after its pretraining are scored apart ([results](../results.md)).
# What it knows of names in general stays, and so do names close to held-out ones (exercise 4).
#
# ## From a card to a training row
#
# The prompt is the card's attributes as text. A user may give any subset of them, so each epoch leaves out others at random
# (condition dropout, as in [Ho and Salimans 2022](https://arxiv.org/abs/2207.12598)).

# %%
quote(Attributes.drop)
p = TrainingConfig().attribute_dropout
card = next(card for card in parts["train"] if card.supertypes and card.subtypes and card.colors and card.mana_value)
for epoch in range(4):
    print(f"epoch {epoch}: {Attributes.of(card).drop(rng, p).prompt()!r} {card.name}")
empty = np.mean([Attributes.of(card).drop(rng, p) == UNCONDITIONAL for _ in range(4000)])
expected = p / 2 + (1 - p / 2) * p**5  # all five together, or one by one
print(f"no attribute is left in {empty:.1%} of draws; expected {expected:.1%}")
holds("the share without attributes is p/2 + (1 - p/2) p^5", abs(empty - expected) < 0.02)

# %% [markdown]
# Prompt and name are cut separately, as in generation: no token may reach from one into the other. Then names are packed, one after the
# other in a row without padding. They do not see each other ([chapter 1](01_attention.py)).
#
# | field | shape | is |
# | --- | --- | --- |
# | `input_ids`, `position_ids` | (1, T) | T tokens of all names, without the EOS tokens |
# | `cu_seq_lens` | (N + 1,) | where each of N names starts, and the end |
# | `keep`, `labels` | (L,) | the positions with a target, and the targets |

# %%
for field in ("position_ids", "cu_seq_lens", "keep"):
    print(f"{field:13}", getattr(row, field).flatten().tolist())
print("labels       ", [shown(tokenizer.decode([token])) for token in row.labels.tolist()])
encoded = encode_cards(random.Random(0).sample(parts["train"], 2048), tokenizer)
batches = [encoded[start : start + 64] for start in range(0, 2048, 64)]
read, learned = sum(name.num_inputs for name in encoded), sum(len(name.ids) - name.prompt_length for name in encoded)
padded = sum(64 * max(name.num_inputs for name in batch) for batch in batches)
print(f"{learned / read:.0%} of tokens have a target; padded to the longest of 64, {1 - read / padded:.0%} are padding")
holds("most of what is read has no target", learned / read < 0.5)
holds("packing saves a fifth of the tokens or more", 1 - read / padded > 0.2)

# %% [markdown]
# ## What to remember
#
# - BPE merges the most frequent pair, again and again. It begins with bytes, so nothing is unknown.
# - Fewer tokens have a larger loss each: compare bits per character. A tokenizer is fit to data: learn it from the training split.
# - Split by what can be looked up: here by family. A leak helps most the model that memorizes most.
# - A random held-out sample next to training names measures memory. Contamination of a teacher is measured apart.
# - The loss is on the name alone, in packed rows without padding.
#
# ## Exercises
#
# 1. **Longest match.** Cut each word by the longest token that fits, from left to right, instead of by the order of merges. How many
#    names are cut otherwise, and into fewer tokens?
# 2. **A tokenizer that has read the test.** Learn 8,192 tokens from training and test names together. What does that save on the
#    test, in tokens and in bits per character of a unigram model that is fit to the training names?
# 3. **Which rule finds the relatives?** Leave out one of the three rules: rare words, legends, small distances. How many test names
#    get a relative in training?
# 4. **Near misses.** How many of the teacher's names are within a fifth of their length of a held-out name, and how many names of an
#    n-gram? What does that show about contamination, and what not?
#
# Solutions: [solutions/00_data_and_tokens.py](solutions/00_data_and_tokens.py).
#
# ## Reading
#
# - [Sennrich et al. 2016](https://arxiv.org/abs/1508.07909): BPE for models of text. [Kudo 2018](https://arxiv.org/abs/1804.10959): several cuts of one
#   text. [ByT5](https://arxiv.org/abs/2105.13626) (Xue et al. 2021): bytes alone. [minbpe](https://github.com/karpathy/minbpe): BPE in a few short files.
# - [Lee et al. 2021](https://arxiv.org/abs/2107.06499): duplicates in training data, and in what is held out. [Carlini et al. 2022](https://arxiv.org/abs/2202.07646): how much is
#   memorized. [Kapoor and Narayanan 2022](https://arxiv.org/abs/2207.07048): leaks in published results.
# - [Krell et al. 2021](https://arxiv.org/abs/2107.02027): packing. Next: [chapter 1](01_attention.py), what a model does with a row.
