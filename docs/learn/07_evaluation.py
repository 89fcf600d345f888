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
# # 7. Evaluation and comparison
#
# **The question: when is one model of names better than another, and how would we notice that it is not?**
#
# A list of generated names looks good when one wants it to. So we measure: how well a model predicts names that it has
# not seen, whether its names can be told from real ones, and whether it has only learned the real ones by heart. Each
# measure can be fooled by something. This chapter puts four makers of names before all of them, and two of the makers are
# frauds.

# %%
import math
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from chapter_tools import DATA, RELEASED, cards, load_released, quote, show, table
from torch.nn import functional as F

from flash_experts.data.names import normal_form
from flash_experts.data.packing import encode_name, pack
from flash_experts.data.prompts import NONE, Attributes
from flash_experts.evaluation import compare, format_comparison, write_report
from flash_experts.evaluation.blind_test import REAL, make_blind_test
from flash_experts.evaluation.evaluate import load_scorer
from flash_experts.evaluation.held_out import HeldOut
from flash_experts.evaluation.memorization import hit_ratio
from flash_experts.evaluation.metrics import bits_estimate, bits_per_character, paired_bits_difference
from flash_experts.evaluation.ngram import KneserNey

train_names = [card.name for card in cards("train")]
held_out = HeldOut.load(DATA, ("test_iid", "test"))
held_cards = held_out.real  # test_iid: held out name by name
names = [card.name for card in held_cards]
characters_N = np.array([len(name) + 1 for name in names])  # the end of a name counts as one
model, ngram = load_scorer(RELEASED, held_out), load_scorer("ngram", held_out)
print(f"{len(train_names):,} training names, {len(names):,} held out, e.g. {names[:4]}")
print(f"two models: {model.label} ({model.size.total:,} weights) and {ngram.label}, which counts letters")

# %% [markdown]
# The second model knows nothing of networks. It counts which letter followed which five to seven letters in the training
# names (Kneser-Ney smoothing), and is done in a second. It is a strong opponent, and the reason to have one: a figure
# says little without the figure of something simple beside it.
#
# ## The picture first
#
# Each point is a held-out name. Across: bits per letter that the n-gram needs for it. Up: bits that the network needs.
# Below the diagonal the network predicts better.

# %%
nats = {scorer.label: scorer.nats(names, [NONE] * len(names)) for scorer in (model, ngram)}
per_letter = {label: nats_N / math.log(2) / characters_N for label, nats_N in nats.items()}
figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
first, second = per_letter[ngram.label], per_letter[model.label]
axes[0].scatter(first, second, s=4, alpha=0.4)
axes[0].axline((0, 0), slope=1, color="black", linewidth=0.8)
axes[0].set(title=f"{len(names):,} held-out names", xlabel="bits per letter, n-gram", ylabel="bits per letter, network")
axes[1].hist(second - first, bins=60)
axes[1].axvline(0, color="black", linewidth=0.8)
axes[1].axvline((second - first).mean(), color="tab:red", label="mean of the names")
axes[1].set(title="network less n-gram (left: the network is better)", xlabel="bits per letter")
axes[1].legend()
show(figure, "07_names")
order = np.argsort(second - first)
print("the network is most ahead at:", "; ".join(names[i] for i in order[:4]))
print("the n-gram is most ahead at: ", "; ".join(names[i] for i in order[-4:]))

# %% [markdown]
# The cloud is long and lies along the diagonal: both find the same names hard. Remember that when we come to intervals.
#
# ## The formula, with shapes
#
# $$ \text{bits per character} = \frac{\sum_n -\ln p(\text{name}_n)}{\ln 2\;\sum_n (\text{letters of name}_n + 1)} $$
#
# | | shape | |
# | --- | --- | --- |
# | ln p of each token given those before | (L,) | L tokens of all names, end symbols included |
# | nats of names | (N,) | summed over the tokens of each |
# | characters | (N,) | letters plus one for the end |
# | figure | a number | a ratio of two sums, not a mean of ratios |
#
# Loss per token would not do: another tokenizer has other tokens, and longer ones are harder. Bits per character do not
# depend on how names are cut. One name by hand:

