"""Ctrl+C, which Python raises between any two instructions: heard always, and where it would harm, later."""

from __future__ import annotations

import _thread
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_AGAIN_SECONDS = 0.01


class CtrlC:
    """While open and listening, Ctrl+C raises KeyboardInterrupt and is remembered.

    In a ``__del__`` or a callback from C nobody can catch the exception: Python prints a traceback and goes on. Here
    nothing is printed, and it is raised again in a moment. And a library that is interrupted while it tidies up may
    raise an error of its own, which says nothing to a user: ``pressed`` tells what it comes of.

    Attributes:
        pressed: whether Ctrl+C came.
    """

    def __init__(self) -> None:
        self.pressed = False
        self._listening = False
        self._in_vain = self._in_hook = False
        self._again: threading.Thread | None = None
        self._previous: Any = None
        self._hook = sys.unraisablehook

    def __enter__(self) -> CtrlC:
        sys.unraisablehook = self._raised_in_vain
        # Where it is to be ignored, as under nohup, it still is.
        if _in_main_thread() and callable(signal.getsignal(signal.SIGINT)):
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def listen(self) -> None:
        """From here on it is raised."""
        self._listening = True
        if self.pressed:
            raise KeyboardInterrupt

    def close(self) -> None:
        """From here on it is not raised: the outcome is certain, and about to be told."""
        self._listening = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if self._listening and not self._in_hook:
            self._in_vain = False
            raise KeyboardInterrupt

    def _raised_in_vain(self, about: sys.UnraisableHookArgs) -> None:
        if not isinstance(about.exc_value, KeyboardInterrupt):
            self._hook(about)
        elif self._listening:
            self._in_hook = self._in_vain = True  # raised in here, it would be in vain again
            if self._again is None:
                self._again = threading.Thread(target=self._press_again, daemon=True)
                self._again.start()
            self._in_hook = False

    def _press_again(self) -> None:
        """Until it is heard: a signal that comes just before a wait begins does not end it."""
        while self._listening:
            time.sleep(_AGAIN_SECONDS)
            if self._in_vain and self._listening:
                _interrupt_main_thread()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        if self._again is not None:
            self._again.join()
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        sys.unraisablehook = self._hook


@contextmanager
def held_back() -> Iterator[None]:
    """Puts Ctrl+C off to the end of the block: for a few renames that belong together."""
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
    """As a key does: out of a wait as well."""
    if sys.platform == "win32":
        _thread.interrupt_main()
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


def _in_main_thread() -> bool:
    """Python lets that one alone set handlers."""
    return threading.current_thread() is threading.main_thread()
