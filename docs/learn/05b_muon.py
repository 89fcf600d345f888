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
# # 5b. Muon, an optimizer for matrices
#
# **The question: what changes when the optimizer takes a weight matrix as a matrix, and not as a list of numbers, and what does
# that mean for experts?**
#
# AdamW (chapter 5) scales every weight by itself. Muon ([Jordan 2024](https://kellerjordan.github.io/posts/muon/)) scales the
# *directions* of a matrix: it makes all singular values of the update about equal. The released models were trained with it.
# This chapter computes a step by hand, shows what it does to busy and idle experts, and compares the two on a small model. The
# [glossary](../glossary.md#training) has the terms.

# %%
import math

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds, verdict
from chapter_models import bits_per_character, mean_and_error, nats_of_names, tiny_student, training_steps, with_dropout
from chapter_steps import gradient
from chapter_tools import cards, franchise_cards, load_base, load_released, quote, show, table, teacher_names

from flash_experts.data.packing import encode_cards, pack
from flash_experts.training.optimizer import Muon, make_optimizers, orthogonalize
from flash_experts.training.training_config import TrainingConfig

base, tokenizer = load_base()
new_cards, held_out = franchise_cards()
rows = [pack(encode_cards(new_cards[64 * k : 64 * k + 64], tokenizer)) for k in range(6)]

# %% [markdown]
# ## The picture first
#
# The singular values of one step's update, for the first matrix of an MLP (320 x 1,280). Each is a direction of the inputs
# and one of the outputs; its size says how far the step moves along it. Plain gradient descent with momentum moves along a few. AdamW,
# which divides each number by its usual size, moves along more. Muon moves along all.

# %%
model = with_dropout(base, 0.0)
layer = model.transformer.h[2].mlp.c_fc
m, v = 0.0, 0.0
for row in rows:
    gradient(model, row.inputs_with_loss(row.labels.numel()))
    m, v = 0.9 * m + 0.1 * layer.weight.grad, 0.95 * v + 0.05 * layer.weight.grad**2
updates = {
    "momentum": m,
    "AdamW": m / (v / (1 - 0.95 ** len(rows))).sqrt(),
    "Muon": orthogonalize(m[None])[0],
}
values = {name: torch.linalg.svdvals(update) for name, update in updates.items()}
figure, axis = plt.subplots(figsize=(7.5, 3.2))
for (name, of), line in zip(values.items(), ("-", "--", "-."), strict=True):
    axis.plot(of / of[0], line, label=name)
axis.set(xlabel="singular values, the largest first", ylabel="over the largest", title="an update of an MLP's matrix")
axis.legend()
show(figure, "05b_singular_values")
shares = {name: ((of**2).sum() / of[0] ** 2 / len(of)).item() for name, of in values.items()}  # stable rank
table(["update", "stable rank over the full rank"], [[name, f"{share:.1%}"] for name, share in shares.items()])
holds("momentum moves along few directions, AdamW along more, Muon along nearly all",
      shares["momentum"] < shares["AdamW"] < 0.5 * shares["Muon"])  # fmt: skip

# %% [markdown]
# The stable rank, the sum of the squared singular values over the largest square, counts the directions that matter. Those with small
# values may be rare in the data, and they are learned slowly unless something enlarges them.
#
# ## The formula
#
# $$ M \leftarrow \mu M + G \qquad U = \text{orthogonalize}(G + \mu M) \qquad
# W \leftarrow (1 - \eta\lambda)\,W - \eta\; 0.2\,\sqrt{\max(R, C)}\;U $$
#
# | symbol | shape | is |
# | --- | --- | --- |
# | W, G, M, U | (R, C) | weights, gradient, momentum, update |
# | μ, η, λ | numbers | momentum 0.95, learning rate, weight decay |
#
# For $X = P\,\Sigma\,Q^\top$ (its singular value decomposition) the exact orthogonalize gives $P Q^\top$: the same singular
# vectors, all singular values 1. A decomposition is slow on a GPU. The **Newton-Schulz iteration** needs matmuls alone: a polynomial
# with odd powers changes the singular values and not the vectors,
#
# $$ X \leftarrow aX + b\,(XX^\top)X + c\,(XX^\top)^2X \qquad \sigma \leftarrow a\sigma + b\sigma^3 + c\sigma^5 $$

# %%
quote(orthogonalize)
a, b, c = 3.4445, -4.7750, 2.0315
figure, axes = plt.subplots(1, 2, figsize=(11, 3))
before = torch.linspace(0, 1, 400)
after = before
for step in range(1, 6):
    after = a * after + b * after**3 + c * after**5
    if step in (1, 2, 3, 5):
        axes[0].plot(before, after, label=f"{step} steps" if step > 1 else "1 step")
axes[0].axhspan(0.68, 1.2, color="grey", alpha=0.2, label="0.68 to 1.2")
axes[0].set(title="what becomes of a singular value", xlabel="before", ylabel="after")
spectra = {0: torch.linalg.svdvals(m / m.norm())}
spectra |= {steps: torch.linalg.svdvals(orthogonalize(m[None], steps)[0]) for steps in (1, 3, 5)}
for steps, of in spectra.items():
    axes[1].plot(of, label=f"{steps} steps")
