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
# # 6b. KV cache and continuous batching
#
# **The question: what does a decoding step have to read and compute, and how can many names share it?**
#
# A model writes a name token by token, and each token needs a forward pass. [Chapter 6](06_generation.py) drew the tokens. This chapter
# is about the passes: what is kept between them (the KV cache), what each of them reads, and how names of different lengths use the
# same passes (continuous batching). We count FLOPs, bytes and steps, which are the same on every machine. Times are printed as well, and no
# sentence rests on them. The terms are in the [glossary](../glossary.md#generation-and-evaluation).

# %%
import time

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_decoding import WatchedDecoder, counted, different_draws, experts_read, names_by_hand, refilled, static
from chapter_models import queries_keys_values
from chapter_tools import load_released, quote, show, table
from transformers import LlamaConfig, LlamaForCausalLM

from flash_experts.data.prompts import Attributes
from flash_experts.generation import Sampling
from flash_experts.generation.decoding import Prompts
from flash_experts.generation.filters.base import NameVocabulary
from flash_experts.kernels.cpu import grouped_mlp
from flash_experts.models.decode_step import _gpt2_attention, next_logits
from flash_experts.models.ring_cache import RingCache
from flash_experts.models.router_metrics import listening

torch.set_grad_enabled(False)
model, tokenizer = load_released()
vocabulary, config = NameVocabulary(tokenizer, model.config.vocab_size), model.config
prompt_text = Attributes.parse("Legendary Creature — Goblin", "R", 3).prompt()
prompt_ids = [tokenizer.bos_token_id, *vocabulary.encode(prompt_text)]
P, EOS, SEED = len(prompt_ids), vocabulary.eos_id, 5
decoder = WatchedDecoder(model, prompt_ids, EOS, SEED)  # the package's, which notes the names of each step
names = decoder.names(192, slots=64)
draws = [len(ids) + 1 for ids in names]  # tokens of each name, and the EOS token
print(
    f"prompt of {P} tokens; {len(names)} names of {min(draws)} to {max(draws)} steps, mean {sum(draws) / len(draws):.1f}"
)
print("; ".join(f"{vocabulary.decode(ids).strip()} ({len(ids) + 1} steps)" for ids in names[:4]))

# %% [markdown]
# ## The picture first
#
# A batch has B slots, and each step draws one token for each slot. Names end at different times. With *static batches* a slot waits
# until the longest name of its batch has ended. With *continuous batching* it gets the next name at once
# ([Yu et al. 2022](https://www.usenix.org/conference/osdi22/presentation/yu)). The figure has 40 of the names above in 8 slots.

# %%
quote(refilled)
figure, axes = plt.subplots(2, 1, figsize=(11, 4.2), sharex=True)
for axis, schedule in zip(axes, (static, refilled), strict=True):
    steps = schedule(draws[:40], 8)
    for step, row in enumerate(steps):
        for slot, n in enumerate(row):
            axis.barh(-slot, 1, left=step, color="#dddddd" if n is None else f"C{n % 7}", edgecolor="white", lw=0.3)
    axis.set(title=f"{schedule.__name__}: {len(steps)} steps (grey: the slot waits)", ylabel="slot", yticks=[])
axes[-1].set_xlabel("step: one forward pass for all slots")
show(figure, "06b_slots")
rows, steps_of, busy_of = [], {}, {}
for slots in (8, 64):
    for schedule in (static, refilled):
        steps = schedule(draws, slots)
        steps_of[schedule, slots], busy_of[schedule, slots] = len(steps), sum(draws) / (slots * len(steps))
        rows.append([f"{slots} slots, {schedule.__name__}", len(steps), f"{busy_of[schedule, slots]:.0%}"])
table([f"{len(draws)} names", "steps", "slots in use"], rows)
by_rule = [[n for n in row if n is not None] for row in refilled(draws, 64)]
holds("the package's decoder has the names of `refilled` in its batch, step by step", decoder.steps == by_rule)
holds("refilled slots need fewer steps", all(steps_of[refilled, n] < steps_of[static, n] for n in (8, 64)))
holds("static batches leave a fifth of the slots and more unused", max(busy_of[static, 8], busy_of[static, 64]) < 0.8)
holds("with 8 slots, refilled ones are in use nearly always", busy_of[refilled, 8] > 0.93)

