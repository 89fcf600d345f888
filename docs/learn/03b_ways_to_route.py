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
# # 3b. Ways to route
#
# **The question: in how many ways can tokens and experts be matched, and what does each of them fix?**
#
# [Chapter 3](03_mixture_of_experts.py) had top-2: each token takes its two best experts. Each other way below controls something
# that top-k leaves free, and gives something up for it. The [glossary](../glossary.md#mixture-of-experts) has the terms.

# %%
import math

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_tools import RELEASED, cards, load_released, show, table

from flash_experts.data.packing import encode_cards, pack
from flash_experts.evaluation.routing.maps import inspect_router
from flash_experts.models.moe_layer import MoELayer

torch.manual_seed(1)
torch.set_grad_enabled(False)
validation_cards = cards("validation")[:200]
names = [card.name for card in validation_cards]

# %% [markdown]
# ## The picture first
#
# The figure routes the same logits in six ways. Rows are 16 tokens, columns 8 experts; blue is a gate. The logits favor experts
# 0 and 1. The titles have the loads: the number of tokens of each expert.

# %%
T_SHOWN, E, K = 16, 8, 2
FAVOR_E = torch.tensor([1.5, 1.0, 0, 0, 0, 0, 0, 0])
shown_TE = torch.randn(T_SHOWN, E) + FAVOR_E


def gates_of(logits_TE: torch.Tensor, k: int, bias_E: torch.Tensor | float = 0.0) -> torch.Tensor:
    """(T, E) gates of the K experts with the largest logit plus bias: their probabilities, for K > 1 over their sum."""
    chosen_TK = (logits_TE + bias_E).topk(k).indices
    gates_TK = logits_TE.softmax(-1).gather(1, chosen_TK)  # the bias moves the choice, not the gate
    if k > 1:
        gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
    return torch.zeros_like(logits_TE).scatter(1, chosen_TK, gates_TK)


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
    "bias on the choice": gates_of(shown_TE, 2, bias_E=-FAVOR_E),
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
show(figure, "03b_ways")
loads = {way: (gates_TE > 0).sum(0) for way, gates_TE in ways.items()}
per_token = {way: (gates_TE > 0).sum(1) for way, gates_TE in ways.items()}
rows = [[way, int(loads[way].max()), f"{per_token[way].min()} to {per_token[way].max()}"] for way in ways]
table(["", "largest load (mean: 4; of top-1: 2)", "experts of a token"], rows)
holds(
    "top-k fixes the number of experts of a token, and leaves the loads free",
    set(per_token["top-2"].tolist()) == {2} and loads["top-2"].max() > 4,
)
holds(
    "a capacity factor of 1 bounds the load, and drops choices",
    loads["top-2, capacity factor 1"].max() <= 4 and loads["top-2, capacity factor 1"].sum() < 32,
)
holds(
    "expert choice fixes the loads, and leaves the number of experts of a token free",
    set(loads["expert choice"].tolist()) == {4} and per_token["expert choice"].unique().numel() > 1,
)
bias_TE, chosen_TE = ways["bias on the choice"], ways["bias on the choice"] > 0
probs_TE = shown_TE.softmax(-1) * chosen_TE
holds(
    "the bias moves the choice; the gates are the probabilities of the chosen without it, over their sum",
    torch.allclose(bias_TE, probs_TE / probs_TE.sum(-1, keepdim=True)) and not torch.equal(chosen_TE, top_2 > 0),
)
holds(
    "noise and bias both lower the largest load",
    max(loads["noisy top-2"].max(), loads["bias on the choice"].max()) < loads["top-2"].max(),
)

