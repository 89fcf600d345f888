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
# # 9. Do experts pay?
#
# **The question: does a model with experts write better names than a dense model, for what it costs in weights,
# FLOPs, seconds and training data, and when would one use experts at all?**
#
# Chapters 3 and 4 show how experts work. This one has this project's evidence: dense models and MoE models, trained in the same
# way with three seeds, and tested once on names that none has read. The tables of our models are not written by hand: they come
# from `benchmarks/results/`, from the logs of the released models, or from this run. Negative results are among them. The
# [glossary](../glossary.md#mixture-of-experts) has the terms.

# %%
import json
import math
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds, verdict
from chapter_models import altered, bits_per_character, mean_and_error, nats_of_names
from chapter_tools import BASE, RELEASED, ROOT, cards, load_base, load_released, show, table
from matplotlib.patches import Patch

from flash_experts.training.tracking import read_metrics

RESULTS = ROOT / "benchmarks/results"
released_runs = json.loads((RESULTS / "released_2cores.json").read_text("utf-8"))
runs, less_dense = released_runs["runs"], released_runs["less_dense"]
LABELS = {
    "dense": "dense",
    "dense-active": "dense, equal active parameters",
    "dense-active-early": "dense, equal active parameters, widened early",
    "dense-total": "dense, equal total parameters",
    "shared": "experts, upcycled late",
    "moe": "experts, upcycled late",
    "shared-early": "experts, upcycled early",
    "moe-early": "experts, upcycled early",
}
SETS = {"test_iid": "test_iid: families that were read", "test": "test: families of which nothing was read"}


def is_moe(name: str) -> bool:
    """An MoE model has more parameters than a token uses."""
    return runs[name][0]["size"]["total"] > runs[name][0]["size"]["active"]


def bits(name: str, split: str, prompt: str = "unconditional") -> float:
    """The mean over seeds."""
    return fmean(run["bits"][split][prompt]["value"] for run in runs[name])


def flops(name: str) -> float:
    """FLOPs of the last stage, the mean over seeds."""
    return fmean(run["flops"] for run in runs[name])


seeds = len(runs["dense"])
print(f"{len(runs)} kinds of models, {seeds} seeds each, PyTorch {released_runs['versions']['torch']}")

# %% [markdown]
# ## The picture first
#
# The figure shows bits per character minus those of the dense model of the same seed, on the same names: left is better. The three
# points are three seeds, with 95% intervals over names (paired bootstrap, chapter 7).

# %%
COLORS = {"dense": "tab:blue", "with experts (MoE)": "tab:orange"}
KEY = [Patch(color=color, label=label) for label, color in COLORS.items()]
figure, axes = plt.subplots(1, 2, figsize=(13, 3.4), sharey=True)
for axis, (split, title) in zip(axes, SETS.items(), strict=True):
    for row, name in enumerate(less_dense):
        for seed, each in enumerate(less_dense[name][split]["each"]):
            place, color = row + 0.2 * (seed - 1), [*COLORS.values()][is_moe(name)]
            errors = [[each["value"] - each["low"]], [each["high"] - each["value"]]]
            axis.errorbar(each["value"], place, xerr=errors, fmt="o", color=color, markersize=4)
    axis.axvline(0, color="black", linewidth=0.8)
    axis.set(title=title, xlabel="bits per character, minus the dense model's")
axes[0].set_yticks(range(len(less_dense)), [LABELS.get(name, name) for name in less_dense])
axes[0].invert_yaxis()
figure.legend(handles=KEY, loc="outside lower center", ncols=2)
show(figure, "09_less_dense")

# %% [markdown]
# In words, by the intervals of each seed:

# %%
for name in less_dense:
    for split in SETS:
        each = less_dense[name][split]["each"]
        found = [verdict(one["low"], one["high"], "better", "worse", "not shown") for one in each]
        counts = ", ".join(f"{found.count(kind)} {kind}" for kind in ("better", "worse", "not shown") if kind in found)
        print(f"{LABELS.get(name, name)}, {split}: {less_dense[name][split]['mean']:+.4f} on average; {counts}")

# %% [markdown]
# ## The models, and what they cost
#
# - **dense**: the base, fine-tuned on the names.
# - **equal active parameters**: a dense model, widened so that a token uses as many weights as in the MoE model.
# - **equal total parameters**: a dense model as large as all experts together.
# - **upcycled late**: experts made before the last stage of training, the names.
# - **upcycled early**: experts made one stage before, where there is much more text.
#
# A comparison has to state what is equal. There are four costs: all weights, active weights, FLOPs and seconds.

