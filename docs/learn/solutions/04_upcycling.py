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
# # Solutions of chapter 4, upcycling

# %%
import sys
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_models import bits_per_character, nats_of_names, training_steps
from chapter_tools import cards, franchise_cards, load_base, table

from flash_experts import GPT2MoEForCausalLM
from flash_experts.data.packing import encode_cards, pack
from flash_experts.models.downcycling import to_dense
from flash_experts.models.moe_layer import MoELayer
from flash_experts.models.router_metrics import router_metrics

dense, tokenizer = load_base()
train_cards = cards("train")
packed = pack(encode_cards(train_cards[:32], tokenizer))
with torch.no_grad():
    dense_logits = dense(**packed.inputs).logits


def upcycled(**fields: object) -> GPT2MoEForCausalLM:
    """Eight experts in every second block, two per token."""
    torch.manual_seed(0)
    return GPT2MoEForCausalLM.from_dense(dense, num_experts=8, num_experts_per_tok=2, moe_layer_freq=2, **fields)


@torch.no_grad()
def difference(model: torch.nn.Module) -> float:
    """Largest difference of any logit from the dense model's."""
    return (model(**packed.inputs).logits - dense_logits).abs().max().item()


# %% [markdown]
# ## 1. The way back
#
# The mean of equal experts is the expert: the dense weights come back bit by bit.

# %%
back = to_dense(upcycled()).state_dict()
print(
    "weights of the mean of untrained copies equal:",
    all(torch.equal(w, back[n]) for n, w in dense.state_dict().items()),
)

new_cards, held_out = franchise_cards()
mixture = upcycled()
for _ in training_steps(mixture, new_cards, tokenizer, 20, 1e-3):
    pass
mean = to_dense(mixture)
nats = {
    name: nats_of_names(each, held_out, tokenizer)
    for name, each in (("dense, before", dense), ("mixture of 8", mixture), ("mean of the 8", mean))
}
table(["", "held-out bits"], [[name, f"{bits_per_character(each, held_out):.3f}"] for name, each in nats.items()])
gain_N = nats["mean of the 8"] - nats["mixture of 8"]
print(f"mean against mixture: {gain_N.mean():+.3f} ± {1.96 * gain_N.std() / len(gain_N) ** 0.5:.3f} nats a name")

# %% [markdown]
# As good within the interval, at a third of the weights and less arithmetic: what 20 steps taught is common to all
# experts, or lies in the other weights. A mixture must beat the mean of its experts to be worth its weights.
# `flash-experts downcycle` is this exercise as a command.
#
# ## 2. How much to drop

# %%
some = train_cards[:100]
rows = []
for ratio in (0.0, 0.25, 0.5, 1.0):
    model = upcycled(method="drop", drop_ratio=ratio)
    bits = bits_per_character(nats_of_names(model, some, tokenizer), some)
    rows.append([f"{ratio:g}", f"{difference(model):.1e}", f"{bits:.3f}"])
bits = bits_per_character(nats_of_names(dense, some, tokenizer), some)
rows.append(["dense", "-", f"{bits:.3f}"])
table(["drop_ratio", "logits off by", "bits on training names"], rows)

# %% [markdown]
# The logits move far and the bits little, even at 1, where nothing of these MLPs is left. Only every second block's MLP
# is drawn anew; attention, embeddings and the other MLPs carry the names. A large difference of logits is not a large
# loss: look at both.
#
# ## 3. The bias

# %%
rows = []
for granularity in (2, 4, 8):
    model = upcycled(method="granular", granularity=granularity)
    right = difference(model)
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
            layer.experts.down_proj_bias *= granularity
    rows.append([granularity, f"{right:.1e}", f"{difference(model):.1e}"])
table(["granularity", "as shipped", "bias multiplied too"], rows)

# %% [markdown]
# The layer then adds the bias g times instead of once. In these layers it is small, yet the error is far beyond rounding,
# and grows with g - 1.
#
# ## 4. A router of zeros

# %%
model = upcycled(router_init="zeros")
with torch.no_grad():
    _, gates_TK, experts_TK = model.transformer.h[1].mlp.router(torch.randn(100, dense.config.n_embd))
print(f"logits off by {difference(model):.1e}, gates {gates_TK.unique().tolist()}")
print("pairs of experts that 100 tokens chose:", experts_TK.unique(dim=0).tolist())
for step, _ in enumerate(training_steps(model, train_cards, tokenizer, 10, 1e-3), start=1):
    load = router_metrics(model)
    if step in (1, 2, 4, 10):
        print(f"step {step:2}: load", "  ".join(f"{load[f'router/3/load/{e}']:.2f}" for e in range(8)))

# %% [markdown]
# Exact, but all tokens go to the same two experts: the first step teaches only these. The straight-through gate and the
# balancing loss then move the rows apart, and the tie is broken within a few steps. That is why the default is a small
# normal router: it spreads the very first tokens.
