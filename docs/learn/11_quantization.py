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
# # 11. Quantization
#
# **The question: in how few bits can the weights of an MoE model be stored, and do experts need fewer than the rest?**
#
# All experts take memory, though few work on a token. A model that makes one token at a time also waits for its weights to be
# read, not for the arithmetic (chapter 2b). So it pays to store them in fewer bits: quantization. This chapter rounds the weights
# of the released model after its training, in three ways, and measures what each costs. The package itself stores bfloat16 and
# no integers; what is written here is in `chapter_quantization.py`. The [glossary](../glossary.md) has the terms.

# %%
import copy
from collections.abc import Callable

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_models import altered, mean_and_error, nats_of_names
from chapter_quantization import (
    ATTENTION,
    DENSE,
    EMBEDDING,
    ROUTED,
    SHARED,
    best_scale,
    gptq,
    largest_scale,
    matrices,
    rounded,
    second_moments,
)
from chapter_tools import cards, load_released, quote, show, table

torch.set_grad_enabled(False)
model, tokenizer = load_released()
some = cards("validation")[:100]
before_N = nats_of_names(model, some, tokenizer)
whole = before_N.mean().item()
Rounding = Callable[[torch.Tensor, int], torch.Tensor]  # a matrix and the number of bits


def with_rounded(part: str, bits: int, rounding: Rounding) -> torch.nn.Module:
    """A copy of the model, one part of which is rounded."""
    other = copy.deepcopy(model)
    for new_IO, W_IO in zip(matrices(other)[part], matrices(model)[part], strict=True):
        new_IO.copy_(rounding(W_IO, bits))
    return other


def cost(changed: torch.nn.Module) -> tuple[float, float]:
    """Nats a name more than the released model needs, given its attributes, and half of the 95% interval over names."""
    return mean_and_error(nats_of_names(changed, some, tokenizer) - before_N)


def plain(W_IO: torch.Tensor, bits: int) -> torch.Tensor:
    return rounded(W_IO, largest_scale(W_IO, bits), bits)


# %% [markdown]
# ## The picture first
#
# Each line is one part of the model, rounded to integers of few bits while the rest stays as it is. The cost is in nats a
# name, against the model as released. The dotted line is what the routed experts are worth: the cost of a model without them.

# %%
BITS = (8, 5, 4, 3, 2)
costs = {(part, bits): cost(with_rounded(part, bits, plain)) for part in matrices(model) for bits in BITS}
silent = cost(altered(model, "routed experts silent"))
figure, axis = plt.subplots(figsize=(8, 3.6))
for part, marker in zip(matrices(model), "sov^D", strict=True):
    means, errors = zip(*(costs[part, bits] for bits in BITS), strict=True)
    axis.errorbar(BITS, means, yerr=errors, fmt=f"{marker}-", markersize=4, capsize=2, label=part)
axis.axhline(silent[0], color="black", linestyle=":", label="without the routed experts")
axis.set_yscale("symlog", linthresh=0.1)  # straight between -0.1 and 0.1, logarithmic beyond
axis.set(xlabel="bits a weight", ylabel="nats a name more, 95% intervals", xticks=BITS)
axis.set_title("rounded to the nearest, one scale for each output unit")
axis.invert_xaxis()
axis.legend(fontsize=7.5)
show(figure, "11_parts_and_bits")
numbers = {part: sum(W_IO.numel() for W_IO in of) for part, of in matrices(model).items()}
rows = [
    [part, f"{numbers[part] / 1e6:.1f} M", *(f"{costs[part, b][0]:+.3f} ± {costs[part, b][1]:.3f}" for b in BITS)]
    for part in numbers
]
table(["part", "weights", *(f"{bits} bits" for bits in BITS)], rows)
holds("8 bits cost less than 1% of the nats in every part", all(costs[p, 8][0] < 0.01 * whole for p in numbers))
holds("2 bits cost the embedding most, and the dense MLPs and attention too: their intervals are above 0",
      max(numbers, key=lambda part: costs[part, 2][0]) == EMBEDDING
      and all(costs[part, 2][0] > costs[part, 2][1] for part in (DENSE, ATTENTION)))  # fmt: skip