# %%
rows = []
for name, of_seeds in runs.items():
    size = of_seeds[0]["size"]
    seconds = [run["seconds"] for run in of_seeds]
    prices = f"{flops(name) / flops('dense'):.2f} x", f"{min(seconds):.0f} to {max(seconds):.0f}"
    scores = *(f"{bits(name, split):.4f}" for split in SETS), f"{bits(name, 'test_iid', 'conditional'):.4f}"
    weights = f"{size['total'] / 1e6:.1f} M", f"{size['active'] / 1e6:.1f} M"
    rows.append([LABELS.get(name, name), *weights, *prices, *scores])
table(["", "weights", "active", "FLOPs", "seconds", "test_iid", "test", "test_iid, given attributes"], rows)
experts = [name for name in runs if is_moe(name)]
dense_ones = [name for name in runs if not is_moe(name)]
widest = max(dense_ones, key=lambda name: runs[name][0]["size"]["total"])
moe_size = runs[experts[0]][0]["size"]
holds("there are models with experts and dense ones to compare them with", len(experts) >= 1 and len(dense_ones) >= 2)
holds("a token uses under half of the weights of the MoE model", moe_size["active"] < moe_size["total"] / 2)
active_ones = [name for name in dense_ones if name.startswith("dense-active")]
like_active = [runs[name][0]["size"]["active"] / moe_size["active"] for name in active_ones]
like_total = runs[widest][0]["size"]["total"] / moe_size["total"]
holds("dense models of equal active or total parameters have as many, within 2%",
      all(abs(ratio - 1) < 0.02 for ratio in (*like_active, like_total)))  # fmt: skip

# %% [markdown]
# FLOPs and seconds are those of the last stage alone. The seconds come from machines that also did other work: look at the
# spread within one row, where the work was the same. So this figure uses FLOPs; the seconds further below come from
# quiet machines.

# %%
spreads = [max(run["seconds"] for run in of) / min(run["seconds"] for run in of) for of in runs.values()]
print(f"slowest over fastest of the same training: up to {max(spreads):.1f}")
figure, axes = plt.subplots(1, 2, figsize=(12, 3.6))
for axis, (split, title) in zip(axes, SETS.items(), strict=True):
    for marker, name in zip("osD^vPX*", runs, strict=False):
        values = [run["bits"][split]["unconditional"]["value"] for run in runs[name]]
        style = {"color": [*COLORS.values()][is_moe(name)], "alpha": 0.7, "label": LABELS.get(name, name)}
        axis.plot([flops(name) / 1e12] * len(values), values, marker, **style)
    axis.set(title=title, xlabel="TFLOP of the last stage", ylabel="bits per character")
axes[0].legend(fontsize=6.5)
show(figure, "09_bits_and_flops")

# %% [markdown]
# Each point is a seed; lower is better. Experts would pay at equal FLOPs if orange points were below the line that joins the blue
# groups.
#
# **Is it more than luck?** The intervals above are over names. Another training seed gives another model. With three seeds
# the mean difference has a t-interval of ± 4.30 standard deviations over the root of 3 (two degrees of freedom).

# %%
T_975 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78}[seeds]  # Student's t, seeds - 1 degrees of freedom
rows = []
for name in less_dense:
    for split in SETS:
        of = less_dense[name][split]
        half = T_975 * of["deviation"] / math.sqrt(seeds)
        low, high = of["mean"] - half, of["mean"] + half
        cells = f"{of['mean']:+.4f} ± {half:.4f}", f"{of['mean'] / bits('dense', split):+.1%}"
        rows.append([f"{LABELS.get(name, name)}, {split}", *cells, verdict(low, high, "better", "worse", "not shown")])
table(["minus dense, over seeds", "bits per character", "relative", ""], rows)
best = min(less_dense, key=lambda name: less_dense[name]["test_iid"]["mean"])
gain = -less_dense[best]["test_iid"]["mean"] / bits("dense", "test_iid")
times = flops(best) / flops("dense")
print(f"best on test_iid: {LABELS[best]}, {gain:.1%} better than dense at {times:.2f} x its FLOPs")
holds("no model here is better than dense by more than 5%: the differences are small", gain < 0.05)

# %% [markdown]
# ## Early or late: experts need new training data
#
# The dense base of these runs had already read the names. Experts made after that read the same names again, and learn little that
# is new. Experts made a stage earlier were trained on the larger data of that stage, and could become different there (in the runs
# of this file 250,000 phrases; [experiments](../experiments.md), 24 November).

