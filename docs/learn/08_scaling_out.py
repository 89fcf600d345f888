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
# # 8. Scaling out
#
# **The question: what does each of many devices have to hold, and what do they have to send each other, so that together
# they train one model?**
#
# Experts add weights and few FLOPs, so memory is the first limit. There are three ways to use many
# devices: copy the model (data parallel), shard every weight (ZeRO, FSDP), or give each device some of the experts (expert
# parallel). Each trades memory for communication. We run all three on two processes of this machine, count what they send, and
# then use an estimator for other machines. Its numbers for those are estimates, not measurements. The
# [glossary](../glossary.md#training) has the terms.

# %%
import json
import math
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from chapter_claims import holds
from chapter_steps import gradient
from chapter_tools import ROOT, cards, load_base, quote, show, table
from chapter_watching import bytes_kept

from flash_experts import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.data.packing import encode_cards, pack
from flash_experts.models.expert_parallel import ShardedExperts

# The estimator of memory and traffic is a script at the root of the repository.
sys.path.append(str(ROOT))
from scripts import scaling_plan as scaling

SCRIPT = ROOT / "docs/learn/two_processes.py"


def two_processes() -> list[dict]:
    """Runs two_processes.py twice in parallel, as torchrun does; returns what each of the two recorded."""
    cards("train")  # prepared before both load it
    with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
        free.bind(("localhost", 0))
        place = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
        free.close()
        started = [
            subprocess.Popen([sys.executable, str(SCRIPT), folder], env=os.environ | place | {"RANK": str(rank)})
            for rank in range(2)
        ]
        assert [process.wait() for process in started] == [0, 0]
        return [json.loads((Path(folder) / f"{rank}.json").read_text("utf-8")) for rank in range(2)]


seen = two_processes()
layers = [each["expert parallel"] for each in seen]
print("tokens of the two processes:", [layer["tokens"] for layer in layers])

# %% [markdown]
# ## The picture first
#
# Left: one layer of eight experts on two processes. Each process has tokens of its own names and half of the experts. A
# cell has the number of a process's (token, expert) pairs that go to an expert; the red ones are sent to the other process. Right:
# what one of W devices holds in training, for GPT-2 small with eight experts in every second block.

