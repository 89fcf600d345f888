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
# # 5. Training
#
# **The question: where does the time of a training step go, how much of it can be saved without changing the result, and how
# does a stopped run resume exactly?**
#
# Card names are short and of unequal length. The usual way to train suits them badly: a batch is padded to its longest text, and
# the model computes the padding as if it were text. This chapter goes from there to the package's own way, one change at a
# time. It times each change on your machine, and checks that the gradient stays the same. The
# [glossary](../glossary.md#training) has the terms.

# %%
import copy
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from chapter_claims import holds
from chapter_models import bits_per_character, mean_and_error, nats_of_names, training_steps, with_dropout
from chapter_steps import gradient, timed_step
from chapter_tools import cards, franchise_cards, load_base, quote, show, table
from matplotlib.patches import Patch
from torch.nn.utils import parameters_to_vector
from torch.utils.flop_counter import FlopCounterMode
from transformers import DataCollatorForSeq2Seq

from flash_experts.benchmarks.timing import Implementation, time_in_rounds
from flash_experts.data.packing import EncodedName, encode_cards, pack
from flash_experts.training import Trainer, TrainingConfig
from flash_experts.training.batches import NameBatches
from flash_experts.training.loss import CausalLoss
from flash_experts.training.optimizer import Schedule, make_optimizers
from flash_experts.training.tracking import Callback, read_metrics

base, tokenizer = load_base()
train_cards = cards("train")
batch = encode_cards(train_cards[:24], tokenizer)  # 24 names and their prompts, in no order
print(f"{len(batch)} names, {sum(name.num_inputs for name in batch)} tokens, e.g. {train_cards[0].name!r}")

# %% [markdown]
# ## The picture first
#
# One batch in two layouts. Each cell is a computed position: blue the prompt, green where the next token is a label, grey padding.

# %%
PAD, PROMPT, LABEL = 0, 1, 2
longest = max(name.num_inputs for name in batch)
padded_NS = np.full((len(batch), longest), PAD)
for row, name in enumerate(batch):
    padded_NS[row, : name.num_inputs] = PROMPT
    padded_NS[row, name.prompt_length - 1 : name.num_inputs] = LABEL
packed_T = padded_NS[padded_NS != PAD]
lines_16W = np.pad(packed_T, (0, -len(packed_T) % 16), constant_values=-1).reshape(16, -1)

figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(1, 1.6))
colors = plt.matplotlib.colors.ListedColormap(["white", "#cccccc", "tab:blue", "tab:green"])
axes[0].imshow(padded_NS, cmap=colors, vmin=-1, vmax=2, aspect="auto")
axes[0].set(title="padded to the longest", xlabel="position", ylabel="name", xticks=range(0, longest, 3))
axes[1].imshow(lines_16W, cmap=colors, vmin=-1, vmax=2, aspect="auto")
axes[1].set(title="packed: one row, here broken into 16 lines", xlabel="position in the line", ylabel="line")
axes[1].set_xticks(range(0, lines_16W.shape[1], 5))
kinds = {"padding": "#cccccc", "prompt": "tab:blue", "has a label": "tab:green"}
key = [Patch(color=color, label=kind) for kind, color in kinds.items()]
figure.legend(handles=key, loc="outside lower center", ncols=3)
show(figure, "05_padding")

padding, labelled = (padded_NS == PAD).mean(), (packed_T == LABEL).mean()
print(f"padded: {padded_NS.size} positions, {padding:.0%} of them padding")
print(f"packed: {len(packed_T)} positions, of which {labelled:.0%} have a label")
holds("over a fifth of the padded batch is padding; the packed row has none", padding > 0.2 and PAD not in packed_T)
holds("under half of the packed positions have a label: prompts are longer than names", labelled < 0.5)

