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
# # Solutions of chapter 5b, Muon

# %%
import functools
import sys
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_claims import holds
from chapter_models import bits_per_character, mean_and_error, nats_of_names, tiny_student, training_steps, with_dropout
from chapter_steps import gradient
from chapter_tools import cards, franchise_cards, load_base, table, teacher_names

from flash_experts.data.packing import encode_cards, pack
from flash_experts.training import optimizer as optimizer_module
from flash_experts.training.optimizer import Muon, orthogonalize

base, tokenizer = load_base()

# %% [markdown]
# ## 1. How many iterations?

# %%
pool, some = teacher_names(3000), cards("validation")[:300]
found, spread = {}, {}
for steps in (1, 3, 5):
    few = functools.partial(orthogonalize, steps=steps)
    optimizer_module.orthogonalize = few  # what Muon's step calls
    values = torch.linalg.svdvals(few(torch.randn(1, 128, 512, generator=torch.manual_seed(0)))[0])
    spread[steps] = (values.max() / values.min()).item()
    torch.manual_seed(0)
    student = tiny_student(base)
    list(training_steps(student, pool, tokenizer, 40, 1e-2, tokens=500, optimizer="muon"))
    found[steps] = nats_of_names(student, some, tokenizer)
optimizer_module.orthogonalize = orthogonalize
rows = []
for steps, nats_N in found.items():
    mean, error = mean_and_error(nats_N - found[5])
    bits = bits_per_character(nats_N, some)
    rows.append([steps, f"{spread[steps]:.1f}", f"{bits:.3f}", f"{mean:+.2f} ± {error:.2f}"])
table(["iterations", "largest over smallest singular value", "bits per character", "nats a name, against 5"], rows)
holds("more iterations bring singular values nearer to each other", spread[1] > spread[3] > spread[5])

# %% [markdown]
# The matrix of the second column is random, so its values are within a factor of three from the start. A gradient's are further apart
# (the chapter's picture): there one iteration leaves most directions small. Look at the last column for what it costs.
#
# ## 2. One block or three?

# %%
new_cards, _ = franchise_cards()
model = with_dropout(base, 0.0)
row = pack(encode_cards(new_cards[:64], tokenizer))
gradient(model, row.inputs_with_loss(row.labels.numel()))
G = model.transformer.h[2].attn.c_attn.weight.grad
width = G.shape[0]
together = orthogonalize(G[None])[0]
rows, ratio = [], {}
for index, name in enumerate(("query", "key", "value")):
    of = slice(index * width, (index + 1) * width)
    alone = orthogonalize(G[None, :, of])[0]
    ratio[name] = (together[:, of].norm() / alone.norm()).item()
    norms = (f"{G[:, of].norm():.1e}", f"{together[:, of].norm():.1f}", f"{alone.norm():.1f}", f"{ratio[name]:.2f}")
    rows.append([name, *norms])
table(["", "gradient", "update, as one matrix", "as three", "ratio"], rows)
smallest = min(range(3), key=lambda index: G[:, index * width : (index + 1) * width].norm().item())
name = ("query", "key", "value")[smallest]
holds(f"as one matrix the {name}, with the smallest gradient, has a smaller share than the largest has",
      ratio[name] < max(ratio.values()))  # fmt: skip

# %% [markdown]
# As one matrix the three share the singular vectors of the output side, and the part with the larger gradient takes most of them. Alone,
# each gets the full step.
#
# ## 3. An expert without tokens
#
# A stack of two experts; the second has tokens in the first step only.

# %%
torch.manual_seed(0)
moves = {}
for kind in ("AdamW", "Muon"):
    experts_EDF = torch.nn.Parameter(torch.zeros(2, 64, 64))
    if kind == "AdamW":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW([experts_EDF], lr=1e-2, betas=(0.9, 0.95), weight_decay=0)
    else:
        optimizer = Muon([{"params": [experts_EDF]}], lr=1e-2)
    first = torch.randn(2, 64, 64)
    sizes = []
    for step in range(11):
        experts_EDF.grad = first.clone() if step == 0 else torch.stack([torch.randn(64, 64), torch.zeros(64, 64)])
        before = experts_EDF.detach().clone()
        optimizer.step()
        sizes.append((experts_EDF.detach() - before).flatten(1).norm(dim=1)[1].item())
    moves[kind] = sizes
rows = [[step, *(f"{moves[kind][step]:.4f}" for kind in moves)] for step in (0, 1, 2, 5, 10)]
table(["step", *(f"{kind}: how far the second moves" for kind in moves)], rows)
holds("both go on moving it without tokens, by the momentum", min(of[1] for of in moves.values()) > 0)
holds("AdamW's steps fade", moves["AdamW"][10] < 0.6 * moves["AdamW"][1])
holds("Muon's do not: the momentum shrinks, and its size is divided away", moves["Muon"][10] > 0.9 * moves["Muon"][1])

# %% [markdown]
# So a dead expert keeps wandering in its last direction under Muon, at full speed, until weight decay or new tokens stop it. With load
# balancing (chapter 3c) no expert is without tokens for many steps.
