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
# # Solutions of chapter 8, scaling out

# %%
import sys
from pathlib import Path

# The chapters' tools are one folder up, the scripts three; a notebook has no __file__, and runs in its own folder.
folders = Path(globals().get("__file__", "a notebook")).resolve().parents
sys.path += [str(folders[1]), str(folders[3])]

import torch
from chapter_claims import holds
from chapter_tools import table

from flash_experts import GPT2MoEConfig
from scripts import scaling_plan as scaling

STRATEGIES = ("ddp", "fsdp", "expert")

# %% [markdown]
# ## 1. The largest that fits


# %%
def xl(num_experts: int) -> GPT2MoEConfig:
    return GPT2MoEConfig(n_layer=48, n_embd=1600, n_head=25, num_experts=num_experts)


rows, fits = [], {}
for parallel in STRATEGIES:
    fitting = 0
    for num_experts in range(8, 513, 8):
        if scaling.memory_per_gpu(xl(num_experts), parallel, 8, 8192).total > scaling.NVLINK.memory:
            break
        fitting = num_experts
    size = scaling.parameter_counts(xl(fitting)).total / 1e9 if fitting else 0.0
    held = scaling.memory_per_gpu(xl(fitting), parallel, 8, 8192).total / 1e9 if fitting else 0.0
    fits[parallel] = fitting
    rows.append([parallel, fitting or "none", f"{size:.1f}", f"{held:.0f}"])
table(["strategy", "experts", "billion weights", "GB on each device"], rows)

holds("copies do not fit at all, spread experts hold most", fits["ddp"] == 0 < fits["fsdp"] < fits["expert"])

# %% [markdown]
# Copies do not shrink with the devices. Shards and spread experts hold an eighth of the weights each. The difference is what has
# to be whole for a moment: with shards a whole block, all of its experts included.
#
# ## 2. The slowest device

# %%
rows, slowest, waits = [], {}, {}
for r in (1.0, 0.9, 0.7, 0.5):
    shares = torch.tensor([r**n for n in range(8)])
    shares = shares / shares.sum()
    slowest[r] = (shares.max() * 8).item()
    waits[r] = (1 - shares[1:] / shares.max()).mean().item()
    rows.append([r, *(f"{share:.2f}" for share in shares.tolist()), f"{slowest[r]:.2f} x", f"{waits[r]:.0%}"])
table(["r", *(f"expert {n}" for n in range(8)), "time", "the other seven wait"], rows)

holds("with r = 0.5 half of all tokens go to one device: four times as long as balanced", abs(slowest[0.5] - 4) < 0.05)
holds("the other seven then wait over 80% of the time, on average", waits[0.5] > 0.8)

# %% [markdown]
# The time is the largest share over the mean share: what chapter 3c calls the largest load. (The messages suffer as well:
# most of them go to one device.)
#
# ## 3. Accumulation

# %%
config = scaling.MODELS["GPT-2 xl x 64"]
rows, sent_of, kept_of = [], {}, {}
for parallel in STRATEGIES:
    for parts in (1, 2, 4, 8):
        memory = scaling.memory_per_gpu(config, parallel, 8, 32_768 // parts, rows=parts)
        traffic = scaling.traffic_per_gpu(config, parallel, 8)
        sent = traffic.of_step(32_768, parts)
        sent_of[parallel, parts], kept_of[parallel, parts] = sent, memory.activations
        cells = (memory.transient, memory.activations, memory.total, sent)
        rows.append([f"{parallel}, {parts} rows", *(f"{size / 1e9:,.0f}" for size in cells)])
table(["", "GB whole for a moment", "activations", "together", "GB sent a step"], rows)

holds(
    "copies send the same whatever the number of rows: accumulation is free, and saves activations",
    sent_of["ddp", 8] == sent_of["ddp", 1] and kept_of["ddp", 8] < kept_of["ddp", 1] / 7,
)
holds("with shards what is sent grows more than fivefold", sent_of["fsdp", 8] > 5 * sent_of["fsdp", 1])
holds(
    "spread experts send the least of the three, at each number of rows",
    all(sent_of["expert", n] < min(sent_of["ddp", n], sent_of["fsdp", n]) for n in (1, 2, 4, 8)),
)

# %% [markdown]
# With shards the weights travel for each row, and whole gradients have to be kept until the last row. Spread experts send
# tokens, which are as many in any number of rows; only the dense rest travels for each row.
