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
# # 10. Distillation
#
# **The question: what can a small model learn from a large one that the names themselves do not teach, and how?**
#
# A model that has read English knows which words go together. 22,000 names are too few to learn that from. So this project's
# small GPT-2, the **student**, learned from a **teacher**: SmolLM2 with 135 million weights, fine-tuned on the names. This is
# **knowledge distillation** ([Hinton et al. 2015](https://arxiv.org/abs/1503.02531)). A student can learn from two things: the
# teacher's *probabilities* for each next token (token level), and *names* that the teacher writes (sequence level:
# [Kim and Rush 2016](https://arxiv.org/abs/1606.07947)). The released models used both. This chapter does both at toy size, in
# a minute. The [glossary](../glossary.md#training) has the terms.

# %%
import copy
from itertools import pairwise

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds, verdict
from chapter_models import bits_per_character, mean_and_error, nats_of_names, tiny_student
from chapter_steps import in_steps, student_step
from chapter_tools import BASE, ROOT, cards, load_base, quote, show, shown, table, teacher_names, token_texts
from torch.nn import functional as F

from flash_experts.data.packing import PackedBatch, encode_cards, pack
from flash_experts.training.loss import DistillationLoss, kl_divergence, top_divergence
from flash_experts.training.tracking import read_metrics

teacher, tokenizer = load_base()  # here the small released model is itself the teacher, of smaller ones
validation_cards = cards("validation")[:300]
V = teacher.config.vocab_size

# %% [markdown]
# ## The picture first
#
# The figure shows a name that the teacher was not trained on. At each position the name gives one label: one token. The
# teacher gives a probability for every token. The bars are its three likeliest tokens; the title of each part has the label.

# %%
example = next(card for card in validation_cards if len(encode_cards([card], tokenizer)[0].ids) > 12)
encoded = encode_cards([example], tokenizer)[0]
row = pack([encoded])
with torch.no_grad():
    teacher_LV = teacher(**row.inputs).logits[0]
probs_LV = teacher_LV.softmax(-1)
labels = [*token_texts(encoded, tokenizer)[encoded.prompt_length :], "[EOS]"]
figure, axes = plt.subplots(1, len(labels), figsize=(2.1 * len(labels), 2.8), sharey=True, squeeze=False)
for place, axis in enumerate(axes[0]):
    best = probs_LV[place].topk(3).indices.tolist()
    words = ["[EOS]" if token == tokenizer.eos_token_id else shown(tokenizer.decode([token])) for token in best]
    rest = 1 - probs_LV[place, best].sum()
    axis.bar(range(4), [*probs_LV[place, best].tolist(), rest], color=["tab:blue"] * 3 + ["#bbbbbb"])
    axis.set_xticks(range(4), [*words, "all others"], rotation=60, size=7)
    axis.set_title(f"label: {labels[place]} (p = {probs_LV[place, row.labels[place]]:.2g})", size=8)
axes[0, 0].set_ylabel("teacher's probability")
figure.supxlabel("next token (· is a space)", size=9)
figure.suptitle(f"{example.type_line}: {example.name}", size=10)
show(figure, "10_teacher")
entropy_L = -(probs_LV * probs_LV.log()).sum(-1)
print("the teacher's entropy, bits:", " ".join(f"{bits:.1f}" for bits in (entropy_L / 0.6931).tolist()))
holds("the label is one token; the teacher's entropy is over two bits at some position", entropy_L.max() > 2 * 0.6931)

# %% [markdown]
# The label is one draw. The teacher's distribution also shows which other tokens could stand here, and how likely each is.
#
# ## The formula, with shapes
#
# p are the teacher's probabilities over V tokens, q the student's. At each of L positions that have a label y:
#
# $$ \text{loss} = (1 - w)\,(-\log q_y) + w\,t^2\,\text{KL}_t \qquad
# \text{KL}(p \| q) = \sum_v p_v \log\frac{p_v}{q_v} $$
#
# | | shape | |
# | --- | --- | --- |
# | logits of teacher and student | (L, V) | both must have the same tokens |
# | w, `distill_weight` | a number | 0: labels alone; 1: teacher alone. The released student was trained with 0.9 |
# | t, `distill_temperature` | a number | both logits are divided by it first |
# | `distill_kl` | | forward: KL(p, q); reverse: KL(q, p) |
#
# The forward KL is the cross-entropy with p in place of the label, minus the teacher's entropy, which the student cannot
# change. A label is the special case of a teacher that gives one token the probability 1.