# %%
network, tokenizer = load_released()
name = "Goblin Ringleader" if "Goblin Ringleader" in names else names[0]
encoded = encode_name(name, NONE, tokenizer)
row = pack([encoded])
with torch.no_grad():
    token_nats = F.cross_entropy(network(**row.inputs).logits[0], row.labels, reduction="none")
pieces = [tokenizer.decode([token]).replace(" ", "·") for token in row.labels.tolist()[:-1]] + ["[EOS]"]
table(
    ["token", "bits"],
    [[piece, f"{bits:.2f}"] for piece, bits in zip(pieces, (token_nats / math.log(2)).tolist(), strict=True)],
)
by_hand = token_nats.sum().item() / math.log(2) / (len(name) + 1)
print(
    f"{name!r}, by hand: {by_hand:.4f} bits a character; the package: {per_letter[model.label][names.index(name)]:.4f}"
)

letters = KneserNey(train_names, order=6).symbol_probabilities([name])[0]
cells = zip([*name, "end"], -np.log2(letters), strict=True)
print("an n-gram of order 6:", " ".join(f"{letter}{bits:.1f}" for letter, bits in cells))

# %% [markdown]
# Both spend their bits at the beginnings of words, and little at their ends.
#
# **Another cut.** A name can be cut into tokens in many ways, and the true probability is the sum over all of them. We
# count the one that the tokenizer gives. What do others add?

# %%
ids = encoded.ids[encoded.prompt_length : -1]


def nats_of_cut(tokens: tuple[int, ...]) -> float:
    whole = torch.tensor([[*encoded.ids[: encoded.prompt_length], *tokens, tokenizer.eos_token_id]])
    with torch.no_grad():
        scores = network(whole[:, :-1]).logits[0, encoded.prompt_length - 1 :]
    return F.cross_entropy(scores, whole[0, encoded.prompt_length :], reduction="sum").item()


vocabulary_of = {tokenizer.decode([token]): token for token in range(len(tokenizer))}
cuts = {tuple(ids)}
for place, token in enumerate(ids):  # each token in two
    text = tokenizer.decode([token])
    for at in range(1, len(text)):
        left, right = vocabulary_of.get(text[:at]), vocabulary_of.get(text[at:])
        if left is not None and right is not None:
            cuts.add((*ids[:place], left, right, *ids[place + 1 :]))
probabilities = [math.exp(-nats_of_cut(cut)) for cut in cuts]
one = math.exp(-nats_of_cut(tuple(ids)))
print(
    f"ways to cut it, one token in two: {len(cuts)}; the tokenizer's own has {one / sum(probabilities):.2%} of their probability"
)

# %% [markdown]
# So the figure is an upper bound, and a close one where that share is near 100%. Where names are spelled, letter by letter,
# there is one way to cut them, and the figure is exact.
#
# ## Intervals, and why they are paired
#
# The names are a sample: other names would have given another figure. The bootstrap draws names with replacement, again
# and again, and looks how the figure moves.

# %%
quote(paired_bits_difference)
for label, nats_N in nats.items():
    print(f"{label}: {bits_estimate(nats_N, characters_N):.3f} bits per character")
a, b = nats[model.label], nats[ngram.label]
apart = [bits_estimate(each, characters_N, seed=seed) for seed, each in enumerate((a, b))]
unpaired = math.hypot(*((each.high - each.low) / 2 for each in apart))
paired = paired_bits_difference(a, b, characters_N)
print(f"difference, as if they had been measured on other names: ± {unpaired:.3f}")
print(f"difference, name by name: {paired:+.3f}, that is ± {(paired.high - paired.low) / 2:.3f}")

# %% [markdown]
# Both intervals are of the same difference. The second is narrower, since what makes a name hard for both drops out. With
# the first you would need many times the names to see what the second sees.
#
# **Does the network listen?** Given the card's type, color and mana value, it should need fewer bits. Given another card's,
# more. A model that ignores its prompt has three equal figures.

# %%
attributes = [Attributes.of(card) for card in held_cards]
others = random.Random(0).sample(attributes, len(attributes))
rows = []
for scorer in (model, ngram):
    told = {
        "nothing": nats[scorer.label],
        "its card": scorer.nats(names, attributes),
        "another": scorer.nats(names, others),
    }
    control = paired_bits_difference(told["another"], told["its card"], characters_N)
    rows.append(
        [scorer.label, *(f"{bits_per_character(x, characters_N):.3f}" for x in told.values()), f"{control:.3f}"]
    )
