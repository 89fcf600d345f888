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
# # Solutions of chapter 2, flash attention

# %%
import sys
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import math

import torch
from chapter_claims import holds
from chapter_tools import table

from flash_experts.models.flash_attn import flash_attn_func

torch.manual_seed(0)

# %% [markdown]
# ## 1. Any order
#
# Maximum and sum do not depend on the order of their terms. The online softmax only changes the reference point of the
# exponentials on the way, and takes that back.

# %%


def online_softmax(scores_S: torch.Tensor, values_SC: torch.Tensor, tiles: list[torch.Tensor]) -> torch.Tensor:
    """``softmax(scores) @ values``, (C,), the keys taken tile by tile."""
    m = scores_S.new_tensor(-torch.inf)
    z, o_C = torch.zeros_like(m), torch.zeros_like(values_SC[0])
    for tile in tiles:
        new_m = torch.maximum(m, scores_S[tile].max())
        rescale, weights = torch.exp(m - new_m), torch.exp(scores_S[tile] - new_m)
        z, o_C, m = z * rescale + weights.sum(), o_C * rescale + weights @ values_SC[tile], new_m
    return o_C / z


scores_S, values_SC = 5 * torch.randn(100, dtype=torch.float64), torch.randn(100, 8, dtype=torch.float64)
expected_C = scores_S.softmax(0) @ values_SC
forwards, shuffled = torch.arange(100), torch.randperm(100)
for label, tiles in (
    ("tiles of 16, in order", list(forwards.split(16))),
    ("tiles of 16, last first", list(forwards.split(16))[::-1]),
    ("keys shuffled, tiles of 7", list(shuffled.split(7))),
    ("one key at a time, shuffled", list(shuffled.split(1))),
    ("tiles of 1, 2, 4, 8, 16, 32, 37", list(shuffled.split([1, 2, 4, 8, 16, 32, 37]))),
):
    off = (online_softmax(scores_S, values_SC, tiles) - expected_C).abs().max()
    print(f"{label:32} off by {off:.0e}")
    holds("neither order nor sizes of the tiles matter", off < 1e-12)

# %% [markdown]
# ## 2. Without the maximum
#
# The largest float32 is 3.4e38, and exp(88.7) is that much. From there on exp gives infinity, and infinity over
# infinity is not a number. At the other end all exponentials become 0, and 0 / 0 is not a number either.

# %%
shape = torch.tensor([0.0, 1.0, 2.0, 3.0])
values = torch.tensor([[10.0], [20.0], [30.0], [40.0]])
rows, plains, onlines = [], {}, {}
for shift in (0.0, 80.0, 85.0, 86.0, 100.0, -100.0, -110.0):
    scores = shape + shift
    plain = (scores.exp() / scores.exp().sum()) @ values
    online = online_softmax(scores, values, [torch.tensor([0, 1]), torch.tensor([2, 3])])
    plains[shift], onlines[shift] = plain.item(), online.item()
    rows.append([f"{shift:g} to {shift + 3:g}", f"{plain.item():.4f}", f"{online.item():.4f}"])
table(["scores", "without m", "online"], rows)
holds("the online form gives the same at all of them", max(onlines.values()) - min(onlines.values()) < 1e-3)
holds(
    "without m it fails from scores of 89 up, and at -107 and under",
    all(math.isnan(plains[shift]) for shift in (86.0, 100.0, -110.0)),
)
holds("before it fails at the low end it loses digits", abs(plains[-100.0] - plains[0.0]) > 1e-3)
holds("in float16 it fails at scores between 11 and 12", math.exp(11) < torch.finfo(torch.float16).max < math.exp(12))

# %% [markdown]
# exp(-100) is a denormal number of float32. The sum fails a little before the single term does. In float16 the largest
# number is 65,504.
#
# ## 3. Two halves
#
# The LSE of a half gives the weight that the half has in all: exp(LSE of the half - LSE of all). And the LSE of all is
# the log of the sum of the exponentials of both.

# %%
q, k, v = torch.randn(1, 3, 4, 64), torch.randn(1, 200, 4, 64), torch.randn(1, 200, 4, 64)
whole, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
outs, lses = zip(
    *(
        flash_attn_func(q, k[:, half], v[:, half], return_attn_probs=True)[:2]
        for half in (slice(0, 80), slice(80, 200))
    ),
    strict=True,
)
lses_2BHS = torch.stack(lses)
lse_of_both = lses_2BHS.logsumexp(0)
shares_2BSH = (lses_2BHS - lse_of_both).exp().transpose(2, 3)
merged = (torch.stack(outs) * shares_2BSH[..., None]).sum(0)
print(
    f"merged against all at once: output {(merged - whole).abs().max():.1e}, LSE {(lse_of_both - lse).abs().max():.1e}"
)
holds("merged, the halves are the attention over all keys", torch.allclose(merged, whole, atol=1e-5))
print(f"share of the first 80 of 200 keys, query 0, by head: {[f'{x:.2f}' for x in shares_2BSH[0, 0, 0].tolist()]}")
