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
# A list of generated names looks good to a reader who wants it to. So we measure three things: how well a model predicts names
# that it has not seen, whether a classifier separates its names from real ones, and whether it has only memorized real ones.
# Each metric can be fooled. This chapter applies all of them to four sources of names, two of which cheat. The
# [glossary](../glossary.md) has the terms.

# %%
import math
import operator
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from chapter_claims import holds, verdict
from chapter_tools import DATA, RELEASED, cards, load_released, quote, show, shown, table
from torch.nn import functional as F

from flash_experts.data.names import normal_form
from flash_experts.data.packing import encode_name, pack
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.evaluation import compare, format_comparison, write_report
from flash_experts.evaluation.compare import REAL, make_blind_test
from flash_experts.evaluation.evaluate import load_scorer
from flash_experts.evaluation.held_out import HeldOut
from flash_experts.evaluation.metrics import bits_estimate, bits_per_character, hit_ratio, paired_bits_difference
from flash_experts.evaluation.ngram import KneserNey

torch.set_grad_enabled(False)
train_names = [card.name for card in cards("train")]
held_out = HeldOut.load(DATA, ("test_iid", "test"))
names = [card.name for card in held_out.real]  # test_iid: held out name by name
characters_N = np.array([len(name) + 1 for name in names])  # the EOS token counts as one
model, ngram = load_scorer(RELEASED, held_out), load_scorer("ngram", held_out)
print(f"{len(train_names):,} training names, {len(names):,} held out; {model.label} has {model.size.total:,} weights")

# %% [markdown]
# The second model is not a network. It counts which character followed which four to six characters in the training
# names: n-grams of orders 5 to 7, averaged, with Kneser-Ney smoothing
# ([Chen and Goodman 1999](https://doi.org/10.1006/csla.1999.0128)). That takes seconds. It is a strong baseline, and a metric
# means little without the same metric of a simple baseline.
#
# ## The picture first
#
# Each point is a held-out name. Horizontal axis: bits per character that the n-gram needs for it. Vertical axis: those of the
# network. Below the diagonal the network predicts better.

# %%
nats = {scorer.label: scorer.nats(names, [UNCONDITIONAL] * len(names)) for scorer in (model, ngram)}
per_character = {label: nats_N / math.log(2) / characters_N for label, nats_N in nats.items()}
figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
first, second = per_character[ngram.label], per_character[model.label]
axes[0].scatter(first, second, s=4, alpha=0.4)
axes[0].axline((1, 1), slope=1, color="black", linewidth=0.8, label="equal")
axes[0].set(title=f"{len(names):,} held-out names: bits per character", xlabel="n-gram", ylabel="network")
axes[1].hist(second - first, bins=60)
axes[1].axvline(0, color="black", linewidth=0.8, label="equal")
axes[1].axvline((second - first).mean(), color="tab:red", label="mean of the names")
axes[1].set(title="network minus n-gram (left: the network is better)", xlabel="bits per character", ylabel="names")
for axis in axes:
    axis.legend()
show(figure, "07_names")
order, together = np.argsort(second - first), np.corrcoef(first, second)[0, 1]
print("the network is most ahead at:", "; ".join(names[i] for i in order[:4]))
print("the n-gram is most ahead at: ", "; ".join(names[i] for i in order[-4:]))
print(f"correlation of the two over names: {together:.2f}")
holds("both find the same names hard", together > 0.5)

# %% [markdown]
# The points lie along the diagonal: what is hard for one model is hard for the other. Intervals will use that.
#
# ## The formula, with shapes
#
# $$ \text{bits per character} = \frac{\sum_n -\ln p(\text{name}_n)}{\ln 2\;\sum_n (\text{characters of name}_n + 1)} $$
#
# | | shape | |
# | --- | --- | --- |
# | ln p of each token given those before | (L,) | L tokens of all names, EOS tokens included |
# | nats of names | (N,) | summed over the tokens of each |
# | characters | (N,) | plus one for the EOS token |
# | bits per character | a number | a ratio of two sums, not a mean of ratios |
#
# Loss per token cannot compare models with different tokenizers: they have different tokens, and longer ones are harder to
# predict. Bits per character do not depend on how names are cut. One name by hand:

