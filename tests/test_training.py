"""The loop: what it learns, what it writes down, when it stops."""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast

from flash_experts.data.cards import Card
from flash_experts.data.packing import pack
from flash_experts.data.prompts import Attributes
from flash_experts.models import GPT2MoEConfig, GPT2MoEForCausalLM
from flash_experts.models.flash_attention import ATTENTION_IMPLEMENTATION
from flash_experts.training import Callback, NonFiniteLossError, Trainer, TrainingConfig, metrics
from flash_experts.training.checkpoint import checkpoint_steps
from flash_experts.training.metrics import SpeedMeter, multiplied_parameters, training_flops
from flash_experts.training.optimizer import Schedule
from flash_experts.training.tracking import read_metrics

FIRST = ["Goblin", "Elf", "Dragon", "Angel", "Storm", "Fire", "Blood", "Night"]
SECOND = ["Guide", "Lord", "Singer", "Wall", "Strike", "Bolt", "Ritual", "Growth"]
CARDS = [
    Card(
        name=f"{first} {second}",
        type_line="Creature — Goblin",
        supertypes=(),
        types=("Creature",),
        subtypes=("Goblin",),
        colors=("R",),
        mana_value=len(first),
        source_id=f"{first}{second}",
    )
    for first in FIRST
    for second in SECOND
]
random.Random(0).shuffle(CARDS)
TRAIN, VALIDATION = CARDS[:48], CARDS[48:]


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    """Two epochs of nine steps."""
    return TrainingConfig(
        output_dir=str(tmp_path),
        run_name="run",
        seed=1,
        max_epochs=2,
        tokens_per_batch=75,
        learning_rate=1e-2,
        log_every=1,
        eval_every=4,
        checkpoint_every=4,
        device="cpu",
    )


def make_model(dense_config: GPT2Config, dropout: float = 0.1, seed: int = 0) -> GPT2LMHeadModel:
    torch.manual_seed(seed)
    dense_config.attn_pdrop = dense_config.embd_pdrop = dense_config.resid_pdrop = dropout
    dense_config._attn_implementation = ATTENTION_IMPLEMENTATION
    return GPT2LMHeadModel(dense_config)


def run(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig, **kwargs: Any
) -> list[dict[str, Any]]:
    """Trains, and gives the lines of the log."""
    Trainer(model, tokenizer, TRAIN, VALIDATION, config, **kwargs).train()
    return read_metrics(config.run_dir / "metrics.jsonl", "train")


