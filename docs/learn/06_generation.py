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
# # 6. Generation and token filters
#
# **The question: how do probabilities of tokens become names, and how can one guarantee that a name has what was asked for
# and is not a real card?**
#
# At each step a language model gives a score, the logit, to every token of its vocabulary. The code around the model decides which
# tokens are left out, how one is drawn, and when to stop. It is short, needs no training, and can give guarantees. The
# [glossary](../glossary.md) has the terms (nucleus sampling is top-p; a token filter is a logits processor).

# %%
import math
import re
import time
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds, verdict
from chapter_models import mean_and_error
from chapter_tools import load_released, quote, show, shown, table
from matplotlib.ticker import PercentFormatter
from transformers import LogitsProcessor, SuppressTokensLogitsProcessor

from flash_experts import NameGenerator
from flash_experts.data.names import normal_form
from flash_experts.data.prompts import Attributes
from flash_experts.evaluation.metrics import Estimate, share, words
from flash_experts.generation import KnownNameFilter, NameFilter, NoTokenLeftError, Sampling, StartsWith
from flash_experts.generation.decoding import NameDecoder
from flash_experts.generation.sampling import _cut, candidates, draw, noise
from flash_experts.models.scoring import evaluating

torch.set_grad_enabled(False)
model, tokenizer = load_released()
generator = NameGenerator(model, tokenizer)  # it has the list of all real cards
vocabulary = generator.vocabulary
GOBLIN = {"type_line": "Legendary Creature — Goblin", "colors": "R"}
prompt = Attributes.parse(GOBLIN["type_line"], "R", 3).prompt()
prompt_ids = [tokenizer.bos_token_id, *vocabulary.encode(prompt)]
V = vocabulary.size
print(f"prompt {prompt!r}: {len(prompt_ids)} tokens; the vocabulary has {V:,}")
for name in generator.generate(5, **GOBLIN, mana_value=3, seed=7):
    print(f"  {name.text:24} log-probability {name.log_prob:6.1f}, nearest card {name.nearest_card}")

# %% [markdown]
# ## The picture first
#
# The figure shows the 24 likeliest first tokens of a name after that prompt, under four settings. Blue is the distribution that
# tokens are drawn from; the wide grey bars are the same before a cut.

# %%
first_V = model(torch.tensor([prompt_ids])).logits[0, -1]
probs_V, best = first_V.softmax(-1), first_V.topk(24).indices
settings = {"the model as it is": Sampling(), "temperature 0.5": Sampling(temperature=0.5)}
settings |= {"top-p 0.5": Sampling(top_p=0.5), "min-p 0.2": Sampling(min_p=0.2)}
figure, axes = plt.subplots(4, 1, figsize=(11, 7.5), sharex=True)
left = {}
for axis, (name, sampling) in zip(axes, settings.items(), strict=True):
    before_V = (first_V / sampling.temperature).softmax(-1)
    probs_1K, ids_1K = candidates(first_V[None], sampling)
    left_V = torch.zeros(V)
    left_V[torch.arange(V) if ids_1K is None else ids_1K[0]] = probs_1K[0] / probs_1K.sum()
    left[name] = left_V
    axis.bar(range(24), before_V[best], color="#cccccc", label="before a cut")
    axis.bar(range(24), left_V[best], color="tab:blue", width=0.5, label="drawn from")
    axis.set(title=f"{name}: {int((left_V > 0).sum()):,} tokens are left to draw from", ylabel="probability")
axes[0].legend()
axes[-1].set_xlabel("first token of the name (· is a space)")
axes[-1].set_xticks(range(24), [shown(vocabulary.texts[token]) for token in best.tolist()], rotation=60)
show(figure, "06_first_token")
largest, count = ({name: f(left_V) for name, left_V in left.items()} for f in (torch.max, torch.count_nonzero))
_, sharper, *cuts = settings
holds("temperature 0.5 sharpens, and leaves all tokens in", largest[sharper] > probs_V.max() and count[sharper] == V)
few = all(count[cut] < V / 10 and largest[cut] > probs_V.max() for cut in cuts)
holds("the cuts leave few of the tokens, and give their probability to the others", few)