# %% [markdown]
# Every position costs time, but padding carries no information. So we measure speed in *real* tokens per second.
#
# ## The formula, with shapes
#
# $$ L = -\frac{1}{M} \sum_{t \in \text{labels}} \log\,\text{softmax}(h_t W^\top)_{y_t} $$
#
# | | shape | |
# | --- | --- | --- |
# | input_ids | (1, T) | packed: all names in one row; padded: (N, S) |
# | position_ids, cu_seq_lens | (1, T), (N + 1,) | from 0 in each name; where each begins: attention stays inside |
# | keep | (L,) | positions whose next token is a label |
# | h at keep | (L, D) | all that the output layer needs |
# | W | (V, D) | the output layer, which is the embedding table |
# | logits | (L, V) | not (T, V), and not (N, S, V) |
# | M | a number | labels of the *whole* step |
#
# How a row is made:

# %%
quote(pack)
for field in ("input_ids", "position_ids", "cu_seq_lens", "keep", "labels"):
    print(f"{field:13}", getattr(pack(batch[:2]), field).flatten().tolist())

# %% [markdown]
# If M counted the labels of a part of the step (a micro-batch, a process), labels of a short part would weigh more. We compare the
# gradient of a whole batch with the sum of the gradients of three micro-batches:

# %%
model = with_dropout(base, 0.0)
by_length = sorted(batch, key=lambda name: name.num_inputs)
whole, parts = pack(by_length), [pack(by_length[start : start + 8]) for start in (0, 8, 16)]
M = whole.labels.numel()
quote(gradient)
one_batch = gradient(model, whole.inputs_with_loss(M))
divisors = {"the labels of the step": [M] * 3, "their own, then by three": [3 * part.labels.numel() for part in parts]}
wrongs = []
for how, each in divisors.items():
    in_parts = gradient(model, *(part.inputs_with_loss(divisor) for part, divisor in zip(parts, each, strict=True)))
    wrongs.append((in_parts - one_batch).norm() / one_batch.norm())
    print(f"divided by {how}: gradient off by {wrongs[-1]:.1e}")
right = wrongs[0] < 1e-4 < 1e-2 < wrongs[1]
holds("divided by the labels of the step, parts give the gradient of the whole; by their own, another", right)

# %% [markdown]
# The second is the gradient of another loss (transformers had it
# [until 2024](https://github.com/huggingface/transformers/pull/34191)). Below is the package's loss; `num_items_in_batch` is M:

# %%
quote(CausalLoss.__call__)

# %% [markdown]
# ## The ladder
#
# Here are six ways to do the same step. Each makes one change to the one before. The first is that of many tutorials.


# %%
def padded(names: Sequence[EncodedName]) -> dict[str, Any]:
    """The usual batch: (N, S) with padding; the label -100 says that a position does not count."""
    labels = [[*[-100] * name.prompt_length, *name.ids[name.prompt_length :]] for name in names]
    rows = [{"input_ids": [*name.ids], "labels": each} for name, each in zip(names, labels, strict=True)]
    return {**DataCollatorForSeq2Seq(tokenizer)(rows), "num_items_in_batch": M, "use_cache": False}


def packed_kept_logits(names: Sequence[EncodedName]) -> dict[str, Any]:
    return pack(names).inputs_with_loss(M)


def packed_all_logits(names: Sequence[EncodedName]) -> dict[str, Any]:
    """One row, but logits at every position (for transformers, 0 means all)."""
    row = pack(names)
    labels_1T = torch.full_like(row.input_ids, -100)
    labels_1T[0, row.keep] = row.labels
    return packed_kept_logits(names) | {"logits_to_keep": 0, "labels": labels_1T, "shift_labels": labels_1T}


LADDER: dict[str, tuple[Callable[[Sequence[EncodedName]], dict[str, Any]], str, str, bool]] = {
    "padded, plain attention": (padded, "eager", "gelu_new", False),
    "fused attention": (padded, "sdpa", "gelu_new", False),
    "packed": (packed_all_logits, "fe_attention", "gelu_new", False),
    "logits at labels only": (packed_kept_logits, "fe_attention", "gelu_new", False),
    "fused activation": (packed_kept_logits, "fe_attention", "gelu_pytorch_tanh", False),
    "fused optimizer": (packed_kept_logits, "fe_attention", "gelu_pytorch_tanh", True),
}
quote(timed_step)
implementations, gradients = {}, {}
for name, choices in LADDER.items():
    implementations[name], model = timed_step(base, batch, *choices)
    gradients[name] = gradient(model, choices[0](batch))
    model.zero_grad()
