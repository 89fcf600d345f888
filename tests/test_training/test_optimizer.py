"""Groups and rates, frozen parts, Muon, the average of the weights, the loss: each against its formula."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers import GPT2Config, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from flash_experts.models import GPT2MoEForCausalLM
from flash_experts.training import Trainer, TrainingConfig
from flash_experts.training import loss as loss_module
from flash_experts.training.loss import CausalLoss, FiniteGuard
from flash_experts.training.optimizer import (
    Muon,
    WeightAverage,
    as_matrices,
    freeze_parts,
    from_matrices,
    make_optimizers,
    orthogonalize,
    part_of,
    set_rates,
)
from flash_experts.training.tracking import read_metrics
from flash_experts.training.training_config import LearningRateScale
from tests.test_training import TRAIN, VALIDATION, make_model


@pytest.fixture
def moe(dense_config: GPT2Config) -> GPT2MoEForCausalLM:
    """Experts in blocks 1 and 3 of four."""
    return GPT2MoEForCausalLM.from_dense(make_model(dense_config), num_experts=2)


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    return TrainingConfig(
        output_dir=str(tmp_path),
        run_name="run",
        seed=1,
        max_steps=6,
        max_epochs=None,
        tokens_per_batch=75,
        learning_rate=1e-2,
        log_every=1,
        eval_every=3,
        checkpoint_every=2,
        device="cpu",
    )


def settings_of(model: nn.Module, config: TrainingConfig) -> dict[str, dict[str, Any]]:
    """The group of each parameter, and which optimizer has it."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: value for key, value in group.items() if key != "params"} | {"by": name}
        for name, optimizer in make_optimizers(model, config).items()
        for group in optimizer.param_groups
        for parameter in group["params"]
    }


def test_decay_is_on_matrices_alone(moe: GPT2MoEForCausalLM) -> None:
    groups = settings_of(moe, TrainingConfig(weight_decay=0.5))
    for name, _ in moe.named_parameters():
        is_matrix = not name.endswith("bias") and "ln_" not in name
        assert groups[name]["weight_decay"] == (0.5 if is_matrix else 0.0), name


def test_each_part_and_depth_has_its_rate(moe: GPT2MoEForCausalLM) -> None:
    config = TrainingConfig(lr_scale=LearningRateScale(router=10, experts=2, dense=0.5), layer_decay=0.8)
    groups = settings_of(moe, config)
    expected = {
        "transformer.ln_f.weight": 0.5,
        "transformer.h.3.mlp.router.weight": 10 * 0.8,
        "transformer.h.3.mlp.experts.down_proj": 2 * 0.8,
        "transformer.h.1.mlp.experts.up_proj_bias": 2 * 0.8**3,
        "transformer.h.0.attn.c_attn.weight": 0.5 * 0.8**4,
        "transformer.wte.weight": 0.5 * 0.8**5,
        "transformer.wpe.weight": 0.5 * 0.8**5,
    }
    for name, scale in expected.items():
        assert groups[name]["scale"] == pytest.approx(scale), name


