"""Ctrl+C handling: a KeyboardInterrupt is never lost, and is deferred where it would do harm."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_AGAIN_SECONDS = 0.05


class CtrlC:
    """While open and listening, Ctrl+C raises KeyboardInterrupt and sets ``pressed``.

    A library that is interrupted may raise an error of its own, so check ``pressed``. In a ``__del__`` or a callback
    from C, where Python would print a traceback and continue, the signal comes again shortly after.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._listening = False
        self._again: threading.Timer | None = None
        self._previous: Any = None
        self._hook = sys.unraisablehook

    def __enter__(self) -> CtrlC:
        sys.unraisablehook = self._on_unraisable
        # An ignored SIGINT, as under nohup, stays ignored.
        if _in_main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def listen(self) -> None:
        """From here on Ctrl+C raises KeyboardInterrupt, also one that came before."""
        self._listening = True
        if self.pressed:
            raise KeyboardInterrupt

    def close(self) -> None:
        """From here on Ctrl+C raises nothing: the outcome is decided, and about to be reported."""
        self._listening = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if self._listening:
            raise KeyboardInterrupt

    def _on_unraisable(self, about: sys.UnraisableHookArgs) -> None:
        if not isinstance(about.exc_value, KeyboardInterrupt):
            self._hook(about)
        elif self._listening:
            self._again = threading.Timer(_AGAIN_SECONDS, _interrupt_main_thread)
            self._again.daemon = True
            self._again.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._again is not None:
            self._again.cancel()
            self._again.join()
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        sys.unraisablehook = self._hook


@contextmanager
def deferred_ctrl_c() -> Iterator[None]:
    """Defers Ctrl+C to the end of the block, for a few renames that belong together."""
    if not _in_main_thread() or not callable(signal.getsignal(signal.SIGINT)):
        yield
        return
    came: list[int] = []
    previous = signal.signal(signal.SIGINT, lambda number, _: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if came:
            signal.raise_signal(signal.SIGINT)


def _interrupt_main_thread() -> None:
    """Sends SIGINT as the key does, which also ends a wait."""
    if sys.platform == "win32":
        _thread.interrupt_main()
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _in_main_thread() -> bool:
    """Whether this is the main thread, the only one that may set signal handlers."""
    return threading.current_thread() is threading.main_thread()
