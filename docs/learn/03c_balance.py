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
# # 3c. Balance
#
# **The question: what keeps the work spread over the experts?**
#
# Nothing in the formula of [chapter 3](03_mixture_of_experts.py) does. An expert that is chosen more often learns more, fits
# better, and is chosen even more often. In the end a few experts do all the work:
# [routing collapse](../glossary.md#mixture-of-experts). We provoke it, then cure it in three ways.

# %%
import math
import warnings

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_models import bits_per_character, favour_two, nats_of_names, training_steps
from chapter_tools import cards, load_base, quote, show, table, token_texts

from flash_experts import GPT2MoEForCausalLM
from flash_experts.data.packing import encode_cards, pack
from flash_experts.models.moe_layer import load_balancing_loss, router_z_loss, sequence_balancing_loss
from flash_experts.models.router_metrics import router_metrics, update_router_biases
from flash_experts.training.training_config import LearningRateScale

torch.manual_seed(1)
torch.set_grad_enabled(False)
dense, tokenizer = load_base()
train_cards, validation_cards = cards("train"), cards("validation")[:200]
E, K, LAST = 8, 2, dense.config.n_layer - 1

# %% [markdown]
# ## The picture first: collapse, provoked and cured
#
# Three ingredients make a router collapse: no balancing, a high learning rate, and a router that favours two experts from the
# start. For the last one we add the mean of the router's inputs to two rows of its weight, scaled so that their logits are 8
# higher on average. The model has one MoE layer, in the last block. It takes 30 steps, and everything but router and experts is
# frozen. Then we train from the same start on the same names with three cures. The z-loss (below) is off in all four runs, so
# that they differ in one thing.

# %%
STEPS, BIAS = 30, 8.0
TOKENS = 440  # of a step: `router_metrics` warns only if there are 100 choices for each expert


def biased_model(**fields: object) -> GPT2MoEForCausalLM:
    """Eight experts in the last block, and a router that favours the first two."""
    torch.manual_seed(0)
    made = GPT2MoEForCausalLM.from_dense(dense, num_experts=E, num_experts_per_tok=K, moe_layer_freq=LAST + 1, **fields)
    favour_two(made, LAST, train_cards[:100], tokenizer, BIAS)
    return made