# %%
torch.manual_seed(0)
student_LV = torch.randn_like(teacher_LV)
forward_L = kl_divergence(student_LV, teacher_LV, 1.0, "forward")
cross_entropy_L = F.cross_entropy(student_LV, probs_LV, reduction="none")  # with probabilities in place of labels
print(f"KL {forward_L.mean():.4f} = cross-entropy {cross_entropy_L.mean():.4f} - entropy {entropy_L.mean():.4f}")
equal = torch.allclose(forward_L, cross_entropy_L - entropy_L, atol=1e-3)
holds("the forward KL is the cross-entropy with the teacher's probabilities, minus a constant", equal)
sure_LV = torch.full_like(teacher_LV, -40.0).scatter(1, row.labels[:, None], 40.0)
usual_L = F.cross_entropy(student_LV, row.labels, reduction="none")
equal = torch.allclose(kl_divergence(student_LV, sure_LV, 1.0, "forward"), usual_L, atol=1e-3)
holds("with a teacher that gives the label the probability 1 it is the usual loss", equal)
quote(kl_divergence)
quote(DistillationLoss.__call__)

# %% [markdown]
# ## Temperature, and why t²
#
# Divided by t > 1, logits differ less, so small probabilities count more: they show which other tokens are nearly right. But
# the gradient with respect to a student's logit is (q - p) / t, and for large t the difference q - p also falls as 1/t. So the
# gradient falls as 1/t², and the loss is multiplied by t² to keep its scale. (At t = 1 and 2 the probabilities of a confident
# teacher are not in that range yet.) With a large vocabulary the tail gets most of the probability before that: see the legend.

# %%
temperatures, plain = [1.0, 2.0, 4.0, 8.0, 16.0], []
for t in temperatures:
    logits = student_LV.clone().requires_grad_()
    kl_divergence(logits, teacher_LV, t, "forward").sum().backward()
    plain.append(logits.grad.norm().item())
norms = [t**2 * norm for t, norm in zip(temperatures, plain, strict=True)]
order = probs_LV[place := int((entropy_L - 1).abs().argmin())].topk(12).indices  # about one nat: few tokens
figure, axes = plt.subplots(1, 2, figsize=(11, 3.2))
for t in (1.0, 2.0, 4.0):
    top_12 = (teacher_LV[place] / t).softmax(-1)[order]
    axes[0].semilogy(range(12), top_12, "o-", label=f"t = {t:g}: {top_12.sum():.0%} on these twelve")
axes[0].set_xticks(range(12), [shown(tokenizer.decode([token])) for token in order.tolist()], rotation=60)
axes[0].set(title="a position between few tokens", ylabel="probability", xlabel="the teacher's twelve likeliest tokens")
axes[0].legend()
axes[1].loglog(temperatures, plain, "o-", label="KL", base=2)
axes[1].loglog(temperatures, norms, "s-", label="t² KL", base=2)
axes[1].set(title="gradient with respect to the student's logits", xlabel="temperature t", ylabel="norm")
axes[1].legend()
show(figure, "10_temperature")
rows = [["gradient of KL", *(f"{x:.1e}" for x in plain)], ["of t² KL", *(f"{x:.2f}" for x in norms)]]
table(["temperature", *(f"{t:g}" for t in temperatures)], rows)
holds("at t = 4 the tail has most of the teacher's probability", top_12.sum() < 0.5)
holds("from t = 4 to 16 the gradient falls about sixteenfold", 10 < plain[2] / plain[4] < 40)
holds("times t² it stays there, within a factor of 2", max(norms[2:]) < 2 * min(norms[2:]))

