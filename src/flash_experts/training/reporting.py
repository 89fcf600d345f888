"""Reporting: the events of a run in metrics.jsonl, the progress bar, and callbacks."""

from __future__ import annotations

import os
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.plain_text import one_line, printable, say
from flash_experts.training.batches import PlannedStage
from flash_experts.training.tracking import METRICS_FILE, Callback, MetricsFile
from flash_experts.training.validation import BITS_PER_CHAR, SELECTION


class Reporter:
    """Sends events to metrics.jsonl, the progress bar and the callbacks, on the main process alone."""

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
        # Sample names that are among these are reported as copies.
        self._known = {
            "in train": {normal_form(card.name) for card in train_cards},
            "in validation": {normal_form(card.name) for card in validation_cards},
        }

    def start(self, step: int, run_info: Mapping[str, object], tracker: Callback | None) -> None:
        """Removes metrics after ``step``; starts the display and the callbacks."""
        if self.is_main:
            self._file.truncate(step)
            if tracker is not None:
                self._callbacks.append(tracker)
        for callback in self._callbacks:
            callback.on_start(self.run_dir.name, run_info)
        self.display.start(self.run_dir.name)

    def notify(self, text: str) -> None:
        self.display.notify(text)

    def log(self, metrics: Mapping[str, float], share: float) -> None:
        """Reports metrics; ``share`` (0 to 1) of the run is done."""
        if self.is_main:
            self._file.append("train", metrics)
        for callback in self._callbacks:
            callback.on_log(int(metrics["step"]), metrics)
        self.display.update(share, metrics)

    def stage_begins(self, plan: Sequence[PlannedStage], planned: PlannedStage) -> None:
        """Reports that a stage begins with the next step."""
        if self.is_main:
            self._file.append("stage", {"step": planned.first_step + 1, "stage": planned.stage.name})
        place = f"stage {plan.index(planned) + 1} of {len(plan)}, {planned.stage.name}"
        length = "until the run ends" if planned.steps is None else f"{planned.steps:,} steps"
        self.notify(f"{place}: {len(planned.cards):,} names, {length}")

    def skipped(self, step: int, names: Sequence[str]) -> None:
        """Reports a step skipped for a non-finite loss or gradient."""
        if self.is_main:
            self._file.append("skipped", {"step": step, "names": list(names)})
        self.notify(
            f"step {step:,} is skipped: its loss or gradient is not a finite number ({', '.join(names[:3])}, ...)"
        )

    def evaluated(self, metrics: Mapping[str, float], best: bool) -> None:
        if self.is_main:
            self._file.append("validation", metrics)
        for callback in self._callbacks:
            callback.on_eval(int(metrics["step"]), metrics)
        self.notify(
            f"validation at step {metrics['step']:,}: {metrics[BITS_PER_CHAR]:.3f} bits per character unconditional, "
            f"{metrics[f'{BITS_PER_CHAR}_given_attributes']:.3f} given all attributes, mean {metrics[SELECTION]:.3f}"
            f"{' (best, saved)' if best else ''}"
        )

    def sample(self, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Reports the callbacks' sample names, new ones and copies apart."""
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
                self.notify(f"samples at step {step:,}, {group}: {', '.join(members)}")

    def end(self, summary: Mapping[str, object]) -> None:
        self.display.stop()
        for callback in self._callbacks:
            callback.on_end(summary)


class ProgressDisplay:
    """A bar by `rich` if stderr is a terminal, else lines."""

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self._bar: Any = None
        self._task: Any = None

    def start(self, run_name: str) -> None:
        if not self.enabled or not sys.stderr.isatty():
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = BarColumn(), TaskProgressColumn(), TextColumn("{task.fields[line]}")
        self._bar = Progress(TextColumn("{task.description}"), *columns, console=Console(stderr=True))
        self._task = self._bar.add_task(one_line(run_name), total=1.0, line="")
        self._bar.start()

    def update(self, share: float, metrics: Mapping[str, float]) -> None:
        """Shows a line of metrics; ``share`` (0 to 1) of the run is done."""
        line = metrics_line(metrics)
        if self._bar is None:
            self.notify(f"{share:4.0%}  {line}")
            return
        with _ignore_closed_output():
            self._bar.update(self._task, completed=share, line=line)

    def notify(self, text: str) -> None:
        if not self.enabled:
            return
        with _ignore_closed_output():
            if self._bar is not None:
                self._bar.console.print(printable(text), markup=False, highlight=False)
            else:
                say(text, sys.stderr)

    def stop(self) -> None:
        if self._bar is not None:
            with _ignore_closed_output():
                self._bar.stop()
            self._bar = None


@contextmanager
def _ignore_closed_output() -> Iterator[None]:
    """Sends output to /dev/null once the terminal or reading program is gone."""
    try:
        yield
    except OSError:
        if not hasattr(select, "poll"):  # Windows
            return
        for stream in (1, 2):
            poll = select.poll()
            poll.register(stream, select.POLLOUT)
            if any(event & (select.POLLHUP | select.POLLERR) for _, event in poll.poll(0)):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


def metrics_line(metrics: Mapping[str, float]) -> str:
    """``step 40  loss 4.021  lr 5.0e-04  1,830 tokens/s  2:10 left``."""
    parts = [f"step {metrics['step']:,}"]
    if "loss" in metrics:  # not where every step was skipped
        parts.append(f"loss {metrics['loss']:.3f}")
    parts.append(f"lr {metrics['lr']:.1e}")
    parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.0%}")
    if "eta_seconds" in metrics:
        parts.append(f"{clock(metrics['eta_seconds'])} left")
    return "  ".join(parts)


def clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
