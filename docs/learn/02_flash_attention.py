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
# For 16,000 tokens the scores of one head are 256 million numbers. They are written to memory, read for the softmax, written
# again, and read again for the matmul with v, while the compute units wait. [Flash attention](../glossary.md#attention) computes
# the same output, not an approximation, and never writes the matrix to memory.
#
# There are four versions of one idea. [FlashAttention](https://arxiv.org/abs/2205.14135) (Dao et al. 2022) has tiles and
# the online softmax, and recomputes the scores in the backward. [FlashAttention-2](https://arxiv.org/abs/2307.08691) (Dao
# 2023) swaps the loops, so that more of the GPU works. [FlashAttention-3](https://arxiv.org/abs/2407.08608) (Shah et
# al. 2024) overlaps copies, matmuls and exponentials on Hopper GPUs, and
# [FlashAttention-4](https://arxiv.org/abs/2603.05451) (Zadouri et al. 2026) does so on Blackwell GPUs. Our kernels follow
# the second.
#
# This chapter is the computation, forward and backward. [Chapter 2b](02b_bytes_and_tiles.py) counts the bytes that it saves,
# and [chapter 2c](02c_triton_kernel.py) writes it as a kernel for a GPU.

# %%
import math
from functools import partial

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_tools import IN_NOTEBOOK, cards, load_base, quote, show, table
from chapter_watching import ATTENTIONS, CAUSAL, bytes_kept, standard, tiled, watched_tiles
from matplotlib.animation import FuncAnimation
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch.utils.flop_counter import FlopCounterMode

from flash_experts.data.packing import encode_cards, pack
from flash_experts.kernels import flash_attention_reference as reference
from flash_experts.kernels.attention_options import AttentionOptions, PackedLengths
from flash_experts.kernels.flash_attention_reference import dropout_keep_mask

torch.manual_seed(0)

# %% [markdown]
# ## The picture first
#
# There are 16 queries (rows) and 16 keys (columns), a causal mask, and tiles of 4 x 4. Each frame is one tile, in the order in
# which our reference computes them: the current tile is dark, finished tiles are light, and what is never computed is white.
# The pale half of a tile on the diagonal is computed and then masked. A tile is computed, used and discarded. The title gives
# the two numbers that are kept of the scores of its last query: the largest so far, and a sum.

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
    "of 16 tiles, 10 are made, each once; the last query's four come one after the other",
    len({(queries.start, keys.start) for queries, keys, _ in visited}) == len(visited) == 10
    and of_query_15 == [6, 7, 8, 9],
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
# ## The online softmax, on four numbers
#
# A softmax needs the sum over the whole row before its first weight is known, and the largest score before that (so that
# no exp overflows). The online softmax begins with the scores seen so far, and corrects the result later.
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
# `_forward_tile` loops over all keys that one tile of queries may see. Shapes: M queries, N keys, width C; B, G and R are batch and
# heads. `sum_BGRM`, `max_BGRM`, `out_BGRMC` are z, m and o from above. Find the lines of the four-number example.

# %%
quote(reference._forward_tile)

# %% [markdown]
# A query that has seen nothing yet has the maximum minus infinity, and `inf - inf` is not a number, so it is shifted by 0
# instead. Division by z happens once, at the end. One number per query is kept for the backward: `max + log(sum)`, the
# log-sum-exp (LSE).
#
# **Is it right?** We compare with softmax attention in float64, and show the error of PyTorch's own kernel next to ours. The
# standard form is that of chapter 1, with the whole matrix:

