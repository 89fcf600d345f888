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
# not seen, whether a classifier separates its names from real ones, and whether it has only memorized real ones. Each measure can be
# fooled by something. This chapter puts four makers of names before all of them, and two of the makers are frauds. The
# [glossary](../glossary.md) has the terms.

# %%
import math
import random
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from chapter_claims import holds, verdict
from chapter_tools import DATA, RELEASED, cards, load_released, quote, show, table
from torch.nn import functional as F

from flash_experts.data.names import normal_form
from flash_experts.data.packing import encode_name, pack
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.evaluation import compare, format_comparison, write_report
from flash_experts.evaluation.compare import REAL, make_blind_test
from flash_experts.evaluation.evaluate import load_scorer
from flash_experts.evaluation.held_out import HeldOut
from flash_experts.evaluation.metrics import bits_estimate, bits_per_character, paired_bits_difference
from flash_experts.evaluation.novelty import hit_ratio
from flash_experts.generation.reranking.ngram import KneserNey

train_names = [card.name for card in cards("train")]
held_out = HeldOut.load(DATA, ("test_iid", "test"))
held_cards = held_out.real  # test_iid: held out name by name
names = [card.name for card in held_cards]
characters_N = np.array([len(name) + 1 for name in names])  # the end of a name counts as one
model, ngram = load_scorer(RELEASED, held_out), load_scorer("ngram", held_out)
print(f"{len(train_names):,} training names, {len(names):,} held out, e.g. {names[:4]}")
print(f"two models: {model.label} ({model.size.total:,} weights) and {ngram.label}, which counts letters")

# %% [markdown]
# The second model knows nothing of networks. It counts which letter followed which four to six letters in the training
# names (n-grams of orders 5 to 7, averaged, with Kneser-Ney smoothing), and is done in seconds. It is a strong opponent,
# and the reason to have one: a figure says little without the figure of something simple beside it.
#
# ## The picture first
#
# Each point is a held-out name. Across: bits per letter that the n-gram needs for it. Up: bits that the network needs.
# Below the diagonal the network predicts better.

# %%
nats = {scorer.label: scorer.nats(names, [UNCONDITIONAL] * len(names)) for scorer in (model, ngram)}
per_letter = {label: nats_N / math.log(2) / characters_N for label, nats_N in nats.items()}
figure, axes = plt.subplots(1, 2, figsize=(11, 4.4))
first, second = per_letter[ngram.label], per_letter[model.label]
axes[0].scatter(first, second, s=4, alpha=0.4)
axes[0].axline((0, 0), slope=1, color="black", linewidth=0.8)
axes[0].set(title=f"{len(names):,} held-out names", xlabel="bits per letter, n-gram", ylabel="bits per letter, network")
axes[1].hist(second - first, bins=60)
axes[1].axvline(0, color="black", linewidth=0.8)
axes[1].axvline((second - first).mean(), color="tab:red", label="mean of the names")
axes[1].set(title="network less n-gram (left: the network is better)", xlabel="bits per letter", ylabel="names")
axes[1].legend()
show(figure, "07_names")
order = np.argsort(second - first)
print("the network is most ahead at:", "; ".join(names[i] for i in order[:4]))
print("the n-gram is most ahead at: ", "; ".join(names[i] for i in order[-4:]))
together = np.corrcoef(first, second)[0, 1]
print(f"correlation of the two over names: {together:.2f}")
holds("both find the same names hard", together > 0.5)

# %% [markdown]
# The cloud is long and lies along the diagonal. Remember that when we come to intervals.
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
encoded = encode_name(name, UNCONDITIONAL, tokenizer)
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
holds("by hand and by the package: the same", abs(by_hand - per_letter[model.label][names.index(name)]) < 1e-3)

# %% [markdown]
# Where does a model spend its bits? Over 300 held-out names, the first letter of a word against the others, and the first
# token of a word against the others:

# %%
some_names = [each for each in names if each.isascii()][:300]
of_letters = KneserNey(train_names, order=6).symbol_probabilities(some_names)
begins, rest = [], []
for each, probabilities_S in zip(some_names, of_letters, strict=True):
    for place, bits in enumerate(-np.log2(probabilities_S[: len(each)])):
        (begins if place == 0 or each[place - 1] == " " else rest).append(bits)
row = pack([encode_name(each, UNCONDITIONAL, tokenizer) for each in some_names])
with torch.no_grad():
    bits_L = F.cross_entropy(network(**row.inputs).logits[0], row.labels, reduction="none") / math.log(2)
texts_L = [tokenizer.decode([token]) for token in row.labels.tolist()]
opens_L = torch.tensor([text.startswith(" ") for text in texts_L])
inside_L = ~opens_L & (row.labels != tokenizer.eos_token_id)
table(
    ["bits each", "beginning of a word", "inside a word"],
    [
        ["n-gram, letters", f"{np.mean(begins):.2f}", f"{np.mean(rest):.2f}"],
        ["network, tokens", f"{bits_L[opens_L].mean():.2f}", f"{bits_L[inside_L].mean():.2f}"],
    ],
)
holds(
    "both spend more bits at the beginnings of words than inside them",
    np.mean(begins) > np.mean(rest) and bits_L[opens_L].mean() > bits_L[inside_L].mean(),
)

# %% [markdown]
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
print(f"ways to cut {name!r}, at most one token in two: {len(cuts)}")
print(f"the tokenizer's own has {one / sum(probabilities):.2%} of their probability")
holds("the cut that is counted has nearly all of the probability", one / sum(probabilities) > 0.9)

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
narrower = unpaired / ((paired.high - paired.low) / 2)
print(f"{narrower:.1f} times narrower: unpaired it would take {narrower**2:.0f} times the names")
holds("the paired interval is narrower", narrower > 1.2)
print(
    verdict(
        paired.low, paired.high, "the network is better", "the n-gram is better", "neither has been shown to be better"
    )
)

# %% [markdown]
# Both intervals are of the same difference. The second is narrower, since what makes a name hard for both drops out.
#
# **Does the network listen?** Given the card's type, color and mana value, it should need fewer bits. Given another card's,
# more. A model that ignores its prompt has three equal figures.

# %%
attributes = [Attributes.of(card) for card in held_cards]
others = random.Random(0).sample(attributes, len(attributes))
rows = []
for scorer in (model, ngram):
    given = {
        "nothing": nats[scorer.label],
        "its card": scorer.nats(names, attributes),
        "another": scorer.nats(names, others),
    }
    control = paired_bits_difference(given["another"], given["its card"], characters_N)
    nothing, own, another = (bits_per_character(x, characters_N) for x in given.values())
    rows.append([scorer.label, f"{nothing:.3f}", f"{own:.3f}", f"{another:.3f}", f"{control:.3f}"])
    holds(
        f"{scorer.label} listens: fewer bits given its card than given nothing, more given another",
        own < nothing < another and control.low > 0,
    )
table(["given", "nothing", "its card", "another card", "the last two apart [95%]"], rows)

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
# one sees letters, up to four in a row. The strong one is given what spelling hides: how surprising the letters are, and
# whether the words are words. Real names against real names show what a classifier says when there is nothing to find.

# %%
rows, weak, strong = [], {}, {}
for maker, made in makers.items():
    found = held_out.detector.detect(made[:300])
    weak[maker], strong[maker] = found.generated.weak, found.generated.strong
    rows.append([maker, f"{found.generated.weak:.2f}", f"{found.generated.strong:.2f}"])
rows.append(["real against real", f"{found.real.weak:.2f}", f"{found.real.strong:.2f}"])
table(["AUC [95%]", "weak", "strong"], rows)
holds(
    "the weak classifier takes the parrot's names for real: its interval does not lie above 0.5",
    weak["parrot"].low <= 0.5,
)
holds("the strong one tells it all the same", strong["parrot"].low > 0.5)
holds("both tell the mixer", weak["mixer"].low > 0.5 and strong["mixer"].low > 0.5)

