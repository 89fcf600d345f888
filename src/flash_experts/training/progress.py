"""What a person sees while a run goes on: a bar in a terminal, plain lines elsewhere.

A run outlives its terminal: what cannot be printed there any more must not end it before it has saved.
"""

from __future__ import annotations

import importlib.util
import os
import select
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flash_experts.plain_text import one_line, printable, say


class ProgressDisplay:
    """Shows how far a run is, on stderr. `rich` draws the bar where it is installed and stderr is a terminal.

    Args:
        enabled: False for the processes that are not the main one.
    """

    def __init__(self, enabled: bool = True):
        self.enabled = enabled
        self._bar: Any = None
        self._task: Any = None

    def start(self, run_name: str) -> None:
        """Opens the bar."""
        if not self.enabled or not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
            return
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

        columns = [
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[line]}"),
        ]
        self._bar = Progress(*columns, console=Console(stderr=True))
        self._task = self._bar.add_task(one_line(run_name), total=1.0, line="")
        self._bar.start()

    def update(self, share: float, metrics: Mapping[str, float]) -> None:
        """A line of metrics, with ``share`` (0 to 1) of the run done."""
        line = metrics_line(metrics)
        if self._bar is None:
            self.say(f"{share:4.0%}  {line}")
            return
        with _perhaps_unread():
            self._bar.update(self._task, completed=share, line=line)

    def say(self, text: str) -> None:
        """A line that stays."""
        if not self.enabled:
            return
        with _perhaps_unread():
            if self._bar is not None:
                self._bar.console.print(printable(text), markup=False, highlight=False)
            else:
                say(text, sys.stderr)

    def stop(self) -> None:
        """Closes the bar."""
        if self._bar is not None:
            with _perhaps_unread():
                self._bar.stop()
            self._bar = None


@contextmanager
def _perhaps_unread() -> Iterator[None]:
    """Where the terminal or the reading program is gone, output goes nowhere from here on."""
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
    """``step 40  loss 4.021  lr 5.0e-04  1,830 tokens/s  2:10 left`` of a line of metrics."""
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