# %% [markdown]
# - **Top-1** (Switch: [Fedus et al. 2021](https://arxiv.org/abs/2101.03961)) is the cheapest. The gate is then the probability
#   itself: with one choice a normalised gate is always 1, and gives the router no gradient (chapter 4).
#   **Top-2** (GShard: [Lepikhin et al. 2020](https://arxiv.org/abs/2006.16668)) mixes two experts for each token.
# - **Noisy top-k** ([Shazeer et al. 2017](https://arxiv.org/abs/1701.06538)) adds noise, of a size that is learned, to the
#   logits in training: H_e = (x W_rᵀ)_e + N(0, 1) softplus((x W_noiseᵀ)_e). Experts that are nearly as good get tokens as well.
#   The package has jitter on the router's input instead, as Switch does (`router_jitter_noise`).
# - **Capacity factor.** On many devices each expert has a buffer of C = factor x T K / E tokens. What does not fit is
#   **dropped** (the red crosses): that choice adds nothing, and the token keeps its residual connection. A higher
#   factor drops less, and pads more. Switch fills buffers in the order of the text, the package by the largest score (exercise 3).
# - **A random second expert** (GShard): the second of two is used with a probability in proportion to its gate. The package does
#   not have it.
# - **Precision.** The router computes in float32 where the rest is bfloat16 (Switch: selective precision). Rounding would
#   otherwise decide near ties (`Router.logits`).
# - **Expert choice** ([Zhou et al. 2022](https://arxiv.org/abs/2202.09368)): experts choose tokens (chapter 3c).
# - **A bias on the choice** (loss-free balancing: [Wang et al. 2024](https://arxiv.org/abs/2408.15664); DeepSeek-V3), also in chapter 3c.
# - **Random or hashed** ([Roller et al. 2021](https://arxiv.org/abs/2106.04426)): a fixed table from token to expert. It learns
#   nothing, and is a baseline for routers that learn.
#
# ## Hierarchical MoE
#
# [Shazeer et al. 2017](https://arxiv.org/abs/1701.06538) (appendix B) route in two levels when there are thousands of experts: a
# first router chooses among a groups, a second one among the b experts of a chosen group (E = a b). The gate is the product of both:
#
# $$ y = \sum_{i \in \text{groups}} \sum_{j \in \text{group } i} g_i(x)\; g_{j|i}(x)\; \text{MLP}_{ij}(x) $$
#
# A token then computes a logits, and b logits for each group that it enters, instead of a b. If a group is a device, the token is
# sent to few devices: [DeepSeek-V3](https://arxiv.org/abs/2412.19437) limits the groups of a token for that reason, with one router
# for all experts. The package has one level. The cost is choice: the best experts may be in other groups. How often, with random
# logits?

