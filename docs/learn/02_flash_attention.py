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
# # 2. Flash attention
#
# **The question: how can one compute softmax(q kᵀ) v without ever having the matrix of scores?**
#
# For 16,000 tokens the scores of one head are 256 million numbers: written to memory, read for the softmax, written again,
# read again for the product with v, while the arithmetic units wait. Flash attention computes the same output, not an
# approximation, and never writes the matrix down.
#
# There are three versions of one idea. [FlashAttention](https://arxiv.org/abs/2205.14135) (Dao et al. 2022) has tiles and
# the online softmax, and makes the scores again in the backward. [FlashAttention-2](https://arxiv.org/abs/2307.08691) (Dao
# 2023) turns the loops around, so that more of the GPU works. [FlashAttention-3](https://arxiv.org/abs/2407.08608) (Shah et
# al. 2024) overlaps copies, matmuls and exponentials on Hopper GPUs. Our kernels follow the second. The
# [glossary](../glossary.md#attention) has the terms.

# %%
import math
import os
import time
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"  # Triton's interpreter, on a CPU: read when Triton is imported

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_tools import IN_NOTEBOOK, cards, load_base, quote, show, table
from chapter_watching import Traffic, bytes_kept, watched_tiles
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from flash_experts.data.packing import encode_cards, pack
from flash_experts.kernels import flash_attention_reference as reference
from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from flash_experts.kernels.philox import dropout_keep_mask
from flash_experts.models.attention_backends import attention_backend
from flash_experts.models.flash_attn import flash_attn_func

CAUSAL = AttentionOptions(scale=64**-0.5, right=0)  # a query sees no key to the right of its own place
torch.manual_seed(0)

# %% [markdown]
# ## The picture first
#
# 16 queries (rows), 16 keys (columns), causal, tiles of 4 x 4. Each frame is one tile, in the order in which our reference
# makes them: dark the tile at work, light what is done, white what is never computed. A tile is made, used and forgotten.
# The title gives the only two numbers that remain of the scores of its last query: the largest so far, and a sum.

# %%
q, k, v = torch.randn(3, 1, 16, 1, 64)  # (B, S, H, C)
with watched_tiles() as visited:
    reference.attention(q, k, v, CAUSAL, block_q=4, block_k=4)
scores_SS = (q[0, :, 0] @ k[0, :, 0].T / 8).masked_fill(torch.ones(16, 16, dtype=torch.bool).triu(1), -torch.inf)


def draw_frame(axis: Axes, frame: int) -> None:
    """The tiles up to this one: done (light), at work (dark); what is never computed stays white."""
    axis.clear()
    axis.set(xlim=(0, 16), ylim=(16, 0), xticks=range(0, 17, 4), yticks=range(0, 17, 4), aspect="equal")
    for number, (queries, keys, is_full) in enumerate(visited[: frame + 1]):
        color = "tab:blue" if number == frame else "#c6dbef"
        axis.add_patch(Rectangle((keys.start, queries.start), 4, 4, facecolor=color, edgecolor="white"))
        for i in [] if is_full else queries:  # the part of a tile on the diagonal that is masked
            axis.add_patch(Rectangle((i + 1, i), keys.stop - i - 1, 1, facecolor="white", alpha=0.75))
    queries, keys, _ = visited[frame]
    seen = scores_SS[queries.stop - 1, : keys.stop]
    axis.set_title(f"query {queries.stop - 1}: max {seen.max():.2f}, sum {(seen - seen.max()).exp().sum():.2f}", size=8)


figure, axes = plt.subplots(2, 5, figsize=(12, 5.2))
for frame, axis in enumerate(axes.flat):
    draw_frame(axis, frame)
figure.supxlabel("key")
figure.supylabel("query")
show(figure, "02_tiles")
of_query_15 = [frame for frame, (queries, _, _) in enumerate(visited) if 15 in queries]
holds(
    "of 16 tiles, 10 are made, each once; the last query's four come one after the other", of_query_15 == [6, 7, 8, 9]
)

# %% [markdown]
# The same as an animation. In Jupyter the cell below has buttons to play and to step.

# %%
figure, axis = plt.subplots(figsize=(3.2, 3.4), dpi=72)
html = FuncAnimation(figure, lambda frame: draw_frame(axis, frame), frames=len(visited)).to_jshtml(fps=1)
plt.close(figure)
if IN_NOTEBOOK:
    from IPython.display import HTML, display

    display(HTML(html))
