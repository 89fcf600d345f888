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
# # 4. Upcycling
#
# **The question: how does one MLP become eight experts without losing what it knows, and how do eight equal experts
# become different?**
#
# Training an MoE model from scratch is expensive. Sparse upcycling ([Komatsuzaki et al. 2022](https://arxiv.org/abs/2212.05055))
# begins with a trained dense model: every expert is made from its MLP. The new model should compute what the old one did, and
# be able to learn more from there. The two goals conflict: equal experts keep the function, but a router has nothing to choose
# between while they are equal. The [glossary](../glossary.md#mixture-of-experts) has the terms.

# %%
import copy
import time
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds, verdict
from chapter_models import bits_per_character, experts_apart, mean_and_error, nats_of_names, training_steps
from chapter_tools import cards, franchise_cards, load_base, quote, show, table

from flash_experts import GPT2MoEForCausalLM
from flash_experts.data.packing import encode_cards, pack
from flash_experts.evaluation.scorers import parameter_counts
from flash_experts.models import upcycling
from flash_experts.models.moe_layer import MoELayer

dense, tokenizer = load_base()
packed = pack(encode_cards(cards("train")[:16], tokenizer))
labels = packed.inputs_with_loss(packed.labels.numel())
with torch.no_grad():
    dense_logits = dense(**packed.inputs).logits
print(f"dense logits on {packed.num_names} names: {tuple(dense_logits.shape)}, up to {dense_logits.abs().max():.1f}")

VARIANTS: dict[str, dict[str, object]] = {
    "copy": {"method": "copy"},
    "noise": {"method": "noise", "noise_scale": 1e-3},
    "drop": {"method": "drop", "drop_ratio": 0.5},
    "granular": {"method": "granular", "granularity": 4},
    "shared": {"method": "shared"},
}


def upcycled(num_experts_per_tok: int = 2, **fields: object) -> GPT2MoEForCausalLM:
    """Eight experts in every second block, made of the dense base."""
    torch.manual_seed(0)
    return GPT2MoEForCausalLM.from_dense(
        dense, num_experts=8, num_experts_per_tok=num_experts_per_tok, moe_layer_freq=2, **fields
    )


@torch.no_grad()
def difference(model: GPT2MoEForCausalLM) -> float:
    """Largest difference of any logit from the dense model's."""
    return (model(**packed.inputs).logits - dense_logits).abs().max().item()


# %% [markdown]
# ## The picture first
#
# Five ways to make experts. The bars show how far any logit is from the dense model's, before any training. Green is rounding
# (float32 has seven digits, and many operations follow each other).

# %%
far = {name: difference(upcycled(**fields)) for name, fields in VARIANTS.items()}
table(["method", "largest difference of a logit"], [[name, f"{value:.1e}"] for name, value in far.items()])
figure, axis = plt.subplots(figsize=(7.5, 2.6))
for color, label, of in (("tab:green", "rounding", [0, 1e-4]), ("tab:orange", "more than rounding", [1e-4, 1e9])):
    some = {name: value for name, value in far.items() if of[0] <= value < of[1]}
    axis.barh([[*far].index(name) for name in some], list(some.values()), color=color, label=label)
axis.axvline(dense_logits.abs().max(), color="black", linestyle=":", label="largest dense logit")
for place, value in enumerate(far.values()):
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1}
    axis.text(max(value, 1e-6) * 1.3, place, f"{value:.0e}" if value else "0", va="center", bbox=box)
axis.set(xscale="log", xlim=(1e-6, 1e3), xlabel="largest difference from the dense logits", ylabel="method")
axis.set_yticks(range(len(far)), list(far))
axis.invert_yaxis()
figure.legend(loc="outside right center")
show(figure, "04_exactness")
holds("copy, granular and shared are exact up to rounding", max(far["copy"], far["granular"], far["shared"]) < 1e-4)
holds(
    "noise and drop are not, and drop moves logits by ten times as much as noise and more",
    1e-4 < far["noise"] < far["drop"] / 10,
)

