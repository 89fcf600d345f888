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
# # Solutions of chapter 3b, ways to route

# %%
import sys
import warnings
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_claims import holds
from chapter_models import favour_two
from chapter_tools import cards, load_base, table

from flash_experts import GPT2MoEForCausalLM
from flash_experts.data.packing import encode_cards, pack
from flash_experts.models.router_metrics import router_metrics

warnings.simplefilter("ignore", UserWarning)  # the alarms of routers that we collapse on purpose
dense, tokenizer = load_base()
train_cards, validation_cards = cards("train"), cards("validation")[:200]
LAST = dense.config.n_layer - 1


def upcycled(**fields: object) -> GPT2MoEForCausalLM:
    """Eight experts in the last block, two per token."""
    torch.manual_seed(0)
    return GPT2MoEForCausalLM.from_dense(dense, num_experts=8, num_experts_per_tok=2, moe_layer_freq=LAST + 1, **fields)


def favouring_two(**fields: object) -> GPT2MoEForCausalLM:
    """The same, whose router favours the first two experts."""
    model = upcycled(**fields)
    favour_two(model, LAST, train_cards[:100], tokenizer)
    return model


# %% [markdown]
# ## 1. Capacity
#
# `Router.left_out` counts what a training forward would drop. The capacity is rounded up to whole tokens.

# %%
packed = pack(encode_cards(train_cards[:100], tokenizer))
rows, dropped = [], {}
for factor in (1.0, 1.25, 2.0, 4.0):
    shares = []
    for model in (upcycled(capacity_factor=factor), favouring_two(capacity_factor=factor)):
        model.train()
        with torch.no_grad():
            model(**packed.inputs_with_loss(packed.labels.numel()))
        shares.append(router_metrics(model)[f"router/{LAST}/drop_rate"])
    dropped[factor] = shares
    rows.append([f"{factor:g}", *(f"{share:.0%}" for share in shares)])
table(["capacity factor", "random router, dropped", "biased router, dropped"], rows)
holds("at 4 = E / K nothing is dropped", max(dropped[4.0]) == 0)
holds("a random router is not balanced either: 1.0 drops from it as well", dropped[1.0][0] > 0.02)
holds(
    "the biased router loses more at each factor under 4",
    all(dropped[factor][1] > dropped[factor][0] for factor in (1.0, 1.25, 2.0)),
)

# %% [markdown]
# At 4.0 even the worst collapse fits: all tokens on the same two experts are 4 times the mean load.
#
# ## 2. A random second expert
#
# The second gate of two is at most a half, so twice the gate is a probability.

# %%
torch.manual_seed(1)
T, E = 20_000, 8
logits_TE = torch.randn(T, E)
best_T2, experts_T2 = logits_TE.topk(2)
gates_T2 = best_T2.softmax(-1)
used_T = torch.rand(T) < 2 * gates_T2[:, 1]
print(f"experts of a token: {1 + used_T.float().mean():.2f}; expected {1 + 2 * gates_T2[:, 1].mean():.2f}")
small_T, large_T = gates_T2[:, 1] < 0.2, gates_T2[:, 1] > 0.4
rows = [["under 0.2", f"{used_T[small_T].float().mean():.0%}"], ["over 0.4", f"{used_T[large_T].float().mean():.0%}"]]
table(["second gate", "used"], rows)
holds("a token has between one and two experts", 1.5 < 1 + used_T.float().mean() < 2)
holds("what is left out is what counts least", used_T[small_T].float().mean() < 0.5 * used_T[large_T].float().mean())

# %% [markdown]
# ## 3. Who is dropped?
#
# The buffer of an expert has room for T K / E choices. In the order of the text the last ones find no room, whatever
# their gates.

# %%
leaning_TE = torch.randn(512, E) + torch.tensor([1.5, 1.0, 0, 0, 0, 0, 0, 0])
best_T2, experts_T2 = leaning_TE.topk(2)
gates_TE = torch.zeros_like(leaning_TE).scatter(1, experts_T2, best_T2.softmax(-1))
capacity = 512 * 2 // E
in_order_TE = (gates_TE > 0).cumsum(0) <= capacity
by_gate_TE = gates_TE.argsort(0, descending=True).argsort(0) < capacity
lost = {}
for way, kept_TE in (("in the order of the text", in_order_TE), ("largest gates first", by_gate_TE)):
    chosen_TE = gates_TE > 0
    lost[way] = (gates_TE[chosen_TE & ~kept_TE].sum() / gates_TE.sum()).item()
    choices = (chosen_TE & ~kept_TE).sum() / chosen_TE.sum()
    print(f"{way}: {choices:.0%} of the choices dropped, {lost[way]:.0%} of the gates")
holds(
    "the largest first lose less of the gates, for as many choices",
    lost["largest gates first"] < lost["in the order of the text"],
)

# %% [markdown]
# But who is first by the gate depends on later tokens: the leak of expert choice, smaller. The order of the text has none.
