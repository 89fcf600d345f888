"""What a run reports: speed over the last interval, metrics.jsonl, the display, and the callbacks."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.training.batches import PlannedStage
from flash_experts.training.callbacks import Callback
from flash_experts.training.optimizer import part_rates
from flash_experts.training.progress import ProgressDisplay
from flash_experts.training.run_info import peak_flops, training_flops
from flash_experts.training.stateful import TrainerState
from flash_experts.training.tracking import METRICS_FILE, MetricsFile
from flash_experts.training.training_config import TrainingConfig
from flash_experts.training.validation import BITS_PER_CHAR, SELECTION


class SpeedMeter:
    """Tokens a second of training alone: pauses (validation, samples, checkpoints) are left out.

    Args:
        counts: the model's, of `multiplied_parameters`.
        device: of this process.
        world: number of processes, each on such a device.
    """

    def __init__(self, counts: dict[str, int], device: torch.device, world: int):
        self._counts, self._device = counts, device
        peak = peak_flops(device)
        self._peak = None if peak is None else peak * world
        self.begin()

    def begin(self) -> None:
        """Begins an interval."""
        self._tokens = self._labels = 0
        self._paused = 0.0
        self._start = time.perf_counter()

    def add(self, tokens: int, labels: int) -> None:
        """Counts a step."""
        self._tokens += tokens
        self._labels += labels

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in here is not training."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """``tokens_per_second``, ``peak_memory_gib`` of this process, and ``mfu`` (share of the peak arithmetic) where
        the peak is known; begins a new interval."""
        seconds = max(1e-9, time.perf_counter() - self._start - self._paused)
        metrics = {"tokens_per_second": round(self._tokens / seconds, 1)} | peak_memory(self._device)
        if self._peak is not None:
            metrics["mfu"] = training_flops(self._counts, self._tokens, self._labels) / seconds / self._peak
        self.begin()
        return metrics


def peak_memory(device: torch.device) -> dict[str, float]:
    """``peak_memory_gib`` since the process began: of the tensors on a GPU, of the whole process on a CPU. Empty where
    it is not known."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif device.type == "cpu" and sys.platform != "win32":
        import resource

        # Linux counts in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        return {}
    return {"peak_memory_gib": round(peak / 2**30, 3)}


def training_metrics(
    state: TrainerState,
    config: TrainingConfig,
    epoch: float,
    rate: float,
    share: float,
    measured: Mapping[str, float],
) -> dict[str, float]:
    """A line of training metrics.

    Args:
        state: where the run stands.
        config: of the run.
        epoch: passes over names so far.
        rate: learning rate of the last step.
        share: how much of the run is done, 0 to 1; the time left follows from it.
        measured: losses, routers and speed since the last line.
    """
    metrics: dict[str, float] = {
        "step": state.step,
        "epoch": round(epoch, 4),
        "tokens": state.tokens,
        "lr": rate,
        **part_rates(config.lr_scale, rate),
        "seconds": round(state.seconds, 3),
        **measured,
    }
    if config.on_nan == "skip":
        metrics["skipped_steps"] = state.skipped_steps
    if share > 0:
        first = state.evaluation_seconds  # the last validation takes as long
        metrics["eta_seconds"] = round((state.seconds - first) * (1 - share) / share + first, 1)
    return metrics


class Reporter:
    """Sends the events of a run to metrics.jsonl, the display and the callbacks. Silent off the main process.

    Args:
        run_dir: where metrics.jsonl lies.
        callbacks: listeners.
        train_cards: to tell sample names that are in the training split.
        validation_cards: to tell those in the validation split.
        is_main: whether this is the main process.
    """

    def __init__(
        self,
        run_dir: Path,
        callbacks: Sequence[Callback],
        train_cards: Sequence[Card],
        validation_cards: Sequence[Card],
        is_main: bool,
    ):
        self.run_dir, self.is_main = run_dir, is_main
        self.display = ProgressDisplay(is_main)
        self._callbacks = list(callbacks) if is_main else []
        self._file = MetricsFile(run_dir / METRICS_FILE)
        self._known = {
            "in train": {normal_form(card.name) for card in train_cards},
            "in validation": {normal_form(card.name) for card in validation_cards},
        }

    def start(self, step: int, run_info: Mapping[str, object], tracker: Callback | None) -> None:
        """Forgets what was recorded after ``step`` and opens the display and the callbacks."""
        if self.is_main:
            self._file.truncate(step)
            if tracker is not None:
                self._callbacks.append(tracker)
        for callback in self._callbacks:
            callback.on_start(self.run_dir.name, run_info)
        self.display.start(self.run_dir.name)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self.display.say(text)

    def log(self, metrics: Mapping[str, float], share: float) -> None:
        """A line of training metrics; ``share`` (0 to 1) of the run is done."""
        if self.is_main:
            self._file.append("train", metrics)
        for callback in self._callbacks:
            callback.on_log(int(metrics["step"]), metrics)
        self.display.update(share, metrics)

    def stage_begins(self, plan: Sequence[PlannedStage], planned: PlannedStage) -> None:
        """A stage of the curriculum begins with the next step."""
        if self.is_main:
            self._file.append("stage", {"step": planned.first_step + 1, "stage": planned.stage.name})
        place = f"stage {plan.index(planned) + 1} of {len(plan)}, {planned.stage.name}"
        length = "until the run ends" if planned.steps is None else f"{planned.steps:,} steps"
        self.say(f"{place}: {len(planned.cards):,} names, {length}")

    def skipped(self, step: int, names: Sequence[str]) -> None:
        """A step that was left out, since its loss or gradient was not a finite number."""
        if self.is_main:
            self._file.append("skipped", {"step": step, "names": list(names)})
        self.say(f"step {step:,} is skipped: its loss or gradient is not a finite number ({', '.join(names[:3])}, ...)")

    def evaluated(self, metrics: Mapping[str, float], best: bool) -> None:
        """The figures of a validation."""
        if self.is_main:
            self._file.append("validation", metrics)
        for callback in self._callbacks:
            callback.on_eval(int(metrics["step"]), metrics)
        self.say(
            f"validation at step {metrics['step']:,}: {metrics[BITS_PER_CHAR]:.3f} bits per character unconditional, "
            f"{metrics[f'{BITS_PER_CHAR}_given_attributes']:.3f} given all attributes, mean {metrics[SELECTION]:.3f}"
            f"{' (best, saved)' if best else ''}"
        )

    def sample(self, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Asks the callbacks for names, and tells the new ones from those that the data has."""
        names = [name for callback in self._callbacks for name in callback.on_sample(step, model, tokenizer)]
        if not names:
            return
        groups: dict[str, list[str]] = {"new": []}
        for name in names:
            key = normal_form(name)
            group = next((group for group, keys in self._known.items() if key in keys), "new")
            groups.setdefault(group, []).append(name)
        self._file.append("samples", {"step": step, "names": groups})
        for callback in self._callbacks:
            callback.on_names(step, groups)
        for group, members in groups.items():
            if members:
                self.say(f"samples at step {step:,}, {group}: {', '.join(members)}")

    def end(self, summary: Mapping[str, object]) -> None:
        """Closes the display and the callbacks."""
        self.display.stop()
        for callback in self._callbacks:
            callback.on_end(summary)
