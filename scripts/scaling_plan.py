"""Memory and communication of data parallel, sharded and expert-parallel training: formulas to plan a run.

    python scripts/scaling_plan.py     prints the tables of docs/scaling.md

Bytes of parameters, gradients and optimizer state are exact (except for padding); activations are an estimate. Training
keeps four float32 numbers per parameter: parameter, gradient, and AdamW's two moments.

State and traffic of each strategy (`training.parallel`) on one of W processes, with N parameters, N_E in experts:

    ddp     all N; all-reduce of the gradients in each optimizer step
    fsdp    N / W; all-gather of the parameters block by block in each forward and backward, reduce-scatter of the
            gradients in each optimizer step (Rajbhandari et al. 2020, ZeRO stage 3)
    expert  N_E / X of the experts, X = gcd(E, W), and the rest as fsdp; all-to-all of tokens and their gradients in
            each MoE layer (Lepikhin et al. 2020, GShard)

Symbols: W processes, X of them with different experts, D width, V vocabulary, F hidden units of an expert, E experts,
K experts per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from transformers import GPT2Config

from flash_experts.models.expert_parallel import expert_group_size
from flash_experts.models.moe_config import GPT2MoEConfig

Parallel = Literal["ddp", "fsdp", "expert"]

FLOAT32, BFLOAT16 = 4, 2


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model.

    Attributes:
        embeddings: token and position embeddings (tied with the output layer) and the final norm.
        blocks: all blocks without routed experts.
        experts: routed experts of all layers.
        largest_block: largest block, with its experts.
        largest_block_experts: routed experts of the largest block.
    """

    embeddings: int
    blocks: int
    experts: int
    largest_block: int
    largest_block_experts: int

    @property
    def dense(self) -> int:
        """All parameters outside routed experts."""
        return self.embeddings + self.blocks

    @property
    def total(self) -> int:
        return self.dense + self.experts


@dataclass(frozen=True)
class Memory:
    """Bytes on one device in a training step.

    Attributes:
        parameters: float32 parameters of this device.
        gradients: their float32 gradients.
        optimizer: AdamW's two moments.
        transient: gathered parameters and gradients while a block is computed; 0 without sharding.
        activations: estimate of saved activations and logits.
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
    """Bytes that one device sends (and equally many that it receives).

    Attributes:
        per_step: per optimizer step: gradients.
        per_row: per micro-batch (`gradient_accumulation_steps` in a step): parameters.
        per_token: per token of this device: hidden states in all-to-alls.
    """

    per_step: float
    per_row: float
    per_token: float

    def of_step(self, tokens: int, rows: int = 1) -> float:
        """Sums an optimizer step with ``tokens`` on this device in ``rows`` micro-batches."""
        return self.per_step + self.per_row * rows + self.per_token * tokens


def parameter_counts(config: GPT2Config) -> ParameterCounts:
    """Counts parameters from the configuration, without building the model."""
    D = config.n_embd
    attention = 4 * D * D + 4 * D + 4 * D  # c_attn, c_proj with biases, two norms
    dense_block = attention + _mlp(D, config.n_inner or 4 * D)
    if not isinstance(config, GPT2MoEConfig):
        embeddings, blocks = _embeddings(config), config.n_layer * dense_block
        return ParameterCounts(embeddings, blocks, 0, dense_block, 0)
    layers = moe_layers(config)
    experts = config.num_experts * _mlp(D, config.expert_size)
    sparse_block = attention + config.num_experts * D  # plus the router
    if config.num_shared_experts:
        sparse_block += _mlp(D, config.num_shared_experts * config.expert_size)
    blocks = layers * sparse_block + (config.n_layer - layers) * dense_block
    largest = max(sparse_block + experts, dense_block if layers < config.n_layer else 0)
    return ParameterCounts(_embeddings(config), blocks, layers * experts, largest, experts)


def moe_layers(config: GPT2Config) -> int:
    """Counts MoE blocks."""
    if not isinstance(config, GPT2MoEConfig):
        return 0
    return sum(config.is_moe_layer(index) for index in range(config.n_layer))


def memory_per_gpu(
    config: GPT2Config,
    parallel: Parallel,
    processes: int,
    tokens_per_row: int = 0,
    rows: int = 1,
    bytes_per_number: int = BFLOAT16,
) -> Memory:
    """Computes the peak memory of one device in an optimizer step.

    Args:
        config: model configuration.
        parallel: parallel strategy.
        processes: W, one per device.
        tokens_per_row: tokens of one micro-batch on one device; 0 leaves out activations.
        rows: micro-batches per optimizer step. With more than one, gradients stay unsharded until the last.
        bytes_per_number: bytes per activation: 2 under bfloat16 autocast, 4 in float32.
    """
    counts = parameter_counts(config)
    group = expert_group_size(config, processes)
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
    """Estimates the saved activations of one token, without gradient checkpointing.

    A block saves about 12 D: input, residual sums, norms, queries, keys, values, attention output, dropout masks. An
    MLP with F hidden units saves 2 F + D, K experts K times that. Logits and their gradient are float32, only at
    labels.

    Args:
        config: model configuration.
        bytes_per_number: 2 under bfloat16 autocast, 4 in float32.
        labelled_share: share of tokens with a label; about half for names with prompts.
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
    """Computes the all-to-all traffic of a device per token and training step, over all MoE layers.

    In each layer a hidden state goes to K experts and back, of which a share (X - 1) / X is on other devices if the
    load is balanced, and so do the gradients: ``4 K D (X - 1) / X`` numbers. The counts sent before (E int64 per layer)
    are left out.
    """
    if not isinstance(config, GPT2MoEConfig):
        return 0.0
    group = expert_group_size(config, processes)
    pairs = config.num_experts_per_tok * moe_layers(config)
    return 4.0 * pairs * config.n_embd * bytes_per_number * (group - 1) / group


