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
# # 3. Mixture of experts
#
# **The question: who decides which weights work on which piece of a name, and what does it cost?**
#
# In a dense GPT-2 every token goes through the same MLP. In a mixture of experts (MoE) there are E MLPs, the experts,
# and a small linear layer, the router, sends each token to K of them. Weights grow with E, FLOPs with K. The
# [glossary](../glossary.md#mixture-of-experts) has the terms.
#
# We need a trained router first. We put eight copies of the MLP into every second block of `models/mtg-base` (chapter 4 is about
# that step), and fine-tune for 30 steps on card names, with the public API, as `examples/finetune_mtg_names.py` does. The router
# learns at ten times the rate of the experts, and all the rest is frozen, so that a few seconds of training change something.

# %%
import json
import tempfile

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_tools import ROOT, cards, load_base, quote, show, table, token_texts
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.data.packing import encode_cards
from flash_experts.evaluation.routing.maps import inspect_router, route
from flash_experts.evaluation.scorers import parameter_counts
from flash_experts.models.moe_layer import Experts, MoELayer
from flash_experts.models.router import TopKRouter
from flash_experts.training import Trainer, TrainingConfig
from flash_experts.training.training_config import LearningRateScale

dense, tokenizer = load_base()
train_cards, validation_cards = cards("train"), cards("validation")[:200]
names = [card.name for card in validation_cards]
E, K = 8, 2
LAST = dense.config.n_layer // 2 * 2 - 1  # the last block with experts: every second one has them

torch.manual_seed(0)
model = GPT2MoEForCausalLM.from_dense(dense, num_experts=E, num_experts_per_tok=K, moe_layer_freq=2)
before = inspect_router(model, names, validation_cards, tokenizer=tokenizer)
with tempfile.TemporaryDirectory() as folder:
    config = TrainingConfig(
        output_dir=folder,
        run_name="chapter-3",
        max_steps=30,
        max_epochs=None,
        tokens_per_batch=640,
        learning_rate=1e-3,
        lr_scale=LearningRateScale(router=10, dense=0),
        eval_every=None,
        checkpoint_every=None,
    )
    Trainer(model, tokenizer, train_cards, [], config).train()
model.eval()
after = inspect_router(model, names, validation_cards, tokenizer=tokenizer)

# %% [markdown]
# ## The picture first
#
# The figure shows names that the model was not trained on. Color and number are the expert with the largest gate in the last MoE
# layer. The prompt is left out.

# %%
figure, axis = plt.subplots(figsize=(9, 4.6))
for row, name_map in enumerate(after.maps[:12]):
    of_name = [place for place, kind in enumerate(name_map.classes) if kind not in ("BOS token", "prompt")]
    x = 0.0
    for place in of_name:
        expert, gate = name_map.experts[LAST][place][0]
        text = f"{name_map.tokens[place]} {expert}"
        width = 0.18 + 0.085 * len(text)
        axis.barh(-row, width, left=x, height=0.8, color=f"C{expert}", alpha=0.35 + 0.5 * gate, edgecolor="white")
        axis.text(x + width / 2, -row, text, ha="center", va="center", fontsize=8)
        x += width
axis.set(title=f"each token and its first expert, block {LAST} (strong color: large gate)", yticks=[], xticks=[])
axis.spines[:].set_visible(False)
show(figure, "03_choices")

# %% [markdown]
# Is that more than chance? We measure the mutual information, in bits, between the experts of a token and its class (BOS token,
# prompt, start of a word, continuation, punctuation), its place and its card. An estimate from a sample is never quite 0, so the
# table has the same estimate with shuffled labels.

# %%
rows = []
for old, new in zip(before.specializations, after.specializations, strict=True):
    information = (old.shuffled, old.information, new.information)
    rows.append([f"{old.title}, block {old.block}", *(f"{x:.3f}" for x in information)])
table(["mutual information of experts and", "shuffled labels", "untrained router", "trained"], rows)
strongest = {}
for each in after.specializations:
    strongest[each.title] = max(strongest.get(each.title, 0.0), each.information)