# %% [markdown]
# Three methods are exact. The other two make the experts different on purpose, and change the logits at once:
#
# | method | an expert is | exact |
# | --- | --- | --- |
# | copy | the dense MLP | yes |
# | noise | the dense MLP plus noise of 0.001 standard deviations of its weights | nearly |
# | drop | the dense MLP with half of its hidden units initialized again (Nakamura et al. 2025) | no |
# | granular | a quarter of the hidden units; 32 experts, 8 per token (He et al. 2024) | yes |
# | shared | silent (second matrix zero), next to one dense MLP for every token | yes |
#
# ## Why copies are exact
#
# With every expert equal to the dense layer f:
#
# $$ y = \sum_{e \in \text{top}_K} g_e\,\text{MLP}_e(x) = \Big(\sum_e g_e\Big) f(x) = f(x) $$
#
# x and y are (T, D), g is (T, K). There is one condition, for every K and E: the gates of a token sum to one. The last row of
# the table breaks it:

# %%
rows = [[f"E 8, K {k}", f"{difference(upcycled(k)):.1e}"] for k in (1, 2, 8)]
exact = copy.deepcopy(dense).double()
with torch.no_grad():
    off = GPT2MoEForCausalLM.from_dense(exact)(**packed.inputs).logits - exact(**packed.inputs).logits
rows.append(["E 8, K 2, in float64", f"{off.abs().max():.1e}"])
broken = upcycled()
for layer in (module for module in broken.modules() if isinstance(module, MoELayer)):
    layer.router.norm_topk_prob = False  # gates are then the plain probabilities of the chosen
rows.append(["K 2, gates not normalised", f"{difference(broken):.1e}"])
table(["copies", "largest difference"], rows)
holds(
    "copies are exact for every K, and in float64 to ten digits and more",
    off.abs().max() < 1e-9 and all(float(row[1]) < 1e-4 for row in rows[:3]),
)
holds("without normalised gates they are far off", float(rows[-1][1]) > 0.1)

# %% [markdown]
# In float64 the difference shrinks with the rounding: it *is* rounding. The package does not let you break this by accident:

# %%
try:
    upcycled(norm_topk_prob=False)
except ValueError as error:
    print("from_dense refuses that:", error)

# %% [markdown]
# ## The code that ships
#
# One function makes the experts of a layer, whatever the method. `up_DF` and `down_FD` are the dense matrices, (D, F)
# and (F, D).

# %%
quote(upcycling._fill_experts)

# %% [markdown]
# The line about granularity: a token takes two whole groups of four shards, and the four shards of a group add up to one MLP. The
# gates of the eight chosen experts sum to one, so each shard gets a quarter of what its group's expert would get. Therefore the
# second matrix is multiplied by 4. Its bias is not: every expert has the whole bias, and gates that sum to one add it once
# (exercise 3).
#
# ## The trap: a router without a gradient
#
# If y = f(x) whatever the gates are, then y does not depend on the router, and neither does the language loss:
#
# $$ \frac{\partial y}{\partial g_e} = f(x) \text{ for all chosen } e, \qquad \sum_e \delta g_e = 0
# \quad\Rightarrow\quad \delta y = f(x) \sum_e \delta g_e = 0 $$
#
# The remedy is a straight-through gate ([Bengio et al. 2013](https://arxiv.org/abs/1308.3432)). Its value is the normalised
# gate's. Its gradient is that of the normalised gate plus that of the plain probability:
#
# $$ g_e = \frac{p_e}{\sum_j p_j} + \big(p_e - \text{stop\_gradient}(p_e)\big) $$
#
# The package uses it in training only (chapter 3 quoted the line with `detach`). So the gradient in eval mode is the one without
# it, in train mode the one with it. Dropout and the router's losses are off: this is the language loss alone.

# %%
QUIET = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
QUIET |= {"router_aux_loss_coef": 0.0, "router_z_loss_coef": 0.0}