# %%
network, tokenizer = load_released()
name = "Goblin Ringleader" if "Goblin Ringleader" in names else names[0]
encoded = encode_name(name, UNCONDITIONAL, tokenizer)
row = pack([encoded])
bits_L = (F.cross_entropy(network(**row.inputs).logits[0], row.labels, reduction="none") / math.log(2)).tolist()
pieces = [shown(tokenizer.decode([token])) for token in row.labels.tolist()[:-1]] + ["[EOS]"]
print("bits of each token:", " ".join(f"{piece} {bits:.2f}" for piece, bits in zip(pieces, bits_L, strict=True)))
by_hand, package = sum(bits_L) / (len(name) + 1), per_character[model.label][names.index(name)]
print(f"{name!r}, by hand: {by_hand:.4f} bits per character; the package: {package:.4f}")

six = KneserNey(train_names, order=6)
cells = zip([*name, "[EOS]"], -np.log2(six.symbol_probabilities([name])[0]), strict=True)
print("an n-gram of order 6:", " ".join(f"{character}{bits:.1f}" for character, bits in cells))
holds("by hand and by the package: the same", abs(by_hand - package) < 1e-3)

# %% [markdown]
# Where does a model spend its bits? We compare the first character of a word with the others, and the first token of a word with
# the others, over 300 held-out names:

# %%
some_names = [each for each in names if each.isascii()][:300]
begins, rest = [], []
for each, probabilities_S in zip(some_names, six.symbol_probabilities(some_names), strict=True):
    for place, bits in enumerate(-np.log2(probabilities_S[: len(each)])):
        (begins if place == 0 or each[place - 1] == " " else rest).append(bits)
row = pack([encode_name(each, UNCONDITIONAL, tokenizer) for each in some_names])
bits_L = F.cross_entropy(network(**row.inputs).logits[0], row.labels, reduction="none") / math.log(2)
opens_L = torch.tensor([tokenizer.decode([token]).startswith(" ") for token in row.labels.tolist()])
inside_L = ~opens_L & (row.labels != tokenizer.eos_token_id)
means = {"n-gram, characters": (np.mean(begins), np.mean(rest))}
means["network, tokens"] = (bits_L[opens_L].mean().item(), bits_L[inside_L].mean().item())
rows = [[label, *(f"{each:.2f}" for each in of)] for label, of in means.items()]
table(["bits each", "beginning of a word", "inside a word"], rows)
holds("both spend more bits at the beginnings of words than inside them", all(of[0] > of[1] for of in means.values()))

# %% [markdown]
# **Other tokenizations.** A name can be cut into tokens in many ways, and its probability is the sum over all of them. The metric
# counts the one that the tokenizer gives. How much do the others add?

# %%
ids = encoded.ids[encoded.prompt_length : -1]


def nats_of_cut(tokens: tuple[int, ...]) -> float:
    whole = torch.tensor([[*encoded.ids[: encoded.prompt_length], *tokens, tokenizer.eos_token_id]])
    scores = network(whole[:, :-1]).logits[0, encoded.prompt_length - 1 :]
    return F.cross_entropy(scores, whole[0, encoded.prompt_length :], reduction="sum").item()


vocabulary_of = {tokenizer.decode([token]): token for token in range(len(tokenizer))}
cuts = {tuple(ids)}
for place, token in enumerate(ids):  # each token in two
    text = tokenizer.decode([token])
    for at in range(1, len(text)):
        left, right = vocabulary_of.get(text[:at]), vocabulary_of.get(text[at:])
        if None not in (left, right):
            cuts.add((*ids[:place], left, right, *ids[place + 1 :]))
share = math.exp(-nats_of_cut(tuple(ids))) / sum(math.exp(-nats_of_cut(cut)) for cut in cuts)
print(f"{name!r} cut in {len(cuts)} ways, at most one token in two: the tokenizer's has {share:.2%} of the probability")
holds("the tokenization that is counted has nearly all of the probability", share > 0.9)