def test_it_learns_and_leaves_a_loadable_model(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> None:
    model = make_model(dense_config)
    result = Trainer(model, tokenizer, TRAIN, VALIDATION, replace(config, max_epochs=6)).train()
    validations = read_metrics(config.run_dir / "metrics.jsonl", "validation")
    bits = [line["validation/bits_per_char_mean"] for line in validations]
    assert [line["step"] for line in validations] == sorted({*range(0, result.step + 1, 4), result.step})
    assert result.best_bits_per_char == min(bits) < 0.6 * bits[0]
    assert result.reason == "steps"
    reloaded = GPT2LMHeadModel.from_pretrained(config.run_dir)
    ids = torch.arange(10)[None]
    if result.best_step == result.step:
        torch.testing.assert_close(reloaded.eval()(ids).logits, model.eval()(ids).logits)
    info = json.loads((config.run_dir / "run.json").read_text())
    assert (
        info["data"]["train_names"] == 48 and info["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    )


def test_names_longer_than_the_context_are_left_out_and_counted(
    dense_config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainingConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One is too long by itself, the other only with its prompt; the longest that fits is learned."""
    alone, prompt = "x" * 70, len(tokenizer(Attributes.of(TRAIN[0]).prompt())["input_ids"])
    fits = replace(TRAIN[0], name="x" * (dense_config.n_positions - prompt - 2))  # a BOS token and a space
    too_long = [replace(TRAIN[0], name=alone), replace(TRAIN[0], name=fits.name + "x")]
    settings = replace(config, max_epochs=1, eval_every=None)
    trainer = Trainer(
        make_model(dense_config), tokenizer, [*TRAIN, *too_long, fits], [*VALIDATION, *too_long], settings
    )
    assert trainer.train().reason == "steps"
    err = capsys.readouterr().err
    assert f"more than the model's 64 tokens: 2 of 51 training names ('{alone[:40]}', ...), 2 of 18 validation" in err
    assert fits in trainer.batches.plan[0].cards and len(trainer.batches.plan[0].cards) == 49
    with pytest.raises(ValueError, match="no training name fits into the model's 64 tokens"):
        Trainer(make_model(dense_config), tokenizer, too_long, VALIDATION, config)


@pytest.mark.parametrize("experts", [False, True])
def test_accumulation_equals_one_large_batch(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig, experts: bool
) -> None:
    """Rows of unequal numbers of labels: a mean of means would differ."""
    runs = []
    for parts in (1, 3):
        model: PreTrainedModel = make_model(dense_config, dropout=0.0)
        if experts:
            # The balancing losses are of one forward; the cross-entropy alone is to be equal.
            model = GPT2MoEForCausalLM.from_dense(
                model,
                num_experts=4,
                router_aux_loss_coef=0.0,
                router_z_loss_coef=0.0,  # type: ignore[arg-type]
            )
            torch.manual_seed(5)
            for name, parameter in model.named_parameters():
                if "router" in name:
                    torch.nn.init.normal_(parameter)
        # Few steps: where a gradient is nearly zero, AdamW follows the sign of its rounding.
        settings = replace(config, gradient_accumulation_steps=parts, run_name=f"run{parts}", max_steps=3)
        losses = [line["loss"] for line in run(model, tokenizer, settings)]
        runs.append((losses, model.state_dict()))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-5)
    for name, weight in runs[0][1].items():
        torch.testing.assert_close(weight, runs[1][1][name], atol=2e-4, rtol=0, msg=name)


def test_gradient_of_accumulated_rows_is_that_of_one_row(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> None:
    gradients = []
    for parts in (1, 4):
        model = make_model(dense_config, dropout=0.0).train()
        settings = replace(config, gradient_accumulation_steps=parts, run_name=f"run{parts}")
        trainer = Trainer(model, tokenizer, TRAIN, [], settings)
        rows, num_labels = trainer._micro_batches_of_step()
        assert len(rows) == parts
        for row in rows:
            trainer._backward(row, num_labels)
        gradients.append([parameter.grad for parameter in model.parameters()])
    for one, several in zip(*gradients, strict=True):
        torch.testing.assert_close(one, several, atol=1e-6, rtol=1e-4)


def test_losses_repeat_and_neither_validation_nor_sampling_disturbs_them(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> None:
    class Dice(Callback):
        def on_sample(self, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Sequence[str]:
            torch.rand(17)
            return [TRAIN[0].name.upper(), VALIDATION[0].name, "Wholly New"]

    quiet = run(make_model(dense_config), tokenizer, replace(config, eval_every=None, max_steps=9))
    settings = replace(config, run_name="other", eval_every=2, sample_every=3, max_steps=9)
    busy = run(make_model(dense_config), tokenizer, settings, callbacks=[Dice()])
    assert [line["loss"] for line in quiet] == [line["loss"] for line in busy]
    samples = read_metrics(settings.run_dir / "metrics.jsonl", "samples")
    assert [line["step"] for line in samples] == [3, 6, 9]
    assert samples[0]["names"] == {
        "new": ["Wholly New"],
        "in train": [TRAIN[0].name.upper()],
        "in validation": [VALIDATION[0].name],
    }


def test_router_statistics_are_logged_and_biases_move(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> None:
    fields = dense_config.to_dict()
    fields.pop("model_type")
    moe = GPT2MoEForCausalLM(GPT2MoEConfig(**fields, num_experts=4, router_bias_update_rate=0.01))
    lines = run(moe, tokenizer, replace(config, max_steps=5))
    assert {"aux_loss", "z_loss", "router/1/load_cv", "router/3/top1"} <= lines[-1].keys()
    biases = [buffer for name, buffer in moe.named_buffers() if "selection_bias" in name]
    assert biases and all(buffer.abs().max() > 0 for buffer in biases)


def test_early_stopping_keeps_the_best_weights(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> None:
    # A rate so high that it only gets worse after the start.
    settings = replace(config, learning_rate=3.0, eval_every=1, early_stopping_patience=3, clip_norm=None)
    model = make_model(dense_config)
    before = model.transformer.wte.weight.detach().clone()
    result = Trainer(model, tokenizer, TRAIN, VALIDATION, settings).train()
    assert (result.reason, result.best_step, result.step) == ("early stopping", 0, 3)
    kept = GPT2LMHeadModel.from_pretrained(config.run_dir).transformer.wte.weight
    assert torch.equal(kept, before) and not torch.equal(model.transformer.wte.weight, before)


def test_nan_stops_at_its_step_and_names_the_last_good_checkpoint(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> None:
    class Poison(Callback):
        def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 6:
                with torch.no_grad():
                    model.transformer.wte.weight[:, 0] = math.nan

    model = make_model(dense_config)
    trainer = Trainer(model, tokenizer, TRAIN, VALIDATION, config, [Poison()])
    with pytest.raises(NonFiniteLossError, match=r"step 7.*step-000004.*halve learning_rate") as caught:
        trainer.train()
    assert caught.value.step == 7
    assert checkpoint_steps(config.run_dir) == [4]


def test_an_unusable_model_is_refused_before_anything_is_written(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> None:
    with pytest.raises(ValueError, match="float32"):
        Trainer(make_model(dense_config).bfloat16(), tokenizer, TRAIN, VALIDATION, config)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="CUDA"):
            Trainer(make_model(dense_config), tokenizer, TRAIN, [], replace(config, device="cuda"))
    assert not config.run_dir.exists()


def test_time_budget_ends_the_run(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> None:
    settings = replace(config, max_epochs=None, max_minutes=0.02, checkpoint_every=None, eval_every=None)
    started = time.monotonic()
    result = Trainer(make_model(dense_config), tokenizer, TRAIN, [], settings).train()
    assert result.reason == "time" and 1.2 <= result.seconds <= time.monotonic() - started
    rates = [line["lr"] for line in read_metrics(config.run_dir / "metrics.jsonl", "train")]
    assert rates[-1] < 0.2 * max(rates)
    assert GPT2LMHeadModel.from_pretrained(config.run_dir)


def test_a_validation_that_takes_most_of_the_time_is_reported(
    dense_config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainingConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings = replace(config, max_epochs=None, max_minutes=0.02, checkpoint_every=None, eval_every=None)
    trainer = Trainer(make_model(dense_config), tokenizer, TRAIN, VALIDATION, settings)
    assert trainer.validation is not None
    score = trainer.validation.sums

    def slow(*args: Any) -> torch.Tensor:
        time.sleep(0.5)
        return score(*args)

    monkeypatch.setattr(trainer.validation, "sums", slow)
    trainer.train()
    assert "more than half of max_minutes (0.02); set validation_names to" in capsys.readouterr().err


def test_the_best_model_is_that_of_the_lowest_mean_and_is_the_one_in_the_folder(
    dense_config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainingConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Unconditional names keep improving while those with attributes get worse: the first validation of the two
    with the lower mean wins."""
    trainer = Trainer(make_model(dense_config), tokenizer, TRAIN, VALIDATION, replace(config, max_steps=12))
    assert trainer.validation is not None
    nats = {0: (30.0, 20.0), 4: (20.0, 20.0), 8: (18.0, 24.0), 12: (17.0, 26.0)}
    weights: dict[int, torch.Tensor] = {}

    def sums(model: GPT2LMHeadModel, device: torch.device) -> torch.Tensor:
        weights[trainer.state.step] = model.transformer.wte.weight.detach().clone()
        return torch.tensor([[figure, 10, 10] for figure in nats[trainer.state.step]], dtype=torch.float64)

    monkeypatch.setattr(trainer.validation, "sums", sums)
    result = trainer.train()
    assert result.best_step == 4 and result.best_bits_per_char == pytest.approx(2 / math.log(2))
    saved = GPT2LMHeadModel.from_pretrained(config.run_dir).transformer.wte.weight
    assert torch.equal(saved, weights[4]) and not torch.equal(saved, weights[8])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("validation at")]
    assert ["best, saved" in line for line in lines] == [True, True, False, False]
    assert "2.597 bits per character unconditional, 3.462 given all attributes, mean 3.030" in lines[2]


def test_the_last_validation_is_within_the_budget() -> None:
    """Ten minutes with validations of two: training has the six between the first and the last."""
    schedule = Schedule("linear", 0.0, 0.0, planned_steps=None, planned_seconds=600)
    shares = [schedule.progress(9, seconds, evaluation_seconds=120) for seconds in (60, 120, 300, 480, 500)]
    assert shares == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert schedule.limit_reached(9, 479.0, evaluation_seconds=120) is None
    assert schedule.limit_reached(9, 480.0, evaluation_seconds=120) == "time"
    short = replace(schedule, planned_seconds=100)
    assert short.progress(1, 121, evaluation_seconds=120) == 1.0, "no time for more than the validations"


def test_bits_per_character_leave_the_balancing_losses_out(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig
) -> None:
    bits, losses = [], []
    for weight in (0.0, 0.5):
        model = GPT2MoEForCausalLM.from_dense(
            make_model(dense_config, dropout=0.0), num_experts=4, router_aux_loss_coef=weight, router_z_loss_coef=weight
        )
        settings = replace(config, run_name=f"weight-{weight}", max_steps=1, gradient_accumulation_steps=2)
        trainer = Trainer(model, tokenizer, TRAIN, [], settings)
        names = trainer.batches.names_of_step(0)
        trainer.train()
        (line,) = read_metrics(settings.run_dir / "metrics.jsonl", "train")
        bits.append(line["bits_per_char"])
        if weight == 0:
            labels = sum(len(name.ids) - name.prompt_length for name in names)
            characters = sum(int(pack([name]).characters) for name in names)
            assert bits[0] == pytest.approx(line["loss"] * labels / math.log(2) / characters, rel=1e-5)
        losses.append(line["loss"])
    assert losses[1] > 1.1 * losses[0]
    assert bits[0] == pytest.approx(bits[1], rel=1e-5)


def test_frozen_parts_cost_no_arithmetic_of_their_own(dense: GPT2LMHeadModel) -> None:
    counts = multiplied_parameters(dense)
    assert counts["body_flops"] == 6 * counts["body"] and counts["head_flops"] == 6 * counts["head"]
    assert training_flops(counts, 10, 4) == 60 * counts["body"] + 24 * counts["head"]
    last = dense.transformer.h[-1]
    dense.requires_grad_(False)
    last.mlp.requires_grad_(True)
    frozen = multiplied_parameters(dense)
    # The gradient goes no deeper than the MLP of the last block; its first weight needs none of its input.
    mlp = sum(parameter.numel() for parameter in last.mlp.parameters())
    final_norm = 2 * dense.config.n_embd
    first = last.mlp.c_fc.weight.numel()
    assert frozen["body_flops"] == 2 * (frozen["body"] + 2 * mlp + final_norm - first)
    assert frozen["head_flops"] == 4 * frozen["head"]


def test_mfu_is_the_flops_of_active_weights_over_time_and_peak(
    dense: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two processes with a device of 1e9 FLOP/s each; the pause is not training."""
    clock = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(metrics, "peak_flops", lambda device: 1e9)
    counts = multiplied_parameters(GPT2MoEForCausalLM.from_dense(dense, num_experts=4, num_experts_per_tok=1))
    assert counts["body"] == multiplied_parameters(dense)["body"] + 2 * 4 * dense.config.n_embd, "and two routers"
    speed = SpeedMeter(counts, torch.device("cpu"), world=2)
    speed.add(900, 200, 600)
    speed.add(600, 100, 400)
    clock[0] += 3.0
    with speed.pause():
        clock[0] += 50.0
    clock[0] += 1.0
    measured = speed.metrics()
    assert measured["tokens_per_second"] == 375.0, "what is read, not what is multiplied"
    assert measured["mfu"] == pytest.approx(6 * (1000 * counts["body"] + 300 * counts["head"]) / 4.0 / 2e9)


def test_gradients_are_reduced_after_the_last_micro_batch_alone(
    dense_config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainingConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = replace(config, gradient_accumulation_steps=3, max_steps=2, eval_every=None)
    trainer = Trainer(make_model(dense_config), tokenizer, TRAIN, [], settings)
    is_deferred, seen = [False], []
    backward = trainer.parallel.backward

    @contextmanager
    def no_sync() -> Iterator[None]:
        is_deferred[0] = True
        yield
        is_deferred[0] = False

    def spy(loss: torch.Tensor) -> None:
        seen.append(is_deferred[0])
        backward(loss)

    monkeypatch.setattr(trainer.parallel, "no_sync", no_sync)
    monkeypatch.setattr(trainer.parallel, "backward", spy)
    trainer.train()
    assert seen == [True, True, False] * 2