first, *_ = gradients.values()
off = {name: (each - first).norm() / first.norm() for name, each in gradients.items()}
table(["the same step?", "gradient off by"], [[name, f"{each:.0e}"] for name, each in off.items()])
holds("all six rungs have one gradient, up to rounding", max(off.values()) < 1e-4)

# %% [markdown]
# Now the time. All are run in turn for several rounds, and the median counts (as in `flash-experts benchmark`).

# %%
timings = time_in_rounds(implementations, torch.device("cpu"), rounds=3, seconds=0.0)
rows, slowest, tokens = [], timings["padded, plain attention"].total, sum(name.num_inputs for name in batch)
for name, timing in timings.items():
    parts_ms = [f"{part * 1e3:.0f}" for part in timing.parts]
    rows.append([name, *parts_ms, f"{tokens / timing.total:,.0f}", f"{slowest / timing.total:.2f} x"])
table(["each with all above", "forward ms", "backward", "optimizer", "real tokens/s", "in all"], rows)

figure, axis = plt.subplots(figsize=(9, 3))
parts_P3 = 1e3 * np.array([timing.parts for timing in timings.values()])
for part, label in enumerate(("forward", "backward", "optimizer")):
    axis.barh(list(timings), parts_P3[:, part], left=parts_P3[:, :part].sum(1), label=label)
axis.invert_yaxis()
axis.set(title="one training step on this machine", xlabel="milliseconds", ylabel="each with all above")
axis.legend()
show(figure, "05_ladder")

# %% [markdown]
# Find the rung that saves most, and compare it with the share of padding: at best, time falls as the number of computed
# positions does. The other rungs depend on sizes. Logits cost 2 V D FLOPs a position, in proportion to the vocabulary
# V (exercise 1 takes GPT-2's). A fused activation or optimizer saves memory traffic, not FLOPs.
#
# ## How near is the last rung to what the machine can do?
#
# PyTorch counts the FLOPs of a step. The reference is a large matmul, timed here.

# %%
with FlopCounterMode(display=False) as counter:
    model(**packed_kept_logits(batch)).loss.backward()
A, B = torch.randn(1024, 1024), torch.randn(1024, 1024)
product = time_in_rounds({"product": Implementation(lambda lap: (torch.mm(A, B), lap()))}, torch.device("cpu"), 5, 0.2)
peak = 2 * 1024**3 / product["product"].total
busy = counter.get_total_flops() / sum(timings["fused optimizer"].parts[:2])
print(f"the step runs at {busy / 1e9:.0f} GFLOP/s, {busy / peak:.0%} of a large matmul's {peak / 1e9:.0f}")

# %% [markdown]
# With the hardware's peak in place of the timed matmul, that share is the model FLOPs utilization (MFU). It bounds all speed-ups:
# near 1, only fewer FLOPs help. The rest of the time went into small matmuls, attention, norms, activations, and memory traffic.
#
# ## The step that ships: accumulation, several processes, clipping, a NaN/Inf check

# %%
quote(Trainer._step)
quote(Trainer._backward)

# %% [markdown]
# **AdamW** keeps two running means for each weight w with gradient g:
#
# $$ m \leftarrow \beta_1 m + (1-\beta_1)\,g \qquad v \leftarrow \beta_2 v + (1-\beta_2)\,g^2 \qquad
# w \leftarrow w - \eta\left(\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}+\epsilon} + \lambda\,w\right) $$
#
# t counts the steps, η is the learning rate, λ the weight decay, ε 1e-8. m and v have w's shape, so training holds four numbers a
# weight (w, g, m, v). The first two steps by hand:

# %%
config = TrainingConfig(max_steps=2, max_epochs=None, learning_rate=1e-3)
model = with_dropout(base, 0.0)
optimizer = make_optimizers(model, config)["optimizer"]
weight = model.transformer.h[0].mlp.c_fc.weight
w, m, v = weight.detach().clone().double(), 0.0, 0.0
(beta_1, beta_2), decay = config.betas, config.weight_decay
for t in (1, 2):
    gradient(model, pack(batch[t * 8 - 8 : t * 8]).inputs_with_loss(100))
    g = weight.grad.double()
    m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g**2
    w -= 1e-3 * (m / (1 - beta_1**t) / ((v / (1 - beta_2**t)).sqrt() + 1e-8) + decay * w)
    optimizer.step()
    print(f"step {t}: by hand in float64 against the fused kernel: {(w - weight).abs().max():.1e}")
    holds("AdamW by hand is the fused kernel's, up to rounding", (w - weight).abs().max() < 1e-6)

