"""The entry point of ``flash-experts``: handles Ctrl+C during imports and at exit."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Runs `flash_experts.cli.main`; returns its exit status."""
    handled = callable(signal.getsignal(signal.SIGINT))  # under nohup SIGINT is ignored
    if handled:
        signal.signal(signal.SIGINT, _leave)
    from flash_experts.cli import main

    status = main()
    if handled:  # while Python exits, Ctrl+C would print a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"flash-experts: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