def test_two_steps_of_adamw_are_those_of_the_paper() -> None:
    """Loshchilov and Hutter 2019, algorithm 2, in float64, with the rate and the decay of each group."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"router": nn.Linear(3, 2), "dense": nn.Linear(3, 2)}).double()
    model = nn.ModuleDict({"mlp": model})
    config = TrainingConfig(weight_decay=0.3, betas=(0.8, 0.9), lr_scale=LearningRateScale(router=4.0))
    expected = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizers = make_optimizers(model, config)
    averages = {name: (0.0, 0.0) for name in expected}
    for step, rate in ((1, 0.1), (2, 0.05)):
        set_rates(optimizers.values(), rate)
        for name, parameter in model.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            first, second = averages[name]
            first = 0.8 * first + 0.2 * parameter.grad
            second = 0.9 * second + 0.1 * parameter.grad**2
            averages[name] = first, second
            own_rate = rate * (4.0 if "router" in name else 1.0)
            decay = 0.0 if name.endswith("bias") else 0.3
            update = first / (1 - 0.8**step) / ((second / (1 - 0.9**step)).sqrt() + 1e-8)
            expected[name] = (1 - own_rate * decay) * expected[name] - own_rate * update
        optimizers["optimizer"].step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-12, atol=1e-12, msg=name)


def test_adamw_is_one_kernel_and_can_skip_a_step_by_itself(moe: GPT2MoEForCausalLM) -> None:
    """`FiniteGuard` relies on the latter where a look at the gradient would wait for the GPU."""
    optimizer = make_optimizers(moe, TrainingConfig())["optimizer"]
    assert all(group["fused"] for group in optimizer.param_groups)
    before = moe.transformer.wte.weight.detach().clone()
    for parameter in moe.parameters():
        parameter.grad = torch.ones_like(parameter)
    for bad, moves in ((True, False), (False, True)):
        assert FiniteGuard(False, torch.device("meta"), 1).update(optimizer, torch.tensor(bad))
        optimizer.step()
        assert torch.equal(moe.transformer.wte.weight, before) is not moves


@pytest.mark.parametrize(
    ("scale", "moving"),
    [
        (LearningRateScale(experts=0, dense=0), {"router"}),
        (LearningRateScale(router=0, dense=0), {"experts"}),
        (LearningRateScale(router=0, experts=0), {"dense"}),
    ],
)
def test_a_frozen_part_stays_and_costs_nothing(
    moe: GPT2MoEForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainingConfig,
    scale: LearningRateScale,
    moving: set[str],
) -> None:
    before = {name: parameter.detach().clone() for name, parameter in moe.named_parameters()}
    trainer = Trainer(moe, tokenizer, TRAIN, VALIDATION, replace(config, lr_scale=scale))
    rows, num_labels = trainer._micro_batches_of_step()
    moe.train()
    trainer._backward(rows[0], num_labels)
    with_gradient = {part_of(name) for name, parameter in moe.named_parameters() if parameter.grad is not None}
    assert with_gradient == moving
    moe.zero_grad(set_to_none=True)
    trainer.train()
    changed = {part_of(name) for name, parameter in moe.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == moving
    with_state = {part_of(key) for key in trainer.checkpointer._registered["optimizer"].state_dict()}
    assert with_state == moving
    line = read_metrics(config.run_dir / "metrics.jsonl", "train")[-1]
    for part in ("router", "experts", "dense"):
        assert line[f"lr/{part}"] == pytest.approx(line["lr"] * (part in moving))


def test_a_scale_of_a_part_that_is_not_there_is_an_error(dense_config: GPT2Config) -> None:
    model = make_model(dense_config)
    with pytest.raises(ValueError, match=r"lr_scale\.router is 10, but the model has no router"):
        freeze_parts(model, LearningRateScale(router=10))
    with pytest.raises(ValueError, match="every parameter is frozen"):
        freeze_parts(model, LearningRateScale(dense=0))


# ---------------------------------------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(3, 16, 40), (3, 40, 16), (1, 8, 8)])
def test_newton_schulz_is_the_polynomial_of_the_singular_values(shape: tuple[int, ...]) -> None:
    """Each step maps singular value s to a s + b s^3 + c s^5 and leaves the singular vectors alone."""
    torch.manual_seed(0)
    matrices = torch.randn(shape, dtype=torch.float64)
    left, values, right = torch.linalg.svd(matrices / matrices.norm(dim=(1, 2), keepdim=True), full_matrices=False)
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    expected = left @ torch.diag_embed(values) @ right
    torch.testing.assert_close(orthogonalize(matrices), expected, rtol=0, atol=1e-6)  # atol: 1e-7 keeps zero from 0 / 0
    assert values.min() > 0.3 and values.max() < 1.3


def test_stacked_and_fused_matrices_are_each_made_orthogonal_alone() -> None:
    torch.manual_seed(0)
    stacked = torch.randn(3, 8, 12)
    assert torch.allclose(orthogonalize(stacked)[1], orthogonalize(stacked[1:2])[0], atol=1e-5)
    fused = torch.randn(8, 24)  # query, key and value
    matrices = as_matrices(fused, 3)
    assert torch.equal(matrices[2], fused[:, 16:]) and torch.equal(from_matrices(matrices, fused), fused)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon")
@pytest.mark.parametrize("dtype", [torch.bfloat16, None])
def test_muon_steps_as_torchs_does_on_single_matrices(dtype: torch.dtype | None) -> None:
    """torch's iterates in bfloat16 always; its momentum, decay and size of the update are the same."""
    torch.manual_seed(0)
    ours, theirs = (nn.Parameter(torch.randn(24, 16, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    optimizer = Muon([{"params": [ours]}], lr=0.1, weight_decay=0.2, momentum=0.9, dtype=dtype)
    reference = torch.optim.Muon(
        [theirs], lr=0.1, weight_decay=0.2, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw"
    )
    for _ in range(3):
        ours.grad = torch.randn(24, 16)
        theirs.grad = ours.grad.clone()
        optimizer.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0.01)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest(moe: GPT2MoEForCausalLM) -> None:
    groups = settings_of(moe, TrainingConfig(optimizer="muon", weight_decay=0.1))
    by_muon = {name for name, group in groups.items() if group["by"] == "muon"}
    assert {"transformer.h.1.mlp.experts.up_proj", "transformer.h.0.mlp.c_proj.weight"} <= by_muon
    assert not any("router" in name or "wte" in name or "bias" in name or "ln_" in name for name in by_muon)
    assert len(groups) == sum(1 for _ in moe.named_parameters())
    assert groups["transformer.h.2.attn.c_attn.weight"]["blocks"] == 3
    assert groups["transformer.h.2.attn.c_proj.weight"]["blocks"] == 1


# ----------------------------------------------------------------------------------------------------------------- EMA


def test_the_average_is_its_closed_form() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    average = WeightAverage(model, decay=0.6)
    history = [model.weight.detach().clone()]
    for step in range(1, 30):
        with torch.no_grad():
            model.weight.copy_(torch.randn(1, 2, generator=torch.Generator().manual_seed(step)))
        history.append(model.weight.detach().clone())
        average.update(step, torch.tensor(False))
    decays = [min(0.6, (1 + step) / (10 + step)) for step in range(1, 30)]
    assert decays[0] == 2 / 11 and decays[-1] == 0.6
    shares = [math.prod(decays)]
    shares += [(1 - decay) * math.prod(decays[index + 1 :]) for index, decay in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * weight for share, weight in zip(shares, history, strict=True))
    with average.in_place():
        torch.testing.assert_close(model.weight.detach(), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(model.weight, history[-1]), "its own weights come back to the bit"


def test_a_llamas_blocks_are_found_too() -> None:
    """Muon has seven matrices of each of two blocks; AdamW their norms, the embeddings, the last norm, the head."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 40}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, tie_word_embeddings=False))
    groups = settings_of(llama, TrainingConfig(optimizer="muon", layer_decay=0.5))
    found = Counter((group["by"], group["scale"]) for group in groups.values())
    rest = {("optimizer", 0.5): 2, ("optimizer", 0.25): 2, ("optimizer", 0.125): 1, ("optimizer", 1.0): 2}
    assert found == {("muon", 0.5): 7, ("muon", 0.25): 7, **rest}
    assert groups["model.embed_tokens.weight"]["scale"] == 0.125
    assert groups["model.layers.0.mlp.up_proj.weight"]["scale"] == 0.25
    assert {group["blocks"] for group in groups.values() if group["by"] == "muon"} == {1}


@pytest.mark.parametrize("fields", [{"ema_decay": 0.7}, {"ema_decay": 0.7, "optimizer": "muon"}])
def test_averaged_weights_are_validated_and_kept_and_resumed_to_the_bit(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig, fields: dict[str, Any]
) -> None:
    def make(seed: int) -> GPT2MoEForCausalLM:
        return GPT2MoEForCausalLM.from_dense(make_model(dense_config, seed=seed), num_experts=2)

    raw = make(0)
    Trainer(raw, tokenizer, TRAIN, VALIDATION, replace(config, **(fields | {"ema_decay": None}))).train()
    straight, settings = make(0), replace(config, run_name="straight", keep_checkpoints=9, **fields)
    trainer = Trainer(straight, tokenizer, TRAIN, VALIDATION, settings)
    trainer.train()
    assert all(map(torch.equal, raw.parameters(), straight.parameters())), "averaging does not change the training"
    kept = GPT2MoEForCausalLM.from_pretrained(settings.run_dir)
    assert trainer.average is not None and trainer.state.best_step == 6
    with trainer.average.in_place():
        assert all(map(torch.equal, kept.parameters(), straight.parameters())), "the averages are what is kept"
    assert not torch.equal(kept.transformer.wte.weight, straight.transformer.wte.weight)
    # From another start, so that all that matters must come from the checkpoint.
    resumed, again = make(9), replace(settings, run_name="resumed")
    other = Trainer(resumed, tokenizer, TRAIN, VALIDATION, again)
    other.train(resume=settings.run_dir / "checkpoints/step-000004")
    assert all(map(torch.equal, resumed.parameters(), straight.parameters()))
    lines = [read_metrics(run.run_dir / "metrics.jsonl", "validation")[-1] for run in (settings, again)]
    assert lines[0]["validation/bits_per_char"] == lines[1]["validation/bits_per_char"]
    same = [(path / "model.safetensors").read_bytes() for path in (settings.run_dir, again.run_dir)]
    assert same[0] == same[1]


# ---------------------------------------------------------------------------------------------------------------- loss


def test_a_second_derivative_of_the_chunked_loss_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward keeps the gradient as a constant: a second derivative would be wrong without a word."""
    monkeypatch.setattr(loss_module, "_CHUNK", 16)
    logits = torch.randn(1, 5, 7, requires_grad=True)
    loss = CausalLoss()(logits, torch.randint(7, (1, 5)), 7)
    (gradient,) = torch.autograd.grad(loss**2, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.pow(2).sum().backward()


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_torchs_smoothed_cross_entropy_over_the_items_of_the_step(smoothing: float) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(1, 7, 11), torch.randint(0, 11, (1, 7))
    loss = CausalLoss(smoothing)
    assert loss(logits, labels, 11, num_items_in_batch=20, shift_labels=labels).item() == pytest.approx(
        F.cross_entropy(logits[0], labels[0], label_smoothing=smoothing, reduction="sum").item() / 20
    )
    labels[0, 3] = -100
    expected = F.cross_entropy(logits[0, :-1], labels[0, 1:], label_smoothing=smoothing).item()
    assert loss(logits, labels, 11).item() == pytest.approx(expected)


@pytest.mark.parametrize("chunk", [2**22, 24])
def test_loss_of_bfloat16_logits_is_computed_in_float32(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(loss_module, "_CHUNK", chunk)
    torch.manual_seed(0)
    logits = torch.randn(1, 60, 11).bfloat16().requires_grad_()
    labels = torch.randint(11, (1, 60))
    loss = CausalLoss()(logits, labels, 11, shift_labels=labels)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(F.cross_entropy(logits[0].detach().double(), labels[0]).item(), rel=1e-6)


def test_smoothing_is_in_training_and_not_in_validation(
    moe: GPT2MoEForCausalLM, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> None:
    """A step of no size: the weights are the same, so that a difference would be the loss's."""
    lines: dict[float, list[dict[str, Any]]] = {}
    for smoothing in (0.0, 0.2):
        settings = replace(
            config, run_name=f"run{smoothing}", label_smoothing=smoothing, learning_rate=1e-30, max_steps=1
        )
        Trainer(moe, tokenizer, TRAIN, VALIDATION, settings).train()
        lines[smoothing] = read_metrics(settings.run_dir / "metrics.jsonl")
    plain, smoothed = ([line for line in lines[key] if line["event"] == "validation"] for key in (0.0, 0.2))
    assert [line["validation/loss"] for line in plain] == [line["validation/loss"] for line in smoothed]
    losses = [next(line["loss"] for line in lines[key] if line["event"] == "train") for key in (0.0, 0.2)]
    assert abs(losses[0] - losses[1]) > 1e-6


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"optimizer": "adam"}, "one of adamw, muon"),
        ({"lr_scale": LearningRateScale(router=-1)}, "lr_scale.router is -1, but it must be from 0 to 1,000"),
        ({"layer_decay": 0}, "layer_decay is 0"),
        ({"layer_decay": 1.2}, "at most 1"),
        ({"ema_decay": 1.0}, "ema_decay is 1.0, but it must be from 0 to under 1"),
        ({"label_smoothing": 1}, "label_smoothing is 1"),
        ({"muon_momentum": math.nan}, "muon_momentum is nan"),
    ],
)
def test_nonsense_is_one_line(wrong: dict[str, Any], message: str) -> None:
    make: Callable[..., TrainingConfig] = TrainingConfig
    with pytest.raises(ValueError, match="wrong") as caught:
        make(**wrong).validate()
    assert message in str(caught.value) and "\n" not in str(caught.value)