# %% [markdown]
# **The schedule** multiplies the learning rate. It is a pure function of how far the run is:

# %%
figure, axis = plt.subplots(figsize=(7, 2.6))
for kind, line in (("constant", "-"), ("wsd", "--"), ("cosine", "-"), ("linear", "-")):
    schedule = Schedule(kind, warmup=0.1, min_ratio=0.1, planned_steps=200, planned_seconds=None)
    axis.plot(
        [schedule.factor(step, 0.0) for step in range(200)], line, label=kind, linewidth=3 if line == "--" else 1.5
    )
axis.set(title="200 steps, a tenth of them warmup", xlabel="step", ylabel="rate over the highest", ylim=(0, 1.05))
figure.legend(loc="outside right center")
show(figure, "05_schedules")

# %% [markdown]
# ## Resuming a run exactly
#
# What must be saved so that the rest of a stopped run is *the same*, to the last bit? The weights, the optimizer's m and v, and
# the step. Three more things are often forgotten: the order of the data, the random state of dropout, and the sums of the log
# so far. In this package the first two of these are pure functions of (seed, step), so there is nothing to save.

# %%
config = TrainingConfig(max_steps=100, max_epochs=None, tokens_per_batch=512, seed=7)
ask = [NameBatches(train_cards[:1000], tokenizer, config).names_of_step(step) for step in (41, 41, 42)]
holds("two objects give the same names for step 41, and others for step 42", ask[0] == ask[1] != ask[2])

# %% [markdown]
# Three runs take six steps each, with dropout. The first is not interrupted. The second gets a SIGTERM, as from a job scheduler,
# while it writes the log of step 3. It does the next step, saves and stops; then a new trainer with a new model resumes. The
# third resumes too, but without the optimizer's state, as if only the weights had been saved.


# %%
class Kill(Callback):
    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)


class Forget(Callback):
    forgetful: Trainer

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        self.forgetful.optimizers["optimizer"].state.clear()


def trainer(name: str, model: Any, *callbacks: Callback) -> Trainer:
    config = TrainingConfig(
        output_dir=folder, run_name=name, max_steps=6, max_epochs=None, tokens_per_batch=256, learning_rate=1e-3,
        schedule="constant", warmup_steps=1, log_every=1, eval_every=None, checkpoint_every=None,
        save_in_background=False,
    )  # fmt: skip
    return Trainer(model, tokenizer, train_cards[:1000], [], config, callbacks)


def logged(name: str) -> list[float]:
    return [line["loss"] for line in read_metrics(Path(folder) / name / "metrics.jsonl", "train")]


with tempfile.TemporaryDirectory() as folder:
    whole_run = with_dropout(base, 0.1)
    trainer("whole", whole_run).train()
    print("ended by", trainer("killed", with_dropout(base, 0.1), Kill()).train().reason)
    saved = sorted((Path(folder) / "killed/checkpoints").iterdir())[-1]
    print(f"{saved.name}:", *(f"{file.name} {file.stat().st_size:,}" for file in sorted(saved.iterdir())), sep="\n  ")
    shutil.copytree(Path(folder) / "killed", Path(folder) / "forgetful")
    resumed, weights_only, forget = with_dropout(base, 0.1), with_dropout(base, 0.1), Forget()
    trainer("killed", resumed).train(resume="auto")
    forget.forgetful = trainer("forgetful", weights_only, forget)
    forget.forgetful.train(resume="auto")
    losses = {"uninterrupted": logged("whole"), "resumed": logged("killed"), "weights alone": logged("forgetful")}

