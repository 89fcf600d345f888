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
# # Solutions of chapter 9, do experts pay?

# %%
import copy
import json
import math
import sys
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_claims import holds
from chapter_models import bits_per_character, nats_of_names
from chapter_tools import ROOT, cards, load_released, table

from flash_experts.evaluation.routing.maps import inspect_router
from flash_experts.models.router import routers_of
from flash_experts.training.tracking import read_metrics

file = json.loads((ROOT / "benchmarks/results/released_2cores.json").read_text("utf-8"))
runs, less_dense = file["runs"], file["less_dense"]
seeds = len(runs["dense"])

# %% [markdown]
# ## 1. How many comparisons?
#
# Student's t with two degrees of freedom has the distribution function 1/2 + t / (2 sqrt(2 + t²)), so its quantiles need no
# table: a two-sided p-value is 1 - t / sqrt(2 + t²).

# %%
assert seeds == 3, "the formula is for three seeds"
p_values = {}
for name, of_splits in less_dense.items():
    for split, of in of_splits.items():
        t = abs(of["mean"]) / (of["deviation"] / math.sqrt(seeds))
        p_values[f"{name}, {split}"] = 1 - t / math.sqrt(2 + t * t)
number = len(p_values)
rows = [
    [name, f"{p:.4f}", "yes" if p < 0.05 else "no", "yes" if p < 0.05 / number else "no"]
    for name, p in sorted(p_values.items(), key=lambda pair: pair[1])
]
table(["less dense, over seeds", "p", "under 5%", f"under 5% / {number}"], rows)
alone = sum(row[2] == "yes" for row in rows)
together = sum(row[3] == "yes" for row in rows)
print(f"by luck {0.05 * number:.1f} of {number} would leave zero out; {alone} do, {together} after Bonferroni")
holds("the stricter rule keeps no more than the plain one", together <= alone)

# %% [markdown]
# With three seeds the test is weak, and Bonferroni makes it weaker: what remains is what can be relied on. To be surer of the
# others takes more seeds, not more names.
#
# ## 2. At equal FLOPs
#
# The dense student's own log, validation bits against the logarithm of the tokens: the slope over its last thousand steps
# is what more reading brought at the end, at a constant learning rate.

# %%
validations = read_metrics(ROOT / "benchmarks/results/student_validations.jsonl", "validation")
last = validations[-1]
first = max((line for line in validations if line["step"] <= last["step"] - 1000), key=lambda line: line["step"])
key = "validation/bits_per_char"
slope = (last[key] - first[key]) / math.log(last["tokens"] / first["tokens"])
experts = [name for name, of in runs.items() if of[0]["size"]["total"] > of[0]["size"]["active"]]
rows = []
for name in experts:
    flops = sum(run["flops"] for run in runs[name]) / sum(run["flops"] for run in runs["dense"])
    rows.append(
        [
            name,
            f"{flops:.2f} x",
            f"{slope * math.log(flops):+.4f}",
            f"{less_dense[name]['test_iid']['mean']:+.4f}",
            f"{less_dense[name]['test']['mean']:+.4f}",
        ]
    )
table(["", "FLOPs", "a longer dense run, about", "experts, test_iid", "experts, test"], rows)
holds("more reading of new text made the student better", slope < 0)

# %% [markdown]
# Where the second column is the larger gain, a dense model would have got more out of that many more FLOPs, *if there were as
# much new text to read*. That is the catch in "at equal FLOPs": the runs of the file had no more names. Where text is the
# bottleneck, FLOPs are cheap, and neither way to spend them brings much.
#
# ## 3. One expert at a time

# %%
torch.set_grad_enabled(False)
model, tokenizer = load_released()
some = cards("validation")[:150]
names = [card.name for card in some]
last_block = max(routers_of(model))
loads = next(
    block.load for block in inspect_router(model, names, some, tokenizer=tokenizer).blocks if block.block == last_block
)
whole_N = nats_of_names(model, some, tokenizer)
rows, costs = [], []
for expert in range(model.config.num_experts):
    other = copy.deepcopy(model)
    experts_of_block = other.transformer.h[last_block].mlp.experts
    experts_of_block.down_proj[expert].zero_()
    experts_of_block.down_proj_bias[expert].zero_()
    more_N = nats_of_names(other, some, tokenizer) - whole_N
    costs.append(more_N.mean().item())
    rows.append([expert, f"{loads[expert]:.2f}", f"{costs[-1]:+.4f} ± {1.96 * more_N.std() / len(more_N) ** 0.5:.4f}"])
table([f"expert of block {last_block}", "load", "nats a name without it"], rows)
print(f"all as they are: {bits_per_character(whole_N, some):.3f} bits a character")
correlation = torch.corrcoef(torch.tensor([loads, costs]))[0, 1].item()
print(f"correlation of load and cost over {len(costs)} experts: {correlation:+.2f}")
holds("no single expert carries the model: each costs under 2% of its nats", max(costs) < 0.02 * whole_N.mean())

# %% [markdown]
# Look at the intervals: most hold zero. Experts that learned from nearly equal starts cover for each other, and a missing one is
# hardly missed.