holds(
    "even an untrained router sorts tokens",
    all(each.information > 2 * each.shuffled for each in before.specializations if each.title == "token class"),
)
holds("experts depend most on the class of the token", max(strongest, key=strongest.get) == "token class")
changed = [
    new.information - old.information for old, new in zip(before.specializations, after.specializations, strict=True)
]
raised = sum(change > 0 for change in changed)
print(f"training raised {raised} of the {len(changed)} rows")
holds("the 30 steps have no one direction", 0 < raised < len(changed))
largest, of = max(zip(changed, after.specializations, strict=True), key=lambda pair: abs(pair[0]))
print(f"the largest change: {largest:+.3f} bits, {of.title}, block {of.block}")
holds("the largest change is in a row about form: class or place", of.title in ("token class", "place in the name"))

# %% [markdown]
# Even an untrained router sorts tokens: it is a linear function of the hidden state, and similar tokens have similar states. So
# compare with an untrained router, not with chance alone. Experts depend most on the class of the token, the *form* of the text,
# before training and after it. The 30 steps have no one direction: some rows rise, others fall. The largest change is about form, too.
# The makers of Mixtral ([Jiang et al. 2024](https://arxiv.org/abs/2401.04088), section 5) looked for experts by topic and
# found syntax.
#
# ## From the MLP of a GPT to experts, in thirty lines
#
# Before we read the package's code, here is an MoE layer from scratch: first the MLP, as in nanoGPT, then E of them and a router.


# %%
class TinyMLP(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x_TD), approximate="tanh"))


