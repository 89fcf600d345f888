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
# **The question: where does the time of a training step go, what of it can be saved without changing the result, and how
# does a run that was stopped go on as if nothing had happened?**
#
# Card names are short and of unequal length. That is the worst case for the usual way to train: a batch is filled up with
# padding to its longest text, and the model multiplies the padding as if it were text. This chapter goes from the usual
# way to the package's own, one change at a time, and times each on your machine. The loss and the gradient stay what
# they were, and we check that too.

# %%
import copy
import json
import shutil
import signal
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from chapter_tools import (
    bits_per_character,
    cards,
    franchise_cards,
    load_base,
    nats_of_names,
    quote,
    show,
    table,
    training_steps,
)
from torch.utils.flop_counter import FlopCounterMode
from transformers.activations import ACT2FN

from flash_experts.benchmarks.measuring import Contestant, Lap, take_turns
from flash_experts.data.packing import EncodedName, PackedBatch, encode_cards, pack
from flash_experts.training import Trainer, TrainingConfig
from flash_experts.training.batches import NameBatches
from flash_experts.training.callbacks import Callback
from flash_experts.training.loss import CausalLoss
from flash_experts.training.optimizer import make_optimizers
from flash_experts.training.schedule import Schedule

base, tokenizer = load_base()
train_cards = cards("train")
batch = encode_cards(train_cards[:24], tokenizer)  # 24 names and their prompts, in no order
print(f"{len(batch)} names, {sum(name.num_inputs for name in batch)} tokens, e.g. {train_cards[0].name!r}")

# %% [markdown]
# ## The picture first
#
# One batch in two layouts. Each cell is a position that the model computes. Blue is the prompt, green a position whose
# next token is a label, grey is padding.

# %%
PAD, PROMPT, LABEL = 0, 1, 2
longest = max(name.num_inputs for name in batch)
padded_NS = np.full((len(batch), longest), PAD)
for row, name in enumerate(batch):
    padded_NS[row, : name.num_inputs] = PROMPT
    padded_NS[row, name.prompt_length - 1 : name.num_inputs] = LABEL
packed_T = padded_NS[padded_NS != PAD]
width = -(-len(packed_T) // 16)
packed_lines = np.full(16 * width, -1)
packed_lines[: len(packed_T)] = packed_T

figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), width_ratios=(1, 1.6))
colors = plt.matplotlib.colors.ListedColormap(["white", "#cccccc", "tab:blue", "tab:green"])
axes[0].imshow(padded_NS, cmap=colors, vmin=-1, vmax=2, aspect="auto")
axes[0].set(title="padded to the longest", xlabel="position", ylabel="name")
axes[1].imshow(packed_lines.reshape(16, width), cmap=colors, vmin=-1, vmax=2, aspect="auto")
axes[1].set(title="packed: one row, here broken into 16 lines", xticks=[], yticks=[])
show(figure, "05_padding")

positions = padded_NS.size
print(f"padded: {positions} positions, {(padded_NS == PAD).mean():.0%} of them padding")
print(f"packed: {len(packed_T)} positions, of which {(packed_T == LABEL).mean():.0%} have a label")

# %% [markdown]
# Three quantities to keep apart: positions that are computed, tokens that are real, and labels that teach. Speed is
# *real* tokens per second. A program that counts padding looks fast and is not.
#
# ## The formula, with shapes
#
# $$ L = -\frac{1}{M} \sum_{t \in \text{labels}} \log\,\text{softmax}(h_t W^\top)_{y_t} $$
#
# | | shape | |
# | --- | --- | --- |
# | input_ids | (1, T) | packed: all names in one row; padded: (N, S) |
# | position_ids | (1, T) | from 0 in each name |
# | cu_seq_lens | (N + 1,) | where each name begins: attention stays inside |
# | keep | (L,) | positions whose next token is a label |
# | h at keep | (L, D) | all that the output layer needs |
# | W | (V, D) | the output layer, which is the embedding table |
# | logits | (L, V) | not (T, V), and not (N, S, V) |
# | M | a number | labels of the *whole* step |
#
# How a row is made:

# %%
quote(pack)
two = pack(batch[:2])
for field in ("input_ids", "position_ids", "cu_seq_lens", "keep", "labels"):
    print(f"{field:13}", getattr(two, field).flatten().tolist())

