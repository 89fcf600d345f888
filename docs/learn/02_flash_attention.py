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

# %%
import math
import time
from functools import partial

import matplotlib.pyplot as plt
import torch
from chapter_tools import IN_NOTEBOOK, cards, load_base, quote, show, table
from chapter_watching import Traffic, bytes_kept, watched_tiles
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch.nn import functional as F

from flash_experts.data.packing import encode_cards, pack
from flash_experts.kernels import flash_attention_reference as reference
from flash_experts.kernels.attention_options import AttentionOptions
from flash_experts.kernels.philox import dropout_keep_mask

CAUSAL = AttentionOptions(scale=64**-0.5, right=0)  # a query sees no key to the right of its own place
torch.manual_seed(0)

# %% [markdown]
# ## The picture first
#
# 16 queries (rows), 16 keys (columns), causal, tiles of 4 x 4. Each frame is one tile, in the order in which our reference
# makes them. A tile is made, used and forgotten. The title tells the only two numbers that remain of the scores of its
# last query: the largest so far, and a sum.

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
show(figure, "02_tiles")

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

# %% [markdown]
# After each tile o / z is the right answer for the keys so far. The package's reference on the same four numbers (width 1,
# so q = 1 and k = the scores):

# %%
q1, k4, v4 = (torch.tensor(x).view(1, -1, 1, 1) for x in ([1.0], four_scores, four_values))
out, lse = reference.attention(q1, k4, v4, AttentionOptions(scale=1.0), block_k=2)
print(f"reference: output {out.item():.4f}, log-sum-exp {lse.item():.4f} = m + log(z) = {m + math.log(z):.4f}")

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
# The same in Triton, for GPUs. The tiles live on the chip; scores are in units of log 2, since the hardware has `exp2`.

# %%
quote("flash_experts.kernels.flash_attention_programs:attend")

# %% [markdown]
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
rows = []
for name, attention in ATTENTIONS.items():
    rounded = [exact.to(dtype) for dtype in (torch.float32, torch.bfloat16)]
    errors = [(attention(*qkv).double() - standard(*qkv.double())).abs().max() for qkv in rounded]
    rows.append([name, *(f"{error:.1e}" for error in errors)])
table(["largest error", "float32", "bfloat16"], rows)

# %% [markdown]
# All are as exact as the numbers allow. In bfloat16 the tiled form has an edge: it sums in float32 and rounds once.
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

# %% [markdown]
# Packed names are the extreme case. Each name is its own little triangle, and nothing between names is touched:

# %%
_, tokenizer = load_base()
packed = pack(encode_cards(cards("train")[:64], tokenizer))
T, starts = packed.num_tokens, packed.cu_seq_lens
q, k, v = torch.randn(3, T, 4, 64)
with watched_tiles() as visited:
    reference.attention_varlen(q, k, v, starts, starts, packed.max_length, packed.max_length, CAUSAL)
made = sum(len(queries) * len(keys) for queries, keys, _ in visited)
print(f"{packed.num_names} names, {T} tokens: {made:,} scores of each head are made, {T * T:,} by a mask over the row")

# %% [markdown]
# ## Bytes moved
#
# A GPU multiplies faster than it reads. On an H200, 16-bit products run at some 790 TFLOP/s and memory gives 4.8 TB/s:
# while one byte arrives, 160 operations could be done. So we count bytes.
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

# %% [markdown]
# Both grow with the square of the length, but with M queries in a tile each key is read once per M queries and not once
# per query. Larger tiles move less, until they no longer fit on the chip.
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
#
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

# %% [markdown]
# ## The backward: make each tile again
#
# With P the weights, dout the gradient of the output:
#
# $$ dv = P^\top dout \qquad dP = dout\,v^\top \qquad dS_{ij} = P_{ij}\,(dP_{ij} - \delta_i) \qquad
# \delta_i = \sum_j P_{ij}\,dP_{ij} $$
#
# and dq = scale dS k, dk = scale dSᵀ q. The delta is a sum over a whole row, but need not wait for its tiles, since
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

# %% [markdown]
# Recomputing costs arithmetic (the backward has 5 products of tiles instead of 4), and saves storing and reading the
# matrix, which is worth more.
#
# **Dropout**: which weights were dropped must be known again in the backward, in another order of tiles. So the random
# number is a pure function of the place, and a tile asked for alone equals that part of the whole:

# %%
seed = torch.tensor([7])
whole = dropout_keep_mask(seed, 1, 4, 64, 64, 0.1)
part = dropout_keep_mask(seed, 1, 4, range(16, 32), range(32, 48), 0.1)
print("tile of the mask equals the mask's tile:", torch.equal(part, whole[:, :, 16:32, 32:48]))
print(f"kept: {whole.float().mean():.3f}")

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
table(["tile", "difference", "tiles", "of the scores", "largest tensor", "MB moved on a chip", "ms here"], rows)
started = time.process_time()
pytorch(q, k, v)
print(f"PyTorch's kernel, tiled in C++: {(time.process_time() - started) * 1e3:.0f} ms")

# %% [markdown]
# Small tiles skip more of the upper triangle and hold less, but read keys more often (and in Python each costs dozens of
# calls: on a CPU `flash_attn_func` takes PyTorch's kernel). On a GPU the choice is between bytes moved and what fits into
# registers; our Triton kernels measure it at the first call for a new shape.
#
# ## What to remember
#
# - Keep a maximum, a sum and an output per query; rescale them when the maximum grows. That is the whole trick.
# - The output is exact. Memory grows with the length, not with its square.
# - Arithmetic is cheap, bytes are dear: the backward makes the weights again from one number per query.
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
# Solutions: `solutions/02_flash_attention.py`.