# %%
early = [name for name in experts if name.endswith("early")]
late = [name for name in experts if not name.endswith("early")]
for split in SETS:
    for first, second in zip(early, late, strict=False):
        a, b = (less_dense[name][split]["mean"] for name in (first, second))
        print(f"{split}: early {a:+.4f}, late {b:+.4f} against dense; early minus late {a - b:+.4f}")

# %% [markdown]
# **The released models** were made later, by distillation ([chapter 10](10_distillation.py)): a dense student read the
# teacher's names at a constant learning rate. From there two runs read the same steps while the rate fell to 0: one dense, one
# with experts next to some of the MLPs. All else is equal. The logs have the result (validation names, bits per character):

# %%
logs = {"dense (models/mtg-base)": BASE, "with experts (models/mtg-names)": RELEASED}
scored = {label: read_metrics(folder / "metrics.jsonl", "validation") for label, folder in logs.items()}
rows = []
keys = ("validation/bits_per_char", "validation/bits_per_char_given_attributes")
for label, validations in scored.items():
    for line in validations:
        values = [f"{line[key]:.4f}" for key in keys]
        rows.append([label, f"{line['step']:,}", f"{line['tokens'] / 1e6:.1f} M", *values])
table(["", "step", "tokens", "unconditional", "given attributes"], rows)
plain, mixed = scored.values()
key = "validation/bits_per_char"
holds("both began as the student: upcycling changes no probability", abs(plain[0][key] - mixed[0][key]) < 0.002)
gains = [each[-1][key] - each[0][key] for each in (plain, mixed)]
worth = gains[1] - gains[0]
print(f"while the rate fell: {gains[0]:+.4f} dense, {gains[1]:+.4f} with experts, which are worth {worth:+.4f}")

figure, axis = plt.subplots(figsize=(7.5, 3.2))
for (label, validations), style in zip(scored.items(), ("o-", "s--"), strict=True):
    axis.plot([line["tokens"] / 1e6 for line in validations], [line[key] for line in validations], style, label=label)
axis.set(xlabel="million tokens read after the student's", ylabel="bits per character", title="validation")
axis.legend()
show(figure, "09_released")

# %% [markdown]
# ## From the first step on, in every block
#
# The released experts joined late, in two of five blocks, and start with an output of 0. What if experts are there from the
# first step? And would plain width do as well? Three students with the same embeddings and attention read the same names of
# the teacher (`python benchmarks/student_capacity.py`, 4 million tokens, one seed): with MLPs of 1,280 hidden units as
# released, of 5,120, and with 16 experts of 320 of which a token takes four: the FLOPs of the first, the weights of the second.

# %%
study = json.loads((RESULTS / "student_capacity.json").read_text("utf-8"))
students = study["rows"]
steps = sorted({line["step"] for row in students for line in row["validations"]} - {0})


def mean_bits(row: dict[str, Any], step: int) -> float:
    line = next(line for line in row["validations"] if line["step"] == step)
    return (line["validation/bits_per_char"] + line["validation/bits_per_char_given_attributes"]) / 2


cells = [
    [row["kind"], f"{row['parameters'] / 1e6:.1f} M", f"{row['tokens_per_second']:,.0f}",
     *(f"{mean_bits(row, step):.3f}" for step in steps)]
    for row in students
]  # fmt: skip
table(["MLPs", "weights", "tokens/s", *(f"bits at step {step:,}" for step in steps)], cells)
gains = {
    (each["second"], each["split"], each["conditional"]): each["bits"]
    for each in study["differences"]
    if each["first"] == "dense"
}
cells = [
    [kind, split, "given attributes" if given else "unconditional",
     f"{gain['value']:.4f} [{gain['low']:.4f}, {gain['high']:.4f}]"]
    for (kind, split, given), gain in gains.items()
]  # fmt: skip
table(["", "test", "", "bits fewer than dense, 95% interval over names"], cells)
for kind in ("wide", "experts"):
    before = study["tests"]["dense"]["test_iid"]["conditional"]["value"]
    share = gains[kind, "test_iid", True]["value"] / before
    print(f"{kind}: {share:.1%} fewer bits than dense on test_iid, given attributes")
holds("the experts beat the dense student on both tests, with all intervals above 0",
      all(gain["low"] > 0 for (kind, _, _), gain in gains.items() if kind == "experts"))  # fmt: skip