# %% [markdown]
# ## Forward and reverse
#
# A student that is too small cannot be right everywhere. The direction of the KL decides where it may be wrong. The **forward**
# KL weighs the sum by the teacher's p: wherever the teacher puts weight, the student has to put some (mode-covering). The
# **reverse** KL weighs it by the student's own q: the student may leave modes out, but has to avoid what the teacher finds
# unlikely (mode-seeking; MiniLLM, [Gu et al. 2024](https://arxiv.org/abs/2306.08543)). Below, the teacher has two modes, and the
# student can have only one:

# %%
x_V = torch.linspace(-6, 6, 121)
bumps_V = torch.stack([-((x_V - centre) ** 2) / 0.8 for centre in (-2.5, 2.5)])
two_modes_V = (bumps_V + torch.tensor([[0.0], [0.3]])).logsumexp(0)
figure, axis = plt.subplots(figsize=(7, 3))
axis.fill_between(x_V, two_modes_V.softmax(0), color="#cccccc", label="teacher")
fitted = {}
for direction, style in (("forward", "-"), ("reverse", "--")):
    found = []
    for begin in (0.5, 1.5):  # the reverse KL has local minima: the better of two starts
        centre, log_width = torch.tensor(begin, requires_grad=True), torch.tensor(0.0, requires_grad=True)
        optimizer = torch.optim.Adam([centre, log_width], lr=0.05)
        for _ in range(200):
            bump_V = -((x_V - centre) ** 2) / (2 * log_width.exp() ** 2)
            divergence = kl_divergence(bump_V[None], two_modes_V[None], 1.0, direction)[0]
            optimizer.zero_grad()
            divergence.backward()
            optimizer.step()
        found.append((divergence.item(), centre.item(), log_width.exp().item(), bump_V.detach().softmax(0)))
    _, centre, width, best_V = min(found, key=lambda each: each[0])
    fitted[direction] = centre, width
    axis.plot(x_V, best_V, style, label=f"student, {direction} KL")
axis.set(xlabel="outcome", ylabel="probability", title="a student with one mode for a teacher with two")
axis.legend()
show(figure, "10_directions")
(covering, wide), (seeking, narrow) = fitted["forward"], fitted["reverse"]
print(f"forward: centre {covering:+.2f}, width {wide:.2f}; reverse: centre {seeking:+.2f}, width {narrow:.2f}")
holds("forward covers both modes: it lies between them, and is wide", abs(covering) < 1.5 and wide > 1.5)
holds("reverse seeks one mode, and is narrow", abs(seeking) > 2 and narrow < 1.0)

# %% [markdown]
# ## At toy size: what helps a student?
#
# Suppose that there are only 200 real names. The student is a new GPT-2 of two blocks of width 128. It takes 40 steps of 25
# names, which is five epochs of the 200. Six students have the same initial weights:
#
# - **labels**: cross-entropy on the 200 names;
# - **token level**: the same names, and the teacher's probabilities (w = 0.8; forward, and reverse);
# - **control**: the teacher's probabilities, but each position gets those of another position in the row. They have nothing
#   to do with this position. They show how frequent tokens are, and keep the student from being certain of its few names;
# - **sequence level**: the 200 names once, then no repetitions but names that the 135M teacher wrote, each once
#   (`data/teacher-names.jsonl.xz`, the file that the released student learned from);
# - **both**: the names of the sequence level, and the toy teacher's probabilities for them.
#
# The 135M teacher itself is not in the repository, so probabilities come from `models/mtg-base`, another and weaker teacher: do
# not compare the gains of the two levels here with those of the real pipeline.

# %%
REAL, STEPS, NAMES_A_STEP, WEIGHT = 200, 40, 25, 0.8
real_cards = cards("train")[:REAL]
written = teacher_names(STEPS * NAMES_A_STEP - REAL)
print("names by the 135M teacher:", "; ".join(card.name for card in written[:5]), "...")
pools = {"repeated": real_cards, "new": real_cards + written}
POOLS = {name: in_steps(pool, STEPS, NAMES_A_STEP) for name, pool in pools.items()}
KINDS: dict[str, tuple[str, str | None]] = {  # which names; direction of the KL, None for labels alone
    "labels": ("repeated", None),
    "token level": ("repeated", "forward"),
    "token level, reverse": ("repeated", "reverse"),
    "control: other positions": ("repeated", "forward"),
    "sequence level": ("new", None),
    "both": ("new", "forward"),
}
torch.manual_seed(0)
start = tiny_student(teacher)
students = {kind: copy.deepcopy(start) for kind in KINDS}
optimizers = {kind: torch.optim.AdamW(x.parameters(), weight_decay=0.05, fused=True) for kind, x in students.items()}
print(f"a student has {start.num_parameters():,} weights, the teacher {teacher.num_parameters():,}")