# %%
quote(standard)
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
# Twice the error of the standard form in the same dtype is the bound that flash-attn's own tests use. The tiled form sums in
# float32 and rounds once.
#
# PyTorch's `scaled_dot_product_attention` has a flash kernel as well. It takes `is_causal=True`, but no mask tensor: with one,
# PyTorch uses another kernel ([documentation](https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html)).
# FlexAttention takes masks given by a function; our kernels take ranges of keys. `flash-experts benchmark attention` times them.
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
# Packed names skip most. Each name is a small triangle of its own, and no score between two names is computed:

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
# ## One number per query gives the weights back
#
# The backward needs the weights again. They are not stored, but `weight = exp(score - LSE)`, and the scores are recomputed from q
# and k.

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
# S are the scores, P the weights, dX is the gradient of the loss with respect to X. The output is P v, so by the product rule
#
# $$ dv = P^\top dout \qquad dP = dout\,v^\top $$
#
# **Through the softmax.** A row's weights are P_j = exp(S_j) / Z, where Z is the sum of exp(S_k). By the quotient rule, the
# numerator contributes P_j if j = k and else 0, and Z contributes -P_j P_k:
#
# $$ \frac{\partial P_j}{\partial S_k} = P_j\,([j = k] - P_k) $$
#
# **Sum over all weights** that S_k moves:
#
# $$ dS_k = \sum_j dP_j\,P_j\,([j = k] - P_k) = P_k\,dP_k - P_k \sum_j P_j\,dP_j = P_k\,(dP_k - \delta) $$
#
# $$ \delta = \sum_j P_j\,dP_j $$
#
# So each score's gradient needs its own weight, its own dP, and one number of the row, δ. On four numbers:

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
# δ is a dot product of two rows that are known before the first tile.

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
# `weight_BGRMN` is P, recomputed. `delta_BGRM` is an argument. Now we compare the whole backward with PyTorch's autograd through
# the standard form, and count what each form keeps between forward and backward:

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
# With stored weights the backward would have four matmuls; the fifth recomputes the scores. That costs FLOPs and saves writing and
# reading the matrix. Our Triton backward does seven: one kernel loops over the queries for dk and dv, another over the keys for
# dq, and both compute scores and dP. In exchange no two programs add to the same number, so results are bit-identical in every
# run. The papers' kernel has five matmuls, and adds to dq with atomic operations, in any order.
#
# **Dropout**: the backward must drop the same weights as the forward, in another order of tiles. So the random number is a pure
# function of the position, and a tile computed alone equals that part of the whole mask:

# %%
seed = torch.tensor([7])
whole = dropout_keep_mask(seed, 1, 4, 64, 64, 0.1)
part = dropout_keep_mask(seed, 1, 4, range(16, 32), range(32, 48), 0.1)
print("tile of the mask equals the mask's tile:", torch.equal(part, whole[:, :, 16:32, 32:48]))
print(f"kept: {whole.float().mean():.3f}")
holds("a tile computed alone equals that part of the whole", torch.equal(part, whole[:, :, 16:32, 32:48]))

# %% [markdown]
# ## What to remember
#
# - Keep a maximum, a sum and an output per query, and rescale sum and output when the maximum grows: the online softmax.
# - The output is exact. What is kept for the backward grows with the length, not with its square.
# - FLOPs are cheaper than memory traffic: the backward recomputes the weights from one number per query.
#
# ## Exercises
#
# 1. **Any order.** Write the online softmax as a function of scores (S,) and values (S, C) and a list of index tensors
#    (the tiles). Show that the order of the tiles does not matter, nor their sizes.
# 2. **Without the maximum.** Leave m out (use exp(score) directly), in float32. At which scores does it fail, and how?
#    What does the online form give there?
# 3. **Two halves.** One machine has computed attention over the first half of the keys, another over the second. Each
#    returns its output and LSE. Merge them into the attention over all keys, without seeing q, k or v. (This is how
#    long contexts are spread over GPUs, and how decoding splits a long cache.)
#
# Solutions: [solutions/02_flash_attention.py](solutions/02_flash_attention.py).
#
# ## Reading
#
# - [Milakov and Gimelshein 2018](https://arxiv.org/abs/1805.02867): the online softmax, before attention had it.
# - [Dao et al. 2022](https://arxiv.org/abs/2205.14135): algorithm 1 and appendix B, the backward.
# - [labml: Flash attention](https://nn.labml.ai/transformers/flash/index.html), annotated line by line: forward and
#   backward with formulas next to a Triton kernel.
# - Next: [chapter 2b](02b_bytes_and_tiles.py), why that is fast; or [chapter 3](03_mixture_of_experts.py), the other half of a block.