table(["told", "nothing", "its card", "another card", "the last two apart [95%]"], rows)

# %% [markdown]
# ## Two frauds
#
# From here on we look at names that are made. Besides the two models:
#
# - **the parrot** draws training names;
# - **the mixer** takes each word from another training name.

# %%
COUNT = 1200
rng = random.Random(1)
by_length = [name.split() for name in train_names]
mixed = [" ".join(rng.choice(by_length)[0] for _ in rng.choice(by_length)) for _ in range(COUNT)]
makers = {
    model.label: model.sample(COUNT, seed=1),
    ngram.label: ngram.sample(COUNT, seed=1),
    "parrot": [rng.choice(train_names) for _ in range(COUNT)],
    "mixer": mixed,
}
for maker, made in makers.items():
    print(f"{maker:12}", "; ".join(made[:4]))

# %% [markdown]
# **Classifiers.** Two of them learn to tell made names from real ones, and are asked about names they have not seen. The
# area under the ROC curve (AUC) is the chance that a made name looks more made than a real one: 0.5 is a coin. The weak
# one sees letters, up to four in a row. The strong one is told what spelling hides: how surprising the letters are, and
# whether the words are words. Real names against real names show what the judge says when there is nothing to find.

# %%
rows = []
for maker, made in makers.items():
    found = held_out.detector.detect(made[:300])
    rows.append([maker, f"{found.generated.weak:.2f}", f"{found.generated.strong:.2f}"])
rows.append(["real against real", f"{found.real.weak:.2f}", f"{found.real.strong:.2f}"])
table(["AUC [95%]", "weak", "strong"], rows)

# %% [markdown]
# Look at the parrot: the weak classifier takes it for real, as it is. The strong one tells it all the same, for another
# reason: it knows how surprising the training names find a name, and these are not surprising at all. Anyway, a good
# figure here says that names look real, not that they are new. So the next measure belongs beside it.
#
# **Memorization.** Every model hits some real names by chance, the more so the better it is. What it was never shown it
# can only guess. So compare the rates:
#
# $$ \text{ratio} = \frac{\text{training names hit}\,/\,\text{training names}}
# {\text{held-out names hit}\,/\,\text{held-out names}} $$
#
# 1 is a model that guesses both alike. The held-out names must be of the same kind; ours were drawn from the training
# side at random.

# %%
quote(hit_ratio)
train_keys = set(map(normal_form, train_names))
held_keys = set(map(normal_form, names))
rows = []
for maker, made in makers.items():
    keys = set(map(normal_form, made))
    hits = hit_ratio(keys, train_keys, held_keys)
    share = len(keys) / len(made)
    ratio = "-" if hits.ratio is None else f"{hits.ratio:.1f}"
    rows.append([maker, f"{share:.0%}", hits.train_hits, hits.held_out_hits, ratio])
table(["", "distinct", "training names hit", "held-out hit", "ratio [95%]"], rows)

# %% [markdown]
# The parrot is caught. For the others the intervals are wide: few names are hit at all. `flash-experts evaluate` draws
# 10,000 names for that reason.
#
# ## The blind test
#
# Measures are proxies. What is meant is a reader. Half of these names are real cards, the others are by the two models,
# with real cards left out. Write down your answers before you read on.

# %%
made = {label: makers[label][:200] for label in (model.label, ngram.label)}
test = make_blind_test(made, names, held_out.reference.is_known, seed=3)
for place, each in enumerate(test, start=1):
    print(f"{place:2}  {each.text}")

# %% [markdown]
# How many must be right before it is more than luck? A coin gets half. The chance to do as well as some number by guessing,
# for the smallest number where it is under 5%:

# %%
n = len(test)


def at_least(right: int) -> float:
    """The chance that a coin gets so many of n right or more."""
    return sum(math.comb(n, k) for k in range(right, n + 1)) / 2**n


needed = next(right for right in range(n + 1) if at_least(right) < 0.05)
print(f"{needed} of {n} right: a coin does that with {at_least(needed):.1%}; {needed - 1}: {at_least(needed - 1):.1%}")

