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
# # 2c. A kernel in Triton
#
# **The question: how is flash attention written for a GPU, in a language that a laptop can run?**
#
# Triton compiles Python functions for a GPU. Without one, its interpreter runs them on a CPU: slowly, and with the same
# results. We build a kernel of two dozen lines from the four-number example of [chapter 2](02_flash_attention.py), then read and run
# the one that ships. The [glossary](../glossary.md#attention) has the terms. (On a system without Triton, macOS or Windows,
# the code of this chapter ends after its picture.)

# %%
import math
import os

os.environ["TRITON_INTERPRET"] = "1"  # the interpreter: read when Triton is imported

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_tools import quote, show
from chapter_watching import standard

from flash_experts.models.attention_backends import attention_backend
from flash_experts.models.flash_attn import flash_attn_func

torch.manual_seed(0)

# %% [markdown]
# ## The picture first
#
# A kernel is written for one *program*; the grid sets how many there are. In flash attention one program has one tile of
# queries of one head, and walks over the tiles of keys that it may see (left). Most grids have more programs than the GPU has
# SMs, its streaming multiprocessors; each SM takes the next program when it is free. With a causal mask the last queries have
# the most keys. So our kernel reverses the order: the longest first. Below, 16 tiles of queries on four SMs, one unit of
# time for each tile of keys; the number in a bar is its tile of queries:


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
show(figure, "02c_schedule")
print(
    f"all work on four SMs without a gap: {sum(ascending) / 4:.0f} units; in order {ends[0]}, longest first {ends[1]}"
)
holds("longest first ends earlier, with no gap", ends[1] == math.ceil(sum(ascending) / 4) < ends[0])
# %% [markdown]
# ## Programs, grid, masks
#
# A program reads its index in the grid, computes which elements are its own, and loads and stores them as one block. A mask keeps
# it from reading or writing past the end.

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
holds("a kernel of two dozen lines is flash attention, up to float32 rounding", small_error < 1e-5)

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
# The order of the picture is the line about `num_programs` in `forward_kernel`. `GROUP` query heads read one head of keys and
# values (grouped-query attention): the pointer is `h // GROUP`, and nothing is copied.

# %%
with attention_backend("triton"), torch.no_grad():
    shared = flash_attn_func(q, k[:, :, :1], v[:, :, :1], causal=True)
repeated = standard(q, *(x[:, :, :1].expand(-1, -1, H, -1) for x in (k, v)))
print(f"two query heads on one head of keys, against copies of it: {(shared - repeated).abs().max():.0e}")
holds("grouped heads give what copies of keys and values would", torch.allclose(shared, repeated, atol=1e-4))
scores_HSS = (q.double() * C**-0.5)[0].transpose(0, 1) @ k.double()[0].permute(1, 2, 0)
exact_lse = scores_HSS.masked_fill(torch.ones(S, S, dtype=torch.bool).triu(1), -torch.inf).logsumexp(-1)
holds("the kernel's LSE is that of the scores", torch.allclose(lse[0].double(), exact_lse, atol=1e-4))

# %% [markdown]
# ## The backward's kernels
#
# Two kernels, each with the loop that suits its output. `keys_kernel` has one tile of keys and walks along the queries, for dk
# and dv; `queries_kernel` has one tile of queries and walks along the keys, for dq. `sum_over_queries` is the inner loop of the
# first. Find the five lines of [chapter 2](02_flash_attention.py): scores, weights by the LSE, dP, dS by delta, the two sums.

# %%
quote("flash_experts.kernels.flash_attention_backward:sum_over_queries")
with attention_backend("triton"):
    again = torch.autograd.grad(flash_attn_func(*leaves, causal=True), leaves, dout)
holds("no two programs add to the same number: a second run has the same bits", all(map(torch.equal, again, gradients)))

# %% [markdown]
# ## What to remember
#
# - A program has its tile of queries, walks along the keys, and writes once. Its inner lines are the online softmax.
# - Pointers are computed; masks keep loads and stores inside.
# - What a library adds is masks at compile time, other masks than the causal one, and numbers for the backward.
#
# ## Exercises
#
# 1. **The LSE.** Let `small_flash` store the LSE of each query as well. Check it against the package's reference.
# 2. **A window in the kernel.** Give it `left`: each query sees `left` keys before its own. Skip the tiles that no query of the
#    program sees. What can go wrong in the first tile, and why?
# 3. **A whole GPU.** 12 heads of 16 tiles of queries on 132 SMs: how long does each order take, and how much time do the SMs
#    wait? And 96 heads?
#
# Solutions: [solutions/02c_triton_kernel.py](solutions/02c_triton_kernel.py).
#
# ## Reading
#
# - [Triton's tutorial on fused attention](https://triton-lang.org/main/getting-started/tutorials/06-fused-attention.html), and
#   [labml's annotated kernel](https://nn.labml.ai/transformers/flash/index.html), forward and backward.
# - [Tillet et al. 2019](https://doi.org/10.1145/3315508.3329973): Triton.
# - [Our kernels](../results.md#flash-attention), and what they were tried on ([experiments](../experiments.md)).
# - Next: [chapter 3](03_mixture_of_experts.py), the other half of a block.
