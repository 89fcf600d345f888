"""The training loop, on a CPU, a GPU, or many GPUs under ``torchrun`` or ``accelerate launch``.

One optimizer step: take its names, cut them into micro-batches, accumulate the gradients, clip, update the weights.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.packing import PackedBatch, pack, packed_length
from flash_experts.models.hub import CARD
from flash_experts.models.router_metrics import update_router_biases
from flash_experts.training import distributed, run_state
from flash_experts.training.batches import NameBatches, check_inputs, check_packing, fitting_cards
from flash_experts.training.checkpoint import drop_later
from flash_experts.training.checkpointer import Checkpointer
from flash_experts.training.loss import (
    MOST_SKIPS_IN_A_ROW,
    CausalLoss,
    FiniteGuard,
    check_dtype,
    deterministic_algorithms,
    make_loss,
    use_bfloat16,
    write_bad_batch,
)
from flash_experts.training.metrics import LoggingWindow, SpeedMeter, Validation, training_metrics
from flash_experts.training.optimizer import (
    OptimizerState,
    Schedule,
    WeightAverage,
    freeze_parts,
    make_optimizers,
    set_rates,
)
from flash_experts.training.run_folder import (
    check_run_folder,
    describe_data,
    describe_run,
    run_lock,
    write_run_card,
    write_run_info,
)
from flash_experts.training.run_state import RUN_INFO
from flash_experts.training.trackers import make_tracker
from flash_experts.training.tracking import SELECTION, Callback, Reporter
from flash_experts.training.training_config import TrainingConfig


class Trainer:
    """Fine-tunes a causal language model on card names.

    Args:
        model: causal LM with float32 weights, trained in place on packed sequences, which a GPT-2 and a Llama separate;
            ``config.precision`` selects bfloat16 autocast.
        data_info: meta.json of the data, kept with the run.
        origin: base of the model and options of its experts, kept with the run.
        how_to_resume: what the last line of an interrupted run advises after "To continue," (default: in Python).

    Raises:
        ValueError: the configuration is wrong, its device not available, or the tokenizer another model's.
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
        origin: Mapping[str, Any] | None = None,
        how_to_resume: str | None = None,
    ):
        config.validate()
        check_inputs(model, tokenizer, [*train_cards, *validation_cards])
        config = replace(config, run_name=config.run_dir.name)  # keeps the date of the start
        self.config, self.tokenizer, self.run_dir = config, tokenizer, config.run_dir
        self.how_to_resume = how_to_resume
        self.accelerator = distributed.make_accelerator(config.device)
        self.device = self.accelerator.device
        self.is_main = self.accelerator.is_main_process
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.autocast = use_bfloat16(config.precision, self.device)
        self.model = check_dtype(model).to(self.device)
        self.loss = make_loss(config, self.model, tokenizer, self.device)
        freeze_parts(self.model, config.lr_scale)
        self.parallel = distributed.parallelize_model(self.model, self.accelerator, config)
        self.optimizers = make_optimizers(self.model, config)
        self.average = None if config.ema_decay is None else WeightAverage(self.model, config.ema_decay)
        self.report = Reporter(self.run_dir, callbacks, train_cards, validation_cards, self.is_main)
        if config.precision == "bfloat16" and not self.autocast:
            self.report.notify("this processor computes bfloat16 in software: float32 is faster here, and is used")
        check_packing(self.model, config.names_per_prompt, self.report.notify)
        data = describe_data(train_cards, validation_cards, data_info)
        train_cards, validation_cards = fitting_cards(
            train_cards, validation_cards, self.model, tokenizer, self.report.notify
        )
        self.batches = NameBatches(train_cards, tokenizer, config, self.loss.top_logits)
        self.batches.check_micro_batches(config.gradient_accumulation_steps * self.world)
        self.schedule = Schedule.of(config, self.batches.planned_steps)
        self.validation = (
            Validation(validation_cards, tokenizer, config, self.rank, self.world) if validation_cards else None
        )
        validation_sha256 = None if self.validation is None else self.validation.sha256
        self.info = describe_run(config, data, origin, self.model, tokenizer, validation_sha256, self.accelerator)
        self.speed = SpeedMeter(self.info["model"]["parameters"], self.device, self.world)
        self.guard = FiniteGuard(config.on_nan == "stop", self.device, self.world)
        # All that a step passes to the next: the weights, `state`, and what is registered (`checkpointer.Stateful`).
        self.state = run_state.TrainerState()
        self.has_trained = False
        self.window = LoggingWindow(self.model, self.accelerator, not config.label_smoothing and config.teacher is None)
        self.checkpointer = Checkpointer(config, self.model, tokenizer, self.info, self.report.notify, self.is_main)
        for name, optimizer in self.optimizers.items():
            self.checkpointer.register(name, OptimizerState(self.model, optimizer))
        self.checkpointer.register("interval", self.window)  # its name in checkpoints since the first version
        if self.average is not None:
            self.checkpointer.register("ema", self.average)

    def train(self, resume: str | Path | None = None, overwrite: bool = False) -> run_state.TrainingResult:
        """Trains to the end of the run, or until Ctrl+C, SIGTERM or SIGHUP.

        A Trainer can resume its run, also after an error, but starts only one: the model has its weights by then.

        Args:
            resume: ``auto`` for the newest checkpoint that verifies, or a new run if there is none; a checkpoint's
                folder; None for a new run, in a folder without checkpoints.
            overwrite: start over in a folder that has a run or a model, also with ``auto``. Its checkpoints and metrics
                are removed when training starts, and its model is replaced by the first that is written.

        Raises:
            CheckpointError: a checkpoint is missing, damaged, or cannot be written.
            TrainingError: the loss is not finite, memory ran out, or another process is gone.
            ValueError: there are checkpoints already and ``resume`` is None, the folder holds something else, or a new
                run was asked of a Trainer that has trained.
        """
        check_run_folder(self.run_dir, overwrite, self.accelerator)
        if overwrite and resume == "auto":
            resume = None
        with deterministic_algorithms(self.config.deterministic), run_lock(self.run_dir, self.accelerator):
            state = self.checkpointer.restore(resume, overwrite)
            if self.has_trained and not state.step:
                raise ValueError(
                    "this Trainer has trained its model already: for a new run make a new Trainer with a new model"
                )
            self.state = state
            if self.checkpointer.resumed:
                self.info["resumed"] = self.checkpointer.resumed
            ended = self._reason_to_end() if self.state.step else None
            has_best = self.checkpointer.holds_best(state, ended is not None)
            if distributed.max_over_processes(self.accelerator, [float(not has_best)]) == [1.0]:
                self.checkpointer.export_best(state, self._export)
            if ended:
                self.report.notify(f"{self.run_dir} is finished ({ended}, step {self.state.step:,}): nothing to do")
            reason = ended or self._run()
            result = run_state.TrainingResult.of(self.state, reason, self.run_dir)
            # A finished run has its card, unless it was killed after the last checkpoint.
            if self.is_main and not (ended and (self.run_dir / CARD).exists()):
                write_run_card(self.run_dir, self.info, result, overwrite)
            return result

    def _run(self) -> str:
        """Trains between the start and the end of everything around the loop; returns why the run ended."""
        # Before anything is removed, for it can fail.
        tracker = make_tracker(self.config.tracker, self.run_dir, self.state.step, self.report.notify)
        self.accelerator.wait_for_everyone()  # all processes have read before checkpoints are removed
        self.has_trained = True
        self.guard.reset()
        for optimizer in self.optimizers.values():  # of a step that an error ended
            optimizer.zero_grad(set_to_none=True)
        if self.is_main:
            drop_later(self.run_dir, self.state.step)
            write_run_info(self.run_dir / RUN_INFO, self.info)
        self.report.notify(f"training into {self.run_dir}")
        self.report.start(self.state.step if self.state.step else -1, self.info, tracker)
        self.model.loss_function = self.loss
        reason = "error"
        try:
            with run_state.StopSignals() as signals, distributed.watch_other_processes(self.accelerator):
                reason = self._loop(signals)
        except RuntimeError as error:
            if self.world == 1 or not distributed.is_lost_process(error):
                raise
            raise run_state.LostProcessError(self.state.step + 1, self.checkpointer.last_good()) from error
        finally:
            self.model.loss_function = CausalLoss()  # a teacher and smoothing are for training alone
            self.report.end({"reason": reason, "step": self.state.step})
            self.checkpointer.close()
        return reason

    def _loop(self, signals: run_state.StopSignals) -> str:
        """Takes steps, with everything that is due after each, until something ends the run; returns what."""
        config, state = self.config, self.state
        started = time.monotonic() - state.seconds
        if state.step == 0:
            self._evaluate_first(started)
        self.speed.begin()
        reason: str | None = None
        while reason is None:
            rate = self._begin_step()
            self._step(rate)
            state.step += 1
            log_due = _due(state.step, config.log_every)
            seconds = time.monotonic() - started
            wants_stop = signals.received is not None
            state.seconds, stop = distributed.agree(self.accelerator, seconds, wants_stop, log_due, state.seconds)
            reason = self._reason_to_end()
            if log_due or reason:
                self._log(rate)
            if _due(state.step, config.eval_every) or reason:
                self._evaluate()
                (state.seconds,) = distributed.max_over_processes(self.accelerator, [time.monotonic() - started])
                reason = reason or self._reason_to_end()
            if _due(state.step, config.sample_every) or (reason and config.sample_every):
                self._sample()
            if reason and self.validation is None:
                self._export()  # before the checkpoint, after which a resumed run has nothing left to do
            if stop and reason is None:
                reason = signals.received or "SIGTERM"
            if _due(state.step, config.checkpoint_every) or reason:
                self._save()
        self.checkpointer.wait()
        self.accelerator.wait_for_everyone()
        result = run_state.TrainingResult.of(state, reason, self.run_dir)
        self.report.notify(result.closing_message(self.how_to_resume))
        return reason

    def _begin_step(self) -> float:
        """Announces a stage that begins; returns the step's learning rate."""
        state = self.state
        planned = self.batches.stage_of(state.step)
        if self.config.stages and planned.first_step == state.step:
            self.report.stage_begins(self.batches.plan, planned)
        factor = self.schedule.factor(state.step, state.seconds, state.evaluation_seconds)
        return self.config.learning_rate * (factor * planned.stage.learning_rate_scale)

    def _step(self, rate: float) -> None:
        """One update of the weights, from the gradients of all micro-batches."""
        (*others, last), num_labels = self._micro_batches_of_step()
        distributed.seed_dropout(self.config.seed, self.state.step, self.rank)
        set_rates(self.optimizers.values(), rate)
        self.model.train()
        self.window.begin_step()
        parts = torch.zeros(5, device=self.device)
        try:
            for batch in others:
                with self.parallel.no_sync():
                    parts += self._backward(batch, num_labels)
            parts += self._backward(last, num_labels)
        except torch.OutOfMemoryError as error:
            accumulation = self.config.gradient_accumulation_steps
            raise run_state.OutOfMemoryError(self.state.step + 1, accumulation) from error
        limit = math.inf if self.config.clip_norm is None else self.config.clip_norm
        grad_norm = self.parallel.clip(limit)
        is_bad = self.guard.check(self.state.step + 1, parts[0], grad_norm)
        for optimizer in self.optimizers.values():
            if self.guard.update(optimizer, is_bad):
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.state.step + 1, self.guard.skips(is_bad))
        update_router_biases(self.model, self.guard.skips(is_bad))
        self.window.add(parts, grad_norm, is_bad)
        if self.device.type == "cpu":  # on a GPU reading the flag would synchronize
            self._check_finite()

    def _backward(self, batch: PackedBatch, num_labels: int) -> torch.Tensor:
        """Adds a micro-batch's gradient; returns its `LoggingWindow.sums_of` of the step."""
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast):
            self.loss.prepare(batch)
            output = self.parallel.wrapped(**batch.inputs_with_loss(num_labels))
        self.parallel.backward(output.loss)
        return self.window.sums_of(output, batch, num_labels)

    def _micro_batches_of_step(self) -> tuple[list[PackedBatch], int]:
        """This process's micro-batches, and the number of labels over all processes."""
        count = self.config.gradient_accumulation_steps * self.world
        batches = self.batches.micro_batches_of_step(self.state.step, count)
        names = [name for batch in batches for name in batch]
        tokens = sum(name.num_inputs for name in names)
        num_labels = sum(len(name.ids) - name.prompt_length for name in names)
        self.state.tokens += tokens
        share = self.config.names_per_prompt > 1
        self.speed.add(tokens, num_labels, sum(packed_length(batch, share) for batch in batches))
        return [pack(batch, share) for batch in batches[self.rank :: self.world]], num_labels

    def _check_finite(self) -> None:
        """Ends the run at a NaN or infinite loss or gradient, or counts the step as skipped."""
        for step in self.guard.bad_steps():
            batch = self.batches.names_of_step(step - 1)
            names = [str(self.tokenizer.decode(list(name.ids[name.prompt_length : -1]))).strip() for name in batch]
            if self.config.on_nan == "skip" and self.state.skip(step) <= MOST_SKIPS_IN_A_ROW:
                self.report.skipped(step, names)
                continue
            if self.is_main:
                write_bad_batch(self.run_dir, step, names)
            raise self._not_finite(step, names)

    def _not_finite(self, step: int, names: Sequence[str]) -> run_state.NonFiniteLossError:
        return run_state.NonFiniteLossError(step, names, self.checkpointer.last_good(), self.config, self.autocast)

    def _log(self, rate: float) -> None:
        self._check_finite()
        self.checkpointer.check()
        state = self.state
        share = self.schedule.progress(state.step, state.seconds, state.evaluation_seconds)
        measured = self.window.metrics() | self.speed.metrics()
        epoch = self.batches.epochs_done(state.step)
        self.report.log(training_metrics(state, self.config, epoch, rate, share, measured), share)

    def _evaluate_first(self, started: float) -> None:
        """As much time is reserved for the validation at the end."""
        if self.validation is None:
            return
        self.report.notify(f"validating on {self.validation.num_names:,} names before the first step ...")
        self._evaluate()
        seconds = time.monotonic() - started
        (self.state.evaluation_seconds,) = distributed.max_over_processes(self.accelerator, [seconds])
        if self.config.max_minutes and 4 * seconds > 60 * self.config.max_minutes:
            self.report.notify(
                f"validation took {seconds:.0f} s and is repeated at the end: that is more than half of max_minutes "
                f"({self.config.max_minutes:g}); set validation_names to validate on fewer names"
            )
        self.report.notify("training ...")

    def _evaluate(self) -> None:
        """Writes a new best model to the run's folder."""
        if self.validation is None:
            return
        state = self.state
        with self.speed.pause():
            self._check_finite()
            autocast = torch.autocast(self.device.type, torch.bfloat16, enabled=self.autocast)
            with self._averaged(), self.parallel.evaluating(), autocast:
                metrics = self.validation.score(self.model, self.accelerator)
            if not math.isfinite(metrics[SELECTION]):
                raise self._not_finite(state.step, ())
            is_best = state.validated(metrics[SELECTION])
            if is_best:
                self._export()
            done = {"step": state.step, "tokens": state.tokens, "seconds": round(state.seconds, 3)}
            self.report.evaluated(done | metrics, is_best)

    def _sample(self) -> None:
        with self.speed.pause():
            self._check_finite()
            with self._averaged():
                model = self.parallel.full_model()
                if model is not None:
                    self.report.sample(self.state.step, model, self.tokenizer)

    def _export(self) -> None:
        """Writes the model, with averaged weights if ``ema_decay`` is set."""
        with self._averaged():
            self.checkpointer.export()

    def _averaged(self) -> AbstractContextManager[None]:
        return nullcontext() if self.average is None else self.average.in_place()

    def _save(self) -> None:
        self._check_finite()
        with self.speed.pause():
            self.checkpointer.save(self.state)

    def _reason_to_end(self) -> str | None:
        """Why the run is over, or None: by state and configuration alone, so a resumed run decides alike."""
        state, patience = self.state, self.config.early_stopping_patience
        reason = self.schedule.limit_reached(state.step, state.seconds, state.evaluation_seconds)
        if reason is None and patience is not None and state.bad_evaluations >= patience:
            reason = "early stopping"
        return reason


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