METHODS = {
    "no balancing": {},
    "Switch loss 0.1": {"router_aux_loss_coef": 0.1},
    "loss-free bias 0.02": {"router_bias_update_rate": 0.02},
    "expert choice": {"routing": "expert_choice"},
}
trained: dict[str, GPT2MoEForCausalLM] = {}
biases: list[list[float]] = []  # of the loss-free way, at each step
alarmed: dict[str, set[str]] = {}
history: dict[str, list[dict[str, float]]] = {}
for method, fields in METHODS.items():
    nothing_else = {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}
    trained[method], history[method] = biased_model(**(nothing_else | fields)), []
    with torch.enable_grad(), warnings.catch_warnings(record=True) as alarms:
        warnings.simplefilter("always")
        steps = training_steps(
            trained[method], train_cards, tokenizer, STEPS, 1e-3, TOKENS, lr_scale=LearningRateScale(router=10, dense=0)
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
# `router_metrics` reads what the routers have counted since the last call. It warns of a router whose loads are collapsed five
# times in a row, and names the setting to change. (A cure takes some steps, so it may warn before the cure has worked.)
#
# Each picture shows the share of each expert over the steps.

# %%
figure, axes = plt.subplots(1, len(METHODS), figsize=(13, 3.2), sharey=True)
for axis, (method, reads) in zip(axes, history.items(), strict=True):
    shares = [[read[f"router/{LAST}/load/{e}"] / E for read in reads] for e in range(E)]
    axis.stackplot(range(1, STEPS + 1), shares, edgecolor="white", linewidth=0.3)
    axis.set(title=method, xlabel="step", xlim=(1, STEPS), ylim=(0, 1))
axes[0].set_ylabel("share of the choices, expert 0 below")
show(figure, "03c_loads")

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
holds("without balancing the spread stays large", end > 0.4 * start)
holds(
    "each cure at least halves it",
    all(spreads[method][1] < 0.5 * start for method in METHODS if method != "no balancing"),
)
holds("expert choice is balanced from the first step", max(spreads["expert choice"]) < 0.05)
widest = max(bits_of.values()) - min(bits_of.values())
print(
    f"the four differ by {widest:.3f} bits; against the dense model {min(bits_of.values()) - dense_bits:+.3f} to {max(bits_of.values()) - dense_bits:+.3f}"
)
holds("in these few steps the collapse costs little: the four are within 0.03 bits", widest < 0.03)
holds("none of the four is ahead of the dense base by more than 0.01 bits", min(bits_of.values()) > dense_bits - 0.01)

# %% [markdown]
# **Why do all four runs gain nothing over the base, or lose a little?** The base was trained on these names, so they teach it
# little that is new, and a few steps at a high rate disturb it. ([The log](../experiments.md) has more, and
# [chapter 9](09_do_experts_pay.py) asks when experts pay.) These runs are about loads, not about bits.
#
# ## The Switch loss
#
# The usual load-balancing loss ([Fedus et al. 2021](https://arxiv.org/abs/2101.03961)) is an *auxiliary loss*: it is added to the
# language loss with a small coefficient.
#
# $$ L = E \sum_e f_e\,P_e $$
#
# f_e is the share of the choices that went to e. It is a count and has no gradient. P_e is the mean probability of e, and has one.
# So the gradient lowers the probability of an expert in proportion to its load.

# %%
quote(load_balancing_loss)


# %% [markdown]
# We compute it for four made-up routers with 64 tokens, 8 experts, and 2 experts per token.


# %%
def of_router(logits_TE: torch.Tensor) -> tuple[str, str, str]:
    """Loss, and how a step along minus its gradient moves the logits of experts 0 and 7, summed over tokens."""
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
        ["balanced, near-certain", *of_router(balanced_TE)],
        ["undecided: all p equal", *of_router(undecided_TE)],
        ["leans to experts 0 and 1", *of_router(leaning_TE)],
        ["all to experts 0 and 1", *of_router(collapsed_TE)],
    ],
)

# %% [markdown]
# The loss is 1 at balance, and E / K when all tokens go to the same K experts. But look at the second and the last row. An
# undecided router has loss 1 too, whatever it chooses. And a collapsed router that is *near-certain* has the largest loss and
# hardly any gradient, because the softmax is saturated. (Is 1 the smallest possible value? See exercise 1.)

# %%
holds(
    "balance has loss 1, collapse E / K",
    abs(float(of_router(balanced_TE)[0]) - 1) < 0.01 and abs(float(of_router(collapsed_TE)[0]) - E / K) < 0.01,
)
holds("an undecided router has loss 1 too", abs(float(of_router(undecided_TE)[0]) - 1) < 0.01)
holds(
    "the gradient moves a leaning router; it hardly moves a near-certain one",
    float(of_router(leaning_TE)[1]) < -0.1 and abs(float(of_router(collapsed_TE)[1])) < 0.01,
)

# %% [markdown]
# **Balanced over which tokens?** f and P are taken over some set of tokens. Over a whole batch the loads can be equal while each kind
# of text has experts of its own. Within one text they cannot: there balance forbids that specialization. In large models that
# costs quality ([Qiu et al. 2025](https://arxiv.org/abs/2501.11873)). The package has three scopes (`router_aux_loss_scope`): the
# micro-batch (chapter 5), the global batch of all processes, and each sequence. First a made-up router gives each of four texts
# two experts of its own. Then we compute both losses for the router that was trained with the Switch loss, over micro-batches. (A
# name has few tokens, so part of its imbalance is chance.)

