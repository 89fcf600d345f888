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
# # Solutions of chapter 5, training

# %%
import copy
import math
import random
import signal
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_claims import holds
from chapter_tools import cards, load_base, table

from flash_experts.benchmarks.timing import Implementation, Lap, time_in_rounds
from flash_experts.data.packing import encode_cards, pack
from flash_experts.training import Trainer, TrainingConfig
from flash_experts.training.batches import NameBatches
from flash_experts.training.optimizer import make_optimizers
from flash_experts.training.tracking import Callback, read_metrics

base, tokenizer = load_base()
train_cards = cards("train")[:3000]

# %% [markdown]
# ## 1. A large vocabulary

# %%
row = pack(encode_cards(train_cards[:24], tokenizer))
labels_T = torch.full((row.num_tokens,), -100)
labels_T[row.keep] = row.labels
kept = row.inputs_with_loss(row.labels.numel())
everywhere = kept | {"logits_to_keep": 0, "labels": labels_T[None], "shift_labels": labels_T[None]}


def step(model: Any, inputs: dict[str, Any]) -> Callable[[Lap], None]:
    def run(lap: Lap) -> None:
        model(**inputs).loss.backward()
        model.zero_grad()
        lap()

    return run


rows, gains, sizes = [], [], []
for vocabulary in (base.config.vocab_size, 50_257):
    model = copy.deepcopy(base)
    model.resize_token_embeddings(vocabulary, mean_resizing=False)
    implementations = {"all": Implementation(step(model, everywhere)), "kept": Implementation(step(model, kept))}
    timings = time_in_rounds(implementations, torch.device("cpu"), rounds=3, seconds=0.0)
    slow, quick = timings["all"].total, timings["kept"].total
    size = 4 * row.num_tokens * vocabulary / 1e6
    gains.append(slow / quick)
    sizes.append(size)
    rows.append(
        [f"{vocabulary:,}", f"{size:.0f} MB", f"{slow * 1e3:.0f}", f"{quick * 1e3:.0f}", f"{slow / quick:.2f} x"]
    )
table(["tokens in the vocabulary", "all logits", "ms with all", "ms with labels' only", "gain"], rows)

D = base.config.n_embd
share = [
    vocabulary * D / (vocabulary * D + 12 * base.config.n_layer * D**2)
    for vocabulary in (base.config.vocab_size, 50_257)
]
print(f"the output layer's share of a forward's FLOPs: {share[0]:.0%} and {share[1]:.0%}")
holds(
    "the larger the vocabulary, the larger the output layer's share, and the gain that was timed",
    share[0] < share[1] and gains[1] > gains[0],
)

# %% [markdown]
# The output layer takes 2 V D FLOPs a position, each block about 24 D². (The optimizer is not timed here. Its work grows with the
# embedding table. `trim_vocabulary` in the training configuration makes that smaller: it leaves out tokens that no card uses.)
#
# ## 2. Sorting instead

# %%
lengths = [name.num_inputs for name in encode_cards(train_cards, tokenizer)]


def padding(order: list[int], size: int = 48) -> float:
    """The share of padding in batches of this many names."""
    batches = [order[start : start + size] for start in range(0, len(order), size)]
    return 1 - sum(order) / sum(len(batch) * max(batch) for batch in batches)


shuffled = random.Random(0).sample(lengths, len(lengths))
buckets = [sorted(shuffled[start : start + 480]) for start in range(0, len(shuffled), 480)]
in_buckets = [length for bucket in buckets for length in bucket]
table(
    ["order", "padding"],
    [
        ["random", f"{padding(shuffled):.1%}"],
        ["sorted among 480 neighbours", f"{padding(in_buckets):.1%}"],
        ["sorted", f"{padding(sorted(lengths)):.1%}"],
    ],
)

holds(
    "sorting takes most of the padding away, among 480 neighbours too",
    padding(sorted(lengths)) < padding(in_buckets) < padding(shuffled) / 2,
)