# %% [markdown]
# With 64 slots and three names for each, the end weighs more: the batch empties. The package then drops slots, and computes fewer rows.
#
# ## The formula, with shapes
#
# For one head, the newest token's query q attends to the keys and values of all K tokens so far:
#
# $$ o = \text{softmax}\left(\frac{q\,K^\top}{\sqrt{C}}\right) V $$
#
# | | shape | |
# | --- | --- | --- |
# | x | (B, D) | one token for each of B rows |
# | q | (B, H, 1, C) | H query heads of C numbers |
# | keys, values | (B, G, K, C) each, in each of L layers | the KV cache; G heads, here G = H |
# | o | (B, D) | D = H C |
#
# Earlier tokens come in by their keys and values alone. And these do not change when a token is appended, since no token looks at a later
# one (the causal mask of [chapter 1](01_attention.py)):

# %%
ids = [*prompt_ids, *names[0]]
before, after = (queries_keys_values(model, torch.tensor([some])) for some in (ids[:-1], ids))
pairs = [pair for a, b in zip(before, after, strict=True) for pair in zip(a[1:], b[1:], strict=True)]
same = all(torch.allclose(old, new[:, :-1], atol=1e-4) for old, new in pairs)
holds("a token more leaves the keys and values of earlier ones as they are, up to rounding", same)
quote(_gpt2_attention)

# %% [markdown]
# `cache.write` adds the newest token's keys and values, and returns all. `penalty` is minus infinity at columns that a row must not see.
#
# ## One name, without a cache and with one
#
# Without a cache, each step computes prompt and name again. With one, the prompt is computed once (*prefill*), and each step computes one
# token (*decode*). We count the FLOPs of matmuls, and the bytes that operations read and write (`counted` in `chapter_decoding.py`).

# %%
ids, prompts = [*prompt_ids, *names[0]], Prompts(model, [prompt_ids])
starts = [torch.tensor([ids[:T]]) for T in range(P, len(ids) + 1)]
without = [counted(model, lambda x_1T=x_1T: model(x_1T, logits_to_keep=1).logits[:, -1]) for x_1T in starts]
prefill = counted(model, lambda: prompts.of(0).first_V[None])
ring = RingCache([prompts.of(0).cache], P)
steps = [counted(model, lambda token=token: next_logits(model, torch.tensor([token]), ring)) for token in ids[P:]]
sums, logits = [], []
for title, passes in (("without a cache", without), ("with the ring cache", [prefill, *steps])):
    logits.append(torch.cat([out for out, *_ in passes]))
    sums.append((sum(flops for _, flops, _ in passes), sum(moved for *_, moved in passes)))
    print(f"{title}: {len(passes)} passes, {sums[-1][0] / 1e6:,.0f} MFLOP, {sums[-1][1] / 1e6:,.0f} MB moved")
holds("the cache changes the logits by rounding alone", (logits[0] - logits[1]).abs().max() < 1e-3)
holds("it saves more than two thirds of the FLOPs of this name", sums[1][0] < sums[0][0] / 3)
holds("it saves less than half of the bytes: as many passes read the weights", sums[1][1] > 0.5 * sums[0][1])

# %% [markdown]
# So the cache saves FLOPs, and leaves passes that read all weights for one token. For one name, reading is what is left to save.
#
# ## What a step reads
#
# A matmul of B tokens with weights (D, F) takes 2 B D F FLOPs, and reads 4 D F bytes of float32 weights, whatever B is. Its arithmetic
# intensity is about B / 2 FLOPs a byte: B tokens share one read. The cache is not shared. Each number in it takes 2 FLOPs (one
# multiply-add) in the step: 1/2 FLOP a byte for any B. Counted with the shipped step:

# %%
L, G, C, D, V = config.n_layer, config.n_head, config.n_embd // config.n_head, config.n_embd, config.vocab_size
weights = sum(p.numel() for name, p in model.named_parameters() if "wpe" not in name)
a_token = 2 * L * G * C  # numbers in the cache for one token
rows, intensity = [], {}
for B in (1, 4, 16, 64, 256):
    ring = RingCache([prompts.of(0).cache] * B, P)
    tokens_B = torch.tensor([names[n % len(names)][0] for n in range(B)])
    _, flops, moved = counted(model, lambda step=(model, tokens_B, ring): next_logits(*step))
    started = time.perf_counter()
    next_logits(model, tokens_B, ring)
    seconds = time.perf_counter() - started
    intensity[B], cached = flops / moved, 4 * a_token * B * (P + 16)
    a_token_of = f"{flops / B / 1e6:.1f}", f"{moved / B / 1e6:.2f}"
    rows.append([B, *a_token_of, f"{cached / moved:.1%}", f"{intensity[B]:.1f}", f"{B / seconds:,.0f}"])
table(["B", "MFLOP a token", "MB a token", "of it cache", "FLOP a byte", "tokens/s here"], rows)
print(f"prefill of {P} tokens: {prefill[1] / prefill[2]:.1f} FLOP a byte")
holds("a batch of one has about half a FLOP a byte", 0.3 < intensity[1] < 0.7)
holds("the prefill of one prompt has more than four times that", prefill[1] / prefill[2] > 4 * intensity[1])
holds("the intensity rises with the batch, but less than B-fold", 8 < intensity[64] / intensity[1] < 64)

# %% [markdown]
# At B = 1 the matmuls are matrix times vector, which is memory-bound: the H100 of [chapter 2b](02b_bytes_and_tiles.py) needs some 300
# FLOPs a byte. Intensity grows more slowly than B / 2, since activations and logits (B, V) are moved as well, and so is the cache.
# Prefill has many rows even for one name: all tokens of the prompt go through a weight matrix at once.
#
# **Weights or cache?** A step reads W weights once, and 2 L G C numbers for each of K tokens of B rows. The cache is the larger part from
# B = W / (2 L G C K) on. [Pope et al. 2022](https://arxiv.org/abs/2211.05102) have this analysis for large models on many chips.
#
# ## How large the cache is, and fewer heads for it
#
# With *grouped-query attention* ([Ainslie et al. 2023](https://arxiv.org/abs/2305.13245)), G heads of keys and values serve H query heads.
# With G = 1 it is *multi-query attention* ([Shazeer 2019](https://arxiv.org/abs/1911.02150)). The cache is G / H as large, and each of its numbers
# serves H / G queries. First the formula against our ring's tensors, for the released model and a small random Llama (9 and 3 heads):

# %%
torch.manual_seed(0)
sizes = {"hidden_size": 576, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 100}
llama = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=9, num_key_value_heads=3)).eval()
some_ids = [1, 5, 7, 9]
for kind, each, ids, numbers in (("released", model, prompt_ids, a_token), ("Llama", llama, some_ids, 2 * 2 * 3 * 64)):
    ring = RingCache([Prompts(each, [ids]).of(0).cache] * 8, len(ids))
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in ring.layers)
    print(f"{kind}: {size:,} bytes for 8 rows of {len(ids) + 16} columns, {numbers} numbers a token")
    holds(f"{kind}: the cache has 2 L G C numbers for each token", size == 4 * numbers * 8 * (len(ids) + 16))
ring = RingCache([Prompts(llama, [some_ids]).of(0).cache], len(some_ids))
off = next_logits(llama, torch.tensor([3]), ring) - llama(torch.tensor([[*some_ids, 3]])).logits[:, -1]
holds("three heads of keys serve nine of queries, as in the model's own forward", off.abs().max() < 1e-4)
models = {  # weights, layers, heads of keys and values, head dim, tokens of a row
    "mtg-names": (weights, L, G, C, 30),
    "SmolLM2-135M, were G = 9": (135e6, 30, 9, 64, 2048),
    "SmolLM2-135M, as it is, G = 3": (135e6, 30, 3, 64, 2048),
    "Llama 3 70B, were G = 64": (70.6e9, 80, 64, 128, 8192),
    "Llama 3 70B, as it is, G = 8": (70.6e9, 80, 8, 128, 8192),
}
rows, from_rows = [], {}
for name, (W, layers, heads, head_dim, K) in models.items():
    numbers = 2 * layers * heads * head_dim
    from_rows[name] = W / (numbers * K)
    rows.append([name, f"{2 * numbers / 1e3:,.1f}", K, f"{2 * numbers * K / 1e6:,.1f}", f"{from_rows[name]:,.1f}"])
