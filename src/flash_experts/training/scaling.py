"""How large a model fits, and what its processes tell each other: formulas for planning a run before it is started.

    python -m flash_experts.training.scaling     prints the tables of docs/scaling.md

Bytes of parameters, gradients and optimizer state are exact (but for the padding of what does not divide); activations
are an estimate. Training keeps four float32 numbers for each weight: the weight, its gradient, and AdamW's two
averages.

What each strategy (`training.parallel`) keeps on one of W processes, and what it sends, with N weights of which N_E are
experts':

    ddp     all N; each optimizer step all-reduces the gradients
    fsdp    N / W; each forward and each backward gathers the weights of one block after the other, each optimizer step
            scatters the sums of the gradients (Rajbhandari et al. 2020, ZeRO stage 3)
    expert  N_E / X experts, X = gcd(E, W), and the rest as fsdp; in each MoE layer the tokens travel to their experts
            and back, and so do their gradients (Lepikhin et al. 2020, GShard)

Letters: W processes, X of them hold different experts, D width, V vocabulary, F hidden units of an expert, E experts, K
experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from transformers import GPT2Config

from flash_experts.models.moe_config import GPT2MoEConfig

Parallel = Literal["ddp", "fsdp", "expert"]

FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class ParameterCounts:
    """Weights of a model.

    Attributes:
        embeddings: of the token and position tables (the output layer is the token table) and the last norm.
        blocks: of all blocks without their experts: attention, norms, dense MLPs, routers, shared experts.
        experts: of all routed experts of all layers.
        largest_block: of one block, the largest, with its experts.
        largest_block_experts: the part of it that is experts.
    """

    embeddings: int
    blocks: int
    experts: int
    largest_block: int
    largest_block_experts: int

    @property
    def dense(self) -> int:
        """All that is not a routed expert."""
        return self.embeddings + self.blocks

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class Memory:
    """Bytes on one device in a training step.

    Attributes:
        parameters: float32 weights that stay there.
        gradients: of them, in float32.
        optimizer: AdamW's two averages.
        transient: weights and gradients that are whole only while a block is computed; none where nothing is sharded.
        activations: what the forward keeps for the backward, and the logits (an estimate).
    """

    parameters: int
    gradients: int
    optimizer: int
    transient: int
    activations: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.transient + self.activations


@dataclass(frozen=True)
class Traffic:
    """Bytes that one device sends (and receives as many).

    Attributes:
        per_step: in each optimizer step, however many tokens it has: gradients.
        per_row: in each of its forwards and backwards (`gradient_accumulation_steps` a step): weights.
        per_token: for each of the device's own tokens: hidden states on their way to experts and back.
    """

    per_step: float
    per_row: float
    per_token: float

    def of_step(self, tokens: int, rows: int = 1) -> float:
        """Of an optimizer step with so many tokens on this device, in so many rows."""
        return self.per_step + self.per_row * rows + self.per_token * tokens


def parameter_counts(config: GPT2Config) -> ParameterCounts:
    """Weights by part, exactly, without making the model. A dense GPT-2 has no experts."""
    D = config.n_embd
    attention = 4 * D * D + 4 * D + 4 * D  # c_attn and c_proj with their biases, and two norms
    dense_block = attention + _mlp(D, config.n_inner or 4 * D)
    if not isinstance(config, GPT2MoEConfig):
        embeddings, blocks = _embeddings(config), config.n_layer * dense_block
        return ParameterCounts(embeddings, blocks, 0, dense_block, 0)
    layers = moe_layers(config)
    experts = config.num_experts * _mlp(D, config.expert_size)
    sparse_block = attention + config.num_experts * D  # and the router
    if config.num_shared_experts:
        sparse_block += _mlp(D, config.num_shared_experts * config.expert_size)
    blocks = layers * sparse_block + (config.n_layer - layers) * dense_block
    largest = max(sparse_block + experts, dense_block if layers < config.n_layer else 0)
    return ParameterCounts(_embeddings(config), blocks, layers * experts, largest, experts)


def moe_layers(config: GPT2Config) -> int:
    """How many blocks have experts."""
    if not isinstance(config, GPT2MoEConfig):
        return 0
    return sum(config.is_moe_layer(index) for index in range(config.n_layer))


def expert_group(config: GPT2Config, processes: int) -> int:
    """X: over how many processes the experts of a layer are spread, ``gcd(E, W)``. Each group of X holds them all."""
    return math.gcd(config.num_experts, processes) if isinstance(config, GPT2MoEConfig) else 1


def memory_per_gpu(
    config: GPT2Config,
    parallel: Parallel,
    processes: int,
    tokens_per_row: int = 0,
    rows: int = 1,
    bytes_per_number: int = BFLOAT16,
) -> Memory:
    """What one device holds at the worst moment of an optimizer step.

    Args:
        config: of the model.
        parallel: how it is spread; with one process that is no matter.
        processes: W, one for each device.
        tokens_per_row: tokens of one forward on one device; 0 leaves activations out.
        rows: forwards per optimizer step (`gradient_accumulation_steps`). With more than one, what is sharded keeps
            whole gradients until the last, since they are not sent before.
        bytes_per_number: of activations: 2 under bfloat16 autocast, 4 in float32.
    """
    counts = parameter_counts(config)
    group = expert_group(config, processes)
    if parallel == "ddp" or processes == 1:
        kept, whole, whole_gradients = float(counts.total), 0, 0
    elif parallel == "fsdp":
        kept, whole = counts.total / processes, counts.embeddings + 2 * counts.largest_block
        whole_gradients = counts.total if rows > 1 else counts.largest_block
    else:
        block = counts.largest_block - counts.largest_block_experts
        kept = counts.dense / processes + counts.experts / group
        whole = counts.embeddings + 2 * block
        whole_gradients = counts.dense if rows > 1 else block
    numbers = math.ceil(kept)
    return Memory(
        parameters=FLOAT32 * numbers,
        gradients=FLOAT32 * numbers,
        optimizer=2 * FLOAT32 * numbers,
        transient=FLOAT32 * (whole + whole_gradients),
        activations=tokens_per_row * activation_bytes_per_token(config, bytes_per_number),
    )


def activation_bytes_per_token(
    config: GPT2Config, bytes_per_number: int = BFLOAT16, labelled_share: float = 0.5
) -> int:
    """An estimate of what a forward keeps for its backward, for each token, without gradient checkpointing.

    A block keeps about 12 D: its input and both residual sums, the norms' outputs, queries, keys and values as they are
    computed and as attention lays them out, its output, dropout's masks. An MLP of F hidden units keeps F before and F
    after its activation and D; K experts that K times.
    The logits are kept in float32, twice (as logits and as their gradient), at labelled positions alone.

    Args:
        config: of the model.
        bytes_per_number: 2 under bfloat16 autocast, 4 in float32.
        labelled_share: share of the tokens that have a label; of card names with their prompts about half.
    """
    D = config.n_embd
    layers = moe_layers(config)
    per_mlp = 2 * (config.n_inner or 4 * D) + D
    numbers = config.n_layer * 12 * D + (config.n_layer - layers) * per_mlp
    if isinstance(config, GPT2MoEConfig):
        K, F = config.num_experts_per_tok + config.num_shared_experts, config.expert_size
        numbers += layers * (K * (2 * F + D) + D)
    return numbers * bytes_per_number + round(2 * FLOAT32 * config.vocab_size * labelled_share)


def all_to_all_bytes_per_token(config: GPT2Config, processes: int, bytes_per_number: int = BFLOAT16) -> float:
    """What a device sends for each of its tokens in a training step, in all MoE layers.

    In each layer a token's hidden state goes to its K experts, of which a share of (X - 1) / X is on other devices when
    the load is balanced, and comes back; so do the gradients: ``4 K D (X - 1) / X`` numbers. How many will come for
    each expert is told before, in E int64 a layer; that is not counted here.

    Args:
        config: of the model.
        processes: W.
        bytes_per_number: 2 under bfloat16 autocast, 4 in float32.
    """
    if not isinstance(config, GPT2MoEConfig):
        return 0.0
    group = expert_group(config, processes)
    pairs = config.num_experts_per_tok * moe_layers(config)
    return 4.0 * pairs * config.n_embd * bytes_per_number * (group - 1) / group


def traffic_per_gpu(
    config: GPT2Config, parallel: Parallel, processes: int, bytes_per_number: int = BFLOAT16
) -> Traffic:
    """What one device sends. Gathering or scattering N numbers over W devices in a ring takes each ``N (W - 1) / W``,
    an all-reduce twice that. Weights and gradients travel in float32.

    Args:
        config: of the model.
        parallel: how it is spread.
        processes: W.
        bytes_per_number: of hidden states.
    """
    counts = parameter_counts(config)
    share = (processes - 1) / processes
    if parallel == "ddp" or processes == 1:
        return Traffic(2 * FLOAT32 * counts.total * share, 0.0, 0.0)
    if parallel == "fsdp":
        return Traffic(FLOAT32 * counts.total * share, 2 * FLOAT32 * counts.total * share, 0.0)
    group = expert_group(config, processes)
    replicas = processes // group
    experts = 2 * FLOAT32 * counts.experts / group * (replicas - 1) / replicas
    return Traffic(
        FLOAT32 * counts.dense * share + experts,
        2 * FLOAT32 * counts.dense * share,
        all_to_all_bytes_per_token(config, processes, bytes_per_number),
    )


def flops_per_token(config: GPT2Config, labelled_share: float = 0.5) -> float:
    """Arithmetic of a token's forward and backward: 6 for each weight that it is multiplied with (K of E experts, the
    output layer where there is a label)."""
    counts = parameter_counts(config)
    active = float(counts.blocks)
    if isinstance(config, GPT2MoEConfig):
        active += counts.experts * config.num_experts_per_tok / config.num_experts
    return 6 * (active + config.vocab_size * config.n_embd * labelled_share)


@dataclass(frozen=True)
class Device:
    """What a plan assumes of a device and its links; the defaults are an H100's data sheet, NVLink, and one 400 Gb/s
    network card for each GPU.

    Attributes:
        memory: bytes.
        flops: dense bfloat16 FLOP/s.
        utilization: share of them that the arithmetic reaches: an assumption.
        bandwidth: bytes a second that a device sends to others.
    """

    memory: float = 80e9
    flops: float = 989e12
    utilization: float = 0.4
    bandwidth: float = 450e9

    def arithmetic_seconds(self, config: GPT2Config, tokens: int) -> float:
        return tokens * flops_per_token(config) / (self.flops * self.utilization)


NVLINK, NETWORK = Device(), Device(bandwidth=50e9)


def tokens_to_hide_traffic(
    config: GPT2Config, parallel: Parallel, processes: int, device: Device = NVLINK, rows: int = 1
) -> float:
    """From how many tokens a step on each device its arithmetic takes longer than its traffic: with fewer, devices wait
    for each other however well the two overlap. Infinite where the traffic of a token takes longer than its arithmetic.
    """
    traffic = traffic_per_gpu(config, parallel, processes)
    fixed = traffic.of_step(0, rows) / device.bandwidth
    left = device.arithmetic_seconds(config, 1) - traffic.per_token / device.bandwidth
    return fixed / left if left > 0 else math.inf


def _mlp(width: int, hidden: int) -> int:
    return 2 * width * hidden + hidden + width


def _embeddings(config: GPT2Config) -> int:
    D = config.n_embd
    return (config.vocab_size + config.n_positions) * D + 2 * D


# ------------------------------------------------------------------------------------------------------------- tables

MODELS = {
    "GPT-2 small x 8": GPT2MoEConfig(),
    "GPT-2 xl x 64": GPT2MoEConfig(n_layer=48, n_embd=1600, n_head=25, num_experts=64),
}


def plan_table(config: GPT2Config, tokens_per_row: int = 8192, processes: tuple[int, ...] = (1, 8, 16, 64)) -> str:
    """Markdown: memory, traffic and break-even of every strategy, one line for each number of devices."""
    columns = ["strategy", "GPUs", "state", "whole for a moment", "activations", "together", "sent a step", "a token"]
    lines = [f"| {' | '.join([*columns, 'tokens NVLink', 'network'])} |", "| --- |" + " ---: |" * 9]
    for parallel in ("ddp", "fsdp", "expert"):
        for count in processes:
            if count == 1 and parallel != "ddp":
                continue
            memory = memory_per_gpu(config, parallel, count, tokens_per_row)
            traffic = traffic_per_gpu(config, parallel, count)
            state = memory.parameters + memory.gradients + memory.optimizer
            columns = [_gb(state), _gb(memory.transient), _gb(memory.activations), _gb(memory.total)]
            columns += [_gb(traffic.of_step(0)), f"{traffic.per_token / 1e3:,.0f} kB"]
            columns += [f"{tokens_to_hide_traffic(config, parallel, count, link):,.0f}" for link in (NVLINK, NETWORK)]
            lines.append(f"| {parallel} | {count} | {' | '.join(columns)} |")
    return "\n".join(lines)


def _gb(size: float) -> str:
    return f"{size / 1e9:,.1f} GB"


def main() -> None:
    """Prints the tables of docs/scaling.md."""
    for name, config in MODELS.items():
        counts = parameter_counts(config)
        print(f"{name}: {counts.total / 1e9:.2f} billion weights, {counts.experts / 1e9:.2f} of them experts'\n")
        print(plan_table(config) + "\n")


if __name__ == "__main__":
    main()
