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
# **The question: who decides which weights work on which piece of a name, and what keeps the work spread?**
#
# In a dense GPT-2 every token goes through the same MLP. In a mixture of experts (MoE) there are E MLPs, the experts,
# and a small linear layer, the router, sends each token to K of them. Weights grow with E, arithmetic with K. The
# [glossary](../glossary.md#mixture-of-experts) has the terms.
#
# A router without training would choose at random, so we make a real one first: eight copies of the MLP in every second
# block of `models/mtg-base` (chapter 4 is about that step), then 30 steps of fine-tuning on card names. That is the
# public API, as `examples/finetune_mtg_names.py` uses it. The router learns at ten times the rate of the experts, and
# all the rest is frozen: so there is something to see after a few seconds.

# %%
import json
import math
import tempfile
import warnings

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_models import bits_per_character, nats_of_names, training_steps
from chapter_tools import RELEASED, ROOT, cards, load_base, load_released, quote, show, table, token_texts
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.data.packing import encode_cards, pack
from flash_experts.evaluation.costs import parameter_counts
from flash_experts.evaluation.routing.maps import inspect_router, route
from flash_experts.models.moe_layer import Experts, MoELayer, load_balancing_loss, router_z_loss
from flash_experts.models.router import TopKRouter
from flash_experts.models.router_metrics import router_metrics, update_router_biases
from flash_experts.training import Trainer, TrainingConfig
from flash_experts.training.training_config import LearningRateScale

dense, tokenizer = load_base()
train_cards, validation_cards = cards("train"), cards("validation")[:200]
names = [card.name for card in validation_cards]
E, K, LAST = 8, 2, dense.config.n_layer - 1

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
# Names that the model was not trained on. Color and number are the expert with the largest gate in the last block. The
# prompt is left out of the picture.

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
# Is that more than chance? Count how much the experts of a token tell about its class (BOS token, prompt, start of a
# word, continuation, punctuation), its place and its card: the mutual information, in bits. Estimated from a sample it is
# never quite 0, so the same is counted with shuffled labels.

# %%
rows = []
for old, new in zip(before.specializations, after.specializations, strict=True):
    information = (old.shuffled, old.information, new.information)
    rows.append([f"{old.title}, block {old.block}", *(f"{x:.3f}" for x in information)])
table(["bits that experts tell about the", "shuffled labels", "untrained router", "trained"], rows)
strongest = {}
for each in after.specializations:
    strongest[each.title] = max(strongest.get(each.title, 0.0), each.information)
holds(
    "even an untrained router sorts tokens",
    all(each.information > 2 * each.shuffled for each in before.specializations if each.title == "token class"),
)
holds("experts tell most about the class of the token", max(strongest, key=strongest.get) == "token class")
changed = [
    new.information - old.information for old, new in zip(before.specializations, after.specializations, strict=True)
]
raised = sum(change > 0 for change in changed)
print(f"training raised {raised} of the {len(changed)} rows")
holds("what 30 steps change has no one direction", 0 < raised < len(changed))

# %% [markdown]
# Two lessons. Even an untrained router sorts tokens: it is a linear function of the hidden state, and like tokens have
# like states. So compare with an untrained router, not with chance alone. And experts tell most about the class of the
# token, the *form* of the text, before and after. What 30 steps change has no one direction: some rows rise, others fall.
# The makers of Mixtral ([Jiang et al. 2024](https://arxiv.org/abs/2401.04088), section 5) looked for experts by topic and
# found syntax.
#
# ## From the MLP of a GPT to experts, in thirty lines
#
# Before the package is opened: all of it, from nothing. First the MLP, as in nanoGPT. Then E of them and a router.


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
        gates_TK = best_TK.softmax(-1)  # how much of each: they sum to 1
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
# What a library adds: it is fast, it can drop, balance, mask and count, it can start from a dense model. But first, how
# tokens and experts can be matched at all. **One figure, one set of logits, six ways.** Rows are 16 tokens, columns 8
# experts; blue is a gate. The logits lean to experts 0 and 1.

