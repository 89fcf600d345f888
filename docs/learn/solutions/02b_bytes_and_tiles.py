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
# # Solutions of chapter 2b, bytes and tiles

# %%
import sys
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import math

import torch
from chapter_claims import holds
from chapter_tools import table
from chapter_watching import watched_tiles

from flash_experts.kernels import flash_attention_reference as reference
from flash_experts.kernels.attention_options import AttentionOptions

torch.manual_seed(0)

# %% [markdown]
# ## 1. A window
#
# Without a window the tiles grow with the square of the length. With one, each row of tiles has at most three: linear.
# The mask's own functions give the keys that a tile of queries sees, so no attention has to be computed to count.

# %%


def count_tiles(S: int, left: int, block: int = 64) -> int:
    part = reference._Part(slice(0, 1), slice(0, S), slice(0, S), 0)
    mask = reference._Mask.of(part, AttentionOptions(scale=1.0, left=left, right=0))
    rows = reference._tiles(range(S), block)
    return sum(math.ceil(len(mask.keys_seen(queries)) / block) for queries in rows)


rows = []
for S in (512, 1024, 2048, 4096):
    rows.append([S, count_tiles(S, left=-1), count_tiles(S, left=128)])
table(["length", "causal", "causal, window of 128"], rows)
holds(
    "twice the length: nearly four times the tiles without a window, about twice with it",
    rows[3][1] > 3.8 * rows[2][1] and rows[3][2] < 2.1 * rows[2][2],
)

with watched_tiles() as made:
    reference.attention(*torch.randn(3, 1, 1024, 1, 64), AttentionOptions(scale=0.125, left=128, right=0))
print(f"made by the reference at 1024 with the window: {len(made)}")
holds("the reference makes as many", len(made) == rows[1][2])

# %% [markdown]
# ## 2. One query
#
# One query makes 2 N C FLOPs of scores and as many of output. Keys and values are 2 N C numbers of 2 bytes. So one FLOP a
# byte, whatever N and C are: far under the ridge. If G query heads read the same keys and values, it is G.

# %%
RIDGE = 989e12 / 3.35e12  # of an H100, FLOPs a byte


def intensity(N: int, C: int, group: int) -> float:
    """FLOPs a byte of HBM of one decoding step: ``group`` query heads share one head of N keys and values."""
    flops = group * 4 * N * C
    moved = 2 * (2 * N * C + 2 * group * C)  # cache; queries and outputs
    return flops / moved


rows = []
for group in (1, 4, 8, 32, 512):
    rows.append([group, *(f"{intensity(N, 128, group):.1f}" for N in (128, 4096, 131072))])
table(["query heads that share keys", "128 keys", "4,096", "131,072"], rows)
reached = next(group for group in range(1, 10_000) if intensity(131072, 128, group) >= RIDGE)
print(f"the ridge is {RIDGE:.0f}: {reached} heads would have to share")
holds("one query makes one FLOP a byte, at any length of the cache", abs(intensity(131072, 128, 1) - 1) < 0.01)
holds("sharing keys among 8 heads makes it 8 times as many", abs(intensity(131072, 128, 8) - 8) < 0.05)
holds("with 8 heads a group, as many models have, decoding stays far under the ridge", reached > 10 * 8)

# %% [markdown]
# That is why grouped-query attention makes decoding faster although it saves no FLOPs of the scores: it reads fewer bytes.
#
# ## 3. Fused halfway

# %%
S, C, BLOCK, HBM_RATE, PEAK = 4096, 64, 128, 3.35e12, 989e12
matmul, square, linear = 2 * S * S * C, 2 * S * S, 2 * S * C  # FLOPs; bytes of S x S and of S x C numbers


def microseconds(*operations: tuple[float, float]) -> float:
    """Least time of operations, each with its FLOPs and bytes, one after the other."""
    return 1e6 * sum(max(flops / PEAK, moved / HBM_RATE) for flops, moved in operations)


times = {
    "standard": microseconds((matmul, 2 * linear + square), (5 * S * S, 2 * square), (matmul, square + 2 * linear)),
    "softmax fused with q k": microseconds((matmul + 5 * S * S, 2 * linear + square), (matmul, square + 2 * linear)),
    "flash attention": microseconds((2 * matmul + 5 * S * S, 2 * linear + 2 * linear * S // BLOCK + 4 * S)),
}
table(["", "µs at least"], [[name, f"{time:.1f}"] for name, time in times.items()])
halfway = times["softmax fused with q k"]
holds("fusing the softmax halves the standard way's time", 0.45 < halfway / times["standard"] < 0.55)
holds("flash attention halves it again", 0.45 < times["flash attention"] / halfway < 0.55)

# %% [markdown]
# Fused halfway a program needs whole rows of scores, to know their sums before it writes weights: at 4,096 tokens a tile of
# 128 rows is 2 MB in float32, more than an SM has. The online softmax is what makes the rest possible.