class TinyMoE(nn.Module):
    def __init__(self, width: int, hidden: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.experts = nn.ModuleList(TinyMLP(width, hidden) for _ in range(num_experts))
        self.router = nn.Linear(width, num_experts, bias=False)
        self.top_k = top_k

    def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
        best_TK, chosen_TK = self.router(x_TD).topk(self.top_k)  # which experts: the K largest logits
        gates_TK = best_TK.softmax(-1)  # how much of each: their probabilities over the sum of these
        y_TD = torch.zeros_like(x_TD)
        for e, expert in enumerate(self.experts):
            token, k = torch.where(chosen_TK == e)  # the tokens that chose this expert
            y_TD = y_TD.index_add(0, token, gates_TK[token, k, None] * expert(x_TD[token]))
        return y_TD


# %% [markdown]
# Is it the package's layer? Give both the same weights:

# %%
torch.manual_seed(1)
tiny, x_TD = TinyMoE(32, 128, num_experts=8, top_k=2), torch.randn(100, 32)
package_layer = MoELayer(
    GPT2MoEConfig(
        n_embd=32, n_layer=1, n_head=1, moe_layer_freq=1, num_experts=8, num_experts_per_tok=2, resid_pdrop=0.0
    )
).eval()
with torch.no_grad():
    package_layer.router.weight.copy_(tiny.router.weight)
    for e, expert in enumerate(tiny.experts):
        package_layer.experts.up_proj[e], package_layer.experts.up_proj_bias[e] = expert.up.weight.T, expert.up.bias
        package_layer.experts.down_proj[e], package_layer.experts.down_proj_bias[e] = (
            expert.down.weight.T,
            expert.down.bias,
        )
    off = (tiny(x_TD) - package_layer(x_TD)).abs().max().item()
print(f"thirty lines against the package: {off:.0e}")
holds("thirty lines compute what the package's layer computes", off < 1e-5)

# %% [markdown]
# A library adds speed, token dropping, balancing, masks and counts, and a start from a dense model. Other ways to match tokens and
# experts are in [chapter 3b](03b_ways_to_route.py).
#
# ## The formula, with shapes
#
# T tokens, width D, E experts with F hidden units, K per token:
#
# $$ p = \text{softmax}(x\,W_r^\top) \qquad g_e = \frac{p_e}{\sum_{j \in \text{top}_K} p_j} \qquad
# y = \sum_{e \in \text{top}_K} g_e\,\text{MLP}_e(x) $$
#
# | | shape | |
# | --- | --- | --- |
# | x | (T, D) | tokens, batch and length flattened |
# | W_r | (E, D) | the router's weight: one row for each expert |
# | p | (T, E) | scores |
# | chosen experts, gates g | (T, K) | gates of a token sum to 1 |
# | up_proj, down_proj | (E, D, F), (E, F, D) | the experts, stacked |
#
# We follow one token step by step, and catch what enters the last MoE layer for "Krenko, Mob Boss".

# %%
torch.set_grad_enabled(False)
krenko = encode_cards([card for card in train_cards if card.name == "Krenko, Mob Boss"], tokenizer)[0]
texts = token_texts(krenko, tokenizer)
E, K = model.config.num_experts, model.config.num_experts_per_tok
layer: MoELayer = model.transformer.h[LAST].mlp
caught: list[torch.Tensor] = []
hook = layer.register_forward_hook(lambda module, inputs, output: caught.extend((inputs[0][0], output[0])))
model(torch.tensor([krenko.ids[:-1]]))
hook.remove()
x_TD, y_TD = caught
logits_TE, gates_TK, experts_TK = layer.router(x_TD)
t = krenko.prompt_length  # the first token of the name
print("shapes:", *(f"{name} {tuple(x.shape)}" for name, x in (("x", x_TD), ("logits", logits_TE), ("gates", gates_TK))))
p_E = logits_TE[t].softmax(-1)
print(f"token {texts[t]!r}")
table(
    ["expert", *range(E)],
    [["logit", *(f"{z:.2f}" for z in logits_TE[t].tolist())], ["p", *(f"{p:.3f}" for p in p_E.tolist())]],
)
first, second = experts_TK[t].tolist()
print(f"chosen: {first} and {second}, gates {gates_TK[t, 0]:.3f} and {gates_TK[t, 1]:.3f}")
print(f"by hand: {p_E[first] / (p_E[first] + p_E[second]):.3f}")
holds(
    "gates are the chosen probabilities over their sum",
    abs(p_E[first] / (p_E[first] + p_E[second]) - gates_TK[t, 0]) < 1e-4,
)

# %% [markdown]
# Now the sum of the two experts' outputs, by hand, against the layer:

# %%
experts: Experts = layer.experts
y_D = torch.zeros(x_TD.shape[1])
for e, g in ((first, gates_TK[t, 0]), (second, gates_TK[t, 1])):
    hidden_F = experts.act_fn(x_TD[t] @ experts.up_proj[e] + experts.up_proj_bias[e])
    y_D += g * (hidden_F @ experts.down_proj[e] + experts.down_proj_bias[e])
print(f"by hand against the layer: {(y_D - y_TD[t]).abs().max():.1e}")
holds("the layer's output is the gated sum of two experts", (y_D - y_TD[t]).abs().max() < 1e-3)

# %% [markdown]
# ## The code that ships

# %%
quote(TopKRouter.forward)
quote(Experts.forward)

# %% [markdown]
# In the router, `topk` chooses by score plus a bias (chapter 3c), and the gates come from the score alone. The line with `detach`
# does not change the value, and gives the router a gradient (chapter 4). The loop over experts is for reading. The default on a
# CPU is one fused operation, on a GPU a grouped matmul, with the same output up to rounding.
#
# ## What it costs
#
# We count the parameters of the layer, and PyTorch counts the FLOPs of one forward.

# %%
rows = []
for experts_count, per_token in ((1, 1), (2, 2), (4, 2), (8, 2), (64, 2), (8, 1), (8, 8)):
    config = GPT2MoEConfig(n_embd=256, n_layer=4, n_head=4, num_experts=experts_count, num_experts_per_tok=per_token)
    config._experts_implementation = "eager"
    moe = MoELayer(config).eval()
    for parameter in moe.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    with FlopCounterMode(display=False) as counter:
        moe(torch.randn(100, 256))
    size = parameter_counts(moe)
    kind = "dense" if experts_count == 1 else f"E {experts_count}, K {per_token}"
    rows.append([kind, f"{size.total:,}", f"{size.active:,}", f"{counter.get_total_flops() / 100 / 1e6:.2f}"])
table(["layer, width 256", "parameters", "active per token", "MFLOP per token"], rows)
for name, each in (("dense", dense), ("E 8, K 2 in every second block", model)):
    size = parameter_counts(each)
    print(f"whole model, {name}: {size.total:,} parameters, {size.active:,} active")
of_kind = {row[0]: [float(str(cell).replace(",", "")) for cell in row[1:]] for row in rows}
holds("64 experts hold 32 times the weights of two", abs(of_kind["E 64, K 2"][0] / of_kind["E 2, K 2"][0] - 32) < 0.1)
holds("for the same FLOPs, up to 2% for the router", of_kind["E 64, K 2"][2] < 1.02 * of_kind["E 2, K 2"][2])

# %% [markdown]
# So weights can grow without FLOPs. DeepSeek-V3 uses 37 of its 671 billion weights for a token: 1 shared expert and 8 of 256
# ([2024](https://arxiv.org/abs/2412.19437)). The costs: all weights are held in memory; each expert sees only K / E of the
# tokens, so its batches are small and uneven; the load has to be balanced; and decoding reads more bytes, as we see now.
#
# ## When do experts decode cheaply?
#
# A model writes one token at a time. Then reading the weights takes longer than the matmuls: decoding is memory-bound (chapter
# 2b). One token reads K experts. But the B tokens of a batch choose *different* experts. If all were equally likely, B tokens
# would read E (1 - (1 - K/E)^B) of them. The figure shows the bytes of weights read for each token, for GPT-2 small's layer, E 8,
# K 2, float32. The dots are counted with this chapter's trained routers on real names.

# %%
routed = route(model, encode_cards(validation_cards, tokenizer))
batches = [1, 2, 4, 8, 16, 32, 64, 128]
expert_megabytes = 4 * (2 * 768 * 3072 + 3072 + 768) / 1e6
generator = torch.Generator().manual_seed(0)
counted = []
for size_of_batch in batches:
    met = []
    for block in routed:
        chosen_TE = torch.from_numpy(block.chosen_TE)
        for _ in range(50):
            some = torch.randperm(len(chosen_TE), generator=generator)[:size_of_batch]
            met.append(chosen_TE[some].any(0).sum().item())
    counted.append(sum(met) / len(met))
expected = [E * (1 - (1 - K / E) ** size_of_batch) for size_of_batch in batches]
per_token = {
    "dense, as large as the active experts": [K * expert_megabytes / size_of_batch for size_of_batch in batches],
    "MoE, all experts equally likely": [n * expert_megabytes / b for n, b in zip(expected, batches, strict=True)],
    "dense, as large as all experts": [E * expert_megabytes / size_of_batch for size_of_batch in batches],
}
figure, axis = plt.subplots(figsize=(7, 3.4))
for (name, values), style in zip(per_token.items(), ("--", "-", ":"), strict=True):
    axis.loglog(batches, values, style, base=2, label=name)
axis.plot(batches, [n * expert_megabytes / b for n, b in zip(counted, batches, strict=True)], "o", label="MoE, counted")
axis.set(
    xlabel="tokens at once (batch size)",
    ylabel="MB of weights read, a token",
    title="E 8, K 2, GPT-2 small's width, float32",
)
axis.xaxis.set_major_formatter("{x:g}")
axis.yaxis.set_major_formatter("{x:g}")
axis.legend()
show(figure, "03_bytes_per_token")
benchmark = json.loads((ROOT / "benchmarks/results/moe_2cores.json").read_text("utf-8"))["rows"]
decoding = {
    row["tokens"]: row["times_dense"]
    for row in benchmark
    if row["section"] == "decoding" and row["implementation"] == "fe_experts"
}
rows = []
for size_of_batch, n in zip(batches, counted, strict=True):
    measured = f"{decoding[size_of_batch]:.2f} x" if size_of_batch in decoding else "-"
    rows.append([size_of_batch, f"{n:.1f} of {E}", f"{n * expert_megabytes / size_of_batch:.1f}", measured])
table(["tokens", "experts read", "MB a token", "time over a dense MLP of all experts' size, measured before"], rows)
holds("one token reads the weights of K experts: a quarter of all", counted[0] == K)
holds("32 tokens read nearly all of them", counted[5] > 0.8 * E)
holds(
    "uneven routers read fewer experts than even ones, and never many more",
    all(n <= 1.05 * even for n, even in zip(counted, expected, strict=True)),
)
holds("in the benchmark experts beat the dense MLP of the same total size at every batch", max(decoding.values()) < 1)

# %% [markdown]
# So a batch of one reads as little as a dense model of the active size. A batch of some dozens reads everything, as a dense model
# of the *total* size does. There experts have lost their advantage in bytes. They keep the one in FLOPs, which matters again when
# the batch is large enough to be compute-bound. The last column is from `benchmarks/results/moe_2cores.json`, two cores of a
# Zen 4; its dense MLP reads the same weights. Experts decode cheaply for one user, or for very many.
#
# ## Load
#
# Nothing in the formula spreads the tokens over the experts. `load` is an expert's tokens over the mean: 1 everywhere is perfect
# balance.

# %%
for block in after.blocks:
    load = "  ".join(f"{x:.2f}" for x in block.load)
    print(f"block {block.block}: load {load}   spread {block.metrics['load_cv']:.2f} (standard deviation over mean)")
least = min((min(block.load), block.block, block.load.index(min(block.load))) for block in after.blocks)
most = max((max(block.load), block.block, block.load.index(max(block.load))) for block in after.blocks)
print(
    f"least: expert {least[2]} of block {least[1]} with {least[0]:.2f}; most: expert {most[2]} of block {most[1]} with {most[0]:.2f}"
)
holds(
    "30 steps with the usual loss (0.01) leave the loads uneven: some expert has under half of the mean", least[0] < 0.5
)

# %% [markdown]
# 30 steps are few, and the coefficient is small, so one expert may be almost idle here. [Chapter 3c](03c_balance.py) shows why loads
# become uneven, and what balances them.
#
# ## What to remember
#
# - The router is one linear layer. Gates of a token sum to 1; only the chosen experts compute and learn.
# - Parameters grow with E, FLOPs with K. All weights are held in memory, though few work on a token.
# - Experts decode cheaply for one user, or for very many.
#
# ## Exercises
#
# 1. **Another K at evaluation.** Fine-tune with K = 2 as above, then set `router.top_k` to 1, 2, 4, 8 and measure
#    validation bits. What do you expect of experts that are still nearly equal?
# 2. **Why 47 billion?** Mixtral 8x7B has 32 blocks of width 4,096, 8 experts of 3 matrices of 4,096 x 14,336 (gated), 2 a token,
#    32 query heads that share 8 heads of keys and values, and 32,000 tokens in and out. Count its weights, all and active. Why are
#    they not 8 x 7 and 2 x 7 billion?
# 3. **Without the loop.** Sort the chosen pairs of token and expert by expert, so that each expert's tokens are one slice, and
#    compute `TinyMoE` slice by slice. That is how fast kernels do it, with nothing dropped. Check that the output is the same.
#
# Solutions: [solutions/03_mixture_of_experts.py](solutions/03_mixture_of_experts.py).
#
# ## Reading
#
# - [Jacobs et al. 1991](https://doi.org/10.1162/neco.1991.3.1.79): experts and a gate, the idea. [Shazeer et al. 2017](https://arxiv.org/abs/1701.06538):
#   sparse, as a layer. [Fedus et al. 2021](https://arxiv.org/abs/2101.03961): Switch, in a transformer with one expert a token.
# - [Gale et al. 2022, MegaBlocks](https://arxiv.org/abs/2211.15841): all experts in one matmul of unequal blocks, no dropping.
# - [Hugging Face: Mixture of Experts explained](https://huggingface.co/blog/moe). From scratch: [makeMoE](https://huggingface.co/blog/AviSoori1x/makemoe-from-scratch),
#   and [LLMs from scratch, chapter 4](https://github.com/rasbt/LLMs-from-scratch/tree/main/ch04/07_moe), gated experts next to an MLP.
# - Next: [chapter 3b](03b_ways_to_route.py), other ways to route; or [chapter 4](04_upcycling.py), how a dense model gets experts.