# %% [markdown]
# The tail of unlikely tokens matters more than the picture suggests: each is unlikely, but they are many, and a name is
# several draws.

# %%
in_tail_V = probs_V < probs_V.max() / 100
tail = probs_V[in_tail_V].sum().item()
print(f"{in_tail_V.sum():,} of {V:,} tokens have under a hundredth of the largest probability: together {tail:.0%}")
print(f"if every token of a name had such a tail, {(1 - tail) ** 6:.0%} of names of 6 tokens would avoid it")
holds("most of the vocabulary is in the tail", in_tail_V.float().mean() > 0.9)
holds("still, most names of six such tokens would draw from it", (1 - tail) ** 6 < 0.5)

# %% [markdown]
# ## The formula, with shapes
#
# $$ p_v = \frac{e^{z_v/\tau}}{\sum_u e^{z_u/\tau}} \qquad z_v = -\infty \text{ where a filter forbids } v $$
#
# τ is the temperature. Then only some tokens stay: the K largest (**top-k**, [Fan et al. 2018](https://arxiv.org/abs/1805.04833));
# the largest that together reach P (**top-p**, [Holtzman et al. 2020](https://arxiv.org/abs/1904.09751)); or those with at least m
# times the probability of the largest (**min-p**, [Nguyen et al. 2024](https://arxiv.org/abs/2407.01082)).
#
# | | shape | |
# | --- | --- | --- |
# | z, the scores | (B, V) | B unfinished names, V tokens |
# | masks of the filters | (B, V) bool | true is forbidden |
# | candidates | (B, K) | what is left, with token ids |
# | noise | (B, 2) | uniform numbers; the second is for a token that has to be redrawn |
# | tokens | (B,) | what is drawn |
#
# By hand, on six tokens, against the package:

# %%
z = torch.tensor([3.0, 2.5, 2.0, 0.0, -1.0, -4.0])
p = z.softmax(-1)
print("p         ", [f"{x:.3f}" for x in p.tolist()])
print("cumulative", [f"{x:.3f}" for x in p.cumsum(0).tolist()], "(two do not reach 0.8, so a third is needed)")
by_hand = {"top_p": (0.8, [True, True, True, False, False, False]), "min_p": (0.1, (p >= 0.1 * p.max()).tolist())}
for name, (value, expected) in by_hand.items():
    kept = (candidates(z[None], Sampling(**{name: value}))[0][0] > 0).tolist()
    print(f"{name} {value}: kept {kept}")
    holds(f"{name} by hand keeps the same", kept == expected)
quote(_cut)

# %% [markdown]
# **The draw** is by inversion: it sums the probabilities in the order of token ids, and takes the first token whose sum is above a
# uniform random number. That needs no sorting. If this token is one that the cut leaves out, the candidates are computed and one
# of them is drawn with the second number, which gives the same distribution. Name i of a seed has its own row of noise, so a name
# does not depend on the batch.

# %%
quote(draw)
quote(noise)
alone, together = (generator.generate(12, quality="fast", type_line="Dragon", seed=3, batch_size=n) for n in (1, 12))
holds("12 names are the same one by one and all at once", [a.text for a in alone] == [b.text for b in together])

# %% [markdown]
# ## The KV cache
#
# Without a cache, the model computes the prompt and all n tokens again for token n. With a cache of keys and values (chapter 1) it
# computes one token. ([Chapter 6b](06b_kv_cache.py) counts what that saves, and batches names.)

# %%
ids = [*prompt_ids, *vocabulary.encode(" " + generator.generate(1, quality="fast", seed=1)[0].text)]
out, steps = None, []
for token in ids:
    out = model(torch.tensor([[token]]), past_key_values=out and out.past_key_values, use_cache=True)
    steps.append(out.logits[0, -1])
off = (torch.stack(steps) - model(torch.tensor([ids])).logits[0]).abs().max()
print(f"{len(ids)} tokens one by one with a cache against all at once: {off:.1e}")
holds("the cache changes nothing but rounding", off < 1e-3)
T, P = len(ids), len(prompt_ids)
print(f"tokens computed for this name: {sum(range(P, T + 1))} without a cache, {T} with one")
print(f"and for 64 names of one prompt, computed once: {64 * T} or {P + 64 * (T - P)}")

