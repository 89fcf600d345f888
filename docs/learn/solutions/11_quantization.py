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
# # Solutions of chapter 11, quantization

# %%
import copy
import sys
from pathlib import Path

# The chapters' tools lie one folder up; a notebook has no __file__, and runs where it lies.
sys.path.append(str(Path(globals().get("__file__", "a notebook")).resolve().parents[1]))

import torch
from chapter_claims import holds
from chapter_models import mean_and_error, nats_of_names, training_steps
from chapter_quantization import DENSE, best_scale, largest_scale, matrices, rounded, second_moments
from chapter_tools import cards, load_released, table
from torch import nn
from torch.nn.utils import parametrize

model, tokenizer = load_released()
some = cards("validation")[:100]
before_N = nats_of_names(model, some, tokenizer)
moments = second_moments(model, cards("train")[:200], tokenizer)

# %% [markdown]
# ## 1. Which matrix hurts?

# %%
rows, errors, costs = [], [], []
for index, W_IO in enumerate(matrices(model)[DENSE]):
    other = copy.deepcopy(model)
    new_IO = rounded(W_IO, largest_scale(W_IO, 2), 2)
    matrices(other)[DENSE][index].copy_(new_IO)
    H_II, D_IO = moments[W_IO.data_ptr()], new_IO - W_IO
    errors.append(((H_II @ D_IO * D_IO).sum() / (H_II @ W_IO * W_IO).sum()).item())
    mean, error = mean_and_error(nats_of_names(other, some, tokenizer) - before_N)
    costs.append(mean)
    place = f"dense MLP {index // 2 + 1}, {'up' if index % 2 == 0 else 'down'}"
    rows.append([place, f"{errors[-1]:.2f}", f"{mean:+.3f} ± {error:.3f}"])
table(["2 bits", "error of its outputs", "nats a name"], rows)
correlation = torch.corrcoef(torch.tensor([errors, costs]))[0, 1].item()
print(f"correlation of the two over {len(costs)} matrices: {correlation:+.2f}")
holds("the matrices differ: the worst costs over twice as much as the mildest", max(costs) > 2 * min(costs))

# %% [markdown]
# The error of a layer's outputs ranks ways to round *one* matrix. Between matrices it says less: each is a share of that layer's own
# outputs, and later layers depend on some outputs more than on others.
#
# ## 2. Rotate first
#
# A random rotation is the Q of a QR decomposition of normal numbers. Outliers among the inputs' weights become a little of
# everything. R (RᵀW) = W, so without rounding nothing changes.

# %%
torch.manual_seed(0)
rows, gain = [], {}
for index, W_IO in enumerate(matrices(model)[DENSE]):
    R_II = torch.linalg.qr(torch.randn(len(W_IO), len(W_IO)))[0]
    cells = []
    for name, scale in (("largest", largest_scale), ("best", best_scale)):
        turned_IO = R_II.T @ W_IO
        plain_error = (rounded(W_IO, scale(W_IO, 3), 3) - W_IO).square().sum() / W_IO.square().sum()
        new_IO = R_II @ rounded(turned_IO, scale(turned_IO, 3), 3)
        turned_error = (new_IO - W_IO).square().sum() / W_IO.square().sum()
        gain[index, name] = (turned_error / plain_error).item()
        cells += [f"{plain_error:.4f}", f"{turned_error:.4f}"]
    rows.append([f"dense MLP {index // 2 + 1}, {'up' if index % 2 == 0 else 'down'}", *cells])
table(["3 bits, squared error", "largest", "rotated", "best scale", "rotated"], rows)
print("rotated over plain:", ", ".join(f"{value:.2f}" for value in gain.values()))
holds("rotations change the error less where the scale is the best one",
      sum(abs(value - 1) for (_, name), value in gain.items() if name == "best")
      < sum(abs(value - 1) for (_, name), value in gain.items() if name == "largest"))  # fmt: skip

# %% [markdown]
# Rotated weights are sums of many and so nearly normal: the largest of them is not far from the rest. Where weights have outliers
# that helps the largest weight's scale. The best scale clips outliers already, so less is left to gain. In large models it is the *inputs* that
# have outliers, and there rotations pay.
#
# ## 3. Train through the rounding


# %%
class Rounded(nn.Module):
    """Forward: the rounded weights. Backward: as if they were the weights themselves (straight-through)."""

    def forward(self, W_IO: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            change_IO = rounded(W_IO, best_scale(W_IO, 2), 2) - W_IO
        return W_IO + change_IO


student = copy.deepcopy(model)
dense_layers = [layer for block in student.transformer.h if hasattr(block.mlp, "c_fc")
                for layer in (block.mlp.c_fc, block.mlp.c_proj)]  # fmt: skip
for layer in dense_layers:
    parametrize.register_parametrization(layer, "weight", Rounded())
for parameter in student.parameters():
    parameter.requires_grad_(False)
for layer in dense_layers:
    layer.parametrizations.weight.original.requires_grad_(True)
after = {"rounded, as it is": mean_and_error(nats_of_names(student, some, tokenizer) - before_N)}
losses = list(training_steps(student, cards("train")[::4], tokenizer, steps=40, learning_rate=1e-3, tokens=1000))
after["after 40 steps"] = mean_and_error(nats_of_names(student, some, tokenizer) - before_N)
table(["dense MLPs, 2 bits", "nats a name"], [[name, f"{m:+.3f} ± {e:.3f}"] for name, (m, e) in after.items()])
back = 1 - after["after 40 steps"][0] / after["rounded, as it is"][0]
print(f"a share of {back:.0%} of the cost came back")
integers_IO = dense_layers[0].weight / dense_layers[0].weight.abs().amax(0)
holds("the trained weights are -s, 0 or s", (integers_IO - integers_IO.round()).abs().max() < 1e-4)
holds("nothing else was trained", torch.equal(student.transformer.wte.weight, model.transformer.wte.weight))
holds("training through the rounding made the model better", back > 0)

# %% [markdown]
# The three levels stay; what changes is which weight has which. Longer training brings more back: BitNet's models never had other weights.