# %%
def distillation(
    student_LV: torch.Tensor, teacher_LV: torch.Tensor, row: PackedBatch, direction: str | None
) -> torch.Tensor:
    """The package's loss at t = 1. The teacher has run on the row once, for all students, so its logits are given."""
    causal = F.cross_entropy(student_LV, row.labels)
    if direction is None:
        return causal
    return (1 - WEIGHT) * causal + WEIGHT * kl_divergence(student_LV, teacher_LV, 1.0, direction).mean()


row = pack(encode_cards(real_cards[:NAMES_A_STEP], tokenizer))
loss = DistillationLoss(0.0, teacher, WEIGHT, 1.0, "forward")
loss.prepare(row)
with torch.no_grad():
    first_LV, row_teacher_LV = (each(**row.inputs).logits[0] for each in (start, teacher))
theirs = loss(first_LV[None], row.labels[None], V, row.labels.numel(), shift_labels=row.labels[None])
ours = distillation(first_LV, row_teacher_LV, row, "forward")
holds("this is the package's distillation loss", torch.allclose(theirs, ours, rtol=1e-4))

# %%
curves: dict[str, list[float]] = {kind: [] for kind in KINDS}
for step in range(STEPS):
    rows_of = {pool: pack(encode_cards(steps[step], tokenizer)) for pool, steps in POOLS.items()}
    with torch.no_grad():
        teachers = {pool: teacher(**row.inputs).logits[0] for pool, row in rows_of.items()}
    for kind, (pool, direction) in KINDS.items():
        row, given_LV = rows_of[pool], teachers[pool]
        given_LV = given_LV[torch.randperm(len(given_LV))] if "control" in kind else given_LV
        student_LV = students[kind](**row.inputs).logits[0]
        loss = distillation(student_LV, given_LV, row, direction)
        student_step(students[kind], optimizers[kind], loss, step, STEPS)
        curves[kind].append(F.cross_entropy(student_LV.detach(), row.labels).item())

# %% [markdown]
# All are scored on names that none of them has read. The interval is 95% over names, paired; it does not cover another seed.

# %%
nats = {kind: nats_of_names(student, validation_cards, tokenizer) for kind, student in students.items()}
nats["the toy teacher"] = nats_of_names(teacher, validation_cards, tokenizer)
rows, gains = [], {}
for kind, nats_N in nats.items():
    gains[kind] = mean, error = mean_and_error(nats_N - nats["labels"])
    found = f"{mean:+.2f} ± {error:.2f}", verdict(mean - error, mean + error, "better", "worse", "not shown")
    last = f"{sum(curves[kind][-10:]) / 10:.2f}" if kind in curves else "-"
    bits = f"{bits_per_character(nats_N, validation_cards):.3f}"
    rows.append([kind, last, bits, *(found if kind != "labels" else ("-", "-"))])
table(["", "training loss at the end", "held-out bits", "nats a name, minus labels", "than labels alone"], rows)
of_students = [kind for kind in KINDS if kind != "labels"]
figure, axes = plt.subplots(1, 2, figsize=(12, 3.6))
for number, (kind, curve) in enumerate(curves.items()):
    smooth = torch.tensor(curve).unfold(0, 8, 1).mean(-1)  # after step 8, 9, ...
    axes[0].plot(range(8, STEPS + 1), smooth, label=kind, color=f"C{number}")
    if kind in of_students:
        axes[1].errorbar(gains[kind][0], kind, xerr=gains[kind][1], fmt="o", color=f"C{number}")