# %% [markdown]
# ## A filter from scratch
#
# Names without a doubled letter: no "ff", no "oo". The first idea, a list of forbidden tokens (in transformers
# `SuppressTokensLogitsProcessor`), is wrong:


# %%
def doubled(text: str) -> bool:
    low = text.lower()
    return any(a == b and a.isalpha() for a, b in pairwise(low))


AS_IT_IS = Sampling()


def decode(count: int, *processors: LogitsProcessor, sampling: Sampling = AS_IT_IS, seed: int = 5) -> list[str]:
    """Names straight from the package's decoding loop, with these filters and no other."""
    with evaluating(model):
        decoder = NameDecoder(model, prompt_ids, vocabulary.eos_id, sampling, processors, 48, seed)
        return [vocabulary.decode(name.ids).strip() for name in decoder.stream(range(count), count)]


def report(title: str, names: list[str]) -> int:
    bad = [name for name in names if doubled(name)]
    print(f"{title}: {len(bad)} of {len(names)} names have a doubled letter, e.g. {bad[:4]}")
    return len(bad)


forbidden_tokens = SuppressTokensLogitsProcessor([n for n, text in enumerate(vocabulary.texts) if doubled(text)], "cpu")
unfiltered, forbidding = report("no filter", decode(200)), report("forbidden tokens", decode(200, forbidden_tokens))
holds("the list of tokens helps, but not always", 0 < forbidding < unfiltered)

# %% [markdown]
# One token may end with a letter, and the next begin with it. So a filter has to look at the *text so far*, and at what each token
# would make of it.


# %%
class NoDoubledLetters(LogitsProcessor):
    """The whole filter, without any help."""

    def __call__(self, input_ids_BT: torch.Tensor, scores_BV: torch.Tensor) -> torch.Tensor:
        scores_BV = scores_BV.clone()
        for row, name in enumerate(vocabulary.names(input_ids_BT, len(prompt_ids))):
            forbidden = [token for token, text in enumerate(vocabulary.texts) if doubled(name[-1:] + text)]
            scores_BV[row, forbidden] = -torch.inf
        return scores_BV


started = time.process_time()
scratch = decode(6, NoDoubledLetters())
print(f"{(time.process_time() - started) / 6:.2f} seconds of CPU a name")
holds("a filter that looks at the text lets none through", report("from scratch", scratch) == 0)

# %% [markdown]
# This is correct but slow: it examines V texts for every row and every step. The answer depends only on the last letter of the
# name, which is the *state* of the filter: one of a few dozen. So the package's filters have two methods. `rule` returns the
# state of a name. `forbidden` returns what is forbidden in a state, and is called once for each state.


# %%
class NoDoubled(NameFilter):
    """The same filter in two lines."""

    def rule(self, name: str) -> str:
        return name[-1:].lower()

    def forbidden(self, rule: str) -> torch.Tensor:
        return self.vocabulary.where(lambda text: doubled(rule + text))


place = vocabulary, len(prompt_ids)
filter_, started = NoDoubled(*place), time.process_time()
quick = decode(6, filter_)
print(f"{(time.process_time() - started) / 6:.3f} seconds a name, {len(filter_._masks)} states met")
holds("two lines give the same names", quick == scratch)
holds("a few dozen states are met, not one for each name and step", len(filter_._masks) < 60)
holds("and none of 200 names has a doubled letter", report("two methods", decode(200, filter_)) == 0)
quote(NameFilter.apply)
quote(NameFilter.mask_of)

# %% [markdown]
# `generate` takes such a class as it is, next to its own filters:

# %%
print("; ".join(name.text for name in generator.generate(8, colors="R", seed=7, filters=[NoDoubled])))

# %% [markdown]
# A regular expression has a state already: that of its automaton, which a maintained library (llguidance) compiles.

# %%
for regex in ("[A-Z][a-z]+ of [A-Z][a-z]+", "(Gr|Kr)[a-z]+, [A-Z][a-z]+ [A-Z][a-z]+"):
    names = generator.generate(4, **GOBLIN, seed=7, regex=regex)
    print(f"{regex}: " + "; ".join(name.text for name in names))
    holds("every name matches the expression", all(re.fullmatch(regex, name.text) for name in names))

