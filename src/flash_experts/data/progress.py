"""A progress bar for downloads: `rich` draws it on stderr, where it is installed and stderr is a terminal."""

from __future__ import annotations

import importlib.util
import sys
from types import TracebackType
from typing import Any

from flash_experts.plain_text import one_line


class Bar:
    """How far a file has come.

    Args:
        label: what is said beside the bar.
        completed: bytes that were there already.
        total: bytes of the whole file; None if unknown.
    """

    def __init__(self, label: str, completed: int, total: int | None):
        self._label = label
        self._completed = completed
        self._total = total
        self._bar: Any = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty() and importlib.util.find_spec("rich") is not None:
            from rich.console import Console
            from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Progress("{task.description}", *columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(one_line(self._label), completed=self._completed, total=self._total)
            self._bar.start()
        return self

    def advance(self, amount: int) -> None:
        """So many bytes more."""
        if self._bar is not None:
            self._bar.advance(self._task, amount)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