def router_gradient(model: GPT2MoEForCausalLM, training: bool) -> float:
    """Norm of the language loss's gradient at all routers' weights."""
    weights = [parameter for name, parameter in model.named_parameters() if ".router." in name]
    gradients = torch.autograd.grad(model.train(training)(**labels).loss, weights)
    model.eval()
    return torch.stack([gradient.norm() for gradient in gradients]).norm().item()


rows, measured = [], {}
for label, k, fields in (
    ("copy, K 2", 2, VARIANTS["copy"]),
    ("copy, K 1", 1, VARIANTS["copy"]),
    ("noise 0.001, K 2", 2, VARIANTS["noise"]),
    ("noise 0.1, K 2", 2, {"method": "noise", "noise_scale": 0.1}),
    ("noise 0.1, K 1", 1, {"method": "noise", "noise_scale": 0.1}),
    ("drop, K 2", 2, VARIANTS["drop"]),
    ("granular, K 8 of 32", 2, VARIANTS["granular"]),
    ("shared, K 2", 2, VARIANTS["shared"]),
):
    model = upcycled(k, **fields, **QUIET)
    far_off = difference(model)
    plain, through = router_gradient(model, training=False), router_gradient(model, training=True)
    measured[label] = far_off, plain, through
    rows.append([label, f"{far_off:.0e}", f"{experts_apart(model):.1e}", f"{plain:.1e}", f"{through:.1e}"])
quote(experts_apart, docstring=True)
table(["", "logits off by", "experts apart", "router gradient: plain", "straight-through"], rows)
holds(
    "copies give the plain gate a gradient of rounding errors, the straight-through gate a real one",
    measured["copy, K 2"][1] < 1e-5 < 1e-2 < measured["copy, K 2"][2],
)
holds(
    "with K = 1 the plain gradient is zero, even when the experts differ",
    measured["copy, K 1"][1] == measured["noise 0.1, K 1"][1] == 0,
)
little, much = measured["noise 0.001, K 2"], measured["noise 0.1, K 2"]
holds("with more noise the plain gradient grows, and so does the error", little[0] < much[0] and little[1] < much[1])
holds(
    "granular experts give even the plain gate a gradient, at exact logits",
    measured["granular, K 8 of 32"][1] > 1e-2 and measured["granular, K 8 of 32"][0] < 1e-4,
)
holds("silent experts give the router none at all", measured["shared, K 2"][1] == measured["shared, K 2"][2] == 0)

# %% [markdown]
# Row by row:
#
# - With copies the plain gate's gradient is rounding error. The straight-through gate gives a real one, at the same logits.
# - With K = 1 the normalised gate is the constant 1. The plain gradient is zero even when the experts differ.
# - The plain gradient grows with the noise. With much noise the router would learn without the straight-through gate, but then
#   the logits are off.
# - Granular experts hold different shards of the MLP, so even the plain gate has a gradient.
# - Silent experts (shared) have the output 0, so no gate matters. Their second matrices do get a gradient. Once these are not
#   zero the router gets one, too: that takes a step or two.
#
# While experts are equal, none is better than another, and the straight-through gradient cannot prefer one. It raises or lowers
# the probabilities of the chosen experts. So it moves the router, which decides which expert learns from which token. What
# makes the experts different is the data: they get different tokens, so their gradients differ from the first step.

# %%
model = upcycled(**QUIET)
model.train()
model(**labels).loss.backward()
gradient_EDF = model.transformer.h[1].mlp.experts.up_proj.grad.flatten(1)
similar_EE = torch.nn.functional.cosine_similarity(gradient_EDF[:, None], gradient_EDF[None], dim=-1)
others = similar_EE[~torch.eye(8, dtype=torch.bool)]
print(f"eight equal experts, cosine of their gradients: mean {others.mean():.2f}, least {others.min():.2f}")
holds("equal experts get gradients that point different ways, from the first step", others.mean() < 0.7)

# %% [markdown]
# ## An experiment that changes one thing: the noise
#
# The noise goes from 0.0001 to one standard deviation of the weights.

# %%
scales = [1e-4, 1e-3, 1e-2, 1e-1, 1.0]
off, plain, through = [], [], []
for scale in scales:
    model = upcycled(method="noise", noise_scale=scale, **QUIET)
    off.append(difference(model))
    plain.append(router_gradient(model, training=False))
    through.append(router_gradient(model, training=True))