# %% [markdown]
# So the metric is an upper bound on the bits, and a close one where that share is near 100%. A tokenizer of single characters
# cuts a name in one way only, and the metric is exact.
#
# ## Intervals, and why they are paired
#
# The names are a sample: other names would have given another value. The bootstrap draws names with replacement, many
# times, and measures how the value varies.

# %%
quote(paired_bits_difference)
for label, nats_N in nats.items():
    print(f"{label}: {bits_estimate(nats_N, characters_N):.3f} bits per character")
a, b = nats[model.label], nats[ngram.label]
apart = [bits_estimate(each, characters_N, seed=seed) for seed, each in enumerate((a, b))]
unpaired = math.hypot(*((each.high - each.low) / 2 for each in apart))
paired = paired_bits_difference(a, b, characters_N)
narrower = unpaired / (half := (paired.high - paired.low) / 2)
print(f"difference: ± {unpaired:.3f} as if on different names; name by name {paired:+.3f}, that is ± {half:.3f}")
print(f"{narrower:.1f} times narrower: unpaired it would take {narrower**2:.0f} times the names")
holds("the paired interval is narrower", narrower > 1.2)
sentences = "the network is better", "the n-gram is better", "neither has been shown to be better"
print(verdict(paired.low, paired.high, *sentences))

# %% [markdown]
# Both are intervals of the same difference. The second is narrower, since the paired difference cancels what makes a name hard
# for both.
#
# **Does the network use its prompt?** Given the card's type, color and mana value, it should need fewer bits. Given another
# card's, it should need more. For a model that ignores its prompt the three values are equal. We score 400 names.

# %%
some = slice(0, 400)
attributes = [Attributes.of(card) for card in held_out.real[some]]
others = random.Random(0).sample(attributes, len(attributes))
rows = []
for scorer in (model, ngram):
    given = nats[scorer.label][some], scorer.nats(names[some], attributes), scorer.nats(names[some], others)
    control = paired_bits_difference(given[2], given[1], characters_N[some])
    nothing, own, another = (bits_per_character(each, characters_N[some]) for each in given)
    rows.append([scorer.label, f"{nothing:.3f}", f"{own:.3f}", f"{another:.3f}", f"{control:.3f}"])
    right = own < nothing < another and control.low > 0
    holds(f"{scorer.label} uses the prompt: fewest bits given its card, most given another card", right)
table(["bits per character", "unconditional", "its card", "another card", "the last two apart [95%]"], rows)

# %% [markdown]
# ## Two sources that cheat
#
# From here on we look at generated names. The two models have two competitors:
#
# - **the parrot** draws training names;
# - **the mixer** takes each word from another training name.

# %%
COUNT = 1200
rng = random.Random(1)
by_length = [name.split() for name in train_names]
makers = {scorer.label: scorer.sample(COUNT, seed=1) for scorer in (model, ngram)}
makers["parrot"] = [rng.choice(train_names) for _ in range(COUNT)]
makers["mixer"] = [" ".join(rng.choice(by_length)[0] for _ in rng.choice(by_length)) for _ in range(COUNT)]
for maker, made in makers.items():
    print(f"{maker:12}", "; ".join(made[:4]))

# %% [markdown]
# **Classifiers.** Two of them learn to separate generated names from real ones, and are tested on names they have not seen. The
# area under the ROC curve (AUC) is the chance that a generated name gets a higher score for "generated" than a real one: 0.5 is
# chance. The weak classifier sees character n-grams of up to four characters. The strong one also has features of the whole
# name: how surprising the characters are, and whether the words are known. Real names against real names show the AUC when
# there is nothing to find.

# %%
real, weak, strong = random.Random(0).sample(names, 600), {}, {}
for maker, made in (makers | {"real against real": real[300:]}).items():
    found = held_out.detector.separate(real[:300], made[:300])
    weak[maker], strong[maker] = found.weak, found.strong
rows = [[maker, f"{weak[maker]:.2f}", f"{strong[maker]:.2f}"] for maker in weak]
table(["AUC [95%]", "weak", "strong"], rows)
holds("the weak classifier takes the parrot's names for real: its interval is not above 0.5", weak["parrot"].low <= 0.5)
holds("the strong one separates the parrot's names from real ones", strong["parrot"].low > 0.5)
holds("both separate the mixer's names from real ones", weak["mixer"].low > 0.5 and strong["mixer"].low > 0.5)

