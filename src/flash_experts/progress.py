"""A progress bar for downloads and lists, drawn by `rich` if stderr is a terminal.

(A run's is in `flash_experts.training.tracking`, with its metrics.)
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import Any, TypeVar

from flash_experts.plain_text import one_line

T = TypeVar("T")


class ProgressBar:
    """Progress of one file or list, in bytes or items; ``total`` is None if unknown."""

    def __init__(self, label: str, completed: int, total: int | None, *, in_bytes: bool = False):
        self._label, self._in_bytes = label, in_bytes
        self._completed = completed
        self._total = total
        self._bar: Any = None

    def __enter__(self) -> ProgressBar:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                Progress,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            amounts = (DownloadColumn(), TransferSpeedColumn()) if self._in_bytes else (MofNCompleteColumn(),)
            columns = ("{task.description}", BarColumn(), *amounts, TimeRemainingColumn())
            self._bar = Progress(*columns, console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(one_line(self._label), completed=self._completed, total=self._total)
            self._bar.start()
        return self

    def advance(self, amount: int = 1) -> None:
        if self._bar is not None:
            self._bar.advance(self._task, amount)

    def count(self, items: Iterable[T]) -> Iterator[T]:
        """Passes items on and counts them."""
        for item in items:
            self.advance()
            yield item

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