holds("four times the width does not, on test_iid", gains["wide", "test_iid", True]["low"] < 0)
holds("given attributes the experts gain more than width does, on both tests",
      all(gains["experts", split, True]["value"] > gains["wide", split, True]["value"] for split in SETS))  # fmt: skip
ends = {row["kind"]: row["tokens_per_second"] for row in students}
holds("and they read fewer tokens per second than the dense student", ends["experts"] < ends["dense"])

# %% [markdown]
# So experts can win here, if they learn from the start; width alone hardly does. It is not their learning rate, twice as large here: a
# smaller student gains as much with one rate for all. There, a router that never learns gains as much on test_iid, and two thirds on
# unseen families ([experiments](../experiments.md)). Not separated: their optimizer (Muon) treats each small matrix by itself.
#
# ## Do the released model's experts do anything?
#
# An ablation needs no training: we silence the routed experts, or shuffle the routers so that tokens go to other experts, and
# measure the nats. (The shared experts, which are the old dense layer, stay.)

# %%
torch.set_grad_enabled(False)
model, tokenizer = load_released()
base, base_tokenizer = load_base()
some = cards("validation")[:200]
nats = {"as it is": nats_of_names(model, some, tokenizer)}
for change in ("routed experts silent", "routers shuffled"):
    nats[change] = nats_of_names(altered(model, change), some, tokenizer)
nats["the dense base"] = nats_of_names(base, some, base_tokenizer)
more = {name: mean_and_error(nats_N - nats["as it is"]) for name, nats_N in nats.items() if name != "as it is"}
rows = [["as it is", f"{bits_per_character(nats['as it is'], some):.3f}", "-", ""]]
for name, (mean, error) in more.items():
    better = verdict(mean - error, mean + error, "better", "worse", "not shown to differ")
    rows.append([name, f"{bits_per_character(nats[name], some):.3f}", f"{mean:+.3f} ± {error:.3f}", better])
table(["released model, given attributes", "bits per character", "nats a name, against as it is", ""], rows)
whole = nats["as it is"].mean().item()
shares = {name: more[name][0] / whole for name in ("routed experts silent", "routers shuffled")}
print("in shares of all its nats:", ", ".join(f"{name} {share:+.2%}" for name, share in shares.items()))

# %% [markdown]
# The two changes answer two questions. Do the routed experts contribute anything? And does it matter *which* expert a token gets?
# If silencing costs something and shuffling does not, the experts are alike: together they act as one small dense layer, and
# routing adds nothing to it. Compare also the last row: what they contribute may have moved there from the rest of the model.
#
# ## Seconds and memory
#
# Measured on two quiet cores of a Zen 4 (`benchmarks/results/moe_2cores.json`): one MoE layer of GPT-2 small's shape, 8
# experts, 2 for each token, against a dense MLP. In training the dense MLP has the FLOPs of the *active* experts, in decoding the
# weights of *all*.

# %%
benchmark = json.loads((RESULTS / "moe_2cores.json").read_text("utf-8"))["rows"]
ours = [row for row in benchmark if row["implementation"] == "fe_experts" and row["reason"] is None]
cells = [[f"{row['section']}, {row['tokens']:,} tokens", f"{row['times_dense']:.2f} x"] for row in ours]
table(["", "time over dense"], cells)
trained, decoded = (
    sorted((row["tokens"], row["times_dense"]) for row in ours if row["section"] == section)
    for section in ("training", "decoding")
)
figure, axis = plt.subplots(figsize=(7, 3))
axis.semilogx(*zip(*trained, strict=True), "o-", base=2, label="training, against equal FLOPs")
axis.semilogx(*zip(*decoded, strict=True), "s--", base=2, label="decoding, against equal weights")
axis.axhline(1, color="black", linewidth=0.8, label="a dense MLP")
axis.set(xlabel="tokens at once", ylabel="time over a dense MLP's", title="an MoE layer on two cores", ylim=(0, None))
axis.legend()
show(figure, "09_seconds")
holds("in training experts cost most where tokens are few",
      [value for _, value in trained] == sorted((value for _, value in trained), reverse=True))  # fmt: skip
holds("with 2,048 tokens they cost under a tenth more than a dense MLP of equal FLOPs", trained[-1][1] < 1.1)
holds("in decoding they beat a dense layer of the same total weights", max(value for _, value in decoded) < 1)

rates = json.loads((RESULTS / "train_speed_2cores.json").read_text("utf-8"))["rows"]
by_name = {row["name"]: row["tokens_per_second"] for row in rates}
dense_rate = by_name["ours, dense"]
moe_rate = next(rate for name, rate in by_name.items() if "experts" in name)
print(f"GPT-2 small: {dense_rate:.0f} tokens/s dense, {moe_rate:.0f} with 8 experts: {dense_rate / moe_rate:.1f} x")
holds("a dense model reads more tokens per second: experts have to make up for it", dense_rate > moe_rate)