table(["16-bit numbers", "kB a token", "tokens", "MB a row", "rows whose cache is as large as the weights"], rows)
ours, *_, many, grouped = from_rows.values()
holds("for long texts the cache passes the weights at a few rows or dozens", many < 10 < grouped < 100)
holds("for names it takes more rows than a batch of 64 has", ours > 64)

# %% [markdown]
# (Shapes: the configuration of [SmolLM2](https://arxiv.org/abs/2502.02737)-135M, our models' teacher; [Llama 3](https://arxiv.org/abs/2407.21783),
# table 3.) With names, the weights are the larger part, so what a larger batch saves is theirs. With 8,192 tokens a row, the cache
# limits how many rows fit, and fewer heads are worth what they may cost in quality (exercise 2).
#
# ## Which experts a step reads
#
# An MoE layer reads only the experts that some row has chosen. If each token chose k of E at random, B tokens would read the share
#
# $$ 1 - \left(1 - k/E\right)^B $$
#
# of the experts ([chapter 3](03_mixture_of_experts.py) has this for tokens drawn from all names). In decoding, the tokens of a
# step are not random: static batches start with the same prompt and are at the same place. So we take the released routers' choices
# for each token of the names, and put together the tokens that meet in a step.


# %%
chosen: list[torch.Tensor] = []
padded_NT = torch.tensor([[*prompt_ids, *ids, *[EOS] * (max(draws) - len(ids))] for ids in names])
with listening(model, lambda block, router, logits_TE, gates_TK, experts_TK: chosen.append(experts_TK)):
    model(padded_NT, logits_to_keep=1)
E, k = config.num_experts, config.num_experts_per_tok
chosen_XTE = torch.stack([torch.zeros(len(each), E).scatter(1, each, 1.0) for each in chosen])  # X MoE layers
chosen_XNSE = chosen_XTE.view(len(chosen), *padded_NT.shape, E)[:, :, P:]  # S tokens of N names
rows, read = [], {}
for B in (1, 2, 4, 8, 16):
    measured = [experts_read(chosen_XNSE, schedule(draws, B)) for schedule in (refilled, static)]
    read[B], fine = [1 - (1 - k / E) ** B, *measured], 1 - (1 - 8 / 256) ** B
    rows.append([B, *(f"{share:.1%}" for share in (*read[B], fine)), f"{B * 8 / 256 / fine:.2f}"])
table(["B", f"{k} of {E} at random", "refilled", "static", "8 of 256 at random", "tokens for each of these"], rows)
routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
print(f"share of all weights: routed experts {routed / weights:.0%}, vocabulary {V * D / weights:.0%}")
holds("the vocabulary's table is larger than all routed experts", routed < V * D)
holds("one token reads k of E experts", all(abs(share - k / E) < 1e-6 for share in read[1]))
holds("8 tokens read nine of ten experts and more", min(read[8]) > 0.9)
order = all(random > mixed > same for B, (random, mixed, same) in read.items() if B > 1)
holds("tokens that meet choose more alike than at random, those at one place in the name most", order)
quote(grouped_mlp)

# %% [markdown]
# So half of the experts saves reading for a batch of one, and hardly any for eight. Every step reads the vocabulary's table, which
# is larger than all routed experts of this model. With 8 of 256 experts, as in DeepSeek-V3, the saving lasts longer, and each expert works
# for fewer tokens: to give it as many as a dense MLP has, the batch has to be E / k times as large. From three quarters of the experts on
# (`_MOST_EXPERTS`), `grouped_mlp` multiplies all at once, and gives up the saving.
#
# ## One prompt for all names
#
# All names of a request have the same prompt. `Prompts` computes it once, for any number of names:

# %%
quote(Prompts.of)
of_tokens = sum(flops for _, flops, _ in steps) / len(steps) * sum(map(len, names))
each, once = (times * prefill[1] + of_tokens for times in (len(names), 1))
print(
    f"{len(names)} names: {each / 1e9:.1f} GFLOP if each computes the prompt, {once / 1e9:.1f} if it is computed once"
)
holds("computing the prompt once saves more than a third of the FLOPs", once < each * 2 / 3)
age, own = [0] * len(names), []  # tokens in the cache: of each name; of all slots at each full step
for row in (row for row in refilled(draws, 64) if None not in row):
    own.append([age[n] for n in row])
    for n in row:
        age[n] += 1
own_SB = torch.tensor(own, dtype=torch.float32)
kept = {
    "whole context for each row": 64 * config.n_positions,
    "ring: prompt and 16 columns for each row": 64 * (P + 16),
    "pages of 4 tokens, the prompt once": P + 4 * (own_SB / 4).ceil().sum(1).mean().item(),
    "what is needed": P + own_SB.sum(1).mean().item(),
}
table(["64 slots", "tokens held", "kB"], [[way, f"{n:,.0f}", f"{n * a_token / 250:,.0f}"] for way, n in kept.items()])
whole, of_ring, of_pages, least = kept.values()
holds("the ring holds under a quarter of whole contexts", of_ring < whole / 4)
holds("it holds more than three times what is needed, pages under twice that", of_pages < 2 * least < of_ring / 1.5)

# %% [markdown]
# The package computes the prompt once, and its ring holds a copy for each row. *Paged attention* ([Kwon et al. 2023, vLLM](https://arxiv.org/abs/2309.06180))
# stores the cache in pages of a few tokens, with a table of each row's pages. Rows share the pages of a prompt, and a row takes a new
# page when it needs one. It needs a kernel that reads by such a table. For names, which are short and alike in length, the ring is small
# enough, and its columns are read by two plain matmuls. For long texts of unknown lengths the pages win.
#
# ## A ring cache by hand
#
# Refilled slots have rows of different ages in one batch. In the *ring cache*, all rows write the same column at each step: step t
# writes column t mod R, and overwrites what was written R steps ago. When a slot gets a new name nothing is moved or cleared. The
# row remembers when it began, and sees columns written since:
#
# $$ s_c = t - ((t - c) \bmod R) \qquad \text{row } b \text{ sees column } c \iff s_c > \text{begun}_b $$
#
# where s is the step that last wrote column c. R has to be at least as long as the longest name (the package's ring grows).

# %%
quote("chapter_decoding:ToyRing")
quote(names_by_hand)
by_hand = names_by_hand(prompts, 64, 64, Sampling(), EOS, SEED)
holds("the toy ring in the package's decode step writes the package's names", by_hand == names[:64])

# %% [markdown]
# `names_by_hand` is the loop of continuous batching. A new name's first token comes from the prompt's logits, so in the step after an end
# the slot computes a token that nobody sees. The package's ring notes the steps in a list, and its prompts may have different lengths:

# %%
quote(RingCache.step)

# %% [markdown]
# ## Does a name depend on its batch?
#
# A row sees its own columns alone, and token choice sends a token to the same experts whatever else is in the batch. And the random
# numbers of name i come from the seed and i, not from the slot or the step (`noise`, chapter 6). What is left is rounding: a matmul of
# 64 rows may add in another order than one of a single row. A draw takes the first token whose cumulative probability exceeds a random
# number, so it differs where that number falls between two sums that rounding moved.

# %%
tokens_B = torch.tensor([ids[0] for ids in names[:28]])
logits_BV = {}  # the same 28 rows, in batches of this size
for size in (28, 7, 1):
    rings = ((part, RingCache([prompts.of(0).cache] * size, P)) for part in tokens_B.split(size))
    logits_BV[size] = torch.cat([next_logits(model, part, ring) for part, ring in rings])