else:
    print(f"an animation of {len(visited)} frames, {len(html):,} characters of HTML")

# %% [markdown]
# ## Why: the memories of a GPU
#
# A GPU has a large memory far from its arithmetic units (HBM, high-bandwidth memory), and small ones on the chip: SRAM, of
# which each of the 132 streaming multiprocessors (SMs) has its own, and registers. The figures of an H100 SXM are those
# of table 1 of the FlashAttention-3 paper; PyTorch's operations write their outputs to HBM, a fused kernel need not.

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
    title="memories of an H100, the nearest to the arithmetic on top (Shah et al. 2024, table 1)",
)
axis.axis("off")
show(figure, "02_memories")
ridge = PEAK / HBM_RATE
print(f"{PEAK / 1e12:.0f} TFLOP/s and {HBM_RATE / 1e12} TB/s: {ridge:.0f} FLOPs in the time of one byte from HBM")
scores_bytes = 16_000**2 * 2
print(f"the scores of one head at 16,000 tokens, 16 bits: {scores_bytes / 2**20:.0f} MiB")
holds("one head's scores do not fit into all the SRAM of the chip", scores_bytes > 132 * 228 * 2**10)
holds("SRAM is about nine times as fast as HBM", 8 < 31e12 / HBM_RATE < 10)

# %% [markdown]
# **Arithmetic intensity** is FLOPs per byte that is moved. Under the ridge, here some 300, an operation is *memory-bound*:
# it takes as long as its bytes. The **roofline** (Williams et al. 2009) is the smaller of the two bounds. One head, 4,096
# tokens, head dim 64, bfloat16, without a mask, each of the standard way's operations by itself:

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
    rows.append([name, *(f"{cell:.1f}" for cell in cells), "memory" if intensities[name] < ridge else "arithmetic"])
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
show(figure, "02_roofline")
memory_bound = [name for name, intensity in intensities.items() if intensity < ridge]
holds("all three standard operations are memory-bound", memory_bound[:3] == [*operations][:3])
holds("the softmax has the lowest intensity", min(intensities, key=intensities.get) == "softmax")
holds(
    "flash attention has ten times the intensity of the softmax and more",
    intensities["flash attention"] > 10 * intensities["softmax"],
)

# %% [markdown]
# These are bounds on paper, and no measurement. Even the fused kernel's intensity, about the size of its tile, is under the
# ridge by this count. In practice most tiles of k and v come from the L2 cache, since many SMs read the same ones.
#
# ## The online softmax, on four numbers
#
# A softmax needs the sum over the whole row before its first weight is known, and the largest score before that (so that
# no exp overflows). The way out: begin with what has been seen, and correct it later.
#
# For one query keep `m`, the largest score so far; `z`, the sum of exp(score - m); `o`, the sum of exp(score - m) x value.
# When a tile brings a larger maximum, all old terms are wrong by the same factor, exp(old m - new m):
#
# $$ m' = \max(m, \max_j s_j) \qquad z' = z\,e^{m-m'} + \sum_j e^{s_j-m'} \qquad
# o' = o\,e^{m-m'} + \sum_j e^{s_j-m'} v_j $$
#
# At the end the output is o / z. Scores 1, 3, 2, 5, values 10, 20, 30, 40, two at a time:

# %%
four_scores, four_values = [1.0, 3.0, 2.0, 5.0], [10.0, 20.0, 30.0, 40.0]
m, z, o = -math.inf, 0.0, 0.0
rows = []
for start in (0, 2):
    tile, values = four_scores[start : start + 2], four_values[start : start + 2]
    new_m = max(m, *tile)
    rescale = math.exp(m - new_m)
    z = z * rescale + sum(math.exp(s - new_m) for s in tile)
    o = o * rescale + sum(math.exp(s - new_m) * value for s, value in zip(tile, values, strict=True))
    m = new_m
    rows.append([str(tile), f"{m:.0f}", f"{rescale:.4f}", f"{z:.4f}", f"{o:.4f}", f"{o / z:.4f}"])
table(["tile", "m", "rescale", "z", "o", "o / z"], rows)
all_at_once = (torch.tensor(four_scores).softmax(0) * torch.tensor(four_values)).sum()
print(f"softmax over all four at once: {all_at_once:.4f}")
first_two = (torch.tensor(four_scores[:2]).softmax(0) * torch.tensor(four_values[:2])).sum()
partial_outputs = [float(row[-1]) for row in rows]
holds(
    "after each tile o / z is the right answer for the keys so far",
    abs(partial_outputs[0] - first_two) < 1e-3 > abs(partial_outputs[1] - all_at_once),
)

