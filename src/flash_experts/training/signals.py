"""Ctrl+C, SIGTERM and SIGHUP (a dropped ssh connection) as a wish to stop, heard at the next step boundary."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType

STOPPING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))


class StopSignals:
    """While open, the first of `STOPPING` sets `received`; a second Ctrl+C interrupts at once.

    A signal that is ignored stays so: SIGHUP under nohup, SIGINT of a shell's background jobs.

    Attributes:
        received: the signal's name, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> StopSignals:
        # Python lets the main thread alone set handlers.
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._handle)
        return self

    def _handle(self, number: int, frame: FrameType | None) -> None:
        name = signal.Signals(number).name
        previous = self._previous.get(signal.SIGINT)
        if self.received is not None and name == "SIGINT" and callable(previous):
            previous(number, frame)
        self.received = name

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)  # type: ignore[arg-type]
