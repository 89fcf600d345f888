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
# # 2b. Bytes and tiles
#
# **The question: why is flash attention fast, and how large may its tiles be?**
#
# [Chapter 2](02_flash_attention.py) computed attention tile by tile, with as many FLOPs as the standard way. Here we count what
# is saved: bytes between a GPU's large, slow memory and its small, fast ones. The terms are
# [HBM, SRAM, arithmetic intensity and roofline](../glossary.md#attention).

# %%
import math
import time

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_tools import show, table
from chapter_watching import ATTENTIONS, CAUSAL, Traffic, pytorch, standard, tiled_bytes, watched_tiles
from matplotlib.patches import Rectangle

from flash_experts.kernels import flash_attention_reference as reference

torch.manual_seed(0)

# %% [markdown]
# ## The picture first
#
# A GPU has a large memory far from its compute units (HBM, high-bandwidth memory), and small ones on the chip: SRAM, of which
# each of the 132 streaming multiprocessors (SMs) has its own, and registers. The numbers are for an H100 SXM, from table 1 of
# the [FlashAttention-3 paper](https://arxiv.org/abs/2407.08608). PyTorch's operations write their outputs to HBM; a fused kernel
# need not.

# %%
HBM_BYTES, HBM_RATE, PEAK = 80 * 2**30, 3.35e12, 989e12  # bytes, bytes/s, 16-bit FLOP/s without sparsity
MEMORIES = [
    ("registers, of all SMs", 132 * 256 * 2**10, None, "accumulators: output, maximum and sum of each query"),
    ("SRAM (shared memory), of all SMs", 132 * 228 * 2**10, 31e12, "the tiles of q, k and v"),
    ("L2 cache", 50 * 2**20, 12e12, "what several SMs read, if it is soon read again"),
    ("HBM", HBM_BYTES, HBM_RATE, "q, k, v, output; the standard way: scores and weights as well"),
]
figure, axis = plt.subplots(figsize=(10, 3.4))
for level, (name, size, rate, use) in enumerate(MEMORIES):
    width = 4.4 + 0.2 * math.log2(size / 2**20)
    axis.add_patch(Rectangle((-width / 2, -level), width, 0.72, facecolor=f"C{level}", alpha=0.3, edgecolor="black"))
    amount = f"{size / 2**30:.0f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"
    speed = "" if rate is None else f", {rate / 1e12:.3g} TB/s"
    axis.text(0, -level + 0.36, f"{name}: {amount}{speed}", ha="center", va="center", size=8.5)
    axis.text(4.1, -level + 0.36, use, va="center", size=8.5)
axis.set(
    xlim=(-4, 11),
    ylim=(-3.2, 1.1),
    title="memories of an H100, the nearest to the compute units on top (Shah et al. 2024, table 1)",
)
axis.axis("off")
show(figure, "02b_memories")
ridge = PEAK / HBM_RATE
print(f"{PEAK / 1e12:.0f} TFLOP/s and {HBM_RATE / 1e12} TB/s: {ridge:.0f} FLOPs in the time of one byte from HBM")
scores_bytes = 16_000**2 * 2
print(f"the scores of one head at 16,000 tokens, 16 bits: {scores_bytes / 2**20:.0f} MiB")
holds("one head's scores do not fit into all the SRAM of the chip", scores_bytes > 132 * 228 * 2**10)
holds("SRAM is about nine times as fast as HBM", 8 < 31e12 / HBM_RATE < 10)

# %% [markdown]
# **Arithmetic intensity** is FLOPs per byte that is moved. Under the ridge, here some 300, an operation is *memory-bound*:
# it takes as long as its bytes. The **roofline** ([Williams et al. 2009](https://doi.org/10.1145/1498765.1498785)) is the smaller
# of the two bounds. The table has one head, 4,096 tokens, head dim 64, bfloat16, without a mask, and each of the standard way's
# operations by itself:

# %%
S, C, BLOCK = 4096, 64, 128
MATMUL = 2 * S * S * C
operations = {
    "q kᵀ": (MATMUL, 2 * (2 * S * C + S * S)),
    "softmax": (5 * S * S, 2 * 2 * S * S),  # maximum, difference, exp, sum, division
    "weights v": (MATMUL, 2 * (S * S + 2 * S * C)),
    "flash attention": (2 * MATMUL + 5 * S * S, 2 * (2 * S * C + 2 * S * S * C // BLOCK) + 4 * S),
}
rows, intensities = [], {}
for name, (flops, moved_bytes) in operations.items():
    intensities[name] = flops / moved_bytes
    bound = min(PEAK, intensities[name] * HBM_RATE)
    cells = (flops / 1e9, moved_bytes / 1e6, intensities[name], bound / 1e12, 1e6 * flops / bound)
    rows.append([name, *(f"{cell:.1f}" for cell in cells), "memory" if intensities[name] < ridge else "compute"])
table(["", "GFLOP", "MB", "FLOP a byte", "TFLOP/s at most", "µs at least", "bound by"], rows)
standard_us, flash_us = sum(float(row[5]) for row in rows[:3]), float(rows[3][5])
print(f"standard {standard_us:.0f} µs, flash {flash_us:.0f} µs at least, if HBM and tensor cores were all that counts")

figure, axis = plt.subplots(figsize=(7, 3.4))
axis.loglog(
    [0.5, ridge, 4000], [0.5 * HBM_RATE / 1e12, PEAK / 1e12, PEAK / 1e12], color="black", label="roofline of an H100"
)
for (name, intensity), marker in zip(intensities.items(), "osv^", strict=True):
    axis.plot(intensity, min(PEAK, intensity * HBM_RATE) / 1e12, marker, label=name, markersize=8)
axis.set(
    xlabel="arithmetic intensity, FLOPs per byte of HBM", ylabel="TFLOP/s at most", title="4,096 tokens, head dim 64"
)
axis.legend()
show(figure, "02b_roofline")
memory_bound = [name for name, intensity in intensities.items() if intensity < ridge]
holds("all three standard operations are memory-bound", memory_bound[:3] == [*operations][:3])
holds("the softmax has the lowest intensity", min(intensities, key=intensities.get) == "softmax")
holds(
    "flash attention has ten times the intensity of the softmax and more",
    intensities["flash attention"] > 10 * intensities["softmax"],
)
fused = intensities["flash attention"]
holds(
    "by this count it is under the ridge as well, at about the size of its tile",
    BLOCK / 1.2 < fused < 1.2 * BLOCK < ridge,
)

# %% [markdown]
# These are theoretical bounds, not measurements. Even the fused kernel's intensity, about the size of its tile, is under the
# ridge by this count. In practice most tiles of k and v come from the L2 cache, since many SMs read the same ones.
#
# ## Bytes moved, counted
#
# The table above was a formula. Now we count what is moved (`Traffic` and `tiled_bytes` in `chapter_watching.py`).
#
# - *Standard*: every operation reads its inputs from memory and writes its output there. We count what PyTorch does.
# - *Tiled*: a tile of q is read once; for each tile that is made, a tile of k and one of v are read; out and LSE are
#   written once. Scores stay on the chip. We count over the tiles that the reference makes.


# %%
rows, lengths = [], [128, 256, 512, 1024, 2048]
moved: dict[str, list[int]] = {"standard": [], "tiled": []}
for S in lengths:
    q, k, v = torch.randn(3, 1, S, 1, 64)
    with Traffic() as traffic:
        standard(q, k, v)
    moved["standard"].append(traffic.bytes)
    moved["tiled"].append(tiled_bytes(S, 64, 128, 4))
    megabytes = [counts[-1] / 1e6 for counts in moved.values()]
    rows.append([S, *(f"{each:.1f}" for each in megabytes), f"{megabytes[0] / megabytes[1]:.0f} x"])
table(["length", "standard, MB", "tiled 128 x 128, MB", "ratio"], rows)
ratios = [standard / tiled for standard, tiled in zip(moved["standard"], moved["tiled"], strict=True)]
holds("the tiled form moves less, the more so the longer the text", ratios == sorted(ratios) and ratios[0] > 1)
holds(
    "the standard form moves about four times as much for twice the length",
    3.5 < moved["standard"][-1] / moved["standard"][-2] < 4.5,
)

# %% [markdown]
# With M queries in a tile, each key is read once per M queries, not once per query.
#
# **The IO complexity.** The paper's theorem 2: with N tokens, head dim d and room for M numbers on the chip, the standard
# way makes about N d + N² accesses of HBM, flash attention N² d² / M. The second follows from the count: a tile of B queries
# reads all keys and values, that is N / B times 2 N d numbers; and four tiles of B x d (q, k, v, output) fill the chip, so
# B = M / 4d. Together 8 N² d² / M, half of it if causal. Next to the counted numbers:

# %%
N, d = 2048, 64
rows = []
for block in (16, 32, 64, 128, 256):
    on_chip = 4 * block * d
    counted = tiled_bytes(N, d, block, 1)
    formula = 8 * N**2 * d**2 / on_chip / 2
    rows.append([block, f"{on_chip:,}", f"{counted / 1e6:.2f}", f"{formula / 1e6:.2f}", f"{counted / formula:.2f}"])
table(["B", "M, numbers on the chip", "million accesses, counted", "4 N² d² / M", "ratio"], rows)
counted_ratios = [float(row[4]) for row in rows]
holds("the formula is the count's leading term: within 10% at small tiles", abs(counted_ratios[0] - 1) < 0.1)
holds(
    "at large tiles the other terms matter: the output, the queries, whole tiles on the diagonal",
    counted_ratios == sorted(counted_ratios),
)

# %% [markdown]
# **How large may a tile be?** The tiles of q, k and v lie in shared memory, of which a thread block of an H100 may have 227 kB
# ([CUDA guide](https://docs.nvidia.com/cuda/hopper-tuning-guide/index.html)). Keys and values are there more than once
# (stages), so that the next tile is copied while one is multiplied. Scores and output are accumulated in registers: M x (N +
# C) float32 numbers over the threads of the block. More than some 128 a thread spill to slower memory (measured with
# `scripts/hopper_report.py`; [experiments](../experiments.md)).

# %%
LIMIT = 227 * 1024
rows, fitting = [], set()
for head_dim in (64, 128, 256):
    for queries_of_tile, keys_of_tile, warps, stages in (
        (64, 64, 4, 2),
        (128, 64, 8, 3),
        (128, 128, 8, 2),
        (256, 256, 8, 2),
    ):
        shared = 2 * head_dim * (queries_of_tile + 2 * stages * keys_of_tile)
        per_thread = queries_of_tile * (head_dim + keys_of_tile) // (32 * warps)
        fits = shared <= LIMIT and per_thread <= 128
        tile_name = f"{queries_of_tile} x {keys_of_tile}, {warps} warps, {stages} stages"
        rows.append([f"head dim {head_dim}: {tile_name}", f"{shared / 1024:.0f}", per_thread, "yes" if fits else "no"])
        fitting |= {(head_dim, queries_of_tile, keys_of_tile)} if fits else set()
table(["bfloat16", "kB of 227", "float32 a thread", "fits"], rows)
holds(
    "128 x 128 fits at head dims 64 and 128, not at 256",
    {(64, 128, 128), (128, 128, 128)} <= fitting and (256, 128, 128) not in fitting,
)
holds("256 x 256 fits at none of them", not any(queries_of_tile == 256 for _, queries_of_tile, _ in fitting))

# %% [markdown]
# ## The loops of FlashAttention 1 and 2, and what 3 and 4 add
#
# **1** has keys outside, queries inside: a tile of k and v is loaded once, and for each tile of queries the unfinished
# output, maximum and sum come from HBM, are corrected, and go back. **2** has queries outside: the output stays on the chip
# until it is done, and is divided by z once, not in every step. Only keys and values are read again. And tiles of queries
# do not need each other, so each is a program of its own: enough work for all SMs, even for one text.


# %%
def bytes_of_orders(length: int, head_dim: int, block: int) -> tuple[int, int]:
    """Bytes of HBM of one causal head's forward in bfloat16: keys outside (1), and queries outside (2)."""
    tiles = length // block
    pairs = tiles * (tiles + 1) // 2
    tile, numbers = 2 * block * head_dim, 2 * 4 * block  # a tile; maximum and sum in float32
    keys_outside = tiles * 2 * tile + pairs * (3 * tile + 2 * numbers)  # read q, read and write output and numbers
    queries_outside = tiles * (2 * tile + 4 * block) + pairs * 2 * tile
    return keys_outside, queries_outside


rows, one_over_two = [], []
for length in (512, 2048, 8192):
    one, two = bytes_of_orders(length, 64, 128)
    one_over_two.append(one / two)
    rows.append([length, f"{one / 1e6:.2f}", f"{two / 1e6:.2f}", f"{one / two:.2f}", 12, 12 * length // 128])
header = ["length", "1: MB a head", "2: MB a head", "ratio", "1: programs, 12 heads", "2: programs"]
table(header, rows)
holds(
    "order 1 moves more bytes, towards 1.5 times as many and more",
    one_over_two == sorted(one_over_two) and one_over_two[-1] > 1.5,
)
holds(
    "12 heads of one text give order 1 fewer programs than the 132 SMs, order 2 more (from 2,048 on)",
    rows[1][4] < 132 < rows[1][5],
)

# %% [markdown]
# **3** is about time, not bytes. A tensor core does nothing while the exponentials of its tile are made, and the units for
# those are slow: 3.9 TFLOP/s on an H100 against 989 (the paper, section 3.1).

# %%
shares_of_exp = {}
for head_dim in (64, 128, 256):
    matmul_seconds, exp_seconds = 4 * head_dim / PEAK, 1 / 3.9e12  # of one score
    shares_of_exp[head_dim] = exp_seconds / matmul_seconds
    print(f"head dim {head_dim}: the exponentials take {shares_of_exp[head_dim]:.0%} of the time of the matmuls")
holds("at head dim 64 exponentials take about as long as the matmuls", 0.9 < shares_of_exp[64] < 1.1)

# %% [markdown]
# So version 3 lets two groups of warps alternate: one does matmuls while the other computes exponentials (ping-pong). Other
# warps only copy tiles, by the hardware's asynchronous copies (TMA): warp specialization. It also has FP8. The paper's
# figures at head dim 64, forward, 16,000 tokens: 324 TFLOP/s with version 2, 497 with version 3. Ours, in Triton, leaves
# such scheduling to Triton's compiler. Its speed on a GPU has not been measured yet.
#
# **4** is for Blackwell GPUs, whose tensor cores are twice as fast while the units for exponentials are not. So it computes a part
# of the exponentials with multiply-adds, and skips the rescaling where the maximum hardly grows
# ([Zadouri et al. 2026](https://arxiv.org/abs/2603.05451)).
#
# ## Memory against length, measured
#
# The largest tensor decides whether a text fits into memory.

# %%
largest: dict[str, list[int]] = {name: [] for name in ATTENTIONS}
for S in lengths:
    q, k, v = torch.randn(3, 1, S, 4, 64)
    for name, attention in ATTENTIONS.items():
        with Traffic() as traffic:
            attention(q, k, v)
        largest[name].append(traffic.largest)
table(["length", *ATTENTIONS], [[S, *(f"{largest[name][n]:,}" for name in ATTENTIONS)] for n, S in enumerate(lengths)])

figure, axes = plt.subplots(1, 2, figsize=(10, 3.8))
for kind, counts in moved.items():
    axes[0].loglog(lengths, [count / 1e6 for count in counts], "o-", base=2, label=kind)
axes[0].set(title="bytes moved, one head, forward", xlabel="length", ylabel="MB")
for (name, counts), style in zip(largest.items(), ("o-", "s-", "x--"), strict=True):
    axes[1].loglog(lengths, [count / 1e6 for count in counts], style, base=2, label=name)
axes[1].set(title="largest tensor, 4 heads, forward", xlabel="length", ylabel="million numbers")
for axis in axes:
    axis.xaxis.set_major_formatter("{x:,.0f}")
    axis.yaxis.set_major_formatter("{x:.3g}")
    axis.legend()
show(figure, "02b_bytes_and_memory")

# %% [markdown]
# The standard form's largest tensor is the scores: 4 times as many for twice the length. Ours is the output: twice for
# twice.

# %%
of_twice = {name: counts[-1] / counts[-2] for name, counts in largest.items()}
holds(
    "twice the length: 4 times the largest tensor the standard way, twice ours and PyTorch's",
    [*of_twice.values()] == [4, 2, 2],
)

# %% [markdown]
# ## An experiment that changes one thing: the size of a tile

# %%
S = 1024
q, k, v = torch.randn(3, 1, S, 4, 64)
first = reference.attention(q, k, v, CAUSAL, block_q=S, block_k=S)[0]
rows, seconds = [], []
blocks = [32, 64, 128, 256, 512, 1024]
for block in blocks:
    with Traffic() as traffic, watched_tiles() as visited:
        out = reference.attention(q, k, v, CAUSAL, block_q=block, block_k=block)[0]
    started = time.process_time()
    reference.attention(q, k, v, CAUSAL, block_q=block, block_k=block)
    seconds.append(time.process_time() - started)
    computed = sum(len(queries) * len(keys) for queries, keys, _ in visited) / S**2
    megabytes = 4 * tiled_bytes(S, 64, block, 4) / 1e6  # 4 heads
    cells = [f"{(out - first).abs().max():.0e}", len(visited), f"{computed:.0%}", f"{traffic.largest:,}"]
    rows.append([block, *cells, f"{megabytes:.1f}", f"{seconds[-1] * 1e3:.0f}"])
    holds(f"tile {block}: the same output up to rounding", (out - first).abs().max() < 1e-5)
table(["tile", "difference", "tiles", "of the scores", "largest tensor", "MB moved on a chip", "ms here"], rows)
started = time.process_time()
pytorch(q, k, v)
print(f"PyTorch's kernel, tiled in C++: {(time.process_time() - started) * 1e3:.0f} ms")

# %% [markdown]
# Small tiles skip more of the upper triangle, but read keys more often (and in Python each costs dozens of calls: on a
# CPU `flash_attn_func` takes PyTorch's kernel). On a GPU the choice is between bytes moved and what fits on the chip; our
# Triton kernels measure it at the first call for a new shape.

# %%
computed_shares, moved_megabytes = ([float(row[column].rstrip("%")) for row in rows] for column in (3, 5))
holds("smaller tiles compute fewer scores", computed_shares == sorted(computed_shares))
holds("smaller tiles move more bytes", moved_megabytes == sorted(moved_megabytes, reverse=True))

# %% [markdown]
# ## What to remember
#
# - The standard way's three operations are memory-bound: they take as long as their bytes.
# - A tile of B queries reads the keys once per B queries. What fits on the chip bounds B.
# - Version 1 has the tiles. Version 2 swaps the loops and has more programs. Versions 3 and 4 overlap copies and exponentials with
#   matmuls.
#
# ## Exercises
#
# 1. **A window.** Give `AttentionOptions` `left=128`: each query sees 128 keys before it. Count tiles of 64 for lengths
#    512 to 4096, with and without the window. How does each grow?
# 2. **One query.** In decoding a head has one query and a cache of N keys and values. What is the arithmetic intensity, in
#    bfloat16? How many query heads would have to share one head of keys and values (grouped-query attention) to reach the
#    ridge of an H100?
# 3. **Fused halfway.** Let the softmax be fused with q kᵀ, so that only the weights are written and read, once each. What is the
#    least time of that, for 4,096 tokens and head dim 64, next to the standard way and flash attention?
#
# Solutions: [solutions/02b_bytes_and_tiles.py](solutions/02b_bytes_and_tiles.py).
#
# ## Reading
#
# - [Dao et al. 2022](https://arxiv.org/abs/2205.14135): theorem 2. [Dao 2023](https://arxiv.org/abs/2307.08691): section 3.
#   [Shah et al. 2024](https://arxiv.org/abs/2407.08608): section 3 and table 1.
# - [Williams et al. 2009](https://doi.org/10.1145/1498765.1498785): the roofline. [Ainslie et al. 2023](https://arxiv.org/abs/2305.13245):
#   grouped-query attention.
# - [Making deep learning go brrrr from first principles](https://horace.io/brrr_intro.html) (He 2022): compute, memory and overhead.
# - Next: [chapter 2c](02c_triton_kernel.py), the kernel.