figure, axis = plt.subplots(figsize=(7, 3.6))
axis.loglog(scales, off, "o-", label="logits off by")
axis.loglog(scales, plain, "s-", label="router gradient, plain gate")
axis.loglog(scales, through, "^-", label="router gradient, straight-through gate")
axis.set(xlabel="noise, in standard deviations of the weights", ylabel="logits; norm of the gradient")
axis.legend()
show(figure, "04_noise")
numbers = zip(scales, off, plain, through, strict=True)
rows = [[f"{scale:g}", *(f"{value:.1e}" for value in values)] for scale, *values in numbers]
table(["noise", "logits off by", "plain", "straight-through"], rows)
tenfold = [[b / a for a, b in pairwise(values[:4])] for values in (off, plain)]
holds(
    "up to a tenth, ten times the noise is about ten times the error and the plain gradient",
    all(7 < ratio < 14 for ratios in tenfold for ratio in ratios),
)
holds("the straight-through gradient hardly depends on the noise there", max(through[:4]) < 1.2 * min(through[:4]))

# %% [markdown]
# Without the straight-through gate, a gradient for the router costs an error in the logits.
#
# ## The result: a short training
#
# The base has memorized too many of its own training names to learn from them again ([experiments](../experiments.md)). So we
# give it names that it has not seen: cards of franchises (Universes Beyond), which our cleaning leaves out. All models get the
# same names in the same order: 12 steps of about 200 tokens. Then all are scored on held-out families of names.

# %%
new_cards, held_out = franchise_cards()
examples = "; ".join(card.name for card in held_out[:4])
print(f"{len(new_cards)} names to learn, {len(held_out)} held out: {examples} ...")

STEPS, RATE = 12, 3e-4
models = {"dense": copy.deepcopy(dense)} | {name: upcycled(**fields) for name, fields in VARIANTS.items()}
curves: dict[str, list[float]] = {}
seconds: dict[str, float] = {}
nats = {"before": nats_of_names(dense, held_out, tokenizer)}
for name, model in models.items():
    started = time.process_time()
    curves[name] = list(training_steps(model, new_cards, tokenizer, STEPS, RATE))
    seconds[name] = (time.process_time() - started) / STEPS
    nats[name] = nats_of_names(model, held_out, tokenizer)

# %% [markdown]
# Differences from the dense model are taken name by name, so that names that are hard for all do not blur them. The
# interval is 95% over names. It does not cover another seed.

# %%
rows, gains = [], {}
for name, model in models.items():
    gains[name] = mean, error = mean_and_error(nats[name] - nats["dense"])
    size, loss = parameter_counts(model), sum(curves[name][-5:]) / 5
    bits = bits_per_character(nats[name], held_out)
    cells = (
        f"{size.total / 1e6:.1f} M",
        f"{size.active / 1e6:.1f} M",
        f"{seconds[name]:.2f}",
        f"{loss:.3f}",
        f"{bits:.3f}",
    )
    last = ("-", "-") if name == "dense" else (f"{mean:+.3f} ± {error:.3f}", f"{experts_apart(model):.3f}")
    rows.append([name, *cells, *last])
before_bits = bits_per_character(nats["before"], held_out)
print(f"held-out bits before: {before_bits:.3f}")
header = "weights", "active", "s a step", "loss, last 5", "held-out bits", "nats a name, against dense", "experts apart"
table(["", *header], rows)

exact_ones = [name for name in VARIANTS if name != "drop"]  # drop has axes with a larger scale
figure, axes = plt.subplots(2, 2, figsize=(11, 4.8), height_ratios=(3, 1.2))
for (left, right), some in zip(axes, (exact_ones, ["drop"]), strict=True):
    for name in some:
        against_dense = [loss - dense_loss for loss, dense_loss in zip(curves[name], curves["dense"], strict=True)]
        style = {"color": f"C{[*VARIANTS].index(name)}"}
        left.plot(range(1, STEPS + 1), against_dense, label=name, linewidth=1, **style)
        right.errorbar(gains[name][0], name, xerr=gains[name][1], fmt="o", **style)
    left.axhline(0, color="black", linewidth=0.8)
    right.axvline(0, color="black", linewidth=0.8)
    right.invert_yaxis()
    left.set(ylabel="nats per token", xlabel="step")
    right.set(ylabel="method", xlabel="nats a name")