axes[0].set(title="training: cross-entropy of the labels, mean of 8 steps", xlabel="step", ylabel="nats per token")
axes[0].legend(fontsize=7)
axes[1].axvline(0, color="black", linewidth=0.8)
axes[1].invert_yaxis()
axes[1].set(title="held-out, minus labels alone, 95% (left is better)", xlabel="nats a name", ylabel="student")
show(figure, "10_students")
known, error = mean_and_error(nats["token level"] - nats["control: other positions"])
print(f"token level minus control: {known:+.2f} ± {error:.2f} nats a name: the teacher's knowledge of each position")
share = gains["control: other positions"][0] / gains["token level"][0]
print(f"the control has {share:.0%} of the token level's gain")
holds("most of the gain comes without that knowledge", share > 0.5)
holds("the right positions teach more than the wrong ones", known + error < 0)
holds("names that a teacher wrote help, where real ones would be repeated", sum(gains["sequence level"]) < 0)
holds("the teacher's probabilities help on the repeated names", sum(gains["token level"]) < 0)
holds("labels alone have the lowest training loss", min(curves, key=lambda kind: sum(curves[kind][-10:])) == "labels")
best = min(gains[kind][0] for kind in of_students)
holds("the students are still far from their teacher", gains["the toy teacher"][0] < 2 * best)

# %% [markdown]
# **Read the control first.** With 200 names, repeated, most of the gain of distillation is regularization: the student does not
# become certain of the few names. Probabilities of the wrong positions do that, too. The rest of the gain is what the teacher
# knows about each position.
#
# The student of labels alone overfits: its training loss is the lowest, and its held-out loss the highest. New names do not have
# this limit. That is why the teacher of the released models wrote hundreds of thousands of them (`data/README.md`).
#
# **Forward or reverse?** In theory the reverse KL makes the more certain student. At this size?

# %%
held = pack(encode_cards(validation_cards[:150], tokenizer))
entropies = {}
with torch.no_grad():
    for kind in ("labels", "token level", "token level, reverse", "the toy teacher"):
        log_LV = (students | {"the toy teacher": teacher})[kind](**held.inputs).logits[0].log_softmax(-1)
        entropies[kind] = -(log_LV.exp() * log_LV).sum(-1).mean().item()
print("mean entropy, nats a token:", "; ".join(f"{kind} {each:.2f}" for kind, each in entropies.items()))
more = "more" if entropies["token level, reverse"] < entropies["token level"] else "less"
print(f"here the student of the reverse KL is {more} certain than that of the forward KL")
holds("after few steps all are less certain than the teacher", min(entropies, key=entropies.get) == "the toy teacher")

# %% [markdown]
# ## The teacher's likeliest tokens
#
# A teacher of 135 million weights in every step would cost more than everything else together. But it has to run once anyway,
# to write the names. Its K likeliest tokens are stored then (`generate --top-logits 256`), and all others count as one outcome.
# How much is lost?

# %%
with torch.no_grad():
    held_teacher_LV = teacher(**held.inputs).logits[0].log_softmax(-1)
    held_student_LV = students["labels"](**held.inputs).logits[0].log_softmax(-1)
full = kl_divergence(held_student_LV, held_teacher_LV, 1.0, "forward").mean().item()
rows, kept_shares, divergences = [], {}, {}
for K in (1, 8, 32, 128, 1024):
    top_LK, ids_LK = held_teacher_LV.topk(K)
    kept_shares[K] = top_LK.exp().sum(-1).mean().item()
    divergences[K] = top_divergence(held_student_LV.gather(1, ids_LK), top_LK, "forward").mean().item()
    rows.append([K, f"{kept_shares[K]:.0%}", f"{divergences[K]:.3f}", f"{K * (4 + 2):,}"])
rows.append([f"{V:,} (all)", "100%", f"{full:.3f}", f"{V * 2:,}"])
table(["K", "of the teacher's probability", "KL, nats", "bytes for each label"], rows)
holds("32 of the tokens hold most of the teacher's probability", kept_shares[32] > 0.5)
ordered = [divergences[K] for K in sorted(divergences)]
growing = ordered == sorted(ordered) and ordered[-1] <= full * 1.001
holds("the KL over K + 1 outcomes grows with K towards the KL over all, and never over it", growing)
holds("32 tokens take less than a hundredth of the bytes", V * 2 / 100 > 32 * 6)
quote(top_divergence)

