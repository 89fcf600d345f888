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

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_tools import table

from flash_experts import GPT2MoEConfig
from flash_experts.training import scaling

STRATEGIES = ("ddp", "fsdp", "expert")

# %% [markdown]
# ## 1. The largest that fits


# %%
def xl(num_experts: int) -> GPT2MoEConfig:
    return GPT2MoEConfig(n_layer=48, n_embd=1600, n_head=25, num_experts=num_experts)


rows = []
for parallel in STRATEGIES:
    fitting = 0
    for num_experts in range(8, 513, 8):
        if scaling.memory_per_gpu(xl(num_experts), parallel, 8, 8192).total > scaling.NVLINK.memory:
            break
        fitting = num_experts
    size = scaling.parameter_counts(xl(fitting)).total / 1e9 if fitting else 0.0
    held = scaling.memory_per_gpu(xl(fitting), parallel, 8, 8192).total / 1e9 if fitting else 0.0
    rows.append([parallel, fitting or "none", f"{size:.1f}", f"{held:.0f}"])
table(["strategy", "experts", "billion weights", "GB on each device"], rows)

# %% [markdown]
# Copies do not fit at all, as they do not shrink with the devices. Parts and spread experts hold about the same for each weight, an eighth. The
# difference is what has to be whole for a moment: with parts a whole block, all of its experts included.
#
# ## 2. The slowest device

# %%
rows = []
for r in (1.0, 0.9, 0.7, 0.5):
    shares = torch.tensor([r**n for n in range(8)])
    shares = shares / shares.sum()
    rows.append([r, *(f"{share:.2f}" for share in shares.tolist()), f"{shares.max() * 8:.2f} x"])
table(["r", *(f"expert {n}" for n in range(8)), "time"], rows)

# %% [markdown]
# The time is the largest share over the mean share: what chapter 3 calls the largest load. (The messages suffer as well:
# most of them go to one device.) With r = 0.5 half of all tokens go to one device, and the other seven wait three
# quarters of the time, on average.
#
# ## 3. Accumulation

# %%
config = scaling.MODELS["GPT-2 xl x 64"]
rows = []
for parallel in STRATEGIES:
    for parts in (1, 2, 4, 8):
        memory = scaling.memory_per_gpu(config, parallel, 8, 32_768 // parts, rows=parts)
        traffic = scaling.traffic_per_gpu(config, parallel, 8)
        sent = traffic.of_step(32_768, parts)
        cells = (memory.transient, memory.activations, memory.total, sent)
        rows.append([f"{parallel}, {parts} rows", *(f"{size / 1e9:,.0f}" for size in cells)])
table(["", "GB whole for a moment", "activations", "together", "GB sent a step"], rows)

# %% [markdown]
# Copies send the same whatever the number of rows: accumulation is free, and saves activations. With parts the weights
# travel for each row, so what is sent grows with the rows, and whole gradients have to be kept until the last row. Spread
# experts send tokens, which are as many in any number of rows; only the dense rest travels for each row.