table(["loss of step", *range(1, 7)], [[name, *(f"{loss:.5f}" for loss in run)] for name, run in losses.items()])
holds("resumed, the losses are equal to the last bit", losses["resumed"] == losses["uninterrupted"])
first, second, third = (parameters_to_vector(model.parameters()) for model in (whole_run, resumed, weights_only))
holds(
    "so are the weights; those of the third run are not", torch.equal(first, second) and not torch.equal(first, third)
)
same = [a == b for a, b in zip(losses["weights alone"], losses["uninterrupted"], strict=True)]
holds("the third run has the right loss up to step 5, and another in step 6", same == [True] * 5 + [False])

# %% [markdown]
# The loss of step 5 was computed before the first update without the old m and v. In six steps the difference is visible. In a
# long loss curve it may not be, so the test of a resume is equality.
#
# A checkpoint is safetensors and JSON alone; `MANIFEST.json` holds the SHA-256 of each file, and the folder is renamed into
# place when all of it is on the disk: a kill at any moment leaves a complete checkpoint or none.
#
# ## An experiment that changes one thing: the learning rate
#
# The base takes 12 steps on names that it has not seen (cards of franchises), at four rates. The interval of the difference from
# before training is 95% over held-out names; it does not cover another seed.

# %%
new_cards, held_out = franchise_cards()
before_N = nats_of_names(base, held_out, tokenizer)
rows, gains = [], []
for rate in (1e-5, 1e-4, 1e-3, 1e-2):
    model = copy.deepcopy(base)
    losses = list(training_steps(model, new_cards, tokenizer, 12, rate))
    nats_N = nats_of_names(model, held_out, tokenizer)
    gain, error = mean_and_error(nats_N - before_N)
    gains.append(gain)
    cells = f"{sum(losses[-5:]) / 5:.3f}", f"{bits_per_character(nats_N, held_out):.3f}", f"{gain:+.2f} ± {error:.2f}"
    rows.append([f"{rate:g}", *cells])
print(f"held-out bits before: {bits_per_character(before_N, held_out):.3f}")
table(["rate", "loss, last 5 steps", "held-out bits", "nats a name, minus before"], rows)
best = gains.index(min(gains))
holds("the best rate is neither the lowest nor the highest", 0 < best < len(gains) - 1)
holds("the lowest wastes steps: it learned less than half as much", gains[0] > gains[best] / 2)
holds("the highest destroys what the base knew", gains[-1] > 1)

# %% [markdown]
# To tune a rate, find a rate that is too low and one that is too high first. Then search between them.
#
# ## What to remember
#
# - Count real tokens: padding teaches nothing. A speed-up must not change the gradient: check that first.
# - Divide by the labels of the whole step; then gradient accumulation and several processes change nothing.
# - A resume is right when its losses are bit-identical. With data order and dropout as functions of the step, little is saved.
#
# ## Exercises
#
# 1. **A large vocabulary.** Give the model an embedding table of 50,257 rows (random ones will do; names keep their
#    ids), and time the rungs "packed" and "logits at labels only" again.
# 2. **Sorting instead.** Batches of names of like length avoid padding, too. How much is left with batches of 48 from the
#    3,000 first training names, in random order and sorted? What does sorting cost that packing does not?
# 3. **Clipping.** `clip_norm` scales the gradient down when its norm is over 1. Take ten steps at rate 1e-2 with and
#    without it: how often does it act, and what does it do to the loss?
# 4. **Another schedule, the same resume.** Show that the cosine's rate after a resume is that of the whole run, step by
#    step, and that it is not if `max_steps` is changed in between.
#
# Solutions: [solutions/05_training.py](solutions/05_training.py).
#
# ## Reading
#
# - [Loshchilov and Hutter 2017](https://arxiv.org/abs/1711.05101): AdamW. [Hu et al. 2024](https://arxiv.org/abs/2404.06395):
#   warmup-stable-decay. Muon, which trained the released models: [chapter 5b](05b_muon.py).
# - [Krell et al. 2021](https://arxiv.org/abs/2107.02027): sequences in one row.
# - [llm.c](https://github.com/karpathy/llm.c) and [nanoGPT](https://github.com/karpathy/nanoGPT): the same loop, short.
# - Next: [chapter 6](06_generation.py), names out of probabilities.