all_BV, one_BV = (logits_BV[size].double().softmax(-1) for size in (28, 1))
shift = (all_BV.cumsum(-1) - one_BV.cumsum(-1)).abs().max().item()
below = (all_BV < shift).float().mean().item()
print(f"28 rows at once or one by one: sums differ by up to {shift:.0e}; {below:.0%} of tokens are less likely")
kinds, rate = {"all tokens": Sampling(), "top-p 0.9": Sampling(top_p=0.9)}, {}
for kind, sampling in kinds.items():
    rate[kind] = [different_draws(logits_BV[28], logits_BV[size], sampling) for size in (1, 7)]
header = ["28 rows at once, drawn from", "draws that differ one by one", "by 7"]
table(header, [[kind, *(f"{each:.5f}" for each in rates)] for kind, rates in rate.items()])
together, *others = (names_by_hand(prompts, 24, slots, Sampling(), EOS, SEED) for slots in (64, 7, 1))
same = [sum(a == b for a, b in zip(together, each, strict=True)) for each in others]
print(f"of 24 names {same[0]} are the same in 7 slots as in 64, and {same[1]} in 1 slot")
holds("without a cut, less than one draw in a hundred depends on the batch", max(rate["all tokens"]) < 1e-2)
holds("if the sums differ at all, many tokens are less likely than that", below > 0.1 or shift == 0)
holds("a cut makes it rarer, if it happens", max(rate["top-p 0.9"]) <= max(rate["all tokens"]))
holds("nearly all names are the same", min(same) >= 21)

# %% [markdown]
# So a name depends on its batch rarely, but not never. Many tokens are less likely than the sums differ. A random number that falls
# among such tokens draws one neighbor or the other, and the rest of the name follows. A cut (chapter 6) removes the tail: whichever of its
# tokens was drawn, it is drawn again. The presets have a cut, and `generate` promises the same names "up to rounding". Batch-dependent
# routing would be another matter: with expert choice, or token dropping at a capacity, other rows decide which experts a token gets.
#
# ## What to remember
#
# - Keys and values of earlier tokens do not change, so they are kept: a step computes one token. It still reads all weights.
# - A batch shares the read of the weights, not that of the cache. Grouped-query attention makes the cache smaller, not the weights.
# - A few rows choose nearly all experts, unless experts are many.
# - Slots that are refilled at once need fewer steps than static batches. A ring of columns is enough for that.
# - A name depends on seed and index, and on the batch by rounding alone. A cut of the tail makes that rare.
#
# ## Exercises
#
# 1. **Sorted lengths.** If the lengths were known before, static batches could hold names of like length. How many steps would that take
#    for 192 names in 8 and in 64 slots? Why does nobody do it in decoding?
# 2. **One head of keys and values.** Make multi-query attention of the released model: average the heads of keys, and those of values, in each
#    layer. How much smaller is the cache, and what do bits per character become? What if only one layer is changed?
# 3. **A ring that is too short.** Give `names_by_hand` a ring of 4 `columns`. Which names change, and what kind of attention is that?
# 4. **Several tokens in one step.** Let the dense base model guess 4 tokens, and check them with one forward of the released model (*speculative
#    decoding*, [Leviathan et al. 2022](https://arxiv.org/abs/2211.17192)). With the likeliest token at each step: how many forwards are saved?
#
# Solutions: [solutions/06b_kv_cache.py](solutions/06b_kv_cache.py).
#
# ## Reading
#
# - [Pope et al. 2022](https://arxiv.org/abs/2211.05102): what limits prefill and decode of large models, by formulas like these.
# - [Shazeer 2019](https://arxiv.org/abs/1911.02150): multi-query attention. [Ainslie et al. 2023](https://arxiv.org/abs/2305.13245): grouped-query attention, and how a
#   trained model gets it.
# - [Yu et al. 2022, Orca](https://www.usenix.org/conference/osdi22/presentation/yu): continuous batching. [Kwon et al. 2023, vLLM](https://arxiv.org/abs/2309.06180): paged attention.
# - From scratch: [LLMs from scratch, KV cache](https://github.com/rasbt/LLMs-from-scratch/tree/main/ch04/03_kv-cache).
# - Next: [chapter 7](07_evaluation.py), which names are better; or [chapter 11](11_quantization.py), fewer bytes for each weight.
