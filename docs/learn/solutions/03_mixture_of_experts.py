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
# # Solutions of chapter 3, mixture of experts

# %%
import sys
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_claims import holds
from chapter_models import bits_per_character, nats_of_names, training_steps
from chapter_tools import cards, load_base, table
from torch import nn

from flash_experts import GPT2MoEForCausalLM
from flash_experts.training.training_config import LearningRateScale

dense, tokenizer = load_base()
train_cards, validation_cards = cards("train"), cards("validation")[:200]
LAST = dense.config.n_layer - 1
EXPERTS_ONLY = LearningRateScale(router=10, dense=0)


def upcycled(**fields: object) -> GPT2MoEForCausalLM:
    """Eight experts in the last block, two per token."""
    torch.manual_seed(0)
    return GPT2MoEForCausalLM.from_dense(dense, num_experts=8, num_experts_per_tok=2, moe_layer_freq=LAST + 1, **fields)


# %% [markdown]
# ## 1. Another K at evaluation

# %%
model = upcycled()
for _ in training_steps(model, train_cards, tokenizer, 20, 1e-3, 320, lr_scale=EXPERTS_ONLY):
    pass
rows, bits_of = [], {}
for k in (1, 2, 4, 8):
    model.transformer.h[LAST].mlp.router.top_k = k
    nats = nats_of_names(model, validation_cards, tokenizer)
    bits_of[k] = bits_per_character(nats, validation_cards)
    rows.append([k, f"{bits_of[k]:.3f}"])
nats = nats_of_names(dense, validation_cards, tokenizer)
rows.append(["dense base", f"{bits_per_character(nats, validation_cards):.3f}"])
table(["experts per token", "validation bits"], rows)
holds("all nearly alike: within 0.03 bits", max(bits_of.values()) - min(bits_of.values()) < 0.03)

# %% [markdown]
# After 20 steps the experts are still close to the MLP that they were copied from, so it hardly matters which of them, and how
# many, work on a token. The number of experts at evaluation is a free choice only while they are nearly equal.
#
# ## 2. Why 47 billion?
#
# Attention, embeddings and norms are there once. Only the MLPs are there eight times.

# %%
width, hidden, blocks, experts, chosen, vocabulary = 4096, 14336, 32, 8, 2, 32_000
heads, kv_heads, head_dim = 32, 8, 128
expert = 3 * width * hidden
attention = 2 * width * heads * head_dim + 2 * width * kv_heads * head_dim  # q and output; k and v
once = (
    blocks * (attention + 2 * width + experts * width) + 2 * vocabulary * width + width
)  # norms, router, tokens in and out
total, active = once + blocks * experts * expert, once + blocks * chosen * expert
table(["Mixtral 8x7B", "billions"], [["all weights", f"{total / 1e9:.1f}"], ["active", f"{active / 1e9:.1f}"]])
holds("46.7 billion weights, 12.9 billion active", (round(total / 1e9, 1), round(active / 1e9, 1)) == (46.7, 12.9))
holds("the experts are 97% of all", 0.96 < blocks * experts * expert / total < 0.98)
with_one = once - blocks * experts * width + blocks * expert  # one MLP in each block, no router
holds("with one such MLP in each block, and no router, 7.2 billion", round(with_one / 1e9, 1) == 7.2)

# %% [markdown]
# A dense model of this shape with one such MLP in each block has 7.2 billion weights: hence the 7 of the name. Memory goes by 47,
# FLOPs of a token by 13. (With many tokens at once all experts are read: chapter 3's figure of bytes.)
#
# ## 3. Without the loop

# %%
torch.manual_seed(1)
T, D, F, E, K = 100, 32, 128, 8, 2
x_TD, router_ED = torch.randn(T, D), torch.randn(E, D)
mlps = [nn.Sequential(nn.Linear(D, F), nn.GELU("tanh"), nn.Linear(F, D)) for _ in range(E)]
with torch.no_grad():
    best_TK, experts_TK = (x_TD @ router_ED.T).topk(K)
    gates_TK = best_TK.softmax(-1)
    by_loop_TD = torch.zeros_like(x_TD)
    for e, mlp in enumerate(mlps):
        token, k = torch.where(experts_TK == e)
        by_loop_TD.index_add_(0, token, gates_TK[token, k, None] * mlp(x_TD[token]))

    order = experts_TK.flatten().argsort(stable=True)  # pairs of token and choice, expert 0 first
    tokens, counts = order // K, torch.bincount(experts_TK.flatten(), minlength=E)
    slices = x_TD[tokens].split(counts.tolist())  # one contiguous slice for each expert: unequal, nothing dropped
    outputs = torch.cat([mlp(part) for mlp, part in zip(mlps, slices, strict=True)])
    sorted_TD = torch.zeros_like(x_TD).index_add_(0, tokens, gates_TK.flatten()[order, None] * outputs)
off = (by_loop_TD - sorted_TD).abs().max().item()
print(f"loads {counts.tolist()}; sorted against the loop: {off:.0e}")
holds("sorted by expert, slice by slice, the output is the same", off < 1e-5)

# %% [markdown]
# The slices go to one *grouped* matmul on a GPU. The package's fast experts do that too (`grouped_mm`).