# %% [markdown]
# The strong one finds the parrot for another reason: one of its features is how surprising a name is given the training names,
# and training names are not surprising at all. In general a low AUC shows that names look real, not that they are new. So a
# low AUC needs the next metric next to it.
#
# **Memorization.** Every model generates some real names by chance, and a better model generates more. It can memorize training
# names only, and has to guess held-out ones. So compare the two rates:
#
# $$ \text{ratio} = \frac{\text{training names hit}\,/\,\text{training names}}
# {\text{held-out names hit}\,/\,\text{held-out names}} $$
#
# It is 1 for a model that guesses both alike. The held-out names must be of the same kind; ours are a random sample of the
# training families' names.

# %%
quote(hit_ratio)
train_keys, held_keys = (set(map(normal_form, some)) for some in (train_names, names))
rows, ratios = [], {}
for maker, made in makers.items():
    keys = set(map(normal_form, made))
    hits = hit_ratio(keys, train_keys, held_keys)
    ratios[maker], ratio = hits.ratio, "-" if hits.ratio is None else f"{hits.ratio:.1f}"
    rows.append([maker, f"{len(keys) / len(made):.0%}", hits.train_hits, hits.held_out_hits, ratio])
table(["", "distinct", "training names hit", "held-out hit", "ratio [95%]"], rows)
holds("the parrot is caught: its interval lies above 1", ratios["parrot"] is not None and ratios["parrot"].low > 1)
wide = [maker for maker, ratio in ratios.items() if ratio and ratio.low <= 1 <= ratio.high]
print("the interval contains 1, that is, memorization is not shown:", ", ".join(wide))
holds("the mixer is among them", "mixer" in wide)

# %% [markdown]
# Where intervals are wide, few names are hit at all. `flash-experts evaluate` draws 10,000 names for that reason.
#
# ## The blind test
#
# Metrics are proxies for a reader's judgement. Half of these names are real cards. The two models generated the others, without
# those that are real cards. Write down your answers before you read on.

# %%
made = {label: makers[label][:200] for label in nats}
test = make_blind_test(made, names, held_out.reference.is_known, seed=3)
for place, each in enumerate(test, start=1):
    print(f"{place:2}  {each.text}")

# %% [markdown]
# How many right answers are more than luck? Guessing gets half. This is the smallest number that guessing reaches in under 5% of
# tests:

# %%
n = len(test)


def at_least(right: int) -> float:
    """The chance that guessing gets this many of n right, or more."""
    return sum(math.comb(n, k) for k in range(right, n + 1)) / 2**n


needed = next(right for right in range(n + 1) if at_least(right) < 0.05)
print(
    f"{needed} of {n} right: guessing does that with {at_least(needed):.1%}; {needed - 1}: {at_least(needed - 1):.1%}"
)
holds("half right is not enough, by far", needed > 0.6 * n)

# %% [markdown]
# The answers, and a simple reader to compare yourself with: "real if every word is a word of some card".

# %%
known_words = {word.lower() for name in train_names for word in name.split()}
right = [all(word.lower() in known_words for word in each.text.split()) == (each.source == REAL) for each in test]
for place, (each, hit) in enumerate(zip(test, right, strict=True), start=1):
    print(f"{place:2}  {each.source:12} {'right' if hit else 'wrong':6} {each.text}")
print(f"the simple reader: {sum(right)} of {n}, by luck with {at_least(sum(right)):.1%}")

# %% [markdown]
# `flash-experts compare` puts such a test into its report, to click through, with the answers hidden.
#
# ## All of it for two models
#
# This is the public function behind `flash-experts compare`, here on a part of the data. One model of a comparison should
# always be a simple baseline.

# %%
result = compare(["ngram", RELEASED], DATA, samples=200, max_names=150)  # few names, so wide intervals
print(format_comparison(result, width=130))
with tempfile.TemporaryDirectory() as folder:
    page = write_report(result, Path(folder) / "report.html")
    print(f"\nthe same as a page without any outside resource: {page.stat().st_size:,} bytes")