# %% [markdown]
# M counts the labels of the whole step. If it counted those of a part of it (a micro-batch, a process), short parts would
# weigh more per label. Let us see: a batch in one piece, and in three pieces whose gradients add up.


# %%
def without_dropout() -> Any:
    """A copy of the base in training mode that computes the same each time."""
    model = copy.deepcopy(base)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model.train()


def gradient(model: torch.nn.Module, parts: Sequence[PackedBatch], divisors: Sequence[int]) -> torch.Tensor:
    """All gradients of the sum of the parts' losses in one vector."""
    model.zero_grad()
    for part, divisor in zip(parts, divisors, strict=True):
        model(**part.inputs_with_loss(divisor)).loss.backward()
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


model = without_dropout()
by_length = sorted(batch, key=lambda name: name.num_inputs)
whole, parts = pack(by_length), [pack(by_length[start : start + 8]) for start in (0, 8, 16)]
M = whole.labels.numel()
one_batch = gradient(model, [whole], [M])
accumulated = gradient(model, parts, [M] * 3)
of_means = gradient(model, parts, [3 * part.labels.numel() for part in parts])
norm = one_batch.norm()
print(f"divided by the labels of the step:      gradient off by {(accumulated - one_batch).norm() / norm:.1e}")
print(f"mean of the means of the three pieces:  gradient off by {(of_means - one_batch).norm() / norm:.1e}")

# %% [markdown]
# The first is rounding, the second is not: another loss is minimized. (transformers had the second until the autumn of
# 2024.) This is the package's loss; `num_items_in_batch` is M.

# %%
quote(CausalLoss.__call__)

# %% [markdown]
# ## The ladder
#
# Six ways to do the same step, each with one change to the one before. The first is how many tutorials do it.


# %%
def padded(names: Sequence[EncodedName]) -> dict[str, Any]:
    """The usual batch: (N, S) with padding; the label -100 says that a position does not count."""
    longest = max(name.num_inputs for name in names) + 1  # transformers shifts the labels itself, so the end stays in
    ids, labels = torch.full((len(names), longest), tokenizer.pad_token_id), torch.full((len(names), longest), -100)
    mask = torch.zeros(len(names), longest, dtype=torch.long)
    for row, name in enumerate(names):
        size = len(name.ids)
        ids[row, :size], mask[row, :size] = torch.tensor(name.ids), 1
        labels[row, name.prompt_length : size] = ids[row, name.prompt_length : size]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels, "num_items_in_batch": M, "use_cache": False}


def packed_all_logits(names: Sequence[EncodedName]) -> dict[str, Any]:
    """One row, but logits at every position."""
    row = pack(names)
    labels_T = torch.full((row.num_tokens,), -100)
    labels_T[row.keep] = row.labels
    inputs = row.inputs | {"logits_to_keep": 0}  # 0 means all, in transformers
    return inputs | {"labels": labels_T[None], "shift_labels": labels_T[None], "num_items_in_batch": M}


def packed_kept_logits(names: Sequence[EncodedName]) -> dict[str, Any]:
    return pack(names).inputs_with_loss(M)


def rung(attention: str, activation: str, fused_optimizer: bool) -> tuple[Any, torch.optim.Optimizer]:
    """The model and AdamW with these choices."""
    model = without_dropout()
    model.set_attn_implementation(attention)
    for block in model.transformer.h:
        block.mlp.act = ACT2FN[activation]
    kind = {"fused": True} if fused_optimizer else {"foreach": False}
    return model, torch.optim.AdamW(model.parameters(), lr=1e-5, **kind)


Rung = tuple[Callable[[Sequence[EncodedName]], dict[str, Any]], str, str, bool]
LADDER: dict[str, Rung] = {
    "padded, plain attention": (padded, "eager", "gelu_new", False),
    "fused attention": (padded, "sdpa", "gelu_new", False),
    "packed": (packed_all_logits, "fe_attention", "gelu_new", False),
    "logits at labels only": (packed_kept_logits, "fe_attention", "gelu_new", False),
    "fused activation": (packed_kept_logits, "fe_attention", "gelu_pytorch_tanh", False),
    "fused optimizer": (packed_kept_logits, "fe_attention", "gelu_pytorch_tanh", True),
}


def contestant(make_batch: Callable[..., dict[str, Any]], *choices: Any) -> tuple[Contestant, Any]:
    """A training step in three timed parts, and its model."""
    model, optimizer = rung(*choices)

    def step(lap: Lap) -> None:
        loss = model(**make_batch(batch)).loss
        lap()
        loss.backward()
        lap()
        optimizer.step()
        optimizer.zero_grad()
        lap()

    return Contestant(step), model


