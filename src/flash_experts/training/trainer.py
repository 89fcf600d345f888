"""The training loop.

One optimizer step: take the names of the step (a pure function of seed and step), cut them into rows for the
processes and for accumulation, add up the gradients, clip, move the weights. Everything else here happens between
steps: the log, validation, samples, checkpoints, stopping. The same code runs on a CPU, a GPU, and many GPUs under
``torchrun`` or ``accelerate launch``.
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
from flash_experts.data.names import normal_form
from flash_experts.data.packing import PackedBatch, pack
from flash_experts.models.loading import resolve_device
from flash_experts.models.router_metrics import router_metrics, update_router_biases
from flash_experts.training import checkpoint as checkpoints
from flash_experts.training import run_info
from flash_experts.training.batches import NameBatches, split_evenly
from flash_experts.training.callbacks import Callback
from flash_experts.training.optimizer import make_optimizer
from flash_experts.training.progress import ProgressDisplay
from flash_experts.training.schedule import Schedule
from flash_experts.training.signals import StopSignals
from flash_experts.training.tracking import METRICS_FILE, MetricsFile, make_tracker
from flash_experts.training.training_config import TrainingConfig
from flash_experts.training.validation import BITS_PER_CHAR, Validation

RESUMABLE_FIELDS = ("seed", "tokens_per_batch", "attribute_dropout", "curriculum")


class TrainingError(RuntimeError):
    """A run that cannot go on. The message says what to change."""


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
        model: any causal LM that takes packed rows (`flash_experts.models.loading.load_model` gives one). It is
            trained in place, and must be in float32 (bfloat16 is a matter of ``config.precision``).
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
        self.autocast_dtype = _autocast_dtype(config.precision, self.device)
        self.progress = ProgressDisplay(self.is_main)
        self.model = model.to(self.device)  # type: ignore[arg-type]  # the model itself: saved, sampled from
        if config.compile:
            self.model.compile(dynamic=True)
        self.optimizer = make_optimizer(self.model, config)
        self.wrapped, self.prepared_optimizer = self.accelerator.prepare(self.model, self.optimizer)
        world = self.accelerator.num_processes
        self.rows_per_step = config.gradient_accumulation_steps * world
        self.batches = NameBatches(
            train_cards, tokenizer, config.tokens_per_batch, config.attribute_dropout, config.seed, config.curriculum
        )
        self.schedule = Schedule.of(config, self.batches.steps_per_epoch)
        self.validation = None
        if validation_cards:
            self.validation = Validation(
                validation_cards,
                tokenizer,
                config.validation_names,
                math.ceil(config.tokens_per_batch / self.rows_per_step),
                config.seed,
                (self.accelerator.process_index, world),
            )
        self.metrics_file = MetricsFile(self.run_dir / METRICS_FILE)
        self.counts = run_info.parameter_counts(self.model)
        self.info: dict[str, Any] = {
            "config": config.to_dict(),
            "data": {
                "train_names": len(train_cards),
                "train_sha256": run_info.fingerprint(train_cards),
                "validation_names": len(validation_cards),
                "validation_sha256": run_info.fingerprint(validation_cards),
                **({"meta": dict(data_info)} if data_info else {}),
            },
            "model": {"type": self.model.config.model_type, **self.counts},
            "device": str(self.device),
            "processes": world,
            "git_commit": run_info.git_commit(),
            "versions": run_info.versions(),
        }
        self.callbacks = list(callbacks)
        self._known = {
            "in train": {normal_form(card.name) for card in train_cards},
            "in validation": {normal_form(card.name) for card in validation_cards},
        }
        self.state = checkpoints.TrainerState()
        self._saved_step: int | None = None

    def train(self, resume: str | Path | None = None) -> TrainingResult:
        """Trains to the end of the run, or until Ctrl+C or SIGTERM.

        Args:
            resume: ``auto`` goes on from the newest checkpoint that verifies (or starts where there is none); a
                checkpoint's folder goes on from that one; None starts anew and wants a run folder without checkpoints.

        Raises:
            CheckpointError: nothing to resume, or not whole, or it cannot be written.
            TrainingError: the loss is not finite, or memory ran out.
            ValueError: there are checkpoints already and ``resume`` is None.
        """
        self._restore(resume)
        if self.state.step and (reason := self._reason_to_end()):
            self.progress.say(f"{self.run_dir} is finished ({reason}, step {self.state.step:,}): nothing to do")
            return self._result(reason)
        self._start()
        with StopSignals() as signals:
            try:
                reason = self._loop(signals)
            finally:
                self.progress.stop()
        result = self._result(reason)
        self._tell("on_end", {"reason": reason, "step": result.step, "best_bits_per_char": result.best_bits_per_char})
        return result

    def _loop(self, signals: StopSignals) -> str:
        """Steps until the run ends; returns why."""
        config, state = self.config, self.state
        started = time.monotonic() - state.seconds
        first_bad = torch.full((), -1, device=self.device)
        if state.step == 0:
            self._evaluate()
        reason = None
        while reason is None:
            rate = config.learning_rate * self.schedule.factor(state.step, state.seconds)
            loss, grad_norm = self._step(rate)
            is_bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
            first_bad = torch.where((first_bad < 0) & is_bad, state.step, first_bad)
            self._interval_loss += loss
            state.step += 1
            # A look at a GPU's tensors waits for it, so only at steps that do so anyway. A CPU has nothing to wait for.
            log_due = state.step % config.log_every == 0
            if self.device.type == "cpu" or log_due or _due(state.step, config.eval_every, config.checkpoint_every):
                self._check_finite(int(first_bad))
            state.seconds, stop = self._agree(time.monotonic() - started, signals.received is not None, log_due)
            reason = self._reason_to_end()
            if log_due or reason:
                self._check_finite(int(first_bad))
                self._log(rate, grad_norm, loss)
            if _due(state.step, config.eval_every) or reason:
                self._evaluate()
                reason = reason or self._reason_to_end()
            if _due(state.step, config.sample_every):
                self._sample()
            if stop and reason is None:
                reason = signals.received or "SIGTERM"
            if _due(state.step, config.checkpoint_every) or reason:
                self._check_finite(int(first_bad))
                self._save()
        return self._finish(reason)

    def _step(self, rate: float) -> tuple[torch.Tensor, torch.Tensor]:
        """One optimizer step. Returns this process's part of the loss, and the norm of the whole gradient."""
        rows, num_labels = self._rows_of_step()
        # Dropout becomes a function of (seed, step, process): resuming needs no random state, and neither validation
        # nor sampling can move it.
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        torch.manual_seed(random.Random(f"dropout/{self.config.seed}/{self.state.step}/{rank}").getrandbits(63))
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
            raise TrainingError(
                f"out of memory at step {self.state.step + 1}: double gradient_accumulation_steps (now "
                f"{self.config.gradient_accumulation_steps}), which gives the same result in half the memory"
            ) from error
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        grad_norm = cast(torch.Tensor, self.accelerator.clip_grad_norm_(self.wrapped.parameters(), limit))
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad(set_to_none=True)
        update_router_biases(self.model)
        return total, grad_norm

    def _backward(self, row: PackedBatch, num_labels: int) -> torch.Tensor:
        """Adds a row's gradient; returns its part of the step's loss."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast_dtype is not None):
            output = self.wrapped(**row.to(self.device).inputs_with_loss(num_labels))
        # The loss is divided by the labels of all processes, and DDP takes the mean of their gradients: undo that.
        self.accelerator.backward(output.loss * self.accelerator.num_processes)
        aux_loss = output.get("aux_loss")
        if aux_loss is not None:
            self._aux_loss = aux_loss.detach()
        return cast(torch.Tensor, output.loss.detach())

    def _rows_of_step(self) -> tuple[list[PackedBatch], int]:
        """This process's rows of the next step, and how many labels the rows of all processes have."""
        names = self.batches.names_of_step(self.state.step)
        if len(names) < self.rows_per_step:
            raise ValueError(
                f"a step has {len(names)} names, too few for {self.rows_per_step} rows (gradient_accumulation_steps "
                f"times processes): raise tokens_per_batch, now {self.config.tokens_per_batch}"
            )
        runs = split_evenly([name.num_inputs for name in names], self.rows_per_step)
        mine = runs[self.accelerator.process_index :: self.accelerator.num_processes]
        tokens = sum(name.num_inputs for name in names)
        self.state.tokens += tokens
        self.state.interval_tokens += tokens
        self.state.interval_steps += 1
        num_labels = sum(len(name.ids) - name.prompt_length for name in names)
        return [pack(names[run.start : run.stop]) for run in mine], num_labels