# %% [markdown]
# Sorting takes most of the padding away. What it costs: a batch then holds names of one length, and short names are of
# other kinds of cards than long ones, so the steps are less alike than random ones (and all batches of one epoch would
# come in the order of length, unless they are shuffled). Also, batches of as many names differ in tokens. Packing keeps
# the order random.
#
# ## 3. Clipping

# %%
rows, of_clip, all_acted = [], {}, []
for clip in (None, 1.0):
    model, config = copy.deepcopy(base), TrainingConfig(max_steps=10, max_epochs=None, tokens_per_batch=384)
    batches, optimizer = NameBatches(train_cards, tokenizer, config), make_optimizers(model, config)["optimizer"]
    torch.manual_seed(0)
    losses, norms = [], []
    for number in range(10):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2
        packed = pack(batches.names_of_step(number))
        loss = model.train()(**packed.inputs_with_loss(packed.labels.numel())).loss
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    acted = sum(norm > 1.0 for norm in norms)
    of_clip[clip] = losses
    all_acted.append(acted)
    rows.append([clip or "none", *(f"{loss:.2f}" for loss in (losses[0], max(losses), losses[-1])), f"{acted} of 10"])
table(["clip_norm", "loss, step 1", "largest", "step 10", "gradient norm over 1"], rows)

holds("the gradient's norm is over 1 in most steps, so clipping acts", min(all_acted) > 5)
holds(
    "it is no cure for a rate that is too high: both runs end far above where they began",
    all(losses[-1] > 1.5 * losses[0] for losses in of_clip.values()),
)
ratio = of_clip[1.0][-1] / of_clip[None][-1]
print(f"the last loss with clipping over that without: {ratio:.2f}")
holds("and it changes the last loss by less than half", 0.5 < ratio < 2)

# %% [markdown]
# AdamW divides by the root of v, so a gradient that is scaled down as a whole moves the weights as far as before. Clipping
# matters with AdamW when *one* step is out of line with the others.
#
# ## 4. Another schedule, the same resume

# %%
# Three runs with a cosine: one is not interrupted, two are stopped after four steps. Of these one resumes as it was, the other
# with twice the `max_steps`. The rates are read from their logs.


# %%
class Kill(Callback):
    """Asks the run to stop, as a job scheduler does, while it writes the log of step 3; it stops after step 4."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == 3:
            signal.raise_signal(signal.SIGTERM)


def rates_of(name: str, max_steps: int, *callbacks: Callback, resume: str | None = None) -> list[float]:
    """Trains, or resumes, and returns the learning rate of each step of the run's log."""
    config = TrainingConfig(
        output_dir=folder, run_name=name, max_steps=max_steps, max_epochs=None, tokens_per_batch=128,
        schedule="cosine", warmup_steps=1, log_every=1, eval_every=None, checkpoint_every=None, save_in_background=False,
    )  # fmt: skip
    Trainer(copy.deepcopy(base), tokenizer, train_cards[:300], [], config, callbacks).train(resume=resume)
    return [line["lr"] for line in read_metrics(Path(folder) / name / "metrics.jsonl", "train")]


with tempfile.TemporaryDirectory() as folder:
    rates = {"not interrupted": rates_of("whole", 8)}
    for title, steps in (("resumed", 8), ("resumed with max_steps 16", 16)):
        rates_of(title.replace(" ", "-"), 8, Kill())
        rates[title] = rates_of(title.replace(" ", "-"), steps, resume="auto")[:8]
table(["rate of step", *range(1, 9)], [[title, *(f"{rate:.1e}" for rate in each)] for title, each in rates.items()])
whole, same, longer = rates.values()
holds("resumed with the same max_steps, each step has the rate of the whole run", same == whole)
holds("with twice the max_steps the rate jumps up at the resume", longer[:4] == whole[:4] and longer[4] > longer[3])

# %% [markdown]
# The rate is a function of the share of the run that is done, so with another length the rate jumps at the resume. A
# schedule that can be prolonged is `wsd` (warmup-stable-decay): it is constant until a decay at the end.