contestants, gradients, losses = {}, {}, {}
for name, (make_batch, *choices) in LADDER.items():
    contestants[name], model = contestant(make_batch, *choices)
    losses[name] = model(**make_batch(batch)).loss
    losses[name].backward()
    gradients[name] = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    model.zero_grad()
first = gradients["padded, plain attention"]
table(
    ["the same step?", "loss", "gradient off by"],
    [
        [name, f"{losses[name].item():.5f}", f"{(each - first).norm() / first.norm():.0e}"]
        for name, each in gradients.items()
    ],
)

# %% [markdown]
# All rungs compute one gradient, up to rounding. Now the clock. `take_turns` is what `flash-experts benchmark` uses: the
# contestants take turns in rounds, and the median counts, so that a slow moment of the machine hits all of them.

# %%
timings = take_turns(contestants, torch.device("cpu"), rounds=3, seconds=0.0)
tokens = sum(name.num_inputs for name in batch)
rows, slowest = [], timings["padded, plain attention"].total
for name, timing in timings.items():
    parts_ms = [f"{part * 1e3:.0f}" for part in timing.parts]
    rows.append([name, *parts_ms, f"{tokens / timing.total:,.0f}", f"{slowest / timing.total:.2f} x"])
table(["each with all above", "forward ms", "backward", "optimizer", "real tokens/s", "in all"], rows)

figure, axis = plt.subplots(figsize=(9, 3))
left = np.zeros(len(timings))
for part, label in enumerate(("forward", "backward", "optimizer")):
    milliseconds = np.array([timing.parts[part] * 1e3 for timing in timings.values()])
    axis.barh(list(timings), milliseconds, left=left, label=label)
    left += milliseconds
axis.invert_yaxis()
axis.set(title="one training step on this machine", xlabel="milliseconds")
axis.legend()
show(figure, "05_ladder")

# %% [markdown]
# Find the longest step of the ladder, and compare it with the share of padding above: at best, time falls as the computed
# positions do. What the other rungs bring depends on sizes. Logits cost 2 V D operations a position, so leaving them out
# matters in proportion to the vocabulary V. Fusing an activation or an optimizer saves trips to memory, not arithmetic.
# A rung that brings little here (look for one) may bring much for another model: exercise 1 gives this one a
# vocabulary as large as GPT-2's.
#
# ## How near is the last rung to what the machine can do?
#
# We let PyTorch count the operations of a step, and compare with the fastest product of matrices that we can time.

# %%
with FlopCounterMode(display=False) as counter:
    model(**packed_kept_logits(batch)).loss.backward()
A, B = torch.randn(1024, 1024), torch.randn(1024, 1024)
product = take_turns({"product": Contestant(lambda lap: (torch.mm(A, B), lap()))}, torch.device("cpu"), 5, 0.2)
peak = 2 * 1024**3 / product["product"].total
last = timings["fused optimizer"]
busy = counter.get_total_flops() / (last.parts[0] + last.parts[1])
print(f"a step: {counter.get_total_flops() / 1e9:.1f} GFLOP; forward and backward run at {busy / 1e9:.0f} GFLOP/s")
print(f"a large product of matrices: {peak / 1e9:.0f} GFLOP/s; so the step uses {busy / peak:.0%} of it")

# %% [markdown]
# That share is the model FLOPs utilization (MFU). What is missing went into small products, attention, norms,
# activations, and reading and writing. It is the honest end of any list of speed-ups: when it is near 1, only less
# arithmetic helps.
#
# ## The step that ships
#
# The trainer's step, with everything that a real run needs: accumulation, several processes, clipping, a look for numbers
# that are none.

# %%
quote(Trainer._step)
quote(Trainer._backward)

# %% [markdown]
# Two of its parts are formulas worth a look. **AdamW** keeps two running means for each weight w with gradient g:
#
# $$ m \leftarrow \beta_1 m + (1-\beta_1)\,g \qquad v \leftarrow \beta_2 v + (1-\beta_2)\,g^2 \qquad
# w \leftarrow w - \eta\left(\frac{m/(1-\beta_1^t)}{\sqrt{v/(1-\beta_2^t)}+\epsilon} + \lambda\,w\right) $$
#
# m and v have w's shape: training needs four numbers a weight (w, g, m, v). By hand, for the first two steps:

# %%
config = TrainingConfig(max_steps=2, max_epochs=None, learning_rate=1e-3)
model = without_dropout()
optimizer = make_optimizers(model, config)["optimizer"]
weight = model.transformer.h[0].mlp.c_fc.weight
w, m, v = weight.detach().clone().double(), 0.0, 0.0
(beta_1, beta_2), decay = config.betas, config.weight_decay
for t in (1, 2):
    model(**pack(batch[t * 8 - 8 : t * 8]).inputs_with_loss(100)).loss.backward()
    g = weight.grad.double()
    m, v = beta_1 * m + (1 - beta_1) * g, beta_2 * v + (1 - beta_2) * g**2
    w -= 1e-3 * (m / (1 - beta_1**t) / ((v / (1 - beta_2**t)).sqrt() + 1e-8) + decay * w)
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {t}: by hand in float64 against the fused kernel: {(w - weight).abs().max():.1e}")
state = sum(x.numel() for values in optimizer.state.values() for x in values.values() if x.ndim)
print(f"{model.num_parameters():,} weights, {state:,} numbers of optimizer state")

# %% [markdown]
# **The schedule** multiplies the rate. It is a pure function of how far the run is:

# %%
figure, axis = plt.subplots(figsize=(7, 2.6))
for kind in ("cosine", "linear", "wsd", "constant"):
    schedule = Schedule(kind, warmup=0.1, min_ratio=0.1, planned_steps=200, planned_seconds=None)
    axis.plot([schedule.factor(step, 0.0) for step in range(200)], label=kind)
axis.set(title="rate over the highest rate, 200 steps, a tenth of them warm-up", xlabel="step")
axis.legend()
show(figure, "05_schedules")

# %% [markdown]
# ## A run that goes on as if nothing had happened
#
# A machine stops, a job is preempted, somebody presses Ctrl+C. What must be kept so that the rest of the run is *the
# same*, to the last bit? The weights. The optimizer's m and v. Where the run stands. And three things that are often
# forgotten: the order of the data, the random state of dropout, and what the log has summed up so far.
#
# The package makes the first two of these pure functions of (seed, step), so there is nothing to keep:

# %%
config = TrainingConfig(max_steps=100, max_epochs=None, tokens_per_batch=512, seed=7)
ask = [NameBatches.of(train_cards[:3000], tokenizer, config).names_of_step(step) for step in (41, 41, 42)]
print("step 41, asked of two objects that know nothing of each other:", ask[0] == ask[1])
print("step 42 is another:", ask[1] != ask[2])

# %% [markdown]
# Three runs of eight steps, with dropout. The first in one go. The second gets a SIGTERM while it writes the log of step
# 3, as from a job scheduler; it does the next step, saves, and stops, and a new trainer with a new model resumes. The
# third resumes too, but forgets the optimizer's state, as if only the weights had been kept.