print("least at 2 bits:", min(numbers, key=lambda part: costs[part, 2][0]))

# %% [markdown]
# Do experts need fewer bits because they are experts? The dotted line is a warning: what contributes little costs little when it
# is rounded. We come back to it.
#
# ## Formats with an exponent
#
# A floating-point number has a sign, an exponent (its range) and a fraction (its precision). With f bits of fraction, rounding
# moves a number by at most a share of 2⁻⁽ᶠ⁺¹⁾.

# %%
rows, worst = [], {}
numbers_N = torch.rand(100_000, dtype=torch.float64) * 7 + 1
for name, exponent, fraction in (("float32", 8, 23), ("float16", 5, 10), ("bfloat16", 8, 7)):
    kind = getattr(torch, name)
    worst[name] = ((numbers_N.to(kind).double() - numbers_N) / numbers_N).abs().max().item()
    bound = f"{2.0 ** -(fraction + 1):.1e}"
    rows.append([name, 1 + exponent + fraction, exponent, fraction, f"{torch.finfo(kind).max:.1e}", bound, worst[name]])
table(["format", "bits", "exponent", "fraction", "largest", "at most", "found"],
      [[*row[:-1], f"{row[-1]:.1e}"] for row in rows])  # fmt: skip
holds("bfloat16 has the range of float32, and moves a number by at most 2^-8 = 0.4%",
      worst["bfloat16"] <= 2**-8 and torch.finfo(torch.bfloat16).max > 1e38)  # fmt: skip
stored = copy.deepcopy(model).to(torch.bfloat16)
holds("the released files are bfloat16 already: storing the model so again changes nothing",
      cost(copy.deepcopy(stored).float())[0] == 0)  # fmt: skip
few = nats_of_names(stored, some[:40], tokenizer) - before_N[:40]  # few: slow where bfloat16 is emulated
mean, error = mean_and_error(few)
print(f"computing in it too (--dtype bfloat16), 40 names: {mean:+.3f} ± {error:.3f} nats a name")
holds("and costs less than 1% of the nats", mean < 0.01 * whole)

# %% [markdown]
# ## Integers and a scale
#
# Without an exponent all levels are equally far apart. The distance is the **scale** s, which many weights share:
#
# $$ \hat W_{io} = s_o\;\text{clip}\big(\text{round}(W_{io} / s_o),\, -m,\, m\big) \qquad m = 2^{b-1} - 1 $$
#
# | symbol | shape | is |
# | --- | --- | --- |
# | `W_IO` | (I, O) | the matrix: I inputs, O output units |
# | `s_O` | (O,) | the scale of each output unit |
# | b, m | numbers | bits a weight; the largest integer |
#
# Two bits leave -s, 0 and s. The plain choice is s = max|W| / m, so that nothing is clipped.

# %%
quote(rounded)
quote(largest_scale)
column_IO = torch.tensor([[0.31], [-0.70], [0.12], [0.05]])
for bits in (4, 3, 2):
    s_O = largest_scale(column_IO, bits)
    integers = (rounded(column_IO, s_O, bits) / s_O).round().int().flatten().tolist()
    new = [round(value, 2) for value in rounded(column_IO, s_O, bits).flatten().tolist()]
    print(f"{bits} bits: s = {s_O.item():.3f}, integers {integers}, weights {new}")

# %% [markdown]
# **Who shares a scale?** Fewer weights to a scale fit it better, and need more scales. GGUF's Q4_0, for example, has a float16 for
# every 32 weights: 4.5 bits a weight. For one matrix at 4 bits:

# %%
W_IO = matrices(model)[DENSE][0]
inputs, units = W_IO.shape
number = W_IO.numel()
shared_by = {"the whole matrix": (1, number), "an output unit": (units, inputs), "32 weights": (number // 32, 32)}
errors, rows = [], []
for name, (scales, size) in shared_by.items():
    groups_IO = W_IO.T.reshape(scales, size).T
    error = (plain(groups_IO, 4) - groups_IO).square().sum() / W_IO.square().sum()
    errors.append(error.item())
    rows.append([name, f"{scales:,}", f"{4 + 16 * scales / number:.3f}", f"{errors[-1]:.5f}"])
table(["a scale for", "scales", "bits a weight", "squared error, share of the squared weights"], rows)
holds("the fewer weights share a scale, the smaller the error", errors == sorted(errors, reverse=True))

# %% [markdown]
# ## Two better ways to round
#
# **A smaller scale.** One large weight makes the steps of all others coarse. With a smaller scale it is clipped, and the others gain:
# `best_scale` tries 40 and takes the one with the least squared error.
#
# **Look at the outputs.** What matters is not the weights but what the layer makes of its inputs X: the error of its outputs,
# tr(Dᵀ H D) with D = Ŵ - W and H = XᵀX. H is known after reading a few names (**calibration**).
# [GPTQ](https://arxiv.org/abs/2210.17323) (Frantar et al. 2022, after Hassibi and Stork's Optimal Brain Surgeon) rounds one input's weights
# after the other. After each it changes the weights that are not yet rounded, so that the outputs move least:
#
# $$ \delta_{j} = -\,\frac{W_{io} - \hat W_{io}}{[H^{-1}]_{ii}}\,[H^{-1}]_{ij} \qquad j > i $$
#
# where H is that of the inputs i, i + 1, … The Cholesky factor U of H⁻¹ (UᵀU = H⁻¹) has these rows for every i, each
# divided by the root of its first entry. So one factorization is enough:

# %%
quote(best_scale)
quote(gptq)
moments = second_moments(model, cards("train")[:400], tokenizer)


def clipped(W_IO: torch.Tensor, bits: int) -> torch.Tensor:
    return rounded(W_IO, best_scale(W_IO, bits), bits)


def by_outputs(W_IO: torch.Tensor, bits: int) -> torch.Tensor:
    return gptq(W_IO, moments[W_IO.data_ptr()], best_scale(W_IO, bits), bits)


WAYS: dict[str, Rounding] = {"plain": plain, "smaller scale": clipped, "GPTQ": by_outputs}
independent_IO = gptq(W_IO, torch.eye(inputs), largest_scale(W_IO, 3), 3)
holds("where inputs do not depend on each other (H = 1), GPTQ rounds to the nearest",
      torch.allclose(independent_IO, plain(W_IO, 3)))  # fmt: skip


def output_error(W_IO: torch.Tensor, rounding: Rounding, bits: int) -> float:
    """Squared error of the layer's outputs on the calibration names, as a share of the squared outputs (biases left out)."""
    H_II, D_IO = moments[W_IO.data_ptr()], rounding(W_IO, bits) - W_IO
    return ((H_II @ D_IO * D_IO).sum() / (H_II @ W_IO * W_IO).sum()).item()


LAYERS = (ATTENTION, DENSE, SHARED, ROUTED)
off = {
    (part, name): sum(output_error(W_IO, way, 2) for W_IO in matrices(model)[part]) / len(matrices(model)[part])
    for part in LAYERS
    for name, way in WAYS.items()
}
at_two = {(part, name): cost(with_rounded(part, 2, way)) for part in LAYERS for name, way in WAYS.items()}
rows = [
    [part, *(f"{off[part, name]:.3f}" for name in WAYS), *("{:+.3f} ± {:.3f}".format(*at_two[part, n]) for n in WAYS)]
    for part in LAYERS
]
table(["2 bits", *(f"output error, {name}" for name in WAYS), *(f"nats, {name}" for name in WAYS)], rows)
holds("in every part a smaller scale halves the outputs' error, and GPTQ halves it again",
      all(off[p, "GPTQ"] < off[p, "smaller scale"] / 2 < off[p, "plain"] / 4 for p in LAYERS))  # fmt: skip
holds("the dense MLPs at 2 bits gain most: GPTQ costs under a quarter of plain rounding",
      at_two[DENSE, "GPTQ"][0] < at_two[DENSE, "plain"][0] / 4)  # fmt: skip

# %% [markdown]
# **Less squared error is not always better.** The embedding is also the output layer, so its errors go straight into the logits.
# Clipping makes the row of each token shorter. A rare token has a logit far below 0, which a shorter row brings nearer to 0:
# it becomes likelier, and there are thousands of such tokens.

# %%
W_DV = matrices(model)[EMBEDDING][0]
read: list[torch.Tensor] = []
hook = model.lm_head.register_forward_hook(lambda module, inputs, output: read.append(inputs[0].flatten(0, -2)))
nats_of_names(model, some, tokenizer)
hook.remove()
x_TD = torch.cat(read)
rare = (x_TD @ W_DV).softmax(-1).mean(0).argsort()[: W_DV.shape[1] // 2]  # half of the vocabulary
squared, up, nats = {}, {}, {}
for name in ("plain", "smaller scale"):
    D_DV = WAYS[name](W_DV, 4) - W_DV
    squared[name] = (D_DV.square().sum() / W_DV.square().sum()).item()
    up[name] = (x_TD @ D_DV[:, rare]).mean().item()
    nats[name] = cost(with_rounded(EMBEDDING, 4, WAYS[name]))
rows = [[name, f"{squared[name]:.3f}", f"{up[name]:+.2f}", "{:+.3f} ± {:.3f}".format(*nats[name])] for name in squared]
table(["embedding, 4 bits", "squared error", "logits of rare tokens", "nats a name"], rows)
holds("the smaller scale has the smaller squared error", squared["smaller scale"] < squared["plain"])
holds("and moves the logits of rare tokens up by more", up["smaller scale"] > up["plain"])
holds("so that the model gets worse", nats["smaller scale"][0] > nats["plain"][0])

# %% [markdown]
# ## Do experts need fewer bits?
#
# [MoQE](https://arxiv.org/abs/2310.02410) (Kim et al. 2023) found that experts bear 2 bits better than dense MLPs.
# [QMoE](https://arxiv.org/abs/2310.16795) (Frantar and Alistarh 2023) rounds the experts of a Switch Transformer of 1.6 T weights to
# three levels as GPTQ does, and codes the many zeros: under 160 GB instead of 3.2 TB. And here? Two numbers tell a robust
# part from one that contributes little: the error of its outputs (the table above), and what the model loses without it.

# %%
print(f"the model without its routed experts: {silent[0]:+.3f} ± {silent[1]:.3f} nats a name, of {whole:.1f}")
holds("the outputs of experts suffer as those of the shared experts do: within a factor of two",
      0.5 < off[ROUTED, "plain"] / off[SHARED, "plain"] < 2)  # fmt: skip
less = at_two[ROUTED, "plain"][0] < at_two[SHARED, "plain"][0] / 2
print("rounding them costs", "less than half" if less else "half or more", "of what it costs with the shared experts")

# %% [markdown]
# So experts are not robust by nature: the outputs of all these layers suffer alike. What differs is how much the model depends on
# them. The released experts joined late and contribute little ([chapter 9](09_do_experts_pay.py)). Where experts are worth more, look at
# both numbers again.
#
# ## A budget
#
# Parts that bear few bits get few. The size counts a scale of 16 bits for each unit; biases, norms and routers stay as they are.

# %%
BUDGETS = {
    "8 bits everywhere": (8, 8, 8, 8, 8),
    "4 bits everywhere": (4, 4, 4, 4, 4),
    "6 for the embedding, 4, 4, 3, 2": (6, 4, 4, 3, 2),
}
rows, found = [["bfloat16", f"{2 * sum(numbers.values()) / 1e6:.1f} MB", "-"]], {}
for name, bits_of in BUDGETS.items():
    other, size = copy.deepcopy(model), 0
    for part, bits in zip(numbers, bits_of, strict=True):
        rounding = plain if part == EMBEDDING else by_outputs
        for new_IO, W_IO in zip(matrices(other)[part], matrices(model)[part], strict=True):
            new_IO.copy_(rounding(W_IO, bits))
            size += bits * W_IO.numel() + 16 * W_IO.shape[1]
    found[name] = size / 8e6, *cost(other)
    rows.append([name, f"{found[name][0]:.1f} MB", f"{found[name][1]:+.3f} ± {found[name][2]:.3f}"])
table(["", "size", "nats a name"], rows)
mixed = found["6 for the embedding, 4, 4, 3, 2"]
holds("the mixed budget takes under a third of bfloat16, and costs less than 2% of the nats",
      mixed[0] < 2 * sum(numbers.values()) / 1e6 / 3 and mixed[1] < 0.02 * whole)  # fmt: skip

# %% [markdown]
# **What is saved, and what is not.** These are *weight-only* formats: a kernel reads the integers, multiplies by the scale in
# registers, and computes in bfloat16. Where reading is the bottleneck, as for one token at a time, the time falls with the bytes.
# For many tokens at once nothing is gained. Then the inputs have to be integers as well, so that the matmul is one of integers
# ([LLM.int8()](https://arxiv.org/abs/2208.07339), [SmoothQuant](https://arxiv.org/abs/2211.10438)); inputs have outliers, which makes that harder.
# An MoE model gains more than a dense one in memory and as much for each token read.
#
# Below 3 bits it is better to train with the rounding in place (quantization-aware training): forward with Ŵ, and backward as if it
# were W, the straight-through estimator of chapter 4. [BitNet b1.58](https://arxiv.org/abs/2402.17764) trains with three levels from the first step.
#
# ## What to remember
#
# - Eight bits are nearly free after training. Four need some care, two need more than rounding to the nearest.
# - Measure the error of a layer's outputs, not of its weights.
# - The embedding and output layer bear the fewest cuts.
# - A part that bears 2 bits may be robust, or may be doing little. Compare with the model without it.
#
# ## Exercises
#
# 1. **Which matrix hurts?** Round each matrix of the dense MLPs to 2 bits by itself. Does the cost follow the error of its outputs?
# 2. **Rotate first.** Turn the inputs of a matrix by a random rotation R, round RᵀW, and turn back. Outliers are spread over all
#    inputs. Is the error smaller, with the largest weight's scale and with the best one?
# 3. **Train through the rounding.** Train the dense MLPs for 40 steps with 2-bit weights and the straight-through estimator. How
#    much of the cost comes back?
#
# Solutions: [solutions/11_quantization.py](solutions/11_quantization.py).
#
# ## Reading
#
# - [Dettmers and Zettlemoyer 2022](https://arxiv.org/abs/2212.09720): how many bits are best for a given memory.
#   [AWQ](https://arxiv.org/abs/2306.00978) (Lin et al. 2023): scales that spare the weights of large inputs.
# - [QuaRot](https://arxiv.org/abs/2404.00456) (Ashkboos et al. 2024): rotations. [Optimal Brain Surgeon](https://proceedings.neurips.cc/paper/1992/hash/303ed4c69846ab36c2904d3ba8573050-Abstract.html)
#   (Hassibi and Stork 1993): where the correction comes from.
# - [What llama.cpp's formats are](https://github.com/ggml-org/llama.cpp/blob/master/tools/quantize/README.md). Back to
#   [chapter 9](09_do_experts_pay.py): what experts are worth.