# %% [markdown]
# The package's reference on the same four numbers (width 1, so q = 1 and k = the scores):

# %%
q1, k4, v4 = (torch.tensor(x).view(1, -1, 1, 1) for x in ([1.0], four_scores, four_values))
out, lse = reference.attention(q1, k4, v4, AttentionOptions(scale=1.0), block_k=2)
print(f"reference: output {out.item():.4f}, log-sum-exp {lse.item():.4f} = m + log(z) = {m + math.log(z):.4f}")
holds("the log-sum-exp (LSE) is m + log(z)", abs(lse.item() - m - math.log(z)) < 1e-5)

# %% [markdown]
# ## The code that ships
#
# One tile of queries walks over all keys that it may see. Shapes: M queries, N keys, width C; B, G and R are batch and
# heads. `sum_BGRM`, `max_BGRM`, `out_BGRMC` are z, m and o from above. Find the lines of the four-number example.

# %%
quote(reference._forward_tile)

# %% [markdown]
# A query that has seen nothing yet has the maximum minus infinity, and `inf - inf` is not a number, so it is shifted by 0
# instead. Division by z happens once, at the end. What is kept for later is one number per query: `max + log(sum)`, the
# log-sum-exp (LSE).
#
# **Is it right?** Against softmax attention in float64, and with the error of PyTorch's own kernel beside it.