# %% [markdown]
# Read the last table first: a difference whose interval contains zero has not been shown. Two held-out sets are reported,
# since they test different things. The names of `test_iid` have relatives in training; those of `test` come from families that
# training has not seen.
#
# ## An experiment that changes one thing: how many names
#
# We compare two pairs of models on more and more names: network and n-gram, and two n-grams of orders 6 and 7, which are much
# alike. How many names does it take to know which one is better?

# %%
shuffled = np.random.default_rng(0).permutation(len(names))
sizes = [size for size in (25, 50, 100, 200, 400, 800) if size < len(names)] + [len(names)]
orders = six.nats(names), KneserNey(train_names, order=7).nats(names)
pairs = {"network minus n-gram": (a, b), "order 6 minus order 7": orders}
rows, widths = [], {}
figure, axes = plt.subplots(1, 2, figsize=(11, 3))
for axis, (pair, (first_N, second_N)) in zip(axes, pairs.items(), strict=True):
    for size in sizes:
        some = shuffled[:size]
        found = paired_bits_difference(first_N[some], second_N[some], characters_N[some])
        widths[pair, size] = (found.high - found.low) / 2
        rows.append([pair, size, f"{found:+.4f}", f"{widths[pair, size]:.4f}", found.excludes_zero])
        error = [[found.value - found.low], [found.high - found.value]]
        axis.errorbar(size, found.value, yerr=error, fmt="o", capsize=3, color="tab:blue")
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xscale="log", title=pair, xlabel="held-out names", ylabel="bits per character, 95% interval")
    axis.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
    axis.minorticks_off()
show(figure, "07_sizes")
table(["", "names", "difference [95%]", "half width", "zero outside"], rows)
for pair in pairs:
    holds(f"{pair}: four times the names for about half the width", 1.5 < widths[pair, 100] / widths[pair, 400] < 2.7)
unlike, alike = ([widths[pair, size] for size in sizes] for pair in pairs)
holds("the interval is narrower where two models are alike", all(map(operator.lt, alike, unlike)))

# %% [markdown]
# The interval shrinks with the root of the number of names. It is narrow where two models are alike, since they find the same
# names hard. The number of names that a test needs follows from the smallest difference that it should detect.
#
# ## What to remember
#
# - Bits per character compare models of different tokenizers. Pair the names, and give the interval.
# - Compare every metric with a simple baseline's, and every metric of generated names with that of real ones.
# - Names can look real without being new, or be new without looking real. Measure both.
# - The interval covers other names. It does not cover another training run, nor another seed.
#
# ## Exercises
#
# 1. **The wrong mean.** Average the bits per character of each name instead of dividing the sums. How far off is it, for
#    both models, and for which names does it count too much?
# 2. **A better cheat.** Let half of the n-gram's names be training names. What do the classifiers show, and what does the
#    hit ratio, with 500 names and with 2,000?
# 3. **What the filters do.** Names of `NameGenerator` are filtered and new. Are they easier or harder to tell from real
#    ones than raw samples? Is it fair to compare a filtered model with an unfiltered one?
# 4. **Twenty comparisons.** Shuffle names between two halves twenty times, and test the n-gram on one half against itself
#    on the other, unpaired. How often does the interval leave zero out? What follows for a table with many rows?
#
# Solutions: [solutions/07_evaluation.py](solutions/07_evaluation.py).
#
# ## Reading
#
# - [Chen and Goodman 1999](https://doi.org/10.1006/csla.1999.0128): smoothing of n-grams, modified Kneser-Ney among them.
# - [Cao and Rimell 2021](https://arxiv.org/abs/2109.02550): does the cut into tokens matter to a likelihood?
# - [Dror et al. 2018](https://aclanthology.org/P18-1128/): which significance test. [Miller 2024](https://arxiv.org/abs/2411.00640): error bars
#   of evaluations, paired.
# - Next: [chapter 8](08_scaling_out.py), many devices; [chapter 9](09_do_experts_pay.py), the models of this project compared.
