"""Failures of a run: NaN, memory, signals, damaged files; their messages, and what they leave on disk."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPT2Config, PreTrainedModel, PreTrainedTokenizerFast

from flash_experts import cli
from flash_experts.data.prepare import check_prepared
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.training import Callback, NonFiniteLossError, Trainer, TrainingConfig
from flash_experts.training.checkpoint import checkpoint_steps
from flash_experts.training.loss import MOST_SKIPS_IN_A_ROW, FiniteGuard
from flash_experts.training.run_folder import run_lock
from flash_experts.training.run_state import STOP_SIGNALS, OutOfMemoryError, StopSignals, checkpoint_path
from flash_experts.training.tracking import read_metrics
from tests.test_training import TRAIN, VALIDATION, make_model

MEASURED = ("seconds", "tokens_per_second", "eta_seconds", "peak_memory_gib")


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    """Nine steps an epoch, two micro-batches each."""
    return TrainingConfig(
        output_dir=str(tmp_path),
        run_name="run",
        seed=1,
        max_epochs=None,
        max_steps=8,
        tokens_per_batch=75,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        log_every=1,
        eval_every=None,
        checkpoint_every=4,
        device="cpu",
    )


@pytest.fixture
def trainer_of(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast
) -> Callable[..., tuple[PreTrainedModel, Trainer]]:
    def trainer_of(
        config: TrainingConfig, bad_steps: tuple[int, ...] = (), value: float = math.nan, callbacks: Any = ()
    ) -> tuple[PreTrainedModel, Trainer]:
        """A trainer whose gradient is ``value`` somewhere at the steps given (from 1)."""
        model = make_model(dense_config)
        trainer = Trainer(model, tokenizer, TRAIN, VALIDATION, config, callbacks)

        def spoil(gradient: torch.Tensor) -> torch.Tensor:
            if trainer.state.step + 1 in bad_steps:
                gradient = gradient.clone()
                gradient[0, 0] = value
            return gradient

        model.transformer.h[1].attn.c_attn.weight.register_hook(spoil)
        return model, trainer

    return trainer_of


class StopAfter(Callback):
    """Sends a signal when a step is logged; it takes effect at the end of the next one."""

    def __init__(self, step: int, number: signal.Signals = signal.SIGTERM):
        self.step, self.number = step, number

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        if step == self.step:
            signal.raise_signal(self.number)


def lines_of(config: TrainingConfig) -> list[dict[str, Any]]:
    lines = read_metrics(config.run_dir / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_bad_gradient_stops_the_run_before_the_weights_change(
    trainer_of: Callable[..., Any], config: TrainingConfig, value: float
) -> None:
    model, trainer = trainer_of(config, bad_steps=(5,), value=value)
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    text = str(caught.value)
    batch = json.loads((config.run_dir / "bad-batch-000005.json").read_text())
    assert batch["step"] == 5 and set(batch["names"]) <= {card.name for card in TRAIN}
    names = [name.ids for row in trainer.batches.micro_batches_of_step(4, 2) for name in row]
    assert len(batch["names"]) == len(names)
    assert "at step 5 (" + ", ".join(batch["names"][:3]) in text and "bad-batch-000005.json" in text
    assert f"last good checkpoint is {checkpoint_path(config.run_dir, 4)}" in text and "\n" not in text
    saved = load_file(checkpoint_path(config.run_dir, 4) / "model.safetensors")
    for name, weight in model.state_dict().items():
        if name in saved:
            assert torch.equal(weight, saved[name]), name
    assert checkpoint_steps(config.run_dir) == [4]


def test_after_an_error_the_same_trainer_resumes_as_if_nothing_had_been(
    trainer_of: Callable[..., Any], config: TrainingConfig
) -> None:
    """NaN at step 6, and then no memory in the second micro-batch of step 6, whose first left a gradient."""
    straight, trainer = trainer_of(replace(config, run_name="straight"))
    trainer.train()
    bad_steps, forwards = {6}, [0]
    model, trainer = trainer_of(config, bad_steps=bad_steps)
    with pytest.raises(NonFiniteLossError):
        trainer.train()
    bad_steps.clear()

    def full(module: torch.nn.Module, *args: Any) -> None:
        forwards[0] += module.training
        if forwards[0] == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")

    hook = model.transformer.h[0].register_forward_pre_hook(full)
    with pytest.raises(OutOfMemoryError):
        trainer.train("auto")
    hook.remove()
    assert trainer.train("auto").step == 8
    assert all(torch.equal(weight, model.state_dict()[name]) for name, weight in straight.state_dict().items())
    assert lines_of(config) == lines_of(replace(config, run_name="straight"))


def test_a_trainer_that_has_trained_starts_no_new_run(trainer_of: Callable[..., Any], config: TrainingConfig) -> None:
    """It would start from trained weights."""
    _, trainer = trainer_of(replace(config, max_steps=4))
    trainer.train()
    with pytest.raises(ValueError, match="for a new run make a new Trainer with a new model"):
        trainer.train(overwrite=True)
    assert checkpoint_steps(config.run_dir) == [4] and trainer.train("auto").step == 4
    bad = replace(config, run_name="bad")
    _, trainer = trainer_of(bad, bad_steps=(2,))
    for resume, error in ((None, NonFiniteLossError), ("auto", ValueError)):
        with pytest.raises(error, match=r"at step 2|make a new Trainer"):  # no checkpoint to resume
            trainer.train(resume)


def test_a_wrong_tracker_is_refused_before_anything_is_overwritten(
    trainer_of: Callable[..., Any], config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer_of(config)[1].train()
    kept = {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()}
    monkeypatch.setattr("flash_experts.training.trackers.is_installed", lambda _: True)
    monkeypatch.setenv("WANDB_MODE", "offlin")
    with pytest.raises(ValueError, match="offlin"):
        trainer_of(replace(config, tracker="wandb"))[1].train(overwrite=True)
    assert {path: path.read_bytes() for path in config.run_dir.rglob("*") if path.is_file()} == kept


def test_a_damaged_newest_checkpoint_is_not_called_good(trainer_of: Callable[..., Any], config: TrainingConfig) -> None:
    class Damage(Callback):
        def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 5:
                trainer.checkpointer.wait()
                (checkpoint_path(config.run_dir, 4) / "model.safetensors").write_bytes(b"")

    _, trainer = trainer_of(replace(config, checkpoint_every=2), bad_steps=(6,), callbacks=[Damage()])
    with pytest.raises(NonFiniteLossError, match=r"last good checkpoint is .*step-000002"):
        trainer.train()


@pytest.mark.parametrize("on_device", [False, True])
def test_a_bad_step_is_skipped_counted_and_resumed_over(
    trainer_of: Callable[..., Any], config: TrainingConfig, monkeypatch: pytest.MonkeyPatch, on_device: bool
) -> None:
    """``on_device`` is the way of a GPU, on a CPU: the optimizer itself holds back."""
    if on_device:
        init = FiniteGuard.__init__

        def as_on_a_gpu(guard: FiniteGuard, *args: Any) -> None:
            init(guard, *args)
            guard._on_cpu = False

        monkeypatch.setattr(FiniteGuard, "__init__", as_on_a_gpu)
    settings = replace(config, on_nan="skip", log_every=2, clip_norm=None)
    before: dict[int, torch.Tensor] = {}
    model, trainer = trainer_of(settings, bad_steps=(5, 7))
    step = Trainer._step

    def watch(watched: Trainer, *args: Any) -> None:
        step(watched, *args)
        if watched is trainer:
            before[watched.state.step + 1] = model.transformer.wte.weight.detach().clone()

    monkeypatch.setattr(Trainer, "_step", watch)
    trainer.train()
    assert torch.equal(before[5], before[4]) and torch.equal(before[7], before[6])
    assert not torch.equal(before[6], before[5])
    lines = read_metrics(config.run_dir / "metrics.jsonl", "train")
    assert [line["skipped_steps"] for line in lines] == [0, 0, 1, 2]
    assert all(math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"]) for line in lines)
    skipped = read_metrics(config.run_dir / "metrics.jsonl", "skipped")
    assert [line["step"] for line in skipped] == [5, 7]
    assert set(skipped[0]["names"]) <= {card.name for card in TRAIN}
    steps = {float(slots["step"]) for slots in trainer.optimizers["optimizer"].state.values()}
    assert steps == {6.0}  # the optimizer has not seen the others
    second = replace(settings, run_name="second")
    trainer_of(second, bad_steps=(5, 7), callbacks=[StopAfter(4)])[1].train()
    assert checkpoint_steps(second.run_dir)[-1] == 5
    trainer_of(second, bad_steps=(5, 7))[1].train("auto")
    assert lines_of(second) == lines_of(settings)


def test_a_skipped_step_leaves_no_trace(
    config: TrainingConfig,
    dense_config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = GPT2MoEForCausalLM.from_dense(make_model(dense_config), num_experts=4, router_bias_update_rate=0.01)
    settings = replace(config, on_nan="skip", ema_decay=0.9, log_every=100)
    trainer = Trainer(model, tokenizer, TRAIN, VALIDATION, settings)

    def spoil(*args: Any) -> torch.Tensor | None:
        return args[2] * math.nan if model.training and trainer.state.step + 1 == 5 else None

    model.transformer.h[0].register_forward_hook(spoil)  # the routers after it also see NaN
    states: list[dict[str, torch.Tensor]] = []
    step = Trainer._step

    def watch(*args: Any) -> None:
        step(*args)
        assert trainer.average is not None
        found = trainer.average.state_dict() | dict(model.named_buffers()) | trainer.window.state_dict()
        states.append({name: value.clone() for name, value in found.items()})

    monkeypatch.setattr(Trainer, "_step", watch)
    trainer.train()
    changes = [
        {name for name, value in after.items() if not torch.equal(value, before[name])}
        for before, after in itertools.pairwise(states)
    ]
    assert trainer.state.skipped_steps == 1 and not changes[3], "the fifth step"
    assert changes[2] == changes[4] >= {"sums", "transformer.wte.weight", "transformer.h.3.mlp.router.selection_bias_E"}


@pytest.mark.parametrize(("stop", "updates"), [(True, [True, False, False]), (False, [True, False, True])])
def test_with_stop_no_later_step_changes_the_weights(stop: bool, updates: list[bool]) -> None:
    """A GPU runs ahead: the host reads of a bad step when later ones were started already."""
    guard, optimizer = FiniteGuard(stop, torch.device("cpu"), 1), torch.optim.SGD([torch.zeros(1)])
    losses = torch.tensor([1.0, math.nan, 1.0])
    found = [guard.update(optimizer, guard.check(step, loss, torch.ones(()))) for step, loss in enumerate(losses, 1)]
    assert found == updates
    assert guard.bad_steps() == [2] and guard.bad_steps() == [], "each is reported once"


def test_a_run_that_only_skips_ends(trainer_of: Callable[..., Any], config: TrainingConfig) -> None:
    settings = replace(config, on_nan="skip", max_steps=100, checkpoint_every=100)
    _, trainer = trainer_of(settings, bad_steps=tuple(range(3, 100)))
    with pytest.raises(NonFiniteLossError) as caught:
        trainer.train()
    assert caught.value.step == 3 + MOST_SKIPS_IN_A_ROW and "on_nan" not in str(caught.value)


def test_out_of_memory_names_the_knob(trainer_of: Callable[..., Any], config: TrainingConfig) -> None:
    model, trainer = trainer_of(config)

    def full(module: torch.nn.Module, *args: Any) -> None:
        if module.training:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.transformer.h[0].register_forward_pre_hook(full)
    with pytest.raises(OutOfMemoryError, match="gradient_accumulation_steps to 4"):
        trainer.train()


@pytest.fixture
def hangup() -> Iterator[None]:
    """SIGHUP as a shell leaves it, even if the tests run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.mark.usefixtures("hangup")