# %%
groups, size = 8, 8
flat_TE = torch.randn(2000, groups * size)
best_TK = flat_TE.topk(2).indices
scores_TG = flat_TE.unflatten(1, (groups, size)).logsumexp(-1)  # a group's probability is the sum of its experts'
kept_share = {}
for entered in (1, 2, 4):
    open_TG = torch.zeros_like(scores_TG).scatter(1, scores_TG.topk(entered).indices, 1.0)
    kept_share[entered] = open_TG.gather(1, best_TK // size).mean().item()
    logits = groups + entered * size
    print(
        f"{entered} of {groups} groups: {logits} logits of {groups * size}, {kept_share[entered]:.0%} of the best two kept"
    )
holds(
    "the fewer groups a token may enter, the more of its best experts it misses",
    kept_share[1] < kept_share[2] < kept_share[4] < 1,
)

# %% [markdown]
# ## Shared experts and fine-grained experts
#
# **Fine-grained** ([Dai et al. 2024](https://arxiv.org/abs/2401.06066), DeepSeekMoE): there are g times as many experts, each of
# 1/g of the size, and a token takes g times as many. Weights and FLOPs stay the same, but there are far more combinations:

# %%
combinations = {g: math.comb(8 * g, 2 * g) for g in (1, 2, 4, 8)}
figure, axis = plt.subplots(figsize=(6, 2.6))
axis.bar([f"{2 * g} of {8 * g}" for g in combinations], list(combinations.values()))
axis.set(yscale="log", xlabel="experts chosen, of experts of 1/g of the size", ylabel="combinations")
axis.set_title("the same weights and FLOPs, cut finer")
show(figure, "03b_fine_grained")
print("; ".join(f"g {g}: {count:,}" for g, count in combinations.items()))
holds("cut in four, 28 combinations become over ten million", combinations[1] == 28 and combinations[4] > 10_000_000)

# %% [markdown]
# **Shared** ([DeepSpeed-MoE](https://arxiv.org/abs/2201.05596), 2022): some experts get every token, so that what all tokens need
# is not learned E times. The released model has both kinds: its dense layer stays as shared experts, next to fine-grained routed
# ones. How large is each kind's part of the output?

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
    ["mean length of the output", "routed", "shared", "routed / shared"],
    [
        [
            f"block {number}",
            *(f"{size:.1f}" for size in parts.values()),
            f"{parts['experts'] / parts['shared_experts']:.1%}",
        ]
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
    axis.legend(loc="upper left", bbox_to_anchor=(1, 1))
    show(figure, "03b_shared")
    holds(
        "in the released model the routed experts add something in each block",
        all(parts["experts"] > 0 for parts in of_parts.values()),
    )

# %% [markdown]
# Routed experts that are added next to shared ones start with an output of 0. How much of the sum is theirs limits how
# much routing can matter: at a few percent of the shared experts, the model is nearly the dense model that it came from.
# Chapter [9](09_do_experts_pay.py) has the bits; `python benchmarks/routed_scale.py` measures how they depend on it.

# %% [markdown]
# ## The released model's routers
#
# What `flash-experts inspect models/mtg-names` shows, drawn here: which expert takes which class of token (the titles have the
# mutual information of chapter 3), and how the loads went during training.

# %%
seen = inspect_router(str(RELEASED), names, validation_cards)
classes = [each for each in seen.specializations if each.title == "token class"]
figure, axes = plt.subplots(1, len(classes) + 1, figsize=(13, 3.6))
highest = max(max(map(max, each.share)) for each in classes)
for axis, each in zip(axes, classes, strict=False):
    drawn = axis.imshow(each.share, cmap="Blues", vmin=0, vmax=highest, aspect="auto")
    title = f"block {each.block}: class and expert share {each.information:.2f} bits"
    axis.set(title=title, xlabel="expert", yticks=range(len(each.groups)))
    axis.title.set_size(9)
    axis.set_yticklabels(each.groups if axis is axes[0] else [""] * len(each.groups))
figure.colorbar(drawn, ax=axes[len(classes) - 1], label="share of the class's choices")
if seen.training is not None:
    for number, (block, loads_of) in enumerate(seen.training.loads.items()):
        for pick, line, which in ((max, "o-", "largest"), (min, "o--", "least")):
            of_steps, label = [pick(step) for step in loads_of], f"block {block}, {which}"
            axes[-1].plot(seen.training.steps, of_steps, line, color=f"C{number}", label=label)
    axes[-1].axhline(1, color="black", linewidth=0.8)
    axes[-1].margins(y=0.3)
    axes[-1].set(title="loads in training", xlabel="step", ylabel="load over the mean", ylim=(0, None))
    axes[-1].legend(fontsize=6, ncols=2)
show(figure, "03b_released")
holds(
    "in each block experts prefer classes of tokens, more than shuffled labels would",
    all(each.information > each.shuffled_high for each in classes),
)
holds("no expert of the released model is dead", all(min(block.load) > 0.01 for block in seen.blocks))

# %% [markdown]
# So experts specialize in classes of tokens, here as in large models. [ST-MoE](https://arxiv.org/abs/2202.08906) found experts for
# punctuation, numbers and proper names in its encoder, fewer of them in its decoder, and none for a language in a multilingual
# model.
#
# ## What to remember
#
# - Top-k fixes the number of experts of a token, expert choice the number of tokens of an expert. A capacity factor bounds the
#   load, and drops tokens.
# - Fine-grained experts add combinations for the same weights; shared ones hold what all tokens need.
#
# ## Exercises
#
# 1. **Capacity.** With `capacity_factor` an expert takes no more than that many times the mean load in training, and
#    the rest is dropped. What share would be dropped at 1.0, 1.25, 2.0 and 4.0 by the biased router, and by one
#    without a bias?
# 2. **A random second expert.** Use the second of two with a probability of twice its gate, at most 1 (GShard). How many experts has a
#    token on average, and which choices are dropped most?
# 3. **Who is dropped?** Fill experts in the order of the text (Switch), or by the largest gates first
#    ([batch prioritized routing](https://arxiv.org/abs/2106.05974)). How much of the gates is lost at a factor of 1?
#
# Solutions: [solutions/03b_ways_to_route.py](solutions/03b_ways_to_route.py).
#
# ## Reading
#
# - [Lepikhin et al. 2020](https://arxiv.org/abs/2006.16668): GShard, top-2, capacity. [Zhou et al. 2022](https://arxiv.org/abs/2202.09368):
#   expert choice. [Dai et al. 2024](https://arxiv.org/abs/2401.06066): shared and fine-grained experts.
# - [labml: Switch Transformer](https://nn.labml.ai/transformers/switch/index.html), annotated line by line, with capacity and dropping.
# - Next: [chapter 3c](03c_balance.py), what keeps the work spread.
