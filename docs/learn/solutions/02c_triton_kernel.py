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
# # Solutions of chapter 2c, a kernel in Triton

# %%
import sys
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import os

os.environ["TRITON_INTERPRET"] = "1"  # the interpreter: read when Triton is imported

import torch
from chapter_claims import holds
from chapter_tools import table
from chapter_watching import CAUSAL

from flash_experts.kernels import flash_attention_reference as reference
from flash_experts.kernels.attention_options import AttentionOptions

try:
    import triton
    import triton.language as tl
except ImportError:
    raise SystemExit(0) from None

torch.manual_seed(0)

# %% [markdown]
# ## 1. The LSE
#
# `m + log(z)` is there when the loop ends. One more pointer, one more store.
#
# ## 2. A window in the kernel
#
# The first tile of keys that any query of the program sees is that of its first query: `i_first - left`, rounded down to a
# tile. In that tile the last queries of the program may see nothing: their scores are all minus infinity, m stays minus
# infinity, and `exp(-inf - -inf)` is not a number, which the rescaling keeps from then on. So they are shifted by 0 as
# long as they have seen nothing, as `safe_max` does in the package.


# %%
@triton.jit
def small_flash(Q, K, V, OUT, LSE, S, scale, left, C: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1) * S * C
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    c = tl.arange(0, C)
    mine = head + i[:, None] * C + c[None, :]
    q = tl.load(Q + mine, mask=(i < S)[:, None], other=0.0)
    m = tl.full([BLOCK], float("-inf"), tl.float32)
    z = tl.zeros([BLOCK], tl.float32)
    o = tl.zeros([BLOCK, C], tl.float32)
    first = tl.maximum(tl.program_id(0) * BLOCK - left, 0) // BLOCK * BLOCK
    for start in range(first, (tl.program_id(0) + 1) * BLOCK, BLOCK):
        j = start + tl.arange(0, BLOCK)
        others = head + j[:, None] * C + c[None, :]
        k = tl.load(K + others, mask=(j < S)[:, None], other=0.0)
        v = tl.load(V + others, mask=(j < S)[:, None], other=0.0)
        s = tl.dot(q, tl.trans(k)) * scale
        seen = (j[None, :] <= i[:, None]) & (j[None, :] >= i[:, None] - left)
        s = tl.where(seen, s, float("-inf"))
        new_m = tl.maximum(m, tl.max(s, 1))
        safe_m = tl.where(new_m == float("-inf"), 0.0, new_m)
        p = tl.exp(s - safe_m[:, None])
        rescale = tl.exp(m - safe_m)
        z = z * rescale + tl.sum(p, 1)
        o = o * rescale[:, None] + tl.dot(p, v)
        m = new_m
    tl.store(OUT + mine, o / z[:, None], mask=(i < S)[:, None])
    tl.store(LSE + tl.program_id(1) * S + i, m + tl.log(z), mask=i < S)


S, H, C, BLOCK = 100, 2, 64, 32
q, k, v = torch.randn(3, 1, S, H, C)
by_head = [x[0].transpose(0, 1).contiguous() for x in (q, k, v)]
for left, options in ((S, CAUSAL), (40, AttentionOptions(scale=C**-0.5, left=40, right=0))):
    out, lse = torch.empty(H, S, C), torch.empty(H, S)
    small_flash[(triton.cdiv(S, BLOCK), H)](*by_head, out, lse, S, C**-0.5, left, C=C, BLOCK=BLOCK)
    expected, expected_lse = reference.attention(q, k, v, options)
    off = (out.transpose(0, 1)[None] - expected).abs().max(), (lse[None] - expected_lse).abs().max()
    print(f"left {left}: output off by {off[0]:.0e}, LSE by {off[1]:.0e}")
    holds(f"output and LSE are the reference's, each query seeing {left} keys before its own", max(off) < 1e-4)

# %% [markdown]
# ## 3. A whole GPU


# %%
def ends_and_waits(lengths: list[int], workers: int) -> tuple[int, float]:
    """When the last program ends, and the share of all workers' time until then that is spent waiting."""
    free = [0] * workers
    for length in lengths:
        free[free.index(min(free))] += length
    return max(free), 1 - sum(lengths) / (max(free) * workers)


rows, found = [], {}
for heads in (12, 96):
    for order, tiles in (("text", range(1, 17)), ("longest first", range(16, 0, -1))):
        in_order = [length for length in tiles for _ in range(heads)]
        found[heads, order] = ends_and_waits(in_order, 132)
        rows.append([f"{heads} heads, {order}", found[heads, order][0], f"{found[heads, order][1]:.0%}"])
table(["16 tiles of queries, 132 SMs", "units until the end", "waiting"], rows)
holds("the longest first is never later", all(found[n, "longest first"][0] <= found[n, "text"][0] for n in (12, 96)))
holds(
    "12 heads leave SMs waiting in either order", min(found[12, order][1] for order in ("text", "longest first")) > 0.1
)
holds("with 96 heads and the longest first hardly any time is lost", found[96, "longest first"][1] < 0.05)

# %% [markdown]
# The longest program alone takes 16 units, so 12 heads (192 programs for 132 SMs) cannot do much better. More heads, or more
# texts at once, fill the gaps.
