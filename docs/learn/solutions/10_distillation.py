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
# # Solutions of chapter 10, distillation

# %%
import copy
import sys
from collections.abc import Callable
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_claims import holds
from chapter_models import bits_per_character, nats_of_names, tiny_student
from chapter_steps import in_steps, student_step
from chapter_tools import cards, load_base, table, teacher_names
from torch.nn import functional as F

from flash_experts.data.cards import Card
from flash_experts.data.packing import encode_cards, pack
from flash_experts.training.loss import kl_divergence

teacher, tokenizer = load_base()
validation_cards = cards("validation")[:200]
STEPS, NAMES_A_STEP = 32, 25
torch.manual_seed(0)
start = tiny_student(teacher)

Teacher = Callable[[torch.Tensor], torch.Tensor]


def taught(pool: list[Card], weight: float, change: Teacher = lambda logits_LV: logits_LV) -> float:
    """Held-out bits per character of a student after `STEPS` steps on a pool of names.

    Args:
        weight: of the teacher's probabilities.
        change: what is done to the teacher's logits.
    """
    student = copy.deepcopy(start)
    optimizer = torch.optim.AdamW(student.parameters(), weight_decay=0.05, fused=True)
    for step, names in enumerate(in_steps(pool, STEPS, NAMES_A_STEP)):
        row = pack(encode_cards(names, tokenizer))
        student_LV = student(**row.inputs).logits[0]
        loss = (1 - weight) * F.cross_entropy(student_LV, row.labels)
        if weight:
            with torch.no_grad():
                teacher_LV = change(teacher(**row.inputs).logits[0])
            loss = loss + weight * kl_divergence(student_LV, teacher_LV, 1.0, "forward").mean()
        student_step(student, optimizer, loss, step, STEPS)
    return bits_per_character(nats_of_names(student, validation_cards, tokenizer), validation_cards)


# %% [markdown]
# ## 1. The weight

# %%
real = cards("train")[:200]
of_weight = {weight: taught(real, weight) for weight in (0.0, 0.5, 1.0)}
table(["w", "held-out bits"], [[f"{weight:g}", f"{bits:.3f}"] for weight, bits in of_weight.items()])
holds("the teacher alone, without a single label, teaches more than labels alone", of_weight[1.0] < of_weight[0.0])
holds("so does half of each", of_weight[0.5] < of_weight[0.0])

# %% [markdown]
# The names still decide which prefixes the student sees. With w = 1 all targets come from the teacher.
#
# ## 2. A wrong teacher


# %%
def shuffled(logits_LV: torch.Tensor) -> torch.Tensor:
    """Each position gets the probabilities of another."""
    return logits_LV[torch.randperm(len(logits_LV))]


def uniform(logits_LV: torch.Tensor) -> torch.Tensor:
    """All tokens are equally likely, as for a model that has learned nothing."""
    return torch.zeros_like(logits_LV)


wrong = {
    "right": of_weight[0.5],
    "shuffled positions": taught(real, 0.5, shuffled),
    "uniform": taught(real, 0.5, uniform),
}
table(["teacher, w = 0.5", "held-out bits"], [[kind, f"{bits:.3f}"] for kind, bits in wrong.items()])
holds(
    "both wrong teachers are worse than the right one",
    wrong["right"] < min(wrong["shuffled positions"], wrong["uniform"]),
)
for kind in ("shuffled positions", "uniform"):
    difference = wrong[kind] - of_weight[0.0]
    print(f"{kind}: {difference:+.3f} bits against no teacher at all")

# %% [markdown]
# A uniform teacher is label smoothing ([Szegedy et al. 2016](https://arxiv.org/abs/1512.00567)). One with shuffled positions teaches
# how frequent each token is. On few names, repeated, even that keeps a student from being too certain. The right teacher's gain
# over them is what it knows about each position.
#
# ## 3. Fresh or repeated?

# %%
by_number = {count: taught(teacher_names(count), 0.0) for count in (50, 200, 800)}
passes = {count: STEPS * NAMES_A_STEP / count for count in by_number}
rows = [[f"{count:,}", f"{passes[count]:.0f}", f"{bits:.3f}"] for count, bits in by_number.items()]
table(["different names", "times each is read", "held-out bits"], rows)
holds(
    "the more different names, the better, for the same steps",
    [*by_number.values()] == sorted(by_number.values(), reverse=True),
)

# %% [markdown]
# FLOPs, steps and model are the same in all rows. Only the number of different names differs.