# %%
class Kill(Callback):
    """Sends SIGTERM to this process."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)


class Forget(Callback):
    """Clears optimizers when a run begins."""

    optimizers: Mapping[str, torch.optim.Optimizer]

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        for optimizer in self.optimizers.values():
            optimizer.state.clear()


def trainer(name: str, model: Any, *callbacks: Callback) -> Trainer:
    config = TrainingConfig(
        output_dir=folder,
        run_name=name,
        max_steps=8,
        max_epochs=None,
        tokens_per_batch=512,
        learning_rate=1e-3,
        schedule="constant",
        warmup_steps=1,
        log_every=1,
        eval_every=None,
        checkpoint_every=None,
        save_in_background=False,
    )
    return Trainer(model, tokenizer, train_cards[:3000], [], config, callbacks)


def logged(name: str) -> list[float]:
    lines = (Path(folder) / name / "metrics.jsonl").read_text("utf-8").splitlines()
    return [record["loss"] for record in map(json.loads, lines) if "loss" in record]


with tempfile.TemporaryDirectory() as folder:
    whole_run = copy.deepcopy(base)
    trainer("whole", whole_run).train()
    print("ended by", trainer("killed", copy.deepcopy(base), Kill()).train().reason)
    saved = sorted((Path(folder) / "killed/checkpoints").iterdir())[-1]
    print(
        f"in {saved.name}:", *(f"{file.name} {file.stat().st_size:,}" for file in sorted(saved.iterdir())), sep="\n  "
    )
    shutil.copytree(Path(folder) / "killed", Path(folder) / "forgetful")
    resumed, weights_only, forget = copy.deepcopy(base), copy.deepcopy(base), Forget()
    trainer("killed", resumed).train(resume="auto")
    forgetful = trainer("forgetful", weights_only, forget)
    forget.optimizers = forgetful.optimizers
    forgetful.train(resume="auto")
    losses = {"in one go": logged("whole"), "resumed": logged("killed"), "weights alone": logged("forgetful")}

rows = [[name, *(f"{loss:.5f}" for loss in of_run)] for name, of_run in losses.items()]
table(["loss of step", *range(1, 9)], rows)


def same(model: torch.nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), whole_run.parameters(), strict=True))


print("losses equal to the last bit:", losses["resumed"] == losses["in one go"])
print(f"weights equal to the last bit: resumed {same(resumed)}, from weights alone {same(weights_only)}")

# %% [markdown]
# The third run has the right loss at the first step after the resume, which the old weights made, and then it is another
# run: m and v began at zero again. In a long loss curve nobody would notice. That is why the test of a resume is equality
# and not a look at a curve.
#
# Everything in the checkpoint is safetensors or JSON, `MANIFEST.json` holds the SHA-256 of each file, and the folder is
# renamed into place when all of it is on the disk. So a kill at any moment leaves either a whole checkpoint or none.
#
# ## An experiment that changes one thing: the learning rate
#
# Names that the base has never seen (cards of franchises), 20 steps, four rates. The interval is 95% over held-out names,
# against no training at all. It does not cover another seed.

# %%
new_cards, held_out = franchise_cards()
before_N = nats_of_names(base, held_out, tokenizer)
rates, rows, curves = [1e-5, 1e-4, 1e-3, 1e-2], [], {}
for rate in rates:
    model = copy.deepcopy(base)
    curves[rate] = list(training_steps(model, new_cards, tokenizer, 20, rate))
    nats_N = nats_of_names(model, held_out, tokenizer)
    gain_N = nats_N - before_N
    error = 1.96 * gain_N.std() / len(gain_N) ** 0.5
    loss = sum(curves[rate][-5:]) / 5
    bits = bits_per_character(nats_N, held_out)
    rows.append([f"{rate:g}", f"{loss:.3f}", f"{bits:.3f}", f"{gain_N.mean():+.2f} ± {error:.2f}"])
print(f"held-out bits before: {bits_per_character(before_N, held_out):.3f}")
table(["rate", "loss, last 5 steps", "held-out bits", "nats a name, against before"], rows)

figure, axis = plt.subplots(figsize=(7, 3))
for rate, curve in curves.items():
    axis.plot(range(1, 21), curve, label=f"{rate:g}")
axis.set(title="training loss at four rates", xlabel="step", ylabel="nats per token")
axis.set_ylim(min(map(min, curves.values())) - 0.2, max(curves[1e-5]) + 1.5)
axis.legend()
show(figure, "05_rates")

# %% [markdown]
# Too low a rate wastes the steps, too high a rate destroys what the base knew. Look for the range between them before you
# look for anything finer.
#
# ## What to remember
#
# - Count real tokens. Padding is arithmetic that teaches nothing.
# - A speed-up has to leave the gradient as it was. Check that first, then look at the clock.
# - Divide by the labels of the whole step, and accumulation and many processes change nothing.
# - Resume is right when it is equal to the bit. Make the data order and dropout functions of the step, and little has to
#   be kept.
#
# ## Exercises
#
# 1. **A large vocabulary.** Give the model an embedding table of 50,257 rows (random ones will do; names keep their
#    ids), and time the rungs "packed" and "logits at labels only" again.
# 2. **Sorting instead.** Padding can also be avoided by making batches of names of like length. How much padding is left
#    with batches of 48 from the 3,000 first training names, in random order and sorted by length? What does sorting cost
#    that packing does not?
# 3. **Clipping.** `clip_norm` scales the gradient down when its norm is over 1. Take ten steps at rate 1e-2 with and
#    without it: how often does it act, and what does it do to the loss?
# 4. **Another schedule, the same resume.** Show that the cosine's rate after a resume is that of the whole run, step by
#    step, and that it is not if `max_steps` is changed in between.
#
# Solutions: `solutions/05_training.py`.
