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
# and a small linear layer, the router, sends each token to K of them. Weights grow with E, arithmetic with K.
#
# A router without training would choose at random, so we make a real one first: eight copies of the MLP in every second
# block of `models/mtg-base` (chapter 4 is about that step), then 30 steps of fine-tuning on card names. That is the
# public API, as `examples/finetune_mtg_names.py` uses it. The router learns at ten times the rate of the experts, and
# all the rest is frozen: so there is something to see after a few seconds.

# %%
import tempfile
import warnings

import matplotlib.pyplot as plt
import torch
from chapter_models import bits_per_character, nats_of_names, training_steps
from chapter_tools import cards, load_base, quote, show, table, token_texts
from torch.utils.flop_counter import FlopCounterMode

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.data.packing import encode_cards, pack
from flash_experts.evaluation.costs import parameter_counts
from flash_experts.evaluation.router_maps import inspect_router
from flash_experts.models.moe_layer import Experts, MoELayer, load_balancing_loss
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
    told = (old.shuffled, old.information, new.information)
    rows.append([f"{old.title}, block {old.block}", *(f"{x:.3f}" for x in told)])
table(["bits that experts tell about the", "shuffled labels", "untrained router", "trained"], rows)

# %% [markdown]
# Two lessons. Even an untrained router sorts tokens: it is a linear function of the hidden state, and like tokens have
# like states. So compare with an untrained router, not with chance alone. And what training adds is about the class of
# the token, the *form* of the text. The card's type and color show as well, but less than before. Nobody gets a "Goblin
# expert": the makers of Mixtral (Jiang et al. 2024, section 5) looked for experts by topic and found syntax.
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

# %% [markdown]
# Now the sum of the two experts' outputs, by hand, against the layer:

# %%
experts: Experts = layer.experts
y_D = torch.zeros(x_TD.shape[1])
for e, g in ((first, gates_TK[t, 0]), (second, gates_TK[t, 1])):
    hidden_F = experts.act_fn(x_TD[t] @ experts.up_proj[e] + experts.up_proj_bias[e])
    y_D += g * (hidden_F @ experts.down_proj[e] + experts.down_proj_bias[e])
print(f"by hand against the layer: {(y_D - y_TD[t]).abs().max():.1e}")

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

# %% [markdown]
# 64 experts hold 32 times the weights of two, for the same arithmetic but for the router's own. That is the offer. The
# price comes now.
#
# ## Load
#
# Nothing in the formula spreads the tokens. The more an expert is chosen, the more it learns, the better it fits, the
# more it is chosen. `load` is an expert's tokens over the mean: 1 everywhere is perfect.

# %%
for block in after.blocks:
    load = "  ".join(f"{x:.2f}" for x in block.load)
    print(f"block {block.block}: load {load}   spread {block.metrics['load_cv']:.2f} (standard deviation over mean)")

# %% [markdown]
# **The Switch loss** (Fedus et al. 2021) is trained beside the language loss:
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
# gradient: the softmax is flat there. The loss must act before that. That is one reason for the z-loss
# (`router_z_loss_coef`), which keeps the logits small. (Is 1 the smallest value there is? Exercise 1.)
#
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
    said = {str(alarm.message) for alarm in alarms} or {"no alarm"}
    print(f"{method}: {'; '.join(said)}")

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
axes[0].set_ylabel("share of the choices")
show(figure, "03_loads")

rows = []
for method, reads in history.items():
    late = {
        key: sum(read[f"router/{LAST}/{key}"] for read in reads[-5:]) / 5 for key in ("load_cv", "max_load", "entropy")
    }
    bits = bits_per_character(nats_of_names(trained[method], validation_cards, tokenizer), validation_cards)
    start = reads[0][f"router/{LAST}/load_cv"]
    rows.append([method, f"{start:.2f}", *(f"{late[key]:.2f}" for key in late), f"{bits:.3f}"])
bits = bits_per_character(nats_of_names(dense, validation_cards, tokenizer), validation_cards)
rows.append(["dense, as it was", "-", "-", "-", "-", f"{bits:.3f}"])
table(["", "spread at step 1", "at the end", "largest load", "entropy of p", "validation bits"], rows)

# %% [markdown]
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

# %% [markdown]
#   The usual rate is 0.001. We took 20 times that because 30 steps are few; see how the loads swing around the mean.
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
for method in ("no balancing", "expert choice"):
    print(f"{method}: the logits of earlier names move by {leak(method):.2g} when a later one changes")

# %% [markdown]
# That is the leak of chapter 1 again, now through the router. A model with expert choice can look ahead in training and
# cannot generate as it was trained, so our `generate` refuses it unless told otherwise. Its validation bits above were
# measured with that look ahead. Study it, compare it, and take token choice to write names.
#
# Look at the column of bits once more: all rows are alike. In 30 steps the collapse costs nothing. The experts began as
# copies of a good MLP, so two of them do what one did. What is lost is what the others could have become: their
# parameters are paid for and not used.
#
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
# Solutions: `solutions/03_mixture_of_experts.py`.