# %% [markdown]
# ## What others found
#
# | who | model | found |
# | --- | --- | --- |
# | [Switch Transformer](https://arxiv.org/abs/2101.03961) (2021) | up to 1.6 T weights, from scratch | the same loss up to seven times sooner than a dense model of equal FLOPs |
# | [Mixtral](https://arxiv.org/abs/2401.04088) (2024) | 47 B, 13 B active | as good as dense models several times its active size |
# | [OLMoE](https://arxiv.org/abs/2409.02060) (2024) | 7 B, 1 B active, 5 T tokens | a dense model's quality with about a third of its tokens; upcycling fell behind training from scratch after some 600 B |
# | [sparse upcycling](https://arxiv.org/abs/2212.05055) (2022) | T5, ViT | ahead of the dense models, for about half of their first budget spent again |
# | [nanochat](https://github.com/karpathy/nanochat) (log, 2026) | GPT-2's size, 8 experts, 2 active | better per step; use of the GPU fell from 46% to 35%; worse per second, removed |
# | [Megatron-LM, issue 894](https://github.com/NVIDIA/Megatron-LM/issues/894) | 125 M | no better than dense |
# | this project | 3 to 25 M | the tables above |
#
# So experts help where the model is large, training data are plentiful and many devices share the weights. They do little where
# training data are the bottleneck, as in the first tables here, and a little where a teacher writes new names without end. (The numbers of others are from their papers and pages, on their data. We did not
# measure them.)
#
# ## When would you use experts?
#
# - **If training data are plentiful and compute is scarce.** With 22,000 names it is the other way round.
# - **Early.** Make experts before the stage with the most training data, not before the last one.
# - **For few tokens at once, or very many.** A single token reads only K experts. Thousands of tokens give every expert a large
#   batch. A few dozen are the worst case (chapter 3).
# - **If there is memory to spare.** All weights are held, though few work on a token. [Chapter 11](11_quantization.py) stores
#   them in fewer bits.
# - **Not to fine-tune on few data.** More weights overfit sooner: [ST-MoE](https://arxiv.org/abs/2202.08906) found that
#   its sparse models overfit small tasks sooner than dense ones. What helped there and elsewhere: dropout inside the experts; training
#   all but the MoE layers, nearly as good as training everything (`lr_scale` does that); and many tasks at once, after which
#   [sparse models gain more than dense ones](https://arxiv.org/abs/2305.14705).
# - **As a teacher of a dense model.** A sparse model distilled into a dense one of its active size kept some 30% of its gain (Switch);
#   averaging the experts makes one as well (`flash-experts export dense MODEL --out DIR`; chapter 4, exercise 1).
# - **Otherwise** use a dense model, more training data, or a teacher ([chapter 10](10_distillation.py)).
#
# ## What to remember
#
# - State what is equal: weights, active weights, FLOPs, seconds or training data.
# - An interval over names is not an interval over seeds. Look at both.
# - Experts add capacity, and capacity needs training data.
# - A negative result with its interval is a result.
#
# ## Exercises
#
# 1. **How many comparisons?** The picture has many intervals. With as many comparisons of equal models, how many would
#    leave zero out by luck? Which remain if each must hold at 95% divided by their number (Bonferroni)? Use the
#    t-distribution over seeds.
# 2. **At equal FLOPs.** The early experts cost more FLOPs than dense. If loss falls with the logarithm of the compute, as the
#    dense student's log has it, how much would a dense model have gained from that much more? Is the gain of the experts
#    larger?
# 3. **One expert at a time.** Silence each routed expert of the released model's last MoE layer in turn, and measure the bits.
#    Are some worth more than others, and does it follow their load?
#
# Solutions: [solutions/09_do_experts_pay.py](solutions/09_do_experts_pay.py).
#
# ## Reading
#
# - [Our log of experiments](../experiments.md), failures included, and [results](../results.md).
# - [Clark et al. 2022](https://arxiv.org/abs/2202.01169): scaling laws of routed models. [Krajewski et al. 2024](https://arxiv.org/abs/2402.07871):
#   of fine-grained ones. [OLMoE](https://arxiv.org/abs/2409.02060): every choice measured, in the open.
# - Next: [chapter 10](10_distillation.py), what helped more.