@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_saves_at_the_next_boundary_and_the_rest_is_the_same(
    trainer_of: Callable[..., Any], config: TrainingConfig, capsys: pytest.CaptureFixture[str], number: signal.Signals
) -> None:
    straight, trainer = trainer_of(replace(config, run_name="straight"))
    trainer.train()
    _, trainer = trainer_of(config, callbacks=[StopAfter(2, number)])
    handler = signal.getsignal(number)
    result = trainer.train()
    assert signal.getsignal(number) is handler
    assert result.interrupted and result.step == 3 and checkpoint_steps(config.run_dir) == [3]
    words = f"{number.name}: stopped after step 3, saved in {checkpoint_path(config.run_dir, 3)}. To continue, "
    words += f'train again with run_name={config.run_name!r} and resume="auto"\n'
    assert words in capsys.readouterr().err
    model, trainer = trainer_of(config)
    trainer.train("auto")
    assert torch.equal(straight.transformer.wte.weight, model.transformer.wte.weight)
    assert lines_of(config) == lines_of(replace(config, run_name="straight"))


@pytest.mark.usefixtures("hangup")
def test_a_dropped_connection_takes_the_terminal_and_not_the_run(
    trainer_of: Callable[..., Any], config: TrainingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is printed at a terminal that is gone fails with EIO."""

    class HangUp(Callback):
        def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
            if step == 2:
                os.close(terminal)
                signal.raise_signal(signal.SIGHUP)

    terminal, end = os.openpty()
    with monkeypatch.context() as patch, contextlib.suppress(OSError), open(end, "w", encoding="utf-8") as stream:
        patch.setattr(sys, "stderr", stream)
        result = trainer_of(config, callbacks=[HangUp()])[1].train()
        with pytest.raises(OSError, match="Input/output"):
            print("more", file=stream, flush=True)
    assert result.reason == "SIGHUP" and checkpoint_steps(config.run_dir) == [3]


@pytest.mark.usefixtures("hangup")
def test_under_nohup_a_hangup_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        signal.raise_signal(signal.SIGHUP)
        assert signals.received is None
        signal.raise_signal(signal.SIGTERM)
        assert signals.received == "SIGTERM"


def test_a_second_trainer_is_refused_while_the_first_runs(
    trainer_of: Callable[..., Any], config: TrainingConfig
) -> None:
    refused: list[str] = []

    class Second(Callback):
        def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
            with pytest.raises(ValueError, match="another process is training into") as caught:
                trainer_of(config)[1].train("auto")
            refused.append(str(caught.value))

    trainer_of(replace(config, max_steps=2), callbacks=[Second()])[1].train()
    assert len(refused) == 2 and "\n" not in refused[0]
    assert trainer_of(config)[1].train("auto").step == 8


def test_a_lock_that_cannot_be_removed_does_not_hide_the_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows removes no open file."""

    def is_open(path: Path, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, "used by another process", str(path))

    accelerator: Any = SimpleNamespace(is_main_process=True, num_processes=1)
    with pytest.raises(KeyError), monkeypatch.context() as patch, run_lock(tmp_path / "run", accelerator):
        patch.setattr(Path, "unlink", is_open)
        raise KeyError
    with pytest.raises(KeyError), run_lock(tmp_path / "run", accelerator):
        raise KeyError
    assert not (tmp_path / "run").exists()


def prepared(folder: Path) -> Path:
    """A prepared folder of two splits, by the command itself."""
    table = folder / "names.txt"
    table.write_text("".join(f"{card.name}\n" for card in [*TRAIN, *VALIDATION]))
    assert cli.main(["prepare", "--source", str(table), "--out", str(folder / "data")]) == 0
    return folder / "data"


def test_a_damaged_prepared_file_is_found_before_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = prepared(tmp_path)
    check_prepared(data)
    train = data / "train.jsonl"
    # Still JSON, still a card: only the hash differs.
    train.write_text(re.sub("Goblin", "Gobbin", train.read_text(), count=1))
    capsys.readouterr()
    status = cli.main(["train", "--data", str(data), "--training.output-dir", str(tmp_path / "models")])
    err = capsys.readouterr().err
    assert status == 1 and err.count("\n") == 1 and "train.jsonl is not the file that was prepared" in err
    assert not (tmp_path / "models").exists()
    meta = json.loads((data / "meta.json").read_text())
    del meta["sha256"]["train.jsonl"]
    (data / "meta.json").write_text(json.dumps(meta))
    check_prepared(data)  # changed on purpose, as the argument says