# %% [markdown]
# **Dead ends.** A filter may leave no token at all. Each of these two can be satisfied, but not both:

# %%
prompt_1T, filters = torch.tensor([prompt_ids]), [StartsWith(*place, "Gree"), NoDoubled(*place)]
request = {"attention_mask": torch.ones_like(prompt_1T), "do_sample": True, "max_new_tokens": 8}
try:
    model.generate(prompt_1T, logits_processor=filters, **request)
except NoTokenLeftError as error:
    print("NoTokenLeftError:", error)
else:
    holds("a dead end raises", False)

# %% [markdown]
# `model.generate` would sample from a row of NaN, so our filters raise an error. `NameGenerator` drops such a name.
#
# ## Novelty by construction
#
# Training cannot guarantee that no name is a real card. A filter can: where the text so far is a known name, it forbids the EOS
# token. The name has to continue, so it becomes another one.

# %%
quote(KnownNameFilter)
card_forms = generator.known.normal_forms
known = KnownNameFilter(*place, card_forms)
print(f"{len(card_forms):,} names are known")
rows, ends = [], []
for text in (" Goblin Guide", " goblin guide", " Goblin  Guide!", " Goblin Guid"):
    ids = vocabulary.encode(text)
    scores_1V = model(torch.tensor([prompt_ids + ids])).logits[:, -1]
    masked_1V = known.mask(torch.tensor([prompt_ids + ids]), scores_1V)
    ends.append([each.softmax(-1)[0, vocabulary.eos_id].item() for each in (scores_1V, masked_1V)])
    rows.append([repr(text), normal_form(text), *(f"{x:.4f}" for x in ends[-1])])
table(["text so far", "its normal form", "P(EOS), model", "P(EOS), filtered"], rows)
holds("case, spaces and punctuation make no difference: none may end", all(free > 0 == end for free, end in ends[:3]))
holds("a text that is not a card may end as before", abs(ends[3][0] - ends[3][1]) < 1e-6 and ends[3][0] > 0)

# %% [markdown]
# Normal forms are compared. Now the count, without the filter and with it, at a low temperature:

# %%
free = NameGenerator(model, tokenizer, known_names=())  # without the list of cards
drawn = (each.generate(300, quality="fast", seed=11, temperature=0.6, guidance=1.0) for each in (free, generator))
without, within = ([name.text for name in some if normal_form(name.text) in card_forms] for some in drawn)
print(f"real cards among 300 names: without the filter {len(without)}, e.g. {without[:5]}; with it {len(within)}")
holds("with the filter there is none", len(within) == 0 <= len(without))

# %% [markdown]
# The second number is 0 for every model, seed and temperature: it follows from the filter, and is not a measurement.
#
# ## What a filter does to the probabilities
#
# Masking does not draw from the model's own distribution of names that meet the constraint. There are two ways to get names of one
# word. *Rejection* draws freely and keeps names of one word: that is exactly the model's distribution of such names, and discards
# most. *Masking* forbids a space: it discards none, but a name that began as the first word of a longer one has to end there.

# %%
request = {"quality": "fast", "type_line": "Goblin", "seed": 13, "temperature": 1.0, "guidance": 1.0}
drawn, masking = free.generate(600, **request), free.generate(100, **request, words=1)
rejection = [name for name in drawn if " " not in name.text]
rows, found = [], []
for title, some in (("rejection", rejection), ("masking", masking)):
    found.append(mean_and_error(torch.tensor([name.log_prob for name in some])))
    mean, error = found[-1]
    rows.append([title, len(some), f"{mean:.1f} ± {error:.1f}", "; ".join(name.text for name in some[:4])])
table(["", "names", "mean log-probability", "e.g."], rows)
print(f"rejection kept {len(rejection) / len(drawn):.0%}")
difference, error = found[1][0] - found[0][0], math.hypot(found[0][1], found[1][1])
print(f"masking minus rejection: {difference:+.1f} ± {error:.1f}")
sentences = (
    "masked names are less likely than the model's own names of one word: that is the constraint's cost",
    "masked names are likelier than the model's own names of one word: masking prefers other, more common ones",
    "this run shows no difference between the means: look at the examples",
)
print(verdict(difference - error, difference + error, *sentences))
holds("rejection discards most names", len(rejection) < len(drawn) / 2)

