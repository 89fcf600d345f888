"""What the chapters share about models: a look inside, a short training, and the metrics that compare models."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.packing import encode_cards, name_nats, pack, pack_all
from flash_experts.models.moe_layer import MoELayer
from flash_experts.models.router_metrics import update_router_biases
from flash_experts.training.batches import NameBatches
from flash_experts.training.optimizer import Schedule, freeze_parts, make_optimizers, set_rates
from flash_experts.training.training_config import LearningRateScale, TrainingConfig

ALL_PARTS = LearningRateScale()


@torch.no_grad()
def queries_keys_values(model: Any, ids: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """q, k and v of each block for tokens (1, S), each (1, S, H, C): what GPT-2's own projections give."""
    caught: list[torch.Tensor] = []
    hooks = [
        block.attn.c_attn.register_forward_hook(lambda module, inputs, output: caught.append(output))
        for block in model.transformer.h
    ]
    model(ids)
    for hook in hooks:
        hook.remove()
    D, H = model.config.n_embd, model.config.n_head
    split = [qkv.split(D, dim=-1) for qkv in caught]
    return [(q.unflatten(-1, (H, -1)), k.unflatten(-1, (H, -1)), v.unflatten(-1, (H, -1))) for q, k, v in split]


def with_dropout(model: Any, probability: float) -> Any:
    """A copy of a model in training mode, with this probability in every dropout; with 0 it computes the same each time."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = probability
    return model.train()


def tiny_student(teacher: Any) -> GPT2LMHeadModel:
    """A new GPT-2 of two blocks of width 128, without dropout, with the teacher's vocabulary and attention."""
    ids = {
        name: getattr(teacher.config, name) for name in ("vocab_size", "n_positions", "bos_token_id", "eos_token_id")
    }
    student = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=128, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids)
    )
    student.set_attn_implementation(teacher.config._attn_implementation)
    student.loss_type = "ForCausalLM"
    return student


def training_steps(
    model: PreTrainedModel,
    names: Sequence[Card],
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    learning_rate: float,
    tokens: int = 200,
    lr_scale: LearningRateScale = ALL_PARTS,
    seed: int = 0,
    optimizer: Literal["adamw", "muon"] = "adamw",
) -> Iterator[float]:
    """A short training loop of the trainer's own parts: its batches, optimizer and schedule.

    Yields, after each optimizer step, the cross-entropy of the step's labels in nats per token (without the router's
    losses, which are trained on as well). Chapter 5 is about the trainer itself.

    Args:
        model: trained in place.
        names: what to learn.
        tokenizer: the model's.
        steps: optimizer steps.
        learning_rate: the highest; a short warm-up leads there, a cosine away from it.
        tokens: of a step, about.
        lr_scale: factors of the rate for router, experts and the rest; 0 freezes a part.
        seed: of the names' order and of dropout.
        optimizer: chapter 5 explains AdamW, chapter 5b Muon.
    """
    config = TrainingConfig(
        max_steps=steps,
        max_epochs=None,
        learning_rate=learning_rate,
        tokens_per_batch=tokens,
        lr_scale=lr_scale,
        seed=seed,
        optimizer=optimizer,
    )
    freeze_parts(model, lr_scale)
    batches, schedule = NameBatches(names, tokenizer, config), Schedule.of(config, steps)
    optimizers = make_optimizers(model, config)
    torch.manual_seed(seed)
    for step in range(steps):
        row = pack(batches.names_of_step(step))
        set_rates(optimizers.values(), learning_rate * schedule.factor(step, 0.0))
        model.train()
        output = model(**row.inputs_with_loss(row.labels.numel()))
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for each in optimizers.values():
            each.step()
            each.zero_grad()
        update_router_biases(model)
        model.eval()
        yield F.cross_entropy(output.logits[0].detach(), row.labels).item()


@torch.no_grad()
def nats_of_names(model: PreTrainedModel, names: Sequence[Card], tokenizer: PreTrainedTokenizerBase) -> torch.Tensor:
    """Negative log-likelihood of each name given its attributes, EOS token included: (N,) nats, in eval mode."""
    model.eval()
    rows = pack_all(encode_cards(names, tokenizer), tokens_per_batch=2048)
    return torch.cat([name_nats(model, row) for row in rows])


def bits_per_character(nats_N: torch.Tensor, names: Sequence[Card]) -> float:
    """The metric that does not depend on the tokenizer; the EOS token counts as a character."""
    characters = sum(len(card.name) + 1 for card in names)
    return nats_N.sum().item() / torch.log(torch.tensor(2.0)).item() / characters


def mean_and_error(values_N: torch.Tensor) -> tuple[float, float]:
    """The mean over names, and half the width of its 95% interval (normal approximation; it covers no other seed)."""
    return values_N.mean().item(), 1.96 * values_N.std().item() / len(values_N) ** 0.5


@torch.no_grad()
def favour_two(
    model: Any, block: int, names: Sequence[Card], tokenizer: PreTrainedTokenizerBase, by: float = 4.0
) -> None:
    """Raises the logits of the first two experts of a block by ``by`` on average over these names: the scaled mean of the
    router's inputs is added to their rows of its weight."""
    router = model.transformer.h[block].mlp.router
    read: list[torch.Tensor] = []
    hook = router.register_forward_hook(lambda module, inputs, output: read.append(inputs[0]))
    nats_of_names(model, names, tokenizer)
    hook.remove()
    mean_D = torch.cat(read).mean(0)
    router.weight[:2] += by * mean_D / mean_D.square().sum()


@torch.no_grad()
def experts_apart(model: Any) -> float:
    """How different experts are: mean distance of an expert's first matrix from the experts' mean, over its length.

    Of granular experts those of the same shard are compared.
    """
    shares = []
    for layer in (module for module in model.modules() if isinstance(module, MoELayer)):
        shards = model.config.n_embd * 4 // layer.experts.up_proj.shape[2]
        W_RSDF = layer.experts.up_proj.unflatten(0, (-1, shards))
        away = (W_RSDF - W_RSDF.mean(0)).flatten(1).norm(dim=1)
        shares.append(away.mean() / W_RSDF.flatten(1).norm(dim=1).mean())
    return torch.stack(shares).mean().item()


@torch.no_grad()
def altered(model: Any, change: str) -> Any:
    """A copy of an MoE model whose routed experts are silent ("routed experts silent"), or whose routers' rows are
    shuffled ("routers shuffled"). Shared experts stay."""
    other = copy.deepcopy(model)
    torch.manual_seed(0)
    for layer in (module for module in other.modules() if isinstance(module, MoELayer)):
        if change == "routed experts silent":
            layer.experts.down_proj.zero_()
            layer.experts.down_proj_bias.zero_()
        else:
            layer.router.weight.copy_(layer.router.weight[torch.randperm(len(layer.router.weight))])
    return other