# %%
def standard(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention as in chapter 1: (B, S, H, C), causal, with the whole matrix of scores."""
    S = q.shape[1]
    scores = torch.einsum("bihc,bjhc->bhij", q, k) * q.shape[-1] ** -0.5
    later = torch.ones(S, S, dtype=torch.bool, device=q.device).triu(1)
    return torch.einsum("bhij,bjhc->bihc", scores.masked_fill(later, -torch.inf).softmax(-1), v)


def tiled(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return reference.attention(q, k, v, CAUSAL)[0]


def pytorch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)


ATTENTIONS = {"standard": standard, "tiled (ours)": tiled, "PyTorch's kernel": pytorch}

exact = torch.randn(3, 2, 500, 4, 64, dtype=torch.float64)  # 500 is no multiple of the tile: the last one is ragged
rows, largest_errors = [], {}
for name, attention in ATTENTIONS.items():
    rounded = [exact.to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    errors = [(attention(*qkv).double() - standard(*qkv.double())).abs().max() for qkv in rounded]
    rows.append([name, *(f"{error:.1e}" for error in errors)])
    largest_errors[name] = errors
table(["largest error", "float32", "bfloat16"], rows)
ours, usual = largest_errors["tiled (ours)"], largest_errors["standard"]
holds("in float32 all are exact up to rounding", max(float32 for float32, _ in largest_errors.values()) < 1e-5)
holds("the tiled form's error is at most twice the standard one's", ours[0] <= 2 * usual[0] and ours[1] <= 2 * usual[1])

# %% [markdown]
# Twice the error of the standard form in the same dtype is the rule that flash-attn's own tests use. Here the tiled form
# has the better place: it sums in float32 and rounds once.
#
# ## What is skipped
#
# With a causal mask, tiles right of the diagonal are not computed at all, and tiles left of it need no mask:

# %%
rows = []
for S in (128, 512, 2048):
    q, k, v = torch.randn(3, 1, S, 1, 64)
    with watched_tiles() as visited:
        reference.attention(q, k, v, CAUSAL, block_q=64, block_k=64)
    whole = sum(is_full for _, _, is_full in visited)
    all_tiles = math.ceil(S / 64) ** 2
    rows.append([S, all_tiles, len(visited), whole, len(visited) - whole, f"{len(visited) / all_tiles:.0%}"])
table(["length", "tiles", "computed", "without mask", "with mask", "of all"], rows)
shares = [row[2] / row[1] for row in rows]
holds(
    "the share that is computed falls towards one half",
    shares == sorted(shares, reverse=True) and 0.5 < shares[-1] < 0.55,
)
holds("only tiles on the diagonal need a mask", all(row[4] == math.ceil(row[0] / 64) for row in rows))

# %% [markdown]
# Packed names are the extreme case. Each name is its own little triangle, and nothing between names is touched:

# %%
_, tokenizer = load_base()
packed = pack(encode_cards(cards("train")[:64], tokenizer))
T, starts = packed.num_tokens, packed.cu_seq_lens
q, k, v = torch.randn(3, T, 4, 64)
with watched_tiles() as visited:
    reference.attention_varlen(q, k, v, PackedLengths.of(starts, packed.max_length), CAUSAL)
made = sum(len(queries) * len(keys) for queries, keys, _ in visited)
print(f"{packed.num_names} names, {T} tokens: {made:,} scores of each head are made, {T * T:,} by a mask over the row")
holds("packed names make under a tenth of the scores of the whole row", made < T * T / 10)

# %% [markdown]
# ## Bytes moved, counted
#
# The table above was a formula. Now we count what is moved.
#
# - *Standard*: every operation reads its inputs from memory and writes its output there. We count what PyTorch does.
# - *Tiled*: a tile of q is read once; for each tile that is made, a tile of k and one of v are read; out and LSE are
#   written once. Scores stay on the chip. We count over the tiles that the reference makes.


# %%
def tiled_bytes(S: int, C: int, block: int, itemsize: int) -> int:
    """What one head's forward reads and writes with square tiles."""
    q, k, v = torch.zeros(3, 1, S, 1, C)
    with watched_tiles() as visited:
        reference.attention(q, k, v, CAUSAL, block_q=block, block_k=block)
    of_keys = sum(2 * len(keys) * C for _, keys, _ in visited)
    return itemsize * (S * C + of_keys + S * C + S)


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
# With M queries in a tile each key is read once per M queries and not once per query.
#
# **The IO complexity.** The paper's theorem 2: with N tokens, head dim d and room for M numbers on the chip, the standard
# way makes about N d + N² accesses of HBM, flash attention N² d² / M. The second follows from the count: a tile of B queries
# reads all keys and values, that is N / B times 2 N d numbers; and four tiles of B x d (q, k, v, output) fill the chip, so
# B = M / 4d. Together 8 N² d² / M, half of it if causal. Beside the counted numbers:

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
    "at large tiles what is left over counts: the output, the queries, whole tiles on the diagonal",
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
# ## The loops of FlashAttention 1 and 2, and what 3 adds
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
# So version 3 lets two groups of warps take turns: one multiplies while the other makes exponentials (ping-pong). Other
# warps only copy tiles, by the hardware's asynchronous copies (TMA): warp specialization. It also has FP8. The paper's
# figures at head dim 64, forward, 16,000 tokens: 324 TFLOP/s with version 2, 497 with version 3. Ours, in Triton, leaves
# such scheduling to Triton's compiler, and has not been measured on a GPU yet.
#
# ## Memory against length, measured
#
# What decides whether a text fits is the largest tensor.

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
    axes[0].loglog(lengths, counts, "o-", base=2, label=kind)
axes[0].set(title="bytes moved, one head, forward", xlabel="length", ylabel="bytes")
for (name, counts), style in zip(largest.items(), ("o-", "s-", "x--"), strict=True):
    axes[1].loglog(lengths, counts, style, base=2, label=name)
axes[1].set(title="largest tensor, 4 heads, forward", xlabel="length", ylabel="numbers")
for axis in axes:
    axis.legend()
show(figure, "02_bytes_and_memory")

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
# ## One number per query gives the weights back
#
# The backward needs the weights again. They are not stored, but `weight = exp(score - LSE)`, and scores are quickly made
# again from q and k.

# %%
q, k, v = torch.randn(3, 1, 6, 1, 64)
_, lse_BHS = reference.attention(q, k, v, CAUSAL)
scores = torch.einsum("bihc,bjhc->bhij", q, k) * CAUSAL.scale
scores = scores.masked_fill(torch.ones(6, 6, dtype=torch.bool).triu(1), -torch.inf)
again = (scores - lse_BHS[..., None]).exp()
print(f"weights from scores and LSE against softmax: {(again - scores.softmax(-1)).abs().max():.1e}")
holds("exp(score - LSE) is the softmax's weight", torch.allclose(again, scores.softmax(-1), atol=1e-5))

# %% [markdown]
# ## The backward, step by step
#
# S are the scores, P the weights, dX the gradient of the loss by X. The output is P v, so by the rule of a product
#
# $$ dv = P^\top dout \qquad dP = dout\,v^\top $$
#
# **Through the softmax.** A row's weights are P_j = exp(S_j) / Z with Z the sum of exp(S_k). The derivative of the upper part
# by S_k is P_j if j = k and else 0; that of Z is exp(S_k), which takes P_j P_k away:
#
# $$ \frac{\partial P_j}{\partial S_k} = P_j\,([j = k] - P_k) $$
#
# **Sum over all weights** that S_k moves:
#
# $$ dS_k = \sum_j dP_j\,P_j\,([j = k] - P_k) = P_k\,dP_k - P_k \sum_j P_j\,dP_j = P_k\,(dP_k - \delta)
# \qquad \delta = \sum_j P_j\,dP_j $$
#
# So each score's gradient needs its own weight, its own dP, and one number of the row. On four numbers:

# %%
four_S = torch.tensor(four_scores, dtype=torch.float64, requires_grad=True)
jacobian_44 = torch.autograd.functional.jacobian(lambda row: row.softmax(0), four_S)
P_4, dP_4 = four_S.detach().softmax(0), torch.tensor([0.3, -1.0, 0.2, 0.5], dtype=torch.float64)
delta = (P_4 * dP_4).sum()
print("dS by the formula: ", [f"{x:+.5f}" for x in (P_4 * (dP_4 - delta)).tolist()])
print("dS by the Jacobian:", [f"{x:+.5f}" for x in (dP_4 @ jacobian_44).tolist()])
holds("the derivative of a weight is P_j ([j = k] - P_k)", torch.allclose(jacobian_44, P_4.diag() - P_4.outer(P_4)))
holds("dS is P (dP - delta), and sums to 0 over a row", abs((P_4 * (dP_4 - delta)).sum()) < 1e-12)

# %% [markdown]
# Then dq = scale dS k and dk = scale dSᵀ q, since S = scale q kᵀ. The delta is a sum over a whole row, but it need not
# wait for all tiles of the row:
#
# $$ \sum_j P_{ij}\,dP_{ij} = \sum_j P_{ij} \sum_c dout_{ic} v_{jc} = \sum_c dout_{ic} \sum_j P_{ij} v_{jc}
# = \sum_c dout_{ic}\,out_{ic} $$
#
# a dot product of two rows that are there already.

# %%
dout = torch.randn(1, 6, 1, 64)
P, dP = again, torch.einsum("bihc,bjhc->bhij", dout, v)
out = torch.einsum("bhij,bjhc->bihc", P, v)
delta_by_row, delta_by_output = (P * dP).sum(-1)[0, 0], (dout * out).sum(-1)[0, :, 0]
print("sum over the row:       ", [f"{x:.4f}" for x in delta_by_row.tolist()])
print("dot product with output:", [f"{x:.4f}" for x in delta_by_output.tolist()])
holds("delta is the dot product of output and its gradient", torch.allclose(delta_by_row, delta_by_output, atol=1e-4))

# %%
quote(reference._backward_tile)

# %% [markdown]
# `weight_BGRMN` is P, made again. `delta_BGRM` comes from outside. Now the whole, against PyTorch's autograd through
# the standard form, and what each keeps between forward and backward:

# %%
inputs = [x.clone().requires_grad_() for x in exact[:, :1]]
dout = torch.randn_like(inputs[0])
gradients = {name: torch.autograd.grad(attention(*inputs), inputs, dout) for name, attention in ATTENTIONS.items()}
for name in ("tiled (ours)", "PyTorch's kernel"):
    pairs = zip(gradients[name], gradients["standard"], strict=True)
    print(f"{name}: dq, dk, dv off by", ", ".join(f"{(a - b).abs().max():.0e}" for a, b in pairs), "(float64)")

rows = []
for S in (512, 1024, 2048):
    inputs = [torch.randn(1, S, 4, 64, requires_grad=True) for _ in range(3)]
    kept = [bytes_kept(partial(attention, *inputs)) for attention in ATTENTIONS.values()]
    rows.append([S, *(f"{each / 1e6:.1f}" for each in kept)])
table(["MB kept for the backward", *ATTENTIONS], rows)
grow = [float(rows[-1][column]) / float(rows[-2][column]) for column in (1, 2, 3)]
holds(
    "what the standard form keeps grows faster than the length; ours grows with it",
    grow[0] > 3.4 and max(grow[1:]) < 2.1,
)

inputs = [x.clone().requires_grad_() for x in torch.randn(3, 1, 256, 1, 64)]
with FlopCounterMode(display=False) as forward_flops:
    out = tiled(*inputs)
with FlopCounterMode(display=False) as backward_flops:
    out.backward(torch.ones_like(out))
times = backward_flops.get_total_flops() / forward_flops.get_total_flops()
print(f"FLOPs of the backward over those of the forward: {times:.2f}")
holds("two matmuls a tile in the forward, five in the backward", abs(times - 2.5) < 0.01)

# %% [markdown]
# With the weights stored it would be four: scores are made again. That costs arithmetic and saves writing and reading the
# matrix. Our Triton backward does seven: one kernel walks along the queries for dk and dv, another along the keys for dq,
# and both make scores and dP. In exchange no two programs add to the same number, so it gives the same bits every time.
# The papers' one kernel has five matmuls, and adds to dq with atomic operations, in any order.
#
# **Dropout**: which weights were dropped must be known again in the backward, in another order of tiles. So the random
# number is a pure function of the place, and a tile asked for alone equals that part of the whole:

# %%
seed = torch.tensor([7])
whole = dropout_keep_mask(seed, 1, 4, 64, 64, 0.1)
part = dropout_keep_mask(seed, 1, 4, range(16, 32), range(32, 48), 0.1)
print("tile of the mask equals the mask's tile:", torch.equal(part, whole[:, :, 16:32, 32:48]))
print(f"kept: {whole.float().mean():.3f}")
holds("a tile asked for alone equals that part of the whole", torch.equal(part, whole[:, :, 16:32, 32:48]))

# %% [markdown]
# ## An experiment that changes one thing
#
# The size of a tile.

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
# ## A kernel in Triton, built line by line
#
# Triton compiles Python functions for a GPU. Without one, its interpreter runs them on a CPU: slowly, and with the same
# results. (On a system without Triton, macOS or Windows, the code of this chapter ends here.)
#
# **Programs, grid, masks.** A kernel is written for one *program*; the grid says how many there are. A program asks which
# one it is, works out which numbers are its own, and loads and stores them all at once. A mask keeps it inside.

# %%
try:
    import triton
    import triton.language as tl
except ImportError:
    raise SystemExit(0) from None


@triton.jit
def doubled(X, OUT, n, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # program 2 of blocks of 4 has places 8 to 11
    inside = place < n
    x = tl.load(X + place, mask=inside, other=0.0)  # a pointer and offsets
    tl.store(OUT + place, 2 * x, mask=inside)


x = torch.arange(10.0)
out = torch.full((12,), -1.0)
doubled[(3,)](x, out, 10, BLOCK=4)  # a grid of three programs
print(out.tolist())
holds(
    "three programs of four double ten numbers, and write nothing past the end",
    out.tolist() == [*(2 * x).tolist(), -1, -1],
)

# %% [markdown]
# **Tiles and `tl.dot`.** Two axes make a matrix of offsets: row times the width, plus the column. One program of a grid of
# two axes makes one tile of scores:


# %%
@triton.jit
def scores_kernel(Q, K, OUT, S, C: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    q = tl.load(Q + i[:, None] * C + c[None, :], mask=(i < S)[:, None], other=0.0)
    k = tl.load(K + j[:, None] * C + c[None, :], mask=(j < S)[:, None], other=0.0)
    inside = (i < S)[:, None] & (j < S)[None, :]
    tl.store(OUT + i[:, None] * S + j[None, :], tl.dot(q, tl.trans(k)), mask=inside)


q_SC, k_SC = torch.randn(2, 40, 16)
out_SS = torch.empty(40, 40)
scores_kernel[(3, 3)](q_SC, k_SC, out_SS, 40, C=16, BLOCK=16)
print(f"nine programs, 40 x 40 scores: off by {(out_SS - q_SC @ k_SC.T).abs().max():.0e}")
holds("nine tiles of 16 x 16 make 40 x 40 scores", torch.allclose(out_SS, q_SC @ k_SC.T, atol=1e-4))

# %% [markdown]
# **Flash attention.** One program has BLOCK queries of one head. It keeps m, z and o, walks along the keys up to its own last
# query, and stores once. Compare the inner lines with the four-number example.


# %%
@triton.jit
def small_flash(Q, K, V, OUT, S, scale, C: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1) * S * C  # (heads, S, C): where this head begins
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)  # my queries
    c = tl.arange(0, C)
    mine = head + i[:, None] * C + c[None, :]
    q = tl.load(Q + mine, mask=(i < S)[:, None], other=0.0)
    m = tl.full([BLOCK], float("-inf"), tl.float32)  # largest score so far
    z = tl.zeros([BLOCK], tl.float32)  # sum of exp(score - m)
    o = tl.zeros([BLOCK, C], tl.float32)  # sum of exp(score - m) v
    for start in range(0, (tl.program_id(0) + 1) * BLOCK, BLOCK):  # causal: no tile right of the diagonal
        j = start + tl.arange(0, BLOCK)
        others = head + j[:, None] * C + c[None, :]
        k = tl.load(K + others, mask=(j < S)[:, None], other=0.0)
        v = tl.load(V + others, mask=(j < S)[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        s = tl.where(j[None, :] <= i[:, None], s, float("-inf"))  # matters in the tile on the diagonal only
        new_m = tl.maximum(m, tl.max(s, 1))
        p = tl.exp(s - new_m[:, None])
        rescale = tl.exp(m - new_m)  # corrects everything so far
        z = z * rescale + tl.sum(p, 1)
        o = o * rescale[:, None] + tl.dot(p, v)
        m = new_m
    tl.store(OUT + mine, o / z[:, None], mask=(i < S)[:, None])


S, H, C, BLOCK = 100, 2, 64, 32
q, k, v = torch.randn(3, 1, S, H, C)
out = torch.empty(H, S, C)
by_head = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
small_flash[(triton.cdiv(S, BLOCK), H)](*by_head, out, S, C**-0.5, C=C, BLOCK=BLOCK)
truth = standard(q.double(), k.double(), v.double())
small_error = (out.transpose(0, 1)[None] - truth).abs().max().item()
print(f"{triton.cdiv(S, BLOCK) * H} programs, {S} tokens, {H} heads: off by {small_error:.1e} from float64")
holds("a kernel of 25 lines is flash attention, up to float32 rounding", small_error < 1e-5)

# %% [markdown]
# ## The kernel that ships
#
# The same lines, with what a library needs around them. `attend` is the inner loop:

# %%
quote("flash_experts.kernels.flash_attention_programs:attend")

# %% [markdown]
# | small kernel | `attend` |
# | --- | --- |
# | `tl.exp(s * scale - m)` | `tl.exp2(score * factor - m)`: the hardware has exp2, so scale and log2(e) are one factor, in one multiply-add |
# | a mask in every tile | `MASKED` is a constant at compile time: two versions of the loop, one without a mask |
# | a diagonal by `j <= i` | `low` and `high`: each query sees one range of keys. Causal, windows and packed names are that |
# | - | `safe_max`: a query that has seen nothing has m = -inf, and `inf - inf` is not a number |
# | `o / z` | the same, and log(z) + m, the LSE, for the backward |
# | - | dropout, softcap, ALiBi: compiled in only if asked for |

# %%
quote("flash_experts.kernels.flash_attention_programs:forward_kernel")

# %% [markdown]
# From the top: which document, head and tile this program has; where its pointers begin; which keys each of its queries sees;
# three calls of `attend`, for a masked left edge, whole tiles, and a masked right edge; division and LSE.
#
# **Run it.** `flash_attn_func` with the backend `triton`, forward and backward, against float64:

# %%
with attention_backend("triton"):
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    out, lse, _ = flash_attn_func(*leaves, causal=True, return_attn_probs=True)
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, dout)
exact_leaves = [x.double().requires_grad_() for x in (q, k, v)]
exact_out = standard(*exact_leaves)
exact_gradients = torch.autograd.grad(exact_out, exact_leaves, dout.double())
errors = [(a - b).abs().max().item() for a, b in zip((out, *gradients), (exact_out, *exact_gradients), strict=True)]
print("off by", ", ".join(f"{name} {error:.0e}" for name, error in zip(("out", "dq", "dk", "dv"), errors, strict=True)))
holds("our Triton kernels, forward and backward, are right up to float32 rounding", max(errors) < 1e-4)

# %% [markdown]
# **Who does what, when.** A grid has more programs than the GPU has SMs; each SM takes the next program when it is free. With
# a causal mask the last queries have the most keys. In the line about `num_programs` the kernel turns the order around: the
# longest first. Below, 16 tiles of queries on four SMs, one unit of time for each tile of keys:


# %%
def schedule(lengths: list[int], workers: int) -> list[tuple[int, int, int]]:
    """(worker, start, program) of programs that begin in this order, each on the first free worker."""
    free, taken = [0] * workers, []
    for program, length in enumerate(lengths):
        worker = free.index(min(free))
        taken.append((worker, free[worker], program))
        free[worker] += length
    return taken


tiles = 16
ascending = list(range(1, tiles + 1))
orders = {"in the order of the text": ascending, "as shipped: the longest first": ascending[::-1]}
figure, axes = plt.subplots(1, 3, figsize=(13, 3.4), width_ratios=(0.8, 1.2, 1.2))
kinds = torch.full((tiles, tiles), torch.nan)
for query in range(tiles):
    kinds[query, :query], kinds[query, query] = 0.4, 0.9
axes[0].imshow(kinds, cmap="Blues", vmin=0, vmax=1)
axes[0].set(
    title="light: no mask; dark: masked; white: skipped", xlabel="tile of keys", ylabel="tile of queries: one program"
)
axes[0].title.set_size(8)
axes[0].set(xticks=range(0, tiles, 3), yticks=range(0, tiles, 3))
ends = []
for axis, (title, lengths_of) in zip(axes[1:], orders.items(), strict=True):
    taken = schedule(lengths_of, 4)
    ends.append(max(start + lengths_of[program] for _, start, program in taken))
    for worker, start, program in taken:
        color = plt.colormaps["Blues"](0.15 + 0.5 * lengths_of[program] / tiles)
        axis.barh(worker, lengths_of[program], left=start, color=color, edgecolor="white")
        axis.text(
            start + lengths_of[program] / 2,
            worker,
            lengths_of[program] - 1,
            ha="center",
            va="center",
            size=7,
        )
    axis.axvline(ends[-1], color="tab:red")
    axis.set(
        title=f"{title}: {ends[-1]} units", xlabel="time, tiles of keys", ylabel="SM", yticks=range(4), xlim=(0, 44)
    )
    axis.title.set_size(9)
show(figure, "02_schedule")
print(
    f"all work on four SMs without a gap: {sum(ascending) / 4:.0f} units; in order {ends[0]}, longest first {ends[1]}"
)
holds("longest first ends earlier, with no gap", ends[1] == math.ceil(sum(ascending) / 4) < ends[0])

# %% [markdown]
# ## What to remember
#
# - Keep a maximum, a sum and an output per query; rescale them when the maximum grows. That is the whole trick.
# - The output is exact. Memory grows with the length, not with its square.
# - Arithmetic is cheap, bytes are dear: the backward makes the weights again from one number per query.
# - Version 1 is tiles, version 2 the order of the loops and more programs, version 3 copies and exponentials beside matmuls.
#
# ## Exercises
#
# 1. **Any order.** Write the online softmax as a function of scores (S,) and values (S, C) and a list of index tensors
#    (the tiles). Show that the order of the tiles does not matter, nor their sizes.
# 2. **Without the maximum.** Leave m out (use exp(score) directly), in float32. At which scores does it fail, and how?
#    What does the online form give there?
# 3. **Two halves.** A machine has computed attention over the first half of the keys, another over the second. Each
#    tells you its output and LSE. Merge them into the attention over all keys, without seeing q, k or v. (This is how
#    long contexts are spread over GPUs, and how decoding splits a long cache.)
# 4. **A window.** Give `AttentionOptions` `left=128`: each query sees 128 keys before it. Count tiles of 64 for lengths
#    512 to 4096, with and without the window. How does each grow?
#
# Solutions: [solutions/02_flash_attention.py](solutions/02_flash_attention.py).
#
# ## Reading
#
# - [Milakov and Gimelshein 2018](https://arxiv.org/abs/1805.02867): the online softmax, before attention had it.
# - [Dao et al. 2022](https://arxiv.org/abs/2205.14135): algorithm 1 and theorem 2. [Dao 2023](https://arxiv.org/abs/2307.08691):
#   section 3. [Shah et al. 2024](https://arxiv.org/abs/2407.08608): section 3 and table 1.
# - [Triton's tutorial on fused attention](https://triton-lang.org/main/getting-started/tutorials/06-fused-attention.html).
# - [Our kernels](../results.md#flash-attention), and what they were tried on ([experiments](../experiments.md)).
# - Next: [chapter 3](03_mixture_of_experts.py), the other half of a block.