# %% [markdown]
# The strong one tells the parrot for another reason: it knows how surprising the training names find a name, and these are
# not surprising at all. Anyway, a good figure here says that names look real, not that they are new. So the next measure
# belongs beside it.
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
rows, ratios = [], {}
for maker, made in makers.items():
    keys = set(map(normal_form, made))
    hits = hit_ratio(keys, train_keys, held_keys)
    ratios[maker] = hits.ratio
    share = len(keys) / len(made)
    ratio = "-" if hits.ratio is None else f"{hits.ratio:.1f}"
    rows.append([maker, f"{share:.0%}", hits.train_hits, hits.held_out_hits, ratio])
table(["", "distinct", "training names hit", "held-out hit", "ratio [95%]"], rows)
holds("the parrot is caught: its interval lies above 1", ratios["parrot"] is not None and ratios["parrot"].low > 1)
wide = [maker for maker, ratio in ratios.items() if ratio is not None and ratio.low <= 1 <= ratio.high]
print("the interval holds 1, that is, memorization is not shown:", ", ".join(wide))
holds("the mixer is among them", "mixer" in wide)

# %% [markdown]
# Where intervals are wide, few names are hit at all. `flash-experts evaluate` draws
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
holds("half right is not enough, by far", needed > 0.6 * n)

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
result = compare(["ngram", RELEASED], DATA, samples=200, max_names=150)  # a part of the data, so wide intervals
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
rows, widths = [], {}
figure, axes = plt.subplots(1, 2, figsize=(11, 3))
for axis, (pair, (first_N, second_N)) in zip(axes, pairs.items(), strict=True):
    estimates = []
    for size in sizes:
        some = shuffled[:size]
        estimates.append(paired_bits_difference(first_N[some], second_N[some], characters_N[some]))
        verdict = "known" if estimates[-1].excludes_zero else "not known"
        width = (estimates[-1].high - estimates[-1].low) / 2
        widths[pair, size] = width
        rows.append([pair, size, f"{estimates[-1]:+.4f}", f"{width:.4f}", verdict])
    values = [each.value for each in estimates]
    errors = [[each.value - each.low for each in estimates], [each.high - each.value for each in estimates]]
    axis.errorbar(sizes, values, yerr=errors, fmt="o-", capsize=3)
    axis.axhline(0, color="black", linewidth=0.8)
    axis.set(xscale="log", title=pair, xlabel="held-out names", ylabel="bits per character")
show(figure, "07_sizes")
table(["", "names", "difference [95%]", "half width", "which is better"], rows)
for pair in pairs:
    fall = widths[pair, 100] / widths[pair, 400]
    holds(f"{pair}: four times the names for about half the width", 1.5 < fall < 2.7)
holds(
    "the interval is narrower where two models are alike",
    all(widths["order 6 less order 7", size] < widths["network less n-gram", size] for size in sizes),
)

# %% [markdown]
# The interval shrinks with the root of the number of names. And it is narrow where two models are alike, since then they err
# on the same names. How many names one needs follows from the difference that one wants to see.
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
# Solutions: [solutions/07_evaluation.py](solutions/07_evaluation.py).
#
# ## Reading
#
# - Chen and Goodman 1998, An Empirical Study of Smoothing Techniques for Language Modeling: Kneser-Ney, modified, measured.
# - [Cao and Rimell 2021](https://arxiv.org/abs/2109.02550): does the cut into tokens matter to a likelihood?
# - [Dror et al. 2018](https://aclanthology.org/P18-1128/): which significance test. [Miller 2024](https://arxiv.org/abs/2411.00640): error bars
#   of evaluations, paired.
# - Next: [chapter 8](08_scaling_out.py), many devices; [chapter 9](09_do_experts_pay.py), the models of this project compared.