# %%
own_TE, text_T = torch.zeros(64, E), token // 16  # four texts of 16 tokens
own_TE[token, 2 * text_T] = own_TE[token, 2 * text_T + 1] = 10.0
packed, routed = pack(encode_cards(validation_cards, tokenizer)), trained["Switch loss 0.1"]
read: list[torch.Tensor] = []
hook = routed.transformer.h[LAST].mlp.router.register_forward_hook(
    lambda module, inputs, output: read.append(output[0])
)
routed(**packed.inputs)
hook.remove()
name_T = torch.repeat_interleave(torch.arange(packed.num_names), packed.cu_seq_lens.diff())
of_scope = {}
for title, logits_TE, sequence_T in (("two experts for each text", own_TE, text_T), ("trained", read[0], name_T)):
    experts_TK = logits_TE.topk(K).indices
    each_alone = sequence_balancing_loss(logits_TE, experts_TK, sequence_T, int(sequence_T[-1]) + 1)
    of_scope[title] = load_balancing_loss(logits_TE, experts_TK).item(), each_alone.item()
table(
    ["loss over", "the batch", "each text"], [[title, *(f"{x:.2f}" for x in both)] for title, both in of_scope.items()]
)
batch, alone = of_scope["two experts for each text"]
holds(
    "experts for each text: balanced over the batch, collapsed within each",
    abs(batch - 1) < 0.01 and abs(alone - E / K) < 0.01,
)
holds(
    "the trained router is nearer to balance over the batch than within names",
    of_scope["trained"][0] < of_scope["trained"][1],
)

# %% [markdown]
# **The z-loss** ([Zoph et al. 2022](https://arxiv.org/abs/2202.08906), ST-MoE) keeps logits small. Then the softmax does not
# saturate, so the Switch loss keeps its gradient, and rounding to 16 bits moves probabilities less:
#
# $$ L_z = \frac{1}{T} \sum_t \Big(\log \sum_e e^{z_{te}}\Big)^2 $$
#
# In the figure a router sends every token to experts 0 and 1. The horizontal axis is by how much their logits lead, the vertical
# axis each loss's gradient.

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
    xlabel="logit of the two favoured experts, others 0",
    ylabel="gradient at expert 0",
    title="which loss still has a gradient?",
)
axis.legend()
show(figure, "03c_z_loss")
holds(
    "the Switch loss's gradient vanishes where the router is near-certain",
    pulls["Switch loss"][-1] < 0.01 * max(pulls["Switch loss"]),
)
holds("the z-loss's gradient grows with the logits", pulls["z-loss"] == sorted(pulls["z-loss"]))
quote(router_z_loss)
# %% [markdown]
# ## A bias instead of a loss
#
# The Switch loss competes with the language loss: if its coefficient is too large, tokens go to idle experts and not to those that
# fit them. **Loss-free balancing** ([Wang et al. 2024](https://arxiv.org/abs/2408.15664)) adds a bias per expert to the scores *for
# the choice only*. The gates do not depend on it, so it adds no gradient. After each step the bias moves by a fixed amount
# against the load:

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
show(figure, "03c_bias")
early = biases[4]
holds("the biases of the two favoured experts fall first, below all others", max(early[:2]) < min(early[2:]))
moves = torch.tensor(biases).diff(dim=0)
amounts = {round(move, 3) for step in moves - moves.amin(1, keepdim=True) for move in step.tolist()}
holds("each bias moves up or down by 0.02 or not at all, before all are centred", amounts <= {0.0, 0.02, 0.04})

# %% [markdown]
# The usual rate is 0.001. We took 20 times that because 30 steps are few: the loads swing around the mean.
# DeepSeek-V3 ([2024](https://arxiv.org/abs/2412.19437)) balances in this way, and adds a very small loss per sequence.
#
# ## Expert choice, and its leak
#
# In expert choice ([Zhou et al. 2022](https://arxiv.org/abs/2202.09368)) each expert takes the C = T K / E tokens that score
# highest for it. The load is equal by construction, at every step. It has two costs. Some tokens are taken by many experts and
# some by none. And the choice depends on the other tokens: on later ones, and on other names in the packed row.


# %%
def leak(method: str) -> float:
    """How far the logits of 39 names move when the 40th, packed after them, is replaced by another."""
    forty = encode_cards(validation_cards[:40], tokenizer)
    other = encode_cards([validation_cards[50]], tokenizer)
    labels = sum(len(name.ids) - name.prompt_length for name in forty[:-1])
    first, second = (trained[method](**pack(some).inputs).logits[0, :labels] for some in (forty, forty[:-1] + other))
    return (first - second).abs().max().item()