axes[0, 0].set_title("training loss of each step, minus the dense model's")
axes[0, 1].set_title("held-out nats, minus the dense model's, 95% (left is better)")
figure.legend(loc="outside lower center", ncols=len(VARIANTS))
show(figure, "04_training")
for name in VARIANTS:
    mean, error = gains[name]
    sentences = "better than dense", "worse than dense", "no difference from dense is shown"
    print(f"{name}: {verdict(mean - error, mean + error, *sentences)}")
ending = {name: bits_per_character(nats[name], held_out) for name in models}
holds("all learned something of the new names", max(ending.values()) < before_bits)
holds("drop is last: half of its hidden units have to be learned again", max(ending, key=ending.get) == "drop")
holds(
    "experts that began equal differ by about a hundredth of their length",
    all(0.003 < experts_apart(models[name]) < 0.03 for name in exact_ones),
)
active = {name: parameter_counts(model).active for name, model in models.items()}
holds(
    "each MoE model has more active parameters than the dense model, shared the most",
    min(active, key=active.get) == "dense" and max(active, key=active.get) == "shared",
)

# %% [markdown]
# Read the column "nats a name" with its interval. Where the interval contains 0, the run shows no difference between experts
# and the dense model. Where it does not, see how small the difference is, and remember that five methods were tried. The
# experts differ by about a hundredth of their length, and each has seen a quarter of the tokens that the dense MLP saw. Upcycling
# adds *capacity*, not an immediate gain. It can pay when there are enough data to use it: the papers train on billions of
# tokens to show that, and [chapter 9](09_do_experts_pay.py) has what this project found.
#
# Count the cost as well. K = 2 doubles the FLOPs of these layers in every step, and `shared` triples them: see the active
# parameters and the seconds. At equal FLOPs the dense model would have had more steps. A fair comparison states all three: per
# step, per FLOP, per second.
#
# ## What to remember
#
# - Gates that sum to one make copies exact, for every K and E.
# - Equal experts give a normalised gate no gradient. The straight-through gate has one, at no cost in exactness.
# - Noise and drop break the symmetry and cost a worse start. Shards and silent experts break it at exact logits.
# - Twelve steps decide nothing. Look at the interval before you believe a difference.
#
# ## Exercises
#
# 1. **The way back.** `flash_experts.models.upcycling.to_dense` averages the experts. What must it give for untrained
#    copies? Fine-tune copies for 20 steps on franchise names, average, and score: is the mean as good as the MoE model?
# 2. **How much to drop.** For `drop_ratio` 0, 0.25, 0.5, 1: the difference of the logits, and bits per character on 100
#    training names. What is left of the dense model at 1?
# 3. **The bias.** Multiply the second bias of granular experts by the granularity as well, as if it belonged to the
#    matrix. How far off are the logits for granularity 2, 4, 8?
# 4. **A router of zeros.** With `router_init="zeros"` all scores tie. Which experts are chosen, and is the model exact?
#    Take ten training steps and look at the loads.
#
# Solutions: [solutions/04_upcycling.py](solutions/04_upcycling.py).
#
# ## Reading
#
# - [Komatsuzaki et al. 2022](https://arxiv.org/abs/2212.05055): sparse upcycling. [Nakamura et al. 2025](https://arxiv.org/abs/2502.19261):
#   drop-upcycling. [He et al. 2024](https://arxiv.org/abs/2410.07524): virtual groups, the granular form.
# - [Bengio et al. 2013](https://arxiv.org/abs/1308.3432): straight-through gradients.
# - Next: [chapter 5](05_training.py), the training loop; [chapter 10](10_distillation.py), where our base learned its names.
