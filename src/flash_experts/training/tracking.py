"""What a run reports: metrics.jsonl (writing and reading it), the hooks of callbacks, and the progress bar.

Light to import, for the commands that only read metrics.
"""

from __future__ import annotations

import json
import os
import select
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flash_experts.data.names import normal_form
from flash_experts.files import whole_file
from flash_experts.terminal import one_line, printable, say

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from flash_experts.data.cards import Card
    from flash_experts.training.batches import PlannedStage

METRICS_FILE = "metrics.jsonl"
BITS_PER_CHAR = "validation/bits_per_char"
# The metric that selects the best model of a run: the mean of the unconditional bits per character and those given all
# attributes. Users ask for names in both ways, and fine-tuning can improve one at the price of the other.
SELECTION = f"{BITS_PER_CHAR}_mean"
_MAX_BYTES = 2**30  # of a metrics.jsonl
_MAX_STEP = 2**53

# -------------------------------------------------------------------------------------------------- the events of a run


class Callback:
    """Hooks of a run, called on the main process alone; they may draw random numbers."""

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        """Before the first step. ``run_info`` is what `run.json` holds."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Every ``log_every`` steps: loss, learning rate, speed, router statistics."""

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each validation."""

    def on_sample(self, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        """Every ``sample_every`` steps, in eval mode. Returns sample names, which are shown and kept."""
        return ()

    def on_names(self, step: int, groups: Mapping[str, Sequence[str]]) -> None:
        """A step's sample names in groups: ``new``, ``in train``, ``in validation``."""

    def on_end(self, summary: Mapping[str, object]) -> None:
        """After the last step, or when interrupted."""


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
        self._given = self._callbacks = list(callbacks) if is_main else []
        # Sample names that are among these are reported as copies.
        self._known = {
            "in train": {normal_form(card.name) for card in train_cards},
            "in validation": {normal_form(card.name) for card in validation_cards},
        }

    def start(self, step: int, run_info: Mapping[str, object], tracker: Callback | None) -> None:
        """Removes metrics after ``step``; starts the display and the callbacks."""
        if self.is_main:
            _truncate(self.run_dir / METRICS_FILE, step)
            self._callbacks = [*self._given, *([] if tracker is None else [tracker])]
        for callback in self._callbacks:
            callback.on_start(self.run_dir.name, run_info)
        self.display.start(self.run_dir.name)

    def notify(self, text: str) -> None:
        self.display.notify(text)

    def log(self, metrics: Mapping[str, float], share: float) -> None:
        """``share`` (0 to 1) of the run is done."""
        self._write("train", metrics)
        for callback in self._callbacks:
            callback.on_log(int(metrics["step"]), metrics)
        self.display.update(share, metrics)

    def stage_begins(self, plan: Sequence[PlannedStage], planned: PlannedStage) -> None:
        self._write("stage", {"step": planned.first_step + 1, "stage": planned.stage.name})
        place = f"stage {plan.index(planned) + 1} of {len(plan)}, {planned.stage.name}"
        length = "until the run ends" if planned.steps is None else f"{planned.steps:,} steps"
        self.notify(f"{place}: {len(planned.cards):,} names, {length}")

    def skipped(self, step: int, names: Sequence[str]) -> None:
        self._write("skipped", {"step": step, "names": list(names)})
        self.notify(
            f"step {step:,} is skipped: its loss or gradient is not a finite number ({', '.join(names[:3])}, ...)"
        )

    def evaluated(self, metrics: Mapping[str, float], best: bool) -> None:
        self._write("validation", metrics)
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
        self._write("samples", {"step": step, "names": groups})
        for callback in self._callbacks:
            callback.on_names(step, groups)
        for group, members in groups.items():
            if members:
                self.notify(f"samples at step {step:,}, {group}: {', '.join(members)}")

    def end(self, summary: Mapping[str, object]) -> None:
        self.display.stop()
        for callback in self._callbacks:
            callback.on_end(summary)

    def _write(self, event: str, values: Mapping[str, object]) -> None:
        """Adds a line to metrics.jsonl; ``values`` include the step."""
        if self.is_main:
            with (self.run_dir / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps({"event": event, **values}, ensure_ascii=False) + "\n")


# -------------------------------------------------------------------------------------------------------- metrics.jsonl
# One JSON object a line, in order of steps, each step and event once.


def _parse(text: str, *fields: str) -> dict[str, Any]:
    """Parses a line of metrics.jsonl; ValueError if it is not a JSON object with these fields."""
    try:
        line: dict[str, Any] = json.loads(text)
        for field in fields:
            line[field]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return line


def read_metrics(path: str | Path, event: str | None = None) -> list[dict[str, Any]]:
    """Reads a metrics.jsonl, one event (train, validation, samples) or all; skips a last line that a kill truncated.

    Raises:
        ValueError: there is no such file, it is too large, or a line is damaged (``file:line``).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no {path}: give the folder of a run that `flash-experts train` wrote")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has more than {_MAX_BYTES:,} bytes: it is not the metrics.jsonl of a run")
    try:
        texts = _lines(path)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not the metrics.jsonl of a run: it is not UTF-8 text") from error
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(_parse(text, "event", "step"))
        except ValueError as error:
            if number == len(texts) and lines:
                break  # the run is still writing, or was killed
            raise ValueError(f"{path}:{number} is not a line of metrics: {error}") from error
    return [line for line in lines if event in (None, line["event"])]


def read_untrusted_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines that have a step, and skips all others; empty if there is no such file."""
    return [line for _, line in _readable(path)] if path.is_file() else []


def _readable(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines that have a step, as text and parsed."""
    for text in _lines(path, errors="replace"):
        with suppress(ValueError):
            line = _parse(text, "step")
            if type(line["step"]) is int and abs(line["step"]) < _MAX_STEP:
                yield text, line


def _lines(path: Path, errors: str = "strict") -> list[str]:
    # str.splitlines would cut at U+2028 and U+0085 too, which JSON leaves as they are in a name.
    with path.open(encoding="utf-8", errors=errors) as file:
        return [line.removesuffix("\n") for line in file]


def _truncate(path: Path, step: int) -> None:
    """Removes lines after ``step``, which a resumed run writes again, and a line cut off by a kill."""
    if path.exists():
        kept = [text + "\n" for text, line in _readable(path) if line["step"] <= step]
        with whole_file(path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


# ------------------------------------------------------------------------------------------------------------- progress


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
        line = _metrics_line(metrics, share)
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


def _metrics_line(metrics: Mapping[str, float], share: float) -> str:
    """``step 40  loss 4.021  lr 5.0e-04  1,830 tokens/s  2:10 left``."""
    parts = [f"step {metrics['step']:,}"]
    if "loss" in metrics:  # not where every step was skipped
        parts.append(f"loss {metrics['loss']:.3f}")
    parts.append(f"lr {metrics['lr']:.1e}")
    parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if "mfu" in metrics:
        parts.append(f"MFU {metrics['mfu']:.0%}")
    if "eta_seconds" in metrics:
        validates = share == 1 and metrics["eta_seconds"] > 0  # the share is that of the training
        parts.append(f"{_clock(metrics['eta_seconds'])} {'for the last validation' if validates else 'left'}")
    return "  ".join(parts)


def _clock(seconds: float) -> str:
    """``1:02:03`` or ``2:03``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