def traffic_per_gpu(
    config: GPT2Config, parallel: Parallel, processes: int, bytes_per_number: int = BFLOAT16
) -> Traffic:
    """Computes the bytes that one device sends.

    A ring all-gather or reduce-scatter of N numbers over W devices sends ``N (W - 1) / W``, an all-reduce twice that.
    Parameters and gradients are float32; ``bytes_per_number`` is that of hidden states.
    """
    counts = parameter_counts(config)
    share = (processes - 1) / processes
    if parallel == "ddp" or processes == 1:
        return Traffic(2 * FLOAT32 * counts.total * share, 0.0, 0.0)
    if parallel == "fsdp":
        return Traffic(FLOAT32 * counts.total * share, 2 * FLOAT32 * counts.total * share, 0.0)
    group = expert_group_size(config, processes)
    replicas = processes // group
    experts = 2 * FLOAT32 * counts.experts / group * (replicas - 1) / replicas
    return Traffic(
        FLOAT32 * counts.dense * share + experts,
        2 * FLOAT32 * counts.dense * share,
        all_to_all_bytes_per_token(config, processes, bytes_per_number),
    )


def flops_per_token(config: GPT2Config, labelled_share: float = 0.5) -> float:
    """Computes training FLOPs per token: 6 per active parameter (K of E experts, the output layer at labels)."""
    counts = parameter_counts(config)
    active = float(counts.blocks)
    if isinstance(config, GPT2MoEConfig):
        active += counts.experts * config.num_experts_per_tok / config.num_experts
    return 6 * (active + config.vocab_size * config.n_embd * labelled_share)


@dataclass(frozen=True)
class Device:
    """Assumed device: by default the data sheet of an H100 with NVLink.

    Attributes:
        memory: bytes.
        flops: dense bfloat16 FLOP/s.
        utilization: assumed model FLOPs utilization.
        bandwidth: bytes per second that a device sends to others.
    """

    memory: float = 80e9
    flops: float = 989e12
    utilization: float = 0.4
    bandwidth: float = 450e9

    def compute_seconds(self, config: GPT2Config, tokens: int) -> float:
        return tokens * flops_per_token(config) / (self.flops * self.utilization)


NVLINK, NETWORK = Device(), Device(bandwidth=50e9)  # the network: one 400 Gb/s card per GPU


def tokens_to_hide_traffic(
    config: GPT2Config, parallel: Parallel, processes: int, device: Device = NVLINK, rows: int = 1
) -> float:
    """Computes from how many tokens per step and device computation takes longer than communication and can hide it.

    Infinite if the communication of a token takes longer than its computation.
    """
    traffic = traffic_per_gpu(config, parallel, processes)
    fixed = traffic.of_step(0, rows) / device.bandwidth
    left = device.compute_seconds(config, 1) - traffic.per_token / device.bandwidth
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
    """Formats memory, traffic and break-even of all strategies as a Markdown table."""
    columns = ["strategy", "GPUs", "state", "transient", "activations", "total", "sent per step", "per token"]
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
        print(f"{name}: {counts.total / 1e9:.2f} billion parameters, {counts.experts / 1e9:.2f} of them in experts\n")
        print(plan_table(config) + "\n")


if __name__ == "__main__":
    main()
