"""Ctrl+C and SIGTERM as a wish to stop, heard at the next step boundary."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType


class StopSignals:
    """While open, the first SIGTERM or Ctrl+C sets `received`; a second Ctrl+C interrupts at once.

    Attributes:
        received: the signal's name, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous.get(signal.SIGINT)
        if self.received is not None and number == signal.SIGINT and callable(previous):
            previous(number, frame)
        self.received = signal.Signals(number).name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]