# %% [markdown]
# ## The released pipeline
#
# 1. `fetch-teacher`: SmolLM2-135M, which has read English. 2. `train --config teacher`: one epoch of the real names (a second
# one memorizes them). 3. `generate --attributes-from train --top-logits 256`: names at temperature 1, with what the teacher
# found likely. 4. `train --config student`: the student, from the principal components of the teacher's token embeddings, at a
# constant learning rate. 5. `train --config names`: the rate falls to 0, without experts (`models/mtg-base`) and with them
# (`models/mtg-names`). Two logs, each on its own draw of 1,500 validation names:

# %%
keys = {"unconditional": "validation/bits_per_char", "given attributes": "validation/bits_per_char_given_attributes"}
logs = {"student": ROOT / "benchmarks/results/student_validations.jsonl", "mtg-base": BASE / "metrics.jsonl"}
stages = {name: read_metrics(log, "validation") for name, log in logs.items()}
(figure, axis), read = plt.subplots(figsize=(7, 3)), 0
for stage, validations in stages.items():
    tokens = [(read + line["tokens"]) / 1e6 for line in validations]
    bits = [[round(line[key], 3) for key in keys.values()] for line in validations]
    first = int(not read)  # step 0 is off the scale
    axis.plot(tokens[first:], bits[first:], "o-", label=[f"{stage}, {label}" for label in keys])
    table([stage, "million tokens", *keys], [["", f"{x:.1f}", *y] for x, y in zip(tokens, bits, strict=True)])
    read += validations[-1]["tokens"]
axis.set(xlabel="million tokens", ylabel="validation bits per character", title="the student learns from the teacher")
axis.legend(fontsize=8)
show(figure, "10_released")
first, last = ([line[keys["given attributes"]] for line in each] for each in stages.values())
holds("at a constant rate the student improved up to the end", all(a > b for a, b in pairwise(first[::2])))
holds("and again when the rate fell to 0", last[-1] < last[0])

# %% [markdown]
# The test results, next to those of models that had read dictionaries instead and of the teacher, are in
# [results](../results.md) and [experiments](../experiments.md): embeddings from the teacher helped three times as much as its
# probabilities, early in training; the real names once more at the end made it worse.
#
# ## What to remember
#
# - A label is one draw. A teacher's probabilities are a whole distribution. Names that it writes are more draws.
# - t² keeps the gradient's scale. Forward KL covers modes, reverse KL seeks one.
# - Where training data are the bottleneck, a model that has read more can write some. Measure on held-out real names.
# - A student inherits what its teacher has read, which may include the test set: check
#   ([results](../results.md#quality), contamination).
#
# ## Exercises
#
# 1. **The weight.** Train students with w = 0, 0.5 and 1 on 200 real names. Is the teacher alone enough?
# 2. **A wrong teacher.** Compare the control above, at w = 0.5, with a teacher that gives all tokens the same probability.
# 3. **Fresh or repeated?** With the same number of steps, take 50, 200 and 800 of the 135M teacher's names, without any real
#    ones. How do the held-out bits depend on the number of different names?
#
# Solutions: [solutions/10_distillation.py](solutions/10_distillation.py).
#
# ## Reading
#
# - [Hinton et al. 2015](https://arxiv.org/abs/1503.02531): temperature, and what soft targets teach.
#   [Kim and Rush 2016](https://arxiv.org/abs/1606.07947): sequence level. [Gu et al. 2024](https://arxiv.org/abs/2306.08543): reverse KL.
# - [Agarwal et al. 2023](https://arxiv.org/abs/2306.13649): the student's own texts (on-policy).
#   [DistilBERT, Sanh et al. 2019](https://arxiv.org/abs/1910.01108), and DistilGPT2 after it.
# - [SmolLM2](https://arxiv.org/abs/2502.02737), the teacher. Next: [chapter 11](11_quantization.py), fewer bits a weight.