axes[1].set(title="of the momentum above, all of them", xlabel="the largest first", ylabel="singular value")
for axis in axes:
    axis.legend(fontsize=7.5)
show(figure, "05b_newton_schulz")
by_hand = m / m.norm()
for _ in range(5):
    gram = by_hand @ by_hand.T
    by_hand = a * by_hand + (b * gram + c * gram @ gram) @ by_hand
holds("the iteration by hand is the package's", torch.allclose(by_hand, orthogonalize(m[None])[0], atol=1e-5))
holds("from 0.05 on, a value ends between 0.68 and 1.2", after[before > 0.05].min() > 0.68 and after.max() < 1.2)
inside = ((spectra[5] > 0.68) & (spectra[5] < 1.2)).float().mean().item()
print(f"after 5 steps {inside:.0%} of the momentum's singular values are there")

# %% [markdown]
# The coefficients are not those of the exact iteration, which would end at 1: they are steep at 0, so that small values grow by 3.4 a
# step, and five steps do. That the values end anywhere from 0.68 to 1.2 does no harm.
#
# **How large is a step?** AdamW's updates have elements of about 0.2 to 0.4 in the root mean square. An orthogonal (R, C) matrix has
# elements of 1 / sqrt(max(R, C)), which would be another size for each shape. The factor 0.2 sqrt(max(R, C)) makes 0.2 of it for
# all ([Liu et al. 2025](https://arxiv.org/abs/2502.16982)): AdamW's learning rates and weight decay can stay.

# %%
rows_of = []
for name, size in (("query", (320, 320)), ("first matrix of an MLP", (320, 1280)), ("of an expert", (320, 320))):
    update = 0.2 * math.sqrt(max(size)) * orthogonalize(torch.randn(1, *size))[0]
    rows_of.append([name, f"{size[0]} x {size[1]}", f"{update.square().mean().sqrt():.3f}"])
table(["", "shape", "root mean square of the update"], rows_of)
holds("about 0.2 for every shape", all(0.15 < float(row[2]) < 0.25 for row in rows_of))

# %% [markdown]
# ## A step by hand, and which weights it is for

# %%
quote(Muon.step)
config = TrainingConfig(max_steps=2, max_epochs=None, learning_rate=1e-3, optimizer="muon", precision="float32")
model = with_dropout(base, 0.0)
optimizers = make_optimizers(model, config)
weight = model.transformer.h[0].mlp.c_fc.weight
W, M = weight.detach().clone(), torch.zeros_like(weight)
for row in rows[:2]:
    gradient(model, row.inputs_with_loss(row.labels.numel()))
    G = weight.grad
    M = config.muon_momentum * M + G
    U = orthogonalize((G + config.muon_momentum * M)[None])[0]
    W = (1 - 1e-3 * config.weight_decay) * W - 1e-3 * 0.2 * math.sqrt(max(W.shape)) * U
    optimizers["muon"].step()
    holds("the step by hand is the package's, up to rounding", (W - weight).abs().max() < 1e-6)
names = {parameter: name for name, parameter in model.named_parameters()}
for kind, optimizer in optimizers.items():
    of = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    parts = dict.fromkeys(".".join(part for part in names[one].split(".") if not part.isdigit()) for one in of)
    print(f"{kind}: {sum(one.numel() for one in of) / 1e6:.2f} M weights: {', '.join(parts)}")

# %% [markdown]
# Muon is for matrices that map one space into another. The embeddings are a table: a token's row should move by what that token's
# gradients say, and most tokens are not in a batch. They, routers, norms and biases stay with AdamW. Query, key and value lie side by
# side in `c_attn`, and are orthogonalized one by one (`blocks`).
#
# **What does it cost?** Five iterations of a matrix (R, C) with R ≤ C take 5 (4 R² C + 2 R³) FLOPs. The matmuls of a training step
# with T tokens take 6 R C T. The more tokens a step has, the smaller the share:

# %%
for tokens in (512, 4096, 65536):
    R, C = 320, 1280
    share = 5 * (4 * R * R * C + 2 * R**3) / (6 * R * C * tokens)
    print(f"{tokens:,} tokens a step: {share:.1%} more FLOPs for a matrix of {R} x {C}")
holds("with 65,536 tokens a step it is under 5%", share < 0.05)

# %% [markdown]
# ## Busy experts and idle ones
#
# A singular value of 0.01 and one of 100 both become about 1: the update does not depend on the size of the gradient. So an
# expert that got few tokens, and has a small gradient, moves as far as a busy one. Each expert's matrix is orthogonalized by itself.
# The gradient of the released model's experts on one batch, with an auxiliary loss of 0:

# %%
moe, moe_tokenizer = load_released()
moe = with_dropout(moe, 0.0)
moe.config.router_aux_loss_coef = 0.0
row = pack(encode_cards(new_cards[:200], moe_tokenizer))
gradient(moe, row.inputs_with_loss(row.labels.numel()))
block = moe.transformer.h[-2].mlp
grads_EFD = block.experts.down_proj.grad
with torch.no_grad():
    caught: list[torch.Tensor] = []
    hook = block.experts.register_forward_hook(lambda module, inputs, output: caught.append(inputs[1]))
    moe(**row.inputs_with_loss(row.labels.numel()))
    hook.remove()
load_E = torch.bincount(caught[0].flatten(), minlength=len(grads_EFD)).float()
gradient_E, update_E = grads_EFD.flatten(1).norm(dim=1), orthogonalize(grads_EFD).flatten(1).norm(dim=1)
figure, axes = plt.subplots(1, 3, figsize=(12, 2.8))
for axis, of, title in zip(axes, (load_E, gradient_E, update_E), ("tokens", "norm of the gradient", "norm of the update"),
                           strict=True):  # fmt: skip
    axis.bar(range(len(of)), of / of.mean())
    axis.set(title=title, xlabel="expert", ylabel="over the mean", ylim=(0, 2.2))
show(figure, "05b_experts")
each = {"tokens": load_E, "gradient": gradient_E, "update": update_E}
spread = {name: (of.max() / of.min()).item() for name, of in each.items()}
print(", ".join(f"{name}: largest over smallest {value:.2f}" for name, value in spread.items()))
holds("the updates of experts are more alike than their gradients", spread["update"] < spread["gradient"])
large = orthogonalize(grads_EFD * 100)
holds(
    "a hundred times the gradient gives the same update",
    torch.allclose(large, orthogonalize(grads_EFD * 10), atol=1e-3),
)

# %% [markdown]
# AdamW has that property for each weight once its running mean has settled. The difference is the direction: after a batch with few
# tokens, an expert's gradient has few directions, and Muon enlarges all of them, noise included. That is a reason for large batches, and for
# the `lr_scale` of experts ([chapter 9](09_do_experts_pay.py) asks whether it is part of what they are worth).
#
# ## Does it pay?
#
# A new GPT-2 of two blocks learns from the teacher's names, from the same start, once with each optimizer at two learning rates.
# One seed; the intervals are over names.

# %%
STEPS = 40
pool, some = teacher_names(4000), cards("validation")[:300]
found = {}
for kind in ("adamw", "muon"):
    for rate in (3e-3, 1e-2):
        torch.manual_seed(0)
        student = tiny_student(base)
        losses = list(training_steps(student, pool, tokenizer, STEPS, rate, tokens=500, optimizer=kind))
        found[kind, rate] = nats_of_names(student, some, tokenizer)
rows_of = [[kind, f"{rate:g}", f"{bits_per_character(nats_N, some):.3f}"] for (kind, rate), nats_N in found.items()]
table(["optimizer", "learning rate", "bits per character, held out"], rows_of)
best = {
    kind: min((nats for (of, _), nats in found.items() if of == kind), key=torch.mean) for kind in ("adamw", "muon")
}
mean, error = mean_and_error(best["muon"] - best["adamw"])
print(f"best Muon minus best AdamW: {mean:+.2f} ± {error:.2f} nats a name:",
      verdict(mean - error, mean + error, "Muon is better", "Muon is worse", "no difference shown"))  # fmt: skip

# %% [markdown]
# The better rate of each was chosen by the names that the result is from, so the interval is a little too narrow; and these are the
# first steps alone. The [log](../experiments.md) has larger models.
#
# ## What to remember
#
# - Muon replaces the singular values of the momentum by about 1, with five rounds of matmuls.
# - It is for hidden matrices. Embeddings, routers, norms and biases stay with AdamW.
# - 0.2 sqrt(max(R, C)) makes its steps as large as AdamW's.
# - An update does not depend on the gradient's size: an expert with few tokens moves as far as a busy one.
#
# ## Exercises
#
# 1. **How many iterations?** Train with 1, 3 and 5 Newton-Schulz steps. How far from equal may the singular values be?
# 2. **One block or three?** Orthogonalize query, key and value together, as one matrix (320 x 960). What becomes of the one whose
#    gradient is the smallest?
# 3. **An expert without tokens.** What does AdamW do to an expert that gets no token in a step, and what Muon? And after ten such steps?
#
# Solutions: [solutions/05b_muon.py](solutions/05b_muon.py).
#
# ## Reading
#
# - [Jordan 2024](https://kellerjordan.github.io/posts/muon/): Muon, with its ablations. [Liu et al. 2025](https://arxiv.org/abs/2502.16982): at scale, for an MoE model.
# - [Bernstein and Newhouse 2024](https://arxiv.org/abs/2409.20325): optimizers as steepest descent in other norms. [Shampoo](https://arxiv.org/abs/1802.09568)
#   (Gupta et al. 2018): the older way to such updates.
# - Next: [chapter 6](06_generation.py), from probabilities to names; [chapter 10](10_distillation.py), where the released models were trained.