# %% [markdown]
# The answers, and a simple reader to compare yourself with: "real if every word is a word of some card".

# %%
known_words = {word.lower() for name in train_names for word in name.split()}
guesses = [all(word.lower() in known_words for word in each.text.split()) for each in test]
right = [guess == (each.source == REAL) for guess, each in zip(guesses, test, strict=True)]
for place, (each, hit) in enumerate(zip(test, right, strict=True), start=1):
    print(f"{place:2}  {each.source:12} {'right' if hit else 'wrong':6} {each.text}")
print(f"the simple reader: {sum(right)} of {n}, by luck with {at_least(sum(right)):.1%}")

# %% [markdown]
# `flash-experts compare` puts such a test into its report, to click through, with the answers hidden.
#
# ## All of it for two models
#
# This is the public function behind `flash-experts compare`, here on a part of the data. One of the two columns of a
# comparison should always be something simple.

# %%
result = compare(["ngram", RELEASED], DATA, samples=200, max_names=150)
print(format_comparison(result, width=110))
with tempfile.TemporaryDirectory() as folder:
    page = write_report(result, Path(folder) / "report.html")
    print(f"\nthe same as a page without any outside resource: {page.stat().st_size:,} bytes")

# %% [markdown]
# Read the last table first: a difference whose interval holds zero has not been shown. And two held-out sets are reported,
# since they ask different things: `test_iid` names have relatives in training, those of `test` come from families that
# training has not seen.
#
# ## An experiment that changes one thing: how many names
#
# Two pairs of models on the same names, more and more of them: network and n-gram; and two n-grams, of six and of seven
# letters, which are much alike. When is it known which is better?

# %%
shuffled = np.random.default_rng(0).permutation(len(names))
sizes = [size for size in (25, 50, 100, 200, 400, 800) if size < len(names)] + [len(names)]
six, seven = (KneserNey(train_names, order=order).nats(names) for order in (6, 7))
pairs = {"network less n-gram": (a, b), "order 6 less order 7": (six, seven)}
rows = []
figure, axes = plt.subplots(1, 2, figsize=(11, 3))
for axis, (pair, (first_N, second_N)) in zip(axes, pairs.items(), strict=True):
    estimates = []
    for size in sizes:
        some = shuffled[:size]
        estimates.append(paired_bits_difference(first_N[some], second_N[some], characters_N[some]))
        verdict = "known" if estimates[-1].excludes_zero else "not known"
        width = (estimates[-1].high - estimates[-1].low) / 2
        rows.append([pair, size, f"{estimates[-1]:+.4f}", f"{width:.4f}", verdict])
    values = [each.value for each in estimates]
    errors = [[each.value - each.low for each in estimates], [each.high - each.value for each in estimates]]
    axis.errorbar(sizes, values, yerr=errors, fmt="o-", capsize=3)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xscale="log", title=pair, xlabel="held-out names", ylabel="bits per character")
show(figure, "07_sizes")
table(["", "names", "difference [95%]", "half width", "which is better"], rows)

# %% [markdown]
# The interval shrinks with the root of the number of names: four times the names for half the width. And it is narrow where
# two models are alike, since then they err on the same names. How many names one needs follows from the difference that
# one wants to see.
#
# ## What to remember
#
# - Bits per character compare models of different tokenizers. Pair the names, and give the interval.
# - Put something simple beside every figure, and real names beside every figure of made ones.
# - Looking real and being new are two things. A measure of one is fooled by a fraud of the other kind.
# - The interval covers other names. It does not cover another training run, nor another seed.
#
# ## Exercises
#
# 1. **The wrong mean.** Average the bits per letter of each name instead of dividing the sums. How far off is it, for
#    both models, and for which names does it count too much?
# 2. **A better fraud.** Let half of the n-gram's names be training names. What do the classifiers say, and what does the
#    hit ratio say, with 500 names and with 2,000?
# 3. **What the filters do.** Names of `NameGenerator` are filtered and new. Are they easier or harder to tell from real
#    ones than raw samples? Whom does the comparison favor?
# 4. **Twenty comparisons.** Shuffle names between two halves twenty times, and test the n-gram on one half against itself
#    on the other, unpaired. How often does the interval leave zero out? What follows for a table with many rows?
#
# Solutions: `solutions/07_evaluation.py`.