# %%
T_SHOWN, E, K = 16, 8, 2
shown_TE = torch.randn(T_SHOWN, E) + torch.tensor([1.5, 1.0, 0, 0, 0, 0, 0, 0])


def gates_of(logits_TE: torch.Tensor, k: int) -> torch.Tensor:
    """(T, E) gates of the K largest logits of each token."""
    best_TK, chosen_TK = logits_TE.topk(k)
    return torch.zeros_like(logits_TE).scatter(1, chosen_TK, best_TK.softmax(-1))


def by_expert_choice(logits_TE: torch.Tensor, k: int) -> torch.Tensor:
    """(T, E) scores of the T K / E tokens that each expert takes."""
    scores_TE = logits_TE.softmax(-1)
    tokens_CE = scores_TE.topk(len(logits_TE) * k // E, dim=0).indices
    return torch.zeros_like(scores_TE).scatter(0, tokens_CE, scores_TE.gather(0, tokens_CE))


def within_capacity(gates_TE: torch.Tensor, k: int, factor: float) -> torch.Tensor:
    """Gates, with those dropped that find their expert full: the largest gates come first."""
    capacity = math.ceil(factor * len(gates_TE) * k / E)
    return gates_TE * (gates_TE >= gates_TE.topk(capacity, dim=0).values[-1])


top_2 = gates_of(shown_TE, 2)
noisy = shown_TE + 1.5 * torch.randn(T_SHOWN, E)
ways = {
    "top-1": gates_of(shown_TE, 1),
    "top-2": top_2,
    "noisy top-2": gates_of(noisy, 2),
    "top-2, capacity factor 1": within_capacity(top_2, 2, 1.0),
    "expert choice": by_expert_choice(shown_TE, 2),
    "bias on the choice": gates_of(shown_TE - torch.tensor([1.5, 1.0, 0, 0, 0, 0, 0, 0]), 2),
}
figure, axes = plt.subplots(1, 6, figsize=(14, 4), sharey=True)
for axis, (way, gates_TE) in zip(axes, ways.items(), strict=True):
    drawn = axis.imshow(gates_TE, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    dropped = torch.nonzero((top_2 > 0) & (gates_TE == 0)) if "capacity" in way else []
    for t, e in dropped:
        axis.text(e, t, "x", color="tab:red", ha="center", va="center", weight="bold")
    load_E = (gates_TE > 0).sum(0)
    axis.set(xlabel="expert", xticks=range(E), title=f"{way}\nloads {' '.join(map(str, load_E.tolist()))}")
    axis.title.set_size(8)
axes[0].set_ylabel("token")
figure.colorbar(drawn, ax=axes, label="gate", fraction=0.01)
show(figure, "03_ways")
loads = {way: (gates_TE > 0).sum(0) for way, gates_TE in ways.items()}
per_token = {way: (gates_TE > 0).sum(1) for way, gates_TE in ways.items()}
rows = [[way, int(loads[way].max()), f"{per_token[way].min()} to {per_token[way].max()}"] for way in ways]
table(["", "largest load (mean: 4; of top-1: 2)", "experts of a token"], rows)
holds(
    "top-k fixes the experts of a token, and leaves the loads free",
    set(per_token["top-2"].tolist()) == {2} and loads["top-2"].max() > 4,
)
holds(
    "a capacity factor of 1 bounds the load, and drops choices",
    loads["top-2, capacity factor 1"].max() <= 4 and loads["top-2, capacity factor 1"].sum() < 32,
)
holds(
    "expert choice fixes the loads, and leaves the experts of a token free",
    set(loads["expert choice"].tolist()) == {4} and per_token["expert choice"].unique().numel() > 1,
)
holds(
    "noise and bias both lower the largest load",
    max(loads["noisy top-2"].max(), loads["bias on the choice"].max()) < loads["top-2"].max(),
)

# %% [markdown]
# - **Top-1** (Switch: [Fedus et al. 2021](https://arxiv.org/abs/2101.03961)) is the cheapest. The gate must then be the
#   probability itself: a gate of one choice that is normalised is always 1, and teaches the router nothing (chapter 4).
#   **Top-2** (GShard: [Lepikhin et al. 2020](https://arxiv.org/abs/2006.16668)) compares two experts for each token.
# - **Noisy top-k** ([Shazeer et al. 2017](https://arxiv.org/abs/1701.06538)) adds noise, of a size that is learned, to the
#   logits in training: H_e = (x W_r)_e + N(0, 1) softplus((x W_noise)_e). Experts that are nearly as good get tokens as well.
#   Later models left it out; the package has jitter on the router's input instead (`router_jitter_noise`).
# - **Capacity factor.** On many devices each expert has a buffer of C = factor x T K / E tokens. What does not fit is
#   **dropped** (the red crosses): that choice adds nothing, and the token goes on by the residual connection. A higher
#   factor drops less, and pads more.
# - **A random second expert** (GShard): the second of two is used with a probability in proportion to its gate. Another kind of
#   noise; the package does not have it.
# - **Precision.** The router computes in float32 where the rest is bfloat16 (Switch: selective precision). Rounding would
#   otherwise decide near ties (`Router.logits`).
# - **Expert choice** ([Zhou et al. 2022](https://arxiv.org/abs/2202.09368)): experts choose tokens. More of it below.
# - **A bias on the choice** (loss-free balancing: [Wang et al. 2024](https://arxiv.org/abs/2408.15664); DeepSeek-V3). Below, too.
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
# One token, step by step. We catch what enters the last MoE layer for "Krenko, Mob Boss".

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
# In the router: `topk` chooses by score plus a bias (of which more below), and the gates come from the score alone. The
# line with `detach` adds nothing to the value and gives the router a gradient: chapter 4. The experts' loop is for
# reading; the default on a CPU is one fused operation, on a GPU a grouped product, with the same numbers.
#
# ## What it costs
#
# Counted, not computed: the parameters of the layer, and the operations that PyTorch counts in one forward.

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
holds("for the same arithmetic, up to 2% for the router", of_kind["E 64, K 2"][2] < 1.02 * of_kind["E 2, K 2"][2])

# %% [markdown]
# That is the offer. The price comes now: memory, balance, and bytes.
#
# ## When do experts decode cheaply?
#
# Writing a name is a token at a time, and then reading weights takes the time, not multiplying (chapter 2: memory-bound). One
# token reads K experts. But the B tokens of a batch choose *different* experts. If all were equally likely, B tokens would
# read E (1 - (1 - K/E)^B) of them. Below: GPT-2 small's layer, E 8, K 2, float32, bytes of weights read for each token.
# The dots are counted with this chapter's trained routers on real names.

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
# So a batch of one reads as little as a dense model of the active size; a batch of some dozens reads everything, as a dense
# model of the *total* size would. Between them experts lose their advantage in bytes and keep the one in arithmetic, which
# counts again when the batch is large enough to be compute-bound. The last column is of `benchmarks/results/moe_2cores.json`,
# two cores of a Zen 4; its dense MLP reads the same weights. Experts decode cheaply for one user, or for very many.
#
# ## Load
#
# Nothing in the formula spreads the tokens. The more an expert is chosen, the more it learns, the better it fits, the
# more it is chosen. `load` is an expert's tokens over the mean: 1 everywhere is perfect.

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
# 30 steps are short, and the coefficient is small, so one expert may be all but idle here. Two losses are there against that.
#
# **The Switch loss**, the usual load-balancing loss (Fedus et al. 2021), is trained beside the language loss:
#
# $$ L = E \sum_e f_e\,P_e $$
#
# f_e is the share of the choices that went to e; it is a count and has no gradient. P_e is the mean probability of e;
# it has one. So the gradient pushes down the probability of experts in proportion to how busy they are.

# %%
quote(load_balancing_loss)


# %% [markdown]
# Its value at made-up routers. 64 tokens, 8 experts, 2 per token.


# %%
def of_router(logits_TE: torch.Tensor) -> tuple[str, str, str]:
    """Loss, and where its gradient moves the mean logits of experts 0 and 7 (minus the gradient)."""
    with torch.enable_grad():
        logits = logits_TE.clone().requires_grad_()
        loss = load_balancing_loss(logits, logits.topk(K, dim=-1).indices)
        loss.backward()
    down_E = -logits.grad.sum(0)
    return f"{loss:.3f}", f"{down_E[0]:+.3f}", f"{down_E[7]:+.3f}"


token = torch.arange(64)
balanced_TE, collapsed_TE, leaning_TE = torch.zeros(3, 64, E)
balanced_TE[token, token % E] = balanced_TE[token, (token + 1) % E] = 10.0
collapsed_TE[:, :2] = 10.0
leaning_TE[:, :2] = 2.0
undecided_TE = 1e-4 * torch.randn(64, E)
table(
    ["router", "loss", "moves expert 0", "moves expert 7"],
    [
        ["balanced, sure of itself", *of_router(balanced_TE)],
        ["undecided: all p equal", *of_router(undecided_TE)],
        ["leans to experts 0 and 1", *of_router(leaning_TE)],
        ["all to experts 0 and 1", *of_router(collapsed_TE)],
    ],
)

# %% [markdown]
# 1 at balance, E / K when all goes to the same K experts. But look at the second and last row. An undecided router has
# loss 1 too, whatever it chooses. And a router that is *sure* of its collapse has the largest loss and hardly any
# gradient: the softmax is flat there. (Is 1 the smallest value there is? Exercise 1.)

# %%
holds(
    "balance has loss 1, collapse E / K",
    abs(float(of_router(balanced_TE)[0]) - 1) < 0.01 and abs(float(of_router(collapsed_TE)[0]) - E / K) < 0.01,
)
holds("an undecided router has loss 1 too", abs(float(of_router(undecided_TE)[0]) - 1) < 0.01)
holds(
    "a leaning router is moved; one that is sure of its collapse is not",
    float(of_router(leaning_TE)[1]) < -0.1 and abs(float(of_router(collapsed_TE)[1])) < 0.01,
)

# %% [markdown]
# **The z-loss** ([Zoph et al. 2022](https://arxiv.org/abs/2202.08906), ST-MoE) keeps logits small, so that the Switch loss
# still has a hold on them, and so that rounding to 16 bits does not move probabilities:
#
# $$ L_z = \frac{1}{T} \sum_t \Big(\log \sum_e e^{z_{te}}\Big)^2 $$
#
# The figure: a router sends every token to experts 0 and 1, with logits that lead by so much. How strong is each loss's pull?

# %%
leads, pulls = [0.5 * step for step in range(1, 31)], {"Switch loss": [], "z-loss": []}
with torch.enable_grad():
    for lead in leads:
        for name, loss_of in (
            ("Switch loss", lambda logits: load_balancing_loss(logits, logits.topk(K, dim=-1).indices)),
            ("z-loss", router_z_loss),
        ):
            logits_TE = torch.zeros(64, E)
            logits_TE[:, :2] = lead
            logits_TE.requires_grad_()
            loss_of(logits_TE).backward()
            pulls[name].append(logits_TE.grad[:, 0].sum().item())
figure, axis = plt.subplots(figsize=(7, 3))
for (name, pull), style in zip(pulls.items(), ("-", "--"), strict=True):
    axis.plot(leads, pull, style, label=name)
axis.set(
    xlabel="logit of the two favoured experts, others 0", ylabel="gradient at expert 0", title="which loss still pulls?"
)
axis.legend()
show(figure, "03_z_loss")
holds(
    "the Switch loss's pull ends where the router is sure of itself",
    pulls["Switch loss"][-1] < 0.01 * max(pulls["Switch loss"]),
)
holds("the z-loss's pull grows with the logits", pulls["z-loss"] == sorted(pulls["z-loss"]))
quote(router_z_loss)

# %% [markdown]
# ## Collapse, provoked
#
# Three ingredients: no balancing, a high rate, and a router that favours two experts from the start. To favour: add to
# two rows of the router's weight the mean of what it reads, so that their logits are 4 higher on average. One MoE layer
# (the last block), 30 steps, everything but router and experts frozen.

# %%
STEPS, BIAS = 30, 4.0


def biased_model(**fields: object) -> GPT2MoEForCausalLM:
    """Eight experts in the last block, and a router that favours the first two."""
    torch.manual_seed(0)
    made = GPT2MoEForCausalLM.from_dense(dense, num_experts=E, num_experts_per_tok=K, moe_layer_freq=LAST + 1, **fields)
    router = made.transformer.h[LAST].mlp.router
    read: list[torch.Tensor] = []
    hook = router.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    nats_of_names(made, train_cards[:100], tokenizer)
    hook.remove()
    mean_D = torch.cat(read).mean(0)
    router.weight[:2] += BIAS * mean_D / mean_D.square().sum()
    return made


METHODS = {
    "no balancing": {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0},
    "Switch loss 0.1": {"router_aux_loss_coef": 0.1},
    "loss-free bias 0.02": {"router_aux_loss_coef": 0.0, "router_bias_update_rate": 0.02},
    "expert choice": {"router_aux_loss_coef": 0.0, "routing": "expert_choice"},
}
trained: dict[str, GPT2MoEForCausalLM] = {}
biases: list[list[float]] = []  # of the loss-free way, at each step
alarmed: dict[str, set[str]] = {}
history: dict[str, list[dict[str, float]]] = {}
for method, fields in METHODS.items():
    trained[method], history[method] = biased_model(**fields), []
    with torch.enable_grad(), warnings.catch_warnings(record=True) as alarms:
        warnings.simplefilter("always")
        steps = training_steps(
            trained[method], train_cards, tokenizer, STEPS, 1e-3, 440, lr_scale=LearningRateScale(router=10, dense=0)
        )
        for _ in steps:
            history[method].append(router_metrics(trained[method]))
            if "bias" in method:
                biases.append(trained[method].transformer.h[LAST].mlp.router.selection_bias_E.tolist())
    alarmed[method] = {str(alarm.message) for alarm in alarms}
    print(f"{method}: {'; '.join(alarmed[method] or {'no alarm'})}")
holds(
    "without balancing the package warns of a collapsed router",
    any("collapsed" in alarm for alarm in alarmed["no balancing"]),
)

# %% [markdown]
# `router_metrics` reads the counts that the routers kept since the last call. It warns of a router that is in trouble
# five times in a row, and names the setting to change. (Where a cure works it may still warn in the first steps, before
# the cure has done its work.)
#
# ## ... and cured
#
# The same start, the same names, the same steps. Each picture: the share of each expert over the steps.

# %%
figure, axes = plt.subplots(1, len(METHODS), figsize=(13, 3.2), sharey=True)
for axis, (method, reads) in zip(axes, history.items(), strict=True):
    shares = [[read[f"router/{LAST}/load/{e}"] / E for read in reads] for e in range(E)]
    axis.stackplot(range(1, STEPS + 1), shares, edgecolor="white", linewidth=0.3)
    axis.set(title=method, xlabel="step", xlim=(1, STEPS), ylim=(0, 1))
axes[0].set_ylabel("share of the choices, expert 0 below")
show(figure, "03_loads")

rows, spreads, bits_of, nats_of = [], {}, {}, {}
for method, reads in history.items():
    late = {
        key: sum(read[f"router/{LAST}/{key}"] for read in reads[-5:]) / 5 for key in ("load_cv", "max_load", "entropy")
    }
    nats_of[method] = nats_of_names(trained[method], validation_cards, tokenizer)
    bits_of[method] = bits_per_character(nats_of[method], validation_cards)
    start = reads[0][f"router/{LAST}/load_cv"]
    spreads[method] = start, late["load_cv"]
    rows.append([method, f"{start:.2f}", *(f"{late[key]:.2f}" for key in late), f"{bits_of[method]:.3f}"])
dense_nats = nats_of_names(dense, validation_cards, tokenizer)
dense_bits = bits_per_character(dense_nats, validation_cards)
rows.append(["dense, as it was", "-", "-", "-", "-", f"{dense_bits:.3f}"])
table(["", "spread at step 1", "at the end", "largest load", "entropy of p", "validation bits"], rows)
start, end = spreads["no balancing"]
holds("without balancing the spread stays large", end > 0.6 * start)
holds(
    "each cure at least halves it",
    all(spreads[method][1] < 0.5 * start for method in METHODS if method != "no balancing"),
)
holds("expert choice is balanced from the first step", max(spreads["expert choice"]) < 0.05)
widest = max(bits_of.values()) - min(bits_of.values())
print(
    f"the four differ by {widest:.3f} bits; against the dense model {min(bits_of.values()) - dense_bits:+.3f} to {max(bits_of.values()) - dense_bits:+.3f}"
)
holds("in 30 steps the collapse costs little: the four are within 0.03 bits", widest < 0.03)
holds("none of the four is ahead of the dense base by more than 0.01 bits", min(bits_of.values()) > dense_bits - 0.01)

# %% [markdown]
# **Why do all four runs gain nothing over the base, or lose a little?** The base has read these training names before; what
# they can teach it, it knows. 30 steps at a high rate then only disturb it. (`docs/experiments.md` has the long form, and
# chapter 9 asks when experts pay.) The runs are about loads, not about bits.
#
# How each works:
#
# - **Switch loss.** The gradient of the balancing loss moves the router. It also competes with the language loss: too
#   large a coefficient and tokens go where there is room, not where they fit.
# - **Loss-free bias** (Wang et al. 2024). A number per expert is added to the scores *for the choice only*; the gates
#   do not see it, so no gradient is disturbed. After each step it moves by a fixed amount against the load:

# %%
quote(update_router_biases)
biases_E = trained["loss-free bias 0.02"].transformer.h[LAST].mlp.router.selection_bias_E
print("the biases now:", [f"{bias:+.2f}" for bias in biases_E.tolist()])
figure, axes = plt.subplots(1, 2, figsize=(10, 3))
for expert in range(E):
    line = {"color": f"C{expert}", "label": f"expert {expert}"}
    axes[0].plot(range(1, STEPS + 1), [step[expert] for step in biases], **line)
    of_expert = [read[f"router/{LAST}/load/{expert}"] for read in history["loss-free bias 0.02"]]
    axes[1].plot(range(1, STEPS + 1), of_expert, **line)
axes[0].set(title="the bias of each expert", xlabel="step", ylabel="added to the score, for the choice")
axes[1].set(title="its load over the mean", xlabel="step", ylabel="load")
axes[1].axhline(1, color="black", linewidth=0.8)
axes[1].legend(ncols=2, fontsize=7)
show(figure, "03_bias")
early = biases[4]
holds("the biases of the two favoured experts fall first, below all others", max(early[:2]) < min(early[2:]))
moves = torch.tensor(biases).diff(dim=0)
amounts = {round(move, 3) for step in moves - moves.amin(1, keepdim=True) for move in step.tolist()}
holds("each bias moves up or down by 0.02 or not at all, before all are centred", amounts <= {0.0, 0.02, 0.04})

# %% [markdown]
#   The usual rate is 0.001. We took 20 times that because 30 steps are few; see how the loads swing around the mean.
#   DeepSeek-V3 ([2024](https://arxiv.org/abs/2412.19437)) balances so, with a very small loss per sequence besides.
# - **Expert choice** (Zhou et al. 2022) turns the table: each expert takes the C = T K / E tokens that score highest
#   for it. The load is equal by construction, at every step. The price: some tokens are taken by many experts and some
#   by none, and the choice depends on the other tokens, later ones and other names among them:


# %%
def leak(method: str) -> float:
    """How far the logits of 39 names move when the 40th, packed after them, is replaced by another."""
    forty = encode_cards(validation_cards[:40], tokenizer)
    other = encode_cards([validation_cards[50]], tokenizer)
    labels = sum(len(name.ids) - name.prompt_length for name in forty[:-1])
    first, second = (trained[method](**pack(some).inputs).logits[0, :labels] for some in (forty, forty[:-1] + other))
    return (first - second).abs().max().item()


chooser = trained["expert choice"].transformer.h[LAST].mlp.router
_, _, tokens_EC = chooser(x_TD)
per_token = chooser.membership(tokens_EC, len(x_TD)).sum(-1).int().tolist()
print("experts of each token:", *(f"{text} {count}" for text, count in zip(texts, per_token, strict=True)))
leaks = {method: leak(method) for method in ("no balancing", "expert choice")}
for method, moved in leaks.items():
    print(f"{method}: the logits of earlier names move by {moved:.2g} when a later one changes")
holds("token choice does not look ahead, expert choice does", leaks["no balancing"] < 1e-3 < leaks["expert choice"])
holds("with expert choice some tokens have more experts than others", len(set(per_token)) > 1)

# %% [markdown]
# That is the leak of chapter 1 again, now through the router. A model with expert choice can look ahead in training and
# cannot generate as it was trained, so our `generate` refuses it by default. Its validation bits above were
# measured with that look ahead. Study it, compare it, and take token choice to write names.
#
# Look at the column of bits once more: all rows are alike. The experts began as copies of a good MLP, so two of them do what
# one did. What a collapse loses is what the others could have become: their parameters are paid for and not used.
#
# ## Shared experts and fine-grained experts
#
# **Fine-grained** ([Dai et al. 2024](https://arxiv.org/abs/2401.06066), DeepSeekMoE): cut each expert into g parts and choose g
# times as many of g times as many. Weights and arithmetic stay, the number of different combinations explodes:

# %%
combinations = {g: math.comb(8 * g, 2 * g) for g in (1, 2, 4, 8)}
figure, axis = plt.subplots(figsize=(6, 2.6))
axis.bar([f"{2 * g} of {8 * g}" for g in combinations], list(combinations.values()))
axis.set(yscale="log", xlabel="experts chosen, of experts of 1/g of the size", ylabel="combinations")
axis.set_title("the same weights and arithmetic, cut finer")
show(figure, "03_fine_grained")
print("; ".join(f"g {g}: {count:,}" for g, count in combinations.items()))
holds("cut in four, 28 combinations become over ten million", combinations[1] == 28 and combinations[4] > 10_000_000)

# %% [markdown]
# **Shared**: some experts get every token, so that what all tokens need is not learned E times. The released model has both:
# its dense layer stays as shared experts, beside fine-grained routed ones. How much of its layers' output is whose?

# %%
released, released_tokenizer = load_released()
config = released.config
print(
    f"{config.num_shared_experts} shared experts, {config.num_experts_per_tok} of {config.num_experts} routed, each of {config.expert_size} hidden units"
)
of_parts: dict[int, dict[str, float]] = {}
inputs = pack(encode_cards(validation_cards[:100], released_tokenizer)).inputs
for number, block in enumerate(released.transformer.h):
    if isinstance(block.mlp, MoELayer) and block.mlp.shared_experts is not None:
        of_parts[number] = {}
        for part in ("experts", "shared_experts"):
            getattr(block.mlp, part).register_forward_hook(
                lambda module, inputs, output, into=of_parts[number], part=part: into.update(
                    {part: output.norm(dim=-1).mean().item()}
                )
            )
released(**inputs)
table(
    ["", "routed", "shared"],
    [
        [f"block {number}: mean length of the output", *(f"{size:.1f}" for size in parts.values())]
        for number, parts in of_parts.items()
    ],
)
if of_parts:
    figure, axis = plt.subplots(figsize=(6, 2.6))
    for offset, part in ((-0.2, "experts"), (0.2, "shared_experts")):
        label = "routed experts" if part == "experts" else "shared experts"
        axis.bar(
            [place + offset for place in range(len(of_parts))],
            [parts[part] for parts in of_parts.values()],
            0.4,
            label=label,
        )
    axis.set(
        xticks=range(len(of_parts)),
        xticklabels=[f"block {number}" for number in of_parts],
        ylabel="mean length of the output",
    )
    axis.legend()
    show(figure, "03_shared")
    holds(
        "in the released model the routed experts do speak, in each block",
        all(parts["experts"] > 0 for parts in of_parts.values()),
    )

# %% [markdown]
# ## The released model's routers
#
# What `flash-experts inspect models/mtg-names` shows, drawn here: which expert takes which class of token, and how its loads
# went during its training.

# %%
seen = inspect_router(str(RELEASED), names, validation_cards)
classes = [each for each in seen.specializations if each.title == "token class"]
figure, axes = plt.subplots(1, len(classes) + 1, figsize=(13, 3.6))
highest = max(max(map(max, each.share)) for each in classes)
for axis, each in zip(axes, classes, strict=False):
    drawn = axis.imshow(each.share, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    axis.set(title=f"block {each.block}: {each.information:.2f} bits", xlabel="expert", yticks=range(len(each.groups)))
    axis.set_yticklabels(each.groups if axis is axes[0] else [""] * len(each.groups))
figure.colorbar(drawn, ax=axes[len(classes) - 1], label="share of the class's choices")
if seen.training is not None:
    for block, loads_of in seen.training.loads.items():
        axes[-1].plot(seen.training.steps, [max(step) for step in loads_of], "o-", label=f"block {block}, largest")
        axes[-1].plot(seen.training.steps, [min(step) for step in loads_of], "o--", label=f"block {block}, least")
    axes[-1].axhline(1, color="black", linewidth=0.8)
    axes[-1].set(title="loads in training", xlabel="step", ylabel="load over the mean", ylim=(0, None))
    axes[-1].legend(fontsize=6, ncols=2)
show(figure, "03_released")
holds(
    "in each block experts prefer classes of tokens, more than shuffled labels would",
    all(each.information > each.shuffled_high for each in classes),
)
holds("no expert of the released model is dead", all(min(block.load) > 0.01 for block in seen.blocks))

# %% [markdown]
# ## What to remember
#
# - The router is one linear layer. Gates of a token sum to 1; only the chosen experts compute and learn.
# - Parameters grow with E, arithmetic with K.
# - Balance does not come by itself. Look at the loads, not at the loss: collapse is silent.
#
# ## Exercises
#
# 1. **Under 1.** Find logits for which `load_balancing_loss` is under 1, with E = 8 and K = 1. (Hint: one expert takes
#    many tokens that hardly prefer it; the others take few that are sure.)
# 2. **Another K at evaluation.** Fine-tune with K = 2 as above, then set `router.top_k` to 1, 2, 4, 8 and measure
#    validation bits. What do you expect of experts that have hardly parted?
# 3. **Capacity.** With `capacity_factor` an expert takes no more than that many times the mean load in training, and
#    the rest is dropped. What share would be dropped at 1.0, 1.25, 2.0 and 4.0 by the biased router, and by one
#    without a bias?
# 4. **The coefficient.** Cure the biased router with Switch loss 0.001, 0.01, 0.1 and 1, 15 steps each. Which still
#    collapses? Which costs language loss?
#
# Solutions: [solutions/03_mixture_of_experts.py](solutions/03_mixture_of_experts.py).
#
# ## Reading
#
# - [Shazeer et al. 2017](https://arxiv.org/abs/1701.06538): noisy top-k, and collapse. [Fedus et al. 2021](https://arxiv.org/abs/2101.03961):
#   Switch, capacity, the loss. [Zoph et al. 2022](https://arxiv.org/abs/2202.08906): the z-loss.
# - [Zhou et al. 2022](https://arxiv.org/abs/2202.09368): expert choice. [Dai et al. 2024](https://arxiv.org/abs/2401.06066): shared and
#   fine-grained experts. [Wang et al. 2024](https://arxiv.org/abs/2408.15664): loss-free balancing.
# - [Gale et al. 2022, MegaBlocks](https://arxiv.org/abs/2211.15841): all experts in one matmul of unequal blocks, no dropping.
# - [Hugging Face: Mixture of Experts explained](https://huggingface.co/blog/moe), and
#   [makeMoE](https://huggingface.co/blog/AviSoori1x/makemoe-from-scratch), from scratch.
# - Next: [chapter 4](04_upcycling.py), how a dense model gets experts; [chapter 9](09_do_experts_pay.py), whether they pay.