# %%
E = len(layers[0]["pairs_of_expert"])
pairs = torch.tensor([layer["pairs_of_expert"] for layer in layers])
figure, axes = plt.subplots(1, 2, figsize=(12, 3.2), width_ratios=(1, 1.3))
drawn = axes[0].imshow(pairs, cmap="Blues", aspect="auto", vmin=0, vmax=2.5 * pairs.max())
figure.colorbar(drawn, ax=axes[0], label="pairs")
for process in range(2):
    for expert in range(E):
        away = (expert >= E // 2) != (process == 1)
        text = f"{int(pairs[process, expert])}" + (" →" if away else "")
        axes[0].text(expert, process, text, ha="center", va="center", color="tab:red" if away else "black")
axes[0].axvline(E / 2 - 0.5, color="black")
axes[0].set(xticks=range(E), yticks=[0, 1], xlabel="expert (0 to 3 are on process 0)", ylabel="process of the token")
axes[0].set_title("pairs of token and expert; red ones are sent")

config, counts = GPT2MoEConfig(), [1, 2, 4, 8, 16, 32, 64]
on_one: dict[str, list[int]] = {}
for parallel in ("ddp", "fsdp", "expert"):
    on_one[parallel] = [scaling.memory_per_gpu(config, parallel, W).total for W in counts]
    axes[1].semilogx(counts, [total / 1e9 for total in on_one[parallel]], "o-", base=2, label=parallel)
axes[1].set(
    title="weights, gradients and optimizer state of one device", xlabel="devices W", ylabel="GB", ylim=(0, None)
)
axes[1].legend()
show(figure, "08_overview")
holds("copies (ddp) cost the same on each device, however many there are", len(set(on_one["ddp"])) == 1)
holds(
    "shards (fsdp) shrink with W, but not to 1/64",
    on_one["fsdp"] == sorted(on_one["fsdp"], reverse=True) and on_one["fsdp"][-1] > 2 * on_one["fsdp"][0] / 64,
)
eight = counts.index(8)
fall = on_one["expert"][eight - 1] / on_one["expert"][eight], on_one["expert"][eight] / on_one["expert"][eight + 1]
holds("expert parallel shrinks fast until each device has one expert of a layer, then slowly", fall[0] > 1.5 > fall[1])

# %% [markdown]
# Shards do not shrink below the block that is gathered while it is computed.
#
# ## The formula, with shapes
#
# N weights, N_E of them experts'; W devices, X of which hold different experts; D width, K experts per token, L layers of
# experts, b bytes a number.
#
# | | holds (float32: weight, gradient, two averages) | sends |
# | --- | --- | --- |
# | ddp | 16 N bytes | 2 · 4 N (W - 1)/W a step: all-reduce of gradients |
# | fsdp | 16 N / W, and one whole block | 4 N (W - 1)/W a step: reduce-scatter of gradients; 8 N (W - 1)/W for each forward and backward: all-gather of weights |
# | expert | 16 (N - N_E) / W + 16 N_E / X | as fsdp without the experts, and for each token: |
#
# $$ \text{bytes per token} = 4\,K\,D\,L\,b\;\frac{X-1}{X} $$
#
# Four times: a hidden state (D) goes to each of K experts and comes back, and so do the gradients. X - 1 of X experts are
# elsewhere, if the load is balanced.

# %%
quote(scaling.memory_per_gpu)
quote(scaling.all_to_all_bytes_per_token)

# %% [markdown]
# **Is it right?** We count weights, gradients, optimizer state and activations of a small model:

# %%
dense, tokenizer = load_base()
torch.manual_seed(0)
model = GPT2MoEForCausalLM.from_dense(dense, num_experts=8, num_experts_per_tok=2).train()
parts = scaling.parameter_counts(model.config)
print(f"weights: {parts.total:,} by formula, {model.num_parameters():,} in the model")
optimizer = torch.optim.AdamW(model.parameters())
packed = pack(encode_cards(cards("train")[:24], tokenizer))
inputs = packed.inputs_with_loss(packed.labels.numel())
activations = bytes_kept(lambda: model(**inputs).loss, but=model.parameters())
gradient(model, inputs)
optimizer.step()
plan = scaling.memory_per_gpu(model.config, "ddp", 1, packed.num_tokens, bytes_per_number=4)
state = sum(x.numel() * 4 for values in optimizer.state.values() for x in values.values() if x.ndim)
rows = [
    ["gradients", f"{plan.gradients:,}", f"{sum(p.grad.numel() * 4 for p in model.parameters()):,}"],
    ["optimizer", f"{plan.optimizer:,}", f"{state:,}"],
    [f"activations of {packed.num_tokens} tokens", f"{plan.activations:,}", f"{activations:,}"],
]
table(["bytes", "by formula", "counted"], rows)
holds(
    "weights, gradients and optimizer state are exact",
    parts.total == model.num_parameters() and all(row[1] == row[2] for row in rows[:2]),
)
holds("activations are an estimate, right within a third", abs(plan.activations / activations - 1) < 1 / 3)

# %% [markdown]
# (We count what autograd keeps for the backward. The estimate counts the logits' gradient as well, and assumes a share of
# positions that have a label.)
#
# ## Activations of an MoE model, and recomputation
#
# The backward needs **activations** of the forward: of each token the inputs of all matmuls, norms and activation functions. An
# MLP with F hidden units keeps about 2 F + D numbers a token, an MoE layer
#
# $$ K\,(2F + D) + D $$
#
# Each of a token's K experts keeps its own; the number of experts E does not appear. So experts multiply the weights by E, and
# these activations by K. **Gradient checkpointing** (activation recomputation, [Chen et al. 2016](https://arxiv.org/abs/1604.06174))
# keeps only the input of each block, D numbers a token, and computes the block's forward again in the backward: about a third
# more FLOPs, as a backward costs two forwards. [Korthikanti et al. 2022](https://arxiv.org/abs/2205.05198) recompute only what is
# large and cheap. In an MoE model the router has to choose the same experts again, or the gradient would belong to another model.

# %%
kept, weights = {}, {}
for label, E_of, K_of in (("E 8, K 1", 8, 1), ("E 8, K 2", 8, 2), ("E 16, K 2", 16, 2), ("E 8, K 4", 8, 4)):
    torch.manual_seed(0)
    each = GPT2MoEForCausalLM.from_dense(dense, num_experts=E_of, num_experts_per_tok=K_of).train()
    kept[label] = bytes_kept(lambda each=each: each(**inputs).loss, but=each.parameters())
    weights[label] = each.num_parameters()
kept["dense"] = bytes_kept(lambda: dense.train()(**inputs).loss, but=dense.parameters())
torch.manual_seed(1)  # the same dropout twice
plain, _ = gradient(model, inputs), model.gradient_checkpointing_enable()
kept["E 8, K 2, checkpointing"] = bytes_kept(lambda: model(**inputs).loss, but=model.parameters())
torch.manual_seed(1)
recomputed = gradient(model, inputs)
weights |= {"dense": dense.num_parameters(), "E 8, K 2, checkpointing": model.num_parameters()}
rows = [[label, f"{weights[label] / 1e6:.1f} M", f"{size / 1e6:.1f} MB"] for label, size in kept.items()]
table(["", "weights", "activations kept for the backward"], rows)
holds("twice the experts, about the same activations", abs(kept["E 16, K 2"] / kept["E 8, K 2"] - 1) < 0.25)
more = (kept["E 8, K 2"] - kept["E 8, K 1"]) / 4 / packed.num_tokens / scaling.moe_layers(model.config)
holds("one more expert of a token keeps 2 F + D = 9 D numbers in a layer", abs(more / dense.config.n_embd - 9) < 1)
holds("checkpointing keeps less than a quarter", kept["E 8, K 2, checkpointing"] < kept["E 8, K 2"] / 4)
holds("and gives the same gradient, to rounding", (plain - recomputed).norm() < 1e-4 * plain.norm())

# %% [markdown]
# ## Copies: gradients are added up
#
# Two processes have every second of the 24 names each. At first each has the gradient of its own names. After an all-reduce both
# have the gradient of all names, as one process alone computes it. It has to be the *sum*, since every process divides by the
# labels of the whole step (chapter 5).

# %%
for rank, each in enumerate(seen):
    reduced = each["data parallel"]
    print(
        f"process {rank}: gradient off by {reduced['before']:.0%} before, {reduced['after']:.0e} after the all-reduce"
    )
    holds(
        "the all-reduce gives each process the gradient of all names",
        reduced["after"] < 1e-4 < 0.1 < reduced["before"],
    )
traffic = scaling.traffic_per_gpu(model.config, "ddp", 2)
print(f"buffer: {seen[0]['data parallel']['bytes']:,} bytes; sent by formula, a ring of two: {traffic.per_step:,.0f}")

# %% [markdown]
# ## Shards: each process keeps its own part (ZeRO, FSDP)
#
# AdamW updates each weight independently. So process r can keep and update the r-th shard of all weights: a reduce-scatter
# gives each process the sum of its shard's gradients, each updates its shard, and an all-gather collects the new weights.

# %%
for rank, each in enumerate(seen):
    sharded = each["sharded"]
    share = sharded["state"] / sharded["whole_state"]
    print(f"process {rank}: new weights off by {sharded['off']:.0e}; it keeps {share:.0%} of the optimizer's state")
    holds(
        "the same weights, to rounding, with half of the optimizer's memory",
        sharded["off"] < 1e-6 and abs(share - 0.5) < 0.01,
    )

# %% [markdown]
# An all-reduce *is* a reduce-scatter followed by an all-gather, so up to here this sends no more than copies do. FSDP also
# shards the weights, and gathers them block by block when they are needed, in each forward and in each backward: its extra
# traffic.
#
# ## Expert parallel: tokens are sent to experts
#
# In expert parallel the experts stay where they are, and tokens are sent to them. The package's layer has four steps: count, send,
# compute, send back.

# %%
quote(ShardedExperts.forward)
quote(ShardedExperts._count_pairs)

# %% [markdown]
# What the two processes sent in one forward of one layer, recorded at the two all-to-all functions:

# %%
rows = []
for rank, layer in enumerate(layers):
    for what, each in zip(("counts", "hidden states", "results"), layer["sent"], strict=True):
        rows.append([f"process {rank}: {what}", str(each["rows"]), f"{each['bytes_to_other']:,}"])
table(["", "rows to process 0, 1", "bytes that leave"], rows)
for rank, layer in enumerate(layers):
    share = layer["weights_here"] / layer["weights_in_all"]
    print(f"process {rank}: holds {share:.0%} of the experts, output off by {layer['off']:.0e} from the whole layer")
    holds(
        "with half of the experts each, the outputs are those of the whole layer",
        layer["off"] < 1e-4 and abs(share - 0.5) < 0.01,
    )

# %% [markdown]
# We compare that with the formula. The formula is for all layers, forward and backward, and a balanced load. One layer's forward is
# half of one layer's share.

# %%
moe_layers = scaling.moe_layers(model.config)
per_token = scaling.all_to_all_bytes_per_token(model.config, 2, bytes_per_number=4) / moe_layers / 2
rows, ratios = [], []
for rank, layer in enumerate(layers):
    counted = sum(each["bytes_to_other"] for each in layer["sent"][1:]) / layer["tokens"]
    ratios.append(counted / per_token)
    rows.append([f"process {rank}", f"{per_token:,.0f}", f"{counted:,.0f}", f"{counted / per_token:.2f}"])
table(["bytes for each token", "by formula", "counted", "ratio"], rows)
holds("the formula is right within a third", all(2 / 3 < ratio < 4 / 3 for ratio in ratios))

# %% [markdown]
# The ratio differs from 1 by the imbalance of this router, which was never trained. All devices wait for the one whose experts get
# most tokens, so load balancing matters for speed, not only for what experts learn (chapter 3c).
#
# ## An estimate for larger machines
#
# The estimator's tables for GPT-2 small with 8 experts, and for GPT-2 xl with 64. FLOPs run at 40% of an H100's
# peak, links at their data sheet's speed: assumptions, to be changed in `scaling.Device`.

# %%
least_network: dict[str, float] = {}
for name, config in scaling.MODELS.items():
    counts_of = scaling.parameter_counts(config)
    print(f"{name}: {counts_of.total / 1e9:.2f} billion weights, {counts_of.experts / counts_of.total:.0%} experts'")
    rows = []
    for parallel in ("ddp", "fsdp", "expert"):
        for W in (8, 64):
            memory = scaling.memory_per_gpu(config, parallel, W, tokens_per_row=8192)
            sent = scaling.traffic_per_gpu(config, parallel, W)
            fits = "yes" if memory.total < scaling.NVLINK.memory else "no"
            needed = [
                scaling.tokens_to_hide_traffic(config, parallel, W, link) for link in (scaling.NVLINK, scaling.NETWORK)
            ]
            least_network[name] = min(least_network.get(name, needed[1]), needed[1])
            cells = [
                f"{memory.total / 1e9:,.0f}",
                fits,
                f"{sent.of_step(0) / 1e9:,.1f}",
                f"{sent.per_token / 1e3:,.0f}",
            ]
            rows.append([f"{parallel}, {W} devices", *cells, *(f"{tokens:,.0f}" for tokens in needed)])
    table(["", "GB", "fits 80 GB", "GB a step", "kB a token", "tokens, NVLink", "network"], rows)
holds(
    "on a network GPT-2 small needs over 20,000 tokens a step on each device", least_network["GPT-2 small x 8"] > 20_000
)

# %% [markdown]
# The last two columns: from how many tokens a step on each device computation takes longer than communication. With
# fewer, devices wait. Card names have some thousands of tokens a step, so on a network none of this pays for GPT-2 small:
# use one device, or data parallel within one machine.
#
# ## An experiment that changes one thing: the size of an expert
#
# Each token takes two experts of 3072 hidden units, or four of half the size, and so on. Active weights and FLOPs stay the same. The
# bytes sent do not.

# %%
rows, sizes = [], [3072, 1536, 768, 384, 192]
tokens_needed: dict[str, list[float]] = {"NVLink": [], "network": []}
for size in sizes:
    K = 2 * 3072 // size
    config = GPT2MoEConfig(num_experts=4 * K, num_experts_per_tok=K, moe_intermediate_size=size)
    flops = scaling.flops_per_token(config)
    travels = scaling.all_to_all_bytes_per_token(config, 8)
    for link, device in (("NVLink", scaling.NVLINK), ("network", scaling.NETWORK)):
        tokens_needed[link].append(scaling.tokens_to_hide_traffic(config, "expert", 8, device))
    needed = [f"{values[-1]:,.0f}" for values in tokens_needed.values()]
    rows.append(
        [size, f"{4 * K}, {K}", f"{flops / 1e6:.0f}", f"{travels / 1e3:.0f}", f"{flops / travels:,.0f}", *needed]
    )
header = ["hidden units", "E, K", "MFLOP a token", "kB a token", "FLOP a byte", "tokens, NVLink", "network"]
table(header, rows)

figure, axis = plt.subplots(figsize=(7, 3))
for link, values in tokens_needed.items():
    axis.loglog(sizes, values, "o-", base=2, label=link)
axis.set(title="tokens that hide communication, on 8 devices", xlabel="hidden units of an expert")
axis.set(ylabel="tokens a step, each device", xticks=sizes, xticklabels=sizes)
axis.invert_xaxis()
axis.legend()
show(figure, "08_expert_size")
megaflops, kilobytes = ([float(row[column]) for row in rows] for column in (2, 3))
holds(
    "the FLOPs stay within 1%, the bytes sent grow sixteenfold",
    max(megaflops) < 1.01 * min(megaflops) and 15 < kilobytes[-1] / kilobytes[0] < 17,
)
holds("smaller experts need more tokens a step", tokens_needed["NVLink"] == sorted(tokens_needed["NVLink"]))
holds(
    "on the network only the largest experts can hide their communication at all",
    [math.isfinite(each) for each in tokens_needed["network"]] == [True, False, False, False, False],
)

# %% [markdown]
# A capacity factor (chapter 3b) bounds the traffic: every device sends buffers of one size, known before the router has chosen,
# and pads or drops. A smaller factor sends less and drops more. Without one, as here, sizes are exchanged first.
# Fine-grained experts (chapter 3b) have more combinations for the same FLOPs, and each choice is sent. Where the table has
# `inf`, a token's communication takes longer than its computation: no number of tokens hides it.
#
# ## What to remember
#
# - Training with AdamW keeps four numbers for each weight. Copy them, shard them, or spread the experts over devices.
# - Activations grow with K and the tokens, not with E; recomputation trades most of them for a third more FLOPs.
# - An all-reduce is a reduce-scatter, then an all-gather. Sharding the optimizer's state adds no traffic.
# - Experts on other devices cost traffic per token: 4 K D numbers a layer. Sharded experts cost traffic per step.
# - An estimate shows what cannot work. What does work has to be measured.
#
# ## Exercises
#
# 1. **The largest that fits.** GPT-2 xl's shape on eight devices of 80 GB, rows of 8,192 tokens: with which number of
#    experts (a multiple of eight) does it still fit under each strategy?
# 2. **The slowest device.** Let a router favor some experts: shares of the tokens in proportion to 1, r, r², ... for
#    the eight experts, one on each device. A layer is done when its slowest device is. How many times longer than
#    balanced does it take for r = 1, 0.9, 0.7, 0.5?
# 3. **Accumulation.** A step of 32,768 tokens on each device in 1, 2, 4 or 8 rows: what does each strategy hold and send?
#    For which is accumulation free?
#
# Solutions: [solutions/08_scaling_out.py](solutions/08_scaling_out.py).
#
# ## Reading
#
# - [Rajbhandari et al. 2020, ZeRO](https://arxiv.org/abs/1910.02054): which of weights, gradients and state to shard.
# - [Lepikhin et al. 2020, GShard](https://arxiv.org/abs/2006.16668): experts on many devices, all-to-all.
# - [Our page on scaling](../scaling.md): the same estimates as tables, and how to start each.
# - [The Ultra-Scale Playbook](https://huggingface.co/spaces/nanotron/ultrascale-playbook): all of it, measured on many GPUs.
# - Next: [chapter 9](09_do_experts_pay.py).