# %% [markdown]
# The two distributions differ, whether or not their means do. Where masked names are less likely, `quality` and `best_of` help:
# they draw more names and choose likely ones that match the card and repeat no word of the list (best-of-n reranking).
#
# ## An experiment that changes one thing: the temperature
#
# We draw 200 names at each of five temperatures, straight from the decoding loop, and count three shares: names that are real cards,
# names that repeat an earlier one, and words that no real card has.

# %%
card_words = {word for name in generator.known.names for word in words(name)}
temperatures, rows = [0.3, 0.6, 0.9, 1.2, 1.5], []
shares: dict[str, list[Estimate]] = {"real cards": [], "repeated": [], "unknown words": []}
for temperature in temperatures:
    names = decode(200, sampling=Sampling(temperature=temperature))
    keys = [normal_form(name) for name in names]
    shares["real cards"].append(share([bool(key) and key in card_forms for key in keys]))
    shares["repeated"].append(share([key in keys[:place] for place, key in enumerate(keys)]))
    shares["unknown words"].append(share([word not in card_words for name in names for word in words(name)]))
    rows.append([temperature, *(f"{each[-1]:.1%}" for each in shares.values()), "; ".join(names[:2])])
table(["temperature", *(f"{name} [95%]" for name in shares), "e.g."], rows)

figure, axes = plt.subplots(1, 3, figsize=(11, 2.8))
for axis, (name, estimates) in zip(axes, shares.items(), strict=True):
    axis.plot(temperatures, [each.value for each in estimates], "o-")
    axis.fill_between(temperatures, [each.low for each in estimates], [each.high for each in estimates], alpha=0.2)
    axis.set(title=name, xlabel="temperature", ylabel="share, with 95% interval", ylim=(0, None))
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
show(figure, "06_temperature")
repeated, unknown = shares["repeated"], shares["unknown words"]
holds("a low temperature repeats itself more than a high one", repeated[0].value > repeated[-1].value)
holds("a high one invents words that no card has", unknown[-1].low > unknown[0].high)

# %% [markdown]
# Real cards are few here, so their intervals are wide: look at them before you believe a trend. No temperature is best: repetition
# and unknown words are a trade-off, and the presets are three points on it. `generate` drops repetitions and forbids real cards,
# so it can use a lower temperature.
#
# ## What to remember
#
# - A draw has four steps: filter, divide by the temperature, cut the tail, invert the cumulative sum.
# - A filter looks at text, never at token ids. It is a state, and a set of tokens that the state forbids.
# - Masking guarantees a constraint. The model's own probability measures what it costs.
#
# ## Exercises
#
# 1. **Growing words.** Write a filter so that each word of a name is longer than the one before. What is the state?
# 2. **Tails.** At temperature 1.5, how many first tokens do top-p 0.9 and min-p 0.1 leave, and which probability has the
#    least likely of them? Why is min-p called robust to temperature?
# 3. **Best of.** For `best_of` 1, 2, 4 and 8: the mean score of 24 names, and the time. What is gained, and what is lost
#    (look at the words)?
# 4. **Without the novelty filter.** How many of 300 names of the model, at the presets' settings, are real cards? And
#    how many are one letter away from one? What does `min_distance` do about that?
#
# Solutions: [solutions/06_generation.py](solutions/06_generation.py).
#
# ## Reading
#
# - [Holtzman et al. 2020](https://arxiv.org/abs/1904.09751): nucleus sampling, top-p. [Nguyen et al. 2024](https://arxiv.org/abs/2407.01082): min-p.
# - [Willard and Louf 2023](https://arxiv.org/abs/2307.09702): regular expressions as automata over tokens.
#   [Park et al. 2024](https://arxiv.org/abs/2405.21047): what masking does to the model's distribution, and a remedy.
# - [Yu et al. 2022, Orca](https://www.usenix.org/conference/osdi22/presentation/yu): continuous batching, which `generate` does.
# - Next: [chapter 6b](06b_kv_cache.py), decoding fast; or [chapter 7](07_evaluation.py), which names are better.
