"""The training loop.

One optimizer step: take the names of the step (a pure function of seed and step), cut them into rows for the
processes and for accumulation, add up the gradients, clip, move the weights. Everything else here happens
between steps: the log, validation, samples, checkpoints, stopping. The same code runs on a CPU, a GPU, and
many GPUs under ``torchrun`` or ``accelerate launch``.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.packing import PackedBatch, pack
from flash_experts.models.loading import resolve_device
from flash_experts.models.router_metrics import router_metrics, update_router_biases
from flash_experts.training import run_info
from flash_experts.training.batches import NameBatches
from flash_experts.training.callbacks import Callback
from flash_experts.training.checkpoint import TrainerState
from flash_experts.training.checkpointer import Checkpointer
from flash_experts.training.errors import NonFiniteLossError, OutOfMemoryError
from flash_experts.training.optimizer import make_optimizer
from flash_experts.training.precision import check_dtype, use_bfloat16
from flash_experts.training.reporting import Reporter, SpeedMeter
from flash_experts.training.schedule import Schedule
from flash_experts.training.signals import StopSignals
from flash_experts.training.tracking import make_tracker
from flash_experts.training.training_config import TrainingConfig
from flash_experts.training.validation import BITS_PER_CHAR, Validation


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """How a run ended.

    Attributes:
        reason: ``steps``, ``time``, ``early stopping``, or a signal's name.
        step: optimizer steps done in all.
        best_bits_per_char: lowest validation figure (unconditional), None without validation names.
        best_step: the step of it, whose weights are in ``run_dir``.
        run_dir: the finished model's folder.
        seconds: training time in all.
    """

    reason: str
    step: int
    best_bits_per_char: float | None
    best_step: int
    run_dir: Path
    seconds: float

    @property
    def interrupted(self) -> bool:
        return self.reason.startswith("SIG")


class Trainer:
    """Fine-tunes a causal language model on card names.

    Args:
        model: any causal LM that takes packed rows (`flash_experts.models.loading.load_model` gives one). It
            is trained in place, and must be in float32 (bfloat16 is a matter of ``config.precision``).
        tokenizer: the model's.
        train_cards: the training split.
        validation_cards: the validation split; empty for none.
        config: settings.
        callbacks: listeners; one of them may make sample names.
        data_info: what `prepare` wrote in meta.json, kept with the run.

    Raises:
        ValueError: the configuration is wrong, or asks for a device that is not there.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        train_cards: Sequence[Card],
        validation_cards: Sequence[Card],
        config: TrainingConfig,
        callbacks: Sequence[Callback] = (),
        data_info: Mapping[str, Any] | None = None,
    ):
        config.validate()
        device = resolve_device(None if config.device == "auto" else config.device)
        self.config, self.tokenizer, self.run_dir = config, tokenizer, config.run_dir
        self.accelerator = Accelerator(cpu=device.type == "cpu", mixed_precision="no")
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.autocast = use_bfloat16(config.precision, self.device)
        self.model = check_dtype(model).to(self.device)
        self.model.loss_type = "ForCausalLM"
        self.optimizer = make_optimizer(self.model, config)
        # Training calls `wrapped`; validation, sampling and saving use the plain model inside it.
        module = torch.compile(self.model, dynamic=True) if config.compile else self.model
        self.wrapped, self.wrapped_optimizer = self.accelerator.prepare(module, self.optimizer)
        self.batches = NameBatches(
            train_cards,
            tokenizer,
            config.tokens_per_batch,
            config.attribute_dropout,
            config.seed,
            config.curriculum,
        )
        self.schedule = Schedule.of(config, self.batches.steps_per_epoch)
        self.rows_per_step = config.gradient_accumulation_steps * self.world
        self.validation = None
        if validation_cards:
            self.validation = Validation(
                validation_cards,
                tokenizer,
                config.validation_names,
                math.ceil(config.tokens_per_batch / self.rows_per_step),
                config.seed,
                (self.rank, self.world),
            )
        self.report = Reporter(self.run_dir, callbacks, train_cards, validation_cards, self.is_main)
        counts = run_info.parameter_counts(self.model)
        peak = run_info.peak_flops(self.device)
        self.speed = SpeedMeter(counts, None if peak is None else peak * self.world)
        self.info: dict[str, Any] = {
            "config": config.to_dict(),
            "data": run_info.describe_data(train_cards, validation_cards, data_info),
            "model": {"type": self.model.config.model_type, "parameters": counts},
            "device": str(self.device),
            "processes": self.world,
            "git_commit": run_info.git_commit(),
            "versions": run_info.versions(),
        }
        self.checkpointer = Checkpointer(
            self.run_dir,
            self.model,
            tokenizer,
            self.optimizer,
            config.keep_checkpoints,
            self.info,
            self.report.say,
            self.is_main,
        )
        self.state = TrainerState()
        self._router_losses: dict[str, torch.Tensor] = {}

    def train(self, resume: str | Path | None = None) -> TrainingResult:
        """Trains to the end of the run, or until Ctrl+C or SIGTERM.

        Args:
            resume: ``auto`` goes on from the newest checkpoint that verifies (or starts where there is none);
                a checkpoint's folder goes on from that one; None starts anew and wants a run folder without
                checkpoints.

        Raises:
            CheckpointError: nothing to resume, or not whole, or it cannot be written.
            TrainingError: the loss is not finite, or memory ran out.
            ValueError: there are checkpoints already and ``resume`` is None.
        """
        self.state = self.checkpointer.restore(resume)
        if self.state.step and (ended := self._reason_to_end()):
            self.report.say(f"{self.run_dir} is finished ({ended}, step {self.state.step:,}): nothing to do")
            return self._result(ended)
        self.accelerator.wait_for_everyone()  # all have read before anything is dropped
        self.checkpointer.drop_later(self.state.step)
        if self.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            run_info.write_run_info(self.run_dir / "run.json", self.info)
        tracker = make_tracker(self.config.tracker, self.run_dir, self.report.say)
        self.report.start(self.state.step if self.state.step else -1, self.info, tracker)
        reason = "error"
        try:
            with StopSignals() as signals:
                reason = self._loop(signals)
        finally:
            self.report.end({"reason": reason, "step": self.state.step})
        return self._result(reason)

    def _loop(self, signals: StopSignals) -> str:
        """Steps until the run ends; returns why."""
        config, state = self.config, self.state
        started = time.monotonic() - state.seconds
        self._interval_loss = torch.full((), state.interval_loss, device=self.device)
        self._first_bad = torch.full((), -1, device=self.device)
        if state.step == 0:
            self._evaluate()
        self.speed.begin()
        reason: str | None = None
        while reason is None:
            rate = config.learning_rate * self.schedule.factor(state.step, state.seconds)
            loss, grad_norm = self._step(rate)
            state.step += 1
            self._interval_loss += loss
            state.interval_steps += 1
            is_bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
            self._first_bad = torch.where((self._first_bad < 0) & is_bad, state.step, self._first_bad)
            log_due = state.step % config.log_every == 0
            if self.device.type == "cpu":  # a look at a GPU's tensor would wait for the GPU
                self._check_finite()
            seconds = time.monotonic() - started
            state.seconds, stop = self._agree(seconds, signals.received is not None, log_due)
            reason = self._reason_to_end()
            if log_due or reason:
                self._log(rate, grad_norm)
            if _due(state.step, config.eval_every) or reason:
                self._evaluate()
                reason = reason or self._reason_to_end()
            if _due(state.step, config.sample_every) or (reason and config.sample_every):
                self._sample()
            if stop and reason is None:
                reason = signals.received or "SIGTERM"
            if _due(state.step, config.checkpoint_every) or reason:
                self._save()
        self._finish(reason)
        return reason

    def _step(self, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Returns this process's part of the loss, and the norm of the whole gradient."""
        rows, num_labels = self._rows_of_step()
        # Dropout becomes a function of (seed, step, process): resuming needs no random state, and neither
        # validation nor sampling can move it.
        key = f"dropout/{self.config.seed}/{self.state.step}/{self.rank}"
        torch.manual_seed(random.Random(key).getrandbits(63))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.wrapped.train()
        total = torch.zeros((), device=self.device)
        try:
            for index, row in enumerate(rows):
                if index == len(rows) - 1:
                    loss = self._backward(row, num_labels)
                else:
                    with self.accelerator.no_sync(self.wrapped):
                        loss = self._backward(row, num_labels)
                total += loss
        except torch.OutOfMemoryError as error:
            accumulation = self.config.gradient_accumulation_steps
            raise OutOfMemoryError(self.state.step + 1, accumulation) from error
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        grad_norm = cast(torch.Tensor, self.accelerator.clip_grad_norm_(self.wrapped.parameters(), limit))
        self.wrapped_optimizer.step()
        self.wrapped_optimizer.zero_grad(set_to_none=True)
        update_router_biases(self.model)
        return total, grad_norm

    def _backward(self, row: PackedBatch, num_labels: int) -> torch.Tensor:
        """Adds a row's gradient; returns its part of the step's loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            output = self.wrapped(**row.to(self.device).inputs_with_loss(num_labels))
        # The loss is divided by the labels of all processes; DDP takes the mean of gradients: undo that.
        self.accelerator.backward(output.loss * self.world)
        self._router_losses = {
            name: output[name].detach() for name in ("aux_loss", "z_loss") if output.get(name) is not None
        }
        return cast(torch.Tensor, output.loss.detach())

    def _rows_of_step(self) -> tuple[list[PackedBatch], int]:
        """This process's rows of the next step, and how many labels the rows of all processes have."""
        rows = self.batches.rows_of_step(self.state.step, self.rows_per_step)
        names = [name for row in rows for name in row]
        tokens = sum(name.num_inputs for name in names)
        num_labels = sum(len(name.ids) - name.prompt_length for name in names)
        self.state.tokens += tokens
        self.speed.add(tokens, num_labels)
        return [pack(row) for row in rows[self.rank :: self.world]], num_labels

    def _check_finite(self) -> None:
        """Stops the run at the first step whose loss or gradient was not a number."""
        step = int(self._first_bad)
        if step >= 0:
            raise self._not_finite(step)

    def _not_finite(self, step: int) -> NonFiniteLossError:
        clipped = self.config.clip_norm is not None
        return NonFiniteLossError(step, self.checkpointer.last_good, clipped, self.autocast)

    def _log(self, rate: float, grad_norm: torch.Tensor) -> None:
        """Writes the mean loss since the last log, the rate, the speed, and what the routers did."""
        self._check_finite()
        state = self.state
        loss = cast(torch.Tensor, self.accelerator.reduce(self._interval_loss, "sum"))
        share = self.schedule.progress(state.step, state.seconds)
        metrics: dict[str, float] = {
            "step": state.step,
            "epoch": round(state.step / self.batches.steps_per_epoch, 4),
            "tokens": state.tokens,
            "loss": loss.item() / state.interval_steps,
            "lr": rate,
            "grad_norm": grad_norm.item(),
            "seconds": round(state.seconds, 3),
            **{name: value.item() for name, value in self._router_losses.items()},
            **router_metrics(self.model),
            **self.speed.metrics(),
        }
        if share > 0:
            metrics["eta_seconds"] = round(state.seconds * (1 - share) / share, 1)
        self._interval_loss.zero_()
        state.interval_steps = 0
        self.report.log(metrics, share)

    def _evaluate(self) -> None:
        """Validates; a new best is written to the run's folder at once."""
        if self.validation is None:
            return
        state = self.state
        with self.speed.pause():
            self._check_finite()
            self.model.eval()
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
                sums = self.validation.sums(self.model, self.device)
            sums = cast(torch.Tensor, self.accelerator.reduce(sums.to(self.device), "sum"))
            metrics = {"step": state.step, "tokens": state.tokens, **self.validation.metrics(sums)}
            bits = metrics[BITS_PER_CHAR]
            if not math.isfinite(bits):
                raise self._not_finite(state.step)
            best = state.best_bits_per_char is None or bits < state.best_bits_per_char
            if best:
                state.best_bits_per_char, state.best_step, state.bad_evaluations = bits, state.step, 0
                self.checkpointer.export()
            else:
                state.bad_evaluations += 1
            self.report.evaluated(metrics, best)

    def _sample(self) -> None:
        with self.speed.pause():
            self._check_finite()
            if self.is_main:
                self.model.eval()
                self.report.sample(self.state.step, self.model, self.tokenizer)

    def _save(self) -> None:
        """Writes a checkpoint of this step."""
        self._check_finite()
        with self.speed.pause():
            interval_loss = cast(torch.Tensor, self.accelerator.reduce(self._interval_loss, "sum"))
            # Restored by every process, and summed over them at the next log.
            self.state.interval_loss = interval_loss.item() / self.world
            self.checkpointer.save(self.state)
            self.accelerator.wait_for_everyone()

    def _finish(self, reason: str) -> None:
        """The last words of a run."""
        state = self.state
        if reason.startswith("SIG"):
            self.report.say(
                f"{reason}: stopped after step {state.step:,}, saved in "
                f"{self.checkpointer.last_good}. Go on with --resume auto"
            )
            return
        if self.validation is None:
            self.checkpointer.export()
        best = ""
        if state.best_bits_per_char is not None:
            best = f", best at step {state.best_step:,}: {state.best_bits_per_char:.3f} bits per character"
        self.report.say(f"finished ({reason}) after step {state.step:,}{best}: the model is {self.run_dir}")

    def _agree(self, seconds: float, stop: bool, due: bool) -> tuple[float, bool]:
        """Time and the wish to stop as all processes know them: exchanged at log steps, held in between."""
        if self.world == 1:
            return seconds, stop
        if not due:
            return self.state.seconds, False
        mine = torch.tensor([[seconds, float(stop)]], device=self.device)
        most = cast(torch.Tensor, self.accelerator.gather(mine)).amax(0)
        return most[0].item(), bool(most[1])

    def _reason_to_end(self) -> str | None:
        """Why the run is over, by its state and configuration alone; None if it is not."""
        state, patience = self.state, self.config.early_stopping_patience
        if self.schedule.planned_steps is not None and state.step >= self.schedule.planned_steps:
            return "steps"
        if self.schedule.planned_seconds is not None and state.seconds >= self.schedule.planned_seconds:
            return "time"
        if patience is not None and state.bad_evaluations >= patience:
            return "early stopping"
        return None

    def _result(self, reason: str) -> TrainingResult:
        state = self.state
        return TrainingResult(
            reason, state.step, state.best_bits_per_char, state.best_step, self.run_dir, state.seconds
        )


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
