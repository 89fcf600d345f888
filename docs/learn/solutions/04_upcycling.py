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
from chapter_claims import holds, verdict
from chapter_models import bits_per_character, nats_of_names, training_steps
from chapter_tools import cards, franchise_cards, load_base, table

from flash_experts import GPT2MoEForCausalLM
from flash_experts.data.packing import encode_cards, pack
from flash_experts.models.moe_layer import MoELayer
from flash_experts.models.router_metrics import router_metrics
from flash_experts.models.upcycling import to_dense

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
same = all(torch.equal(weight, back[name]) for name, weight in dense.state_dict().items())
holds("the dense weights come back bit by bit from untrained copies", same)

new_cards, held_out = franchise_cards()
moe = upcycled()
for _ in training_steps(moe, new_cards, tokenizer, 20, 2e-4, 320):
    pass
mean = to_dense(moe)
nats = {
    name: nats_of_names(each, held_out, tokenizer)
    for name, each in (("dense, before", dense), ("MoE model", moe), ("mean of the 8", mean))
}
table(["", "held-out bits"], [[name, f"{bits_per_character(each, held_out):.3f}"] for name, each in nats.items()])
gain_N = nats["mean of the 8"] - nats["MoE model"]
mean_gain, error = gain_N.mean().item(), 1.96 * gain_N.std().item() / len(gain_N) ** 0.5
print(f"mean minus MoE model: {mean_gain:+.3f} ± {error:.3f} nats a name")
print(
    verdict(
        mean_gain - error,
        mean_gain + error,
        "the mean of the experts is even better than the MoE model",
        "the MoE model is better than the mean of its experts",
        "no difference between the MoE model and the mean of its experts is shown",
    )
)
taught = (nats["dense, before"] - nats["MoE model"]).mean().item()
print(
    f"the 20 steps saved {taught:.2f} nats a name; the mean has {mean.num_parameters() / moe.num_parameters():.0%} of the weights"
)
holds("20 steps at this rate teach something", taught > 0)
holds("averaging costs at most a fifth of what they taught", mean_gain < taught / 5)

# %% [markdown]
# What 20 steps taught is common to all experts, or in the other weights. An MoE model must beat the mean of its experts to
# be worth its weights. `flash-experts export dense MODEL --out DIR` is this exercise as a command.
#
# ## 2. How much to drop

# %%
some = train_cards[:100]
rows, far, bits_of = [], [], []
for ratio in (0.0, 0.25, 0.5, 1.0):
    model = upcycled(method="drop", drop_ratio=ratio)
    bits = bits_per_character(nats_of_names(model, some, tokenizer), some)
    far.append(difference(model))
    bits_of.append(bits)
    rows.append([f"{ratio:g}", f"{far[-1]:.1e}", f"{bits:.3f}"])
bits = bits_per_character(nats_of_names(dense, some, tokenizer), some)
rows.append(["dense", "-", f"{bits:.3f}"])
table(["drop_ratio", "logits off by", "bits on training names"], rows)
print(
    f"at 1/2: {bits_of[2] - bits:+.3f} bits against dense; at 1, where nothing of these MLPs is left: {bits_of[3] - bits:+.3f}"
)
holds("at 0 it is the dense model", far[0] < 1e-4)
holds(
    "the more is dropped, the further the logits and the higher the bits",
    far == sorted(far) and bits_of == sorted(bits_of),
)
holds("the second half costs more than the first", bits_of[3] - bits_of[2] > bits_of[2] - bits_of[0])

# %% [markdown]
# Only every second block's MLP is initialized again; attention, embeddings and the other MLPs still work. The cost depends on how
# much the base uses these MLPs. A large difference of logits is not always a large loss: look at both.
#
# ## 3. The bias

# %%
rows, rights, wrongs = [], [], []
for granularity in (2, 4, 8):
    model = upcycled(method="granular", granularity=granularity)
    right = difference(model)
    with torch.no_grad():
        for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
            layer.experts.down_proj_bias *= granularity
    rights.append(right)
    wrongs.append(difference(model))
    rows.append([granularity, f"{right:.1e}", f"{wrongs[-1]:.1e}"])
table(["granularity", "as shipped", "bias multiplied too"], rows)
holds(
    "as shipped it is exact; with the bias multiplied the error is far beyond rounding, and grows",
    max(rights) < 1e-4 < 100 * max(rights) < wrongs[0] < wrongs[1] < wrongs[2],
)

# %% [markdown]
# The layer then adds the bias g times instead of once.
#
# ## 4. A router of zeros

# %%
model = upcycled(router_init="zeros")
with torch.no_grad():
    _, gates_TK, experts_TK = model.transformer.h[1].mlp.router(torch.randn(100, dense.config.n_embd))
print(f"logits off by {difference(model):.1e}, gates {gates_TK.unique().tolist()}")
pairs = experts_TK.unique(dim=0).tolist()
print("pairs of experts that 100 tokens chose:", pairs)
holds(
    "all tokens go to the same two experts, with equal gates", len(pairs) == 1 and gates_TK.unique().tolist() == [0.5]
)
holds("and the model is exact", difference(model) < 1e-4)
loads = {}
for step, _ in enumerate(training_steps(model, train_cards, tokenizer, 10, 1e-3, 320), start=1):
    load = router_metrics(model)
    loads[step] = [load[f"router/3/load/{e}"] for e in range(8)]
    if step in (1, 2, 4, 10):
        print(f"step {step:2}: load", "  ".join(f"{each:.2f}" for each in loads[step]))
working = {step: sum(each > 0.05 for each in load_E) for step, load_E in loads.items()}
print("experts with over a twentieth of the mean load:", "; ".join(f"step {step}: {n}" for step, n in working.items()))
holds("in step 1 two experts work, by step 10 more than four do", working[1] == 2 and working[10] > 4)

# %% [markdown]
# The first step teaches two experts only. The straight-through gate and the balancing loss then move the rows apart, and the
# tie is broken within a few steps. That is why the default is a small normal router: it spreads the very first tokens.