krenko = encode_cards([card for card in train_cards if card.name == "Krenko, Mob Boss"], tokenizer)[0]
texts = token_texts(krenko, tokenizer)
chooser, chosen = trained["expert choice"].transformer.h[LAST].mlp.router, []
hook = chooser.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
trained["expert choice"](torch.tensor([krenko.ids[:-1]]))
hook.remove()
per_token = chooser.membership(chosen[0], len(texts)).sum(-1).int().tolist()
print("experts of each token:", *(f"{text} {count}" for text, count in zip(texts, per_token, strict=True)))
leaks = {method: leak(method) for method in ("no balancing", "expert choice")}
for method, moved in leaks.items():
    print(f"{method}: the logits of earlier names move by {moved:.2g} when a later one changes")
holds("token choice does not look ahead, expert choice does", leaks["no balancing"] < 1e-3 < leaks["expert choice"])
holds("with expert choice some tokens have more experts than others", len(set(per_token)) > 1)

# %% [markdown]
# That is the leak of chapter 1 again, now through the router. A model with expert choice sees later tokens in training and cannot
# see them in generation, so our `generate` refuses it by default. Its validation bits above were measured with later tokens in
# view. Use token choice to generate names.
#
# Look at the column of bits once more: all rows are alike. The experts began as copies of a good MLP, so two of them do what
# one did. A collapse loses what the others could have learned: their parameters take memory and are not used.
#
# ## Stable from the start
#
# Two more choices keep a router stable. It computes in **float32** (chapter 3b). And it starts **undecided**: Switch draws
# weights with a tenth of the usual variance, so that no expert leads by chance before anything is learned. With inputs of
# unit variance the standard deviation of the logits is the root of that scale:

# %%
x_TD = torch.randn(1000, 768)
rows, leads_at_start = [], {}
for scale in (1.0, 0.1):
    logits_TE = x_TD @ (torch.randn(768, E) * math.sqrt(scale / 768))
    leads_at_start[scale] = logits_TE.softmax(-1).max(-1).values.mean().item()
    rows.append([f"{scale:g}", f"{logits_TE.std():.2f}", f"{leads_at_start[scale]:.2f}"])
table(["scale", "deviation of the logits", "probability of the first choice (even: 0.125)"], rows)
holds(
    "at a tenth of the scale the first choice leads by half as much or less",
    leads_at_start[0.1] - 1 / E < 0.5 * (leads_at_start[1.0] - 1 / E),
)

# %% [markdown]
# ## What to remember
#
# - Routers do not balance by themselves. Look at the loads: a collapse may not show in the loss.
# - The Switch loss has a gradient until the softmax saturates; the z-loss prevents that. A bias balances without a gradient.
# - Expert choice is balanced by construction, but it is not causal.
#
# ## Exercises
#
# 1. **Under 1.** Find logits for which `load_balancing_loss` is under 1, with E = 8 and K = 1. (Hint: one expert takes
#    many tokens that hardly prefer it; the others take few that are sure.)
# 2. **The coefficient.** Cure the biased router with Switch loss 0.001, 0.01, 0.1 and 1, 15 steps each. Which still
#    collapses? Which costs language loss?
# 3. **The rate of the bias.** The same with loss-free rates 0.001, 0.01 and 0.1. Which is too slow, and what does the fastest do?
#
# Solutions: [solutions/03c_balance.py](solutions/03c_balance.py).
#
# ## Reading
#
# - [Shazeer et al. 2017](https://arxiv.org/abs/1701.06538): noise, importance and load. [Fedus et al. 2021](https://arxiv.org/abs/2101.03961):
#   Switch, the loss, the initialization. [Zoph et al. 2022](https://arxiv.org/abs/2202.08906): the z-loss, and what keeps training stable.
# - [Wang et al. 2024](https://arxiv.org/abs/2408.15664): loss-free balancing. [nanoMoE](https://cameronrwolfe.substack.com/p/nano-moe) (Wolfe
#   2025): each of these switched on in turn in a small GPT.
# - Next: [chapter 4](04_upcycling.py), how a dense model gets experts; [chapter 9](09_do_experts_pay.py), whether they pay.
