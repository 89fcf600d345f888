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
# # Solutions of chapter 3c, balance

# %%
import sys
import warnings
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_claims import holds
from chapter_models import bits_per_character, favour_two, nats_of_names, training_steps
from chapter_tools import cards, load_base, table

from flash_experts import GPT2MoEForCausalLM
from flash_experts.models.moe_layer import load_balancing_loss
from flash_experts.models.router_metrics import router_metrics
from flash_experts.training.training_config import LearningRateScale

warnings.simplefilter("ignore", UserWarning)  # the alarms of routers that we collapse on purpose
dense, tokenizer = load_base()
train_cards, validation_cards = cards("train"), cards("validation")[:200]
LAST = dense.config.n_layer - 1
EXPERTS_ONLY = LearningRateScale(router=10, dense=0)


def upcycled(**fields: object) -> GPT2MoEForCausalLM:
    """Eight experts in the last block, two per token."""
    torch.manual_seed(0)
    return GPT2MoEForCausalLM.from_dense(dense, num_experts=8, num_experts_per_tok=2, moe_layer_freq=LAST + 1, **fields)


def favouring_two(**fields: object) -> GPT2MoEForCausalLM:
    """The same, whose router favours the first two experts."""
    model = upcycled(**fields)
    favour_two(model, LAST, train_cards[:100], tokenizer, 8.0)
    return model


# %% [markdown]
# ## 1. Under 1
#
# The loss is E times the sum over experts of (share of the choices) x (mean probability). It is 1 when either factor
# is equal for all experts. It is under 1 when busy experts have *low* mean probabilities. So: 30 of 100 tokens choose
# expert 0, but by a hair; the other 70 are spread evenly over the other experts, each sure.

# %%
logits_TE = torch.zeros(100, 8)
logits_TE[:30, 0] = 0.01
token = torch.arange(30, 100)
logits_TE[token, 1 + token % 7] = 20.0
experts_TK = logits_TE.argmax(-1, keepdim=True)
print("load:", [f"{load:.2f}" for load in (torch.bincount(experts_TK[:, 0], minlength=8) / 12.5).tolist()])
print("mean probability:", [f"{p:.3f}" for p in logits_TE.softmax(-1).mean(0).tolist()])
loss_under_1 = load_balancing_loss(logits_TE, experts_TK)
print(f"loss: {loss_under_1:.3f}")
holds("an unbalanced router with a loss under 1", loss_under_1 < 1)

# %% [markdown]
# So "the minimum is 1" holds where the probabilities follow the shares, as they do with a router that is sure: f = P
# gives E times a sum of squares, at least 1 by Cauchy and Schwarz. In between, a value under 1 is no sign of balance.
#
# ## 2. The coefficient

# %%
rows, ends, bits_of = [], {}, {}
WITHOUT = {"router_z_loss_coef": 0.0}
for coefficient, more in ((0.0, WITHOUT), (0.0, {}), (0.001, {}), (0.01, {}), (0.1, {}), (1.0, {})):
    model = favouring_two(router_aux_loss_coef=coefficient, **more)
    reads, losses = [], []
    for loss in training_steps(model, train_cards, tokenizer, 15, 1e-3, 320, lr_scale=EXPERTS_ONLY):
        reads.append(router_metrics(model)[f"router/{LAST}/load_cv"])
        losses.append(loss)
    late = sum(losses[-5:]) / 5
    bits = bits_per_character(nats_of_names(model, validation_cards, tokenizer), validation_cards)
    label = f"{coefficient:g}{', no z-loss' if more else ''}"
    ends[label], bits_of[label] = reads[-1], bits
    rows.append([label, f"{reads[0]:.2f}", f"{reads[-1]:.2f}", f"{late:.3f}", f"{bits:.3f}"])
table(["coefficient", "spread, step 1", "spread, step 15", "training loss, last 5", "validation bits"], rows)

holds(
    "without any loss the collapse stays; large coefficients cure it fastest",
    ends["0, no z-loss"] > 2 * max(ends["0.1"], ends["1"]),
)
small = [ends[label] for label in ("0", "0.001", "0.01")]
holds(
    "0, 0.001 and 0.01 end alike: what moves the router there is the z-loss (0.001, the default)",
    max(small) < 1.3 * min(small) and max(small) < 0.75 * ends["0, no z-loss"],
)
holds("no cost in bits is seen", max(bits_of.values()) - min(bits_of.values()) < 0.03)

# %% [markdown]
# The z-loss lowers the large logits of the two favoured experts, and with them their lead: it has cured most of the
# collapse before a small balancing loss has an effect. A cost in language loss does not show here: the experts are
# still nearly equal, so a token loses nothing at the wrong one. Expect a cost when they have become different. That is why 0.01 is
# the usual value and not 1.
#
# ## 3. The rate of the bias

# %%
rows, last_of, swings = [], {}, {}
for rate in (0.001, 0.01, 0.1):
    model = favouring_two(router_aux_loss_coef=0.0, router_z_loss_coef=0.0, router_bias_update_rate=rate)
    spreads = []
    for _ in training_steps(model, train_cards, tokenizer, 15, 1e-3, 320, lr_scale=EXPERTS_ONLY):
        spreads.append(router_metrics(model)[f"router/{LAST}/load_cv"])
    last_of[rate] = spreads[-1]
    swings[rate] = (torch.tensor(spreads[-6:]).diff().abs().mean()).item()
    rows.append([f"{rate:g}", f"{spreads[0]:.2f}", f"{min(spreads):.2f}", f"{spreads[-1]:.2f}", f"{swings[rate]:.2f}"])
table(["rate", "spread, step 1", "least", "step 15", "change a step, last 5"], rows)
holds("0.001, the usual rate, is too slow for 15 steps", last_of[0.001] > 0.8 * ends["0, no z-loss"])
holds("a larger rate moves the loads sooner", last_of[0.01] < last_of[0.001])

# %% [markdown]
# Scores are probabilities, so a bias of 0.1 a step outweighs most of them at once: the loads then swing from one group of
# experts to the other. The usual rate is for thousands of steps.
