"""The program ``flash-experts``: hears Ctrl+C while everything else is imported, and after the last word."""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType


def main() -> int:
    """Runs `flash_experts.cli.main` as a process: returns its exit status."""
    heeded = callable(signal.getsignal(signal.SIGINT))  # under nohup it is not
    if heeded:
        signal.signal(signal.SIGINT, _leave)
    from flash_experts.cli import main

    status = main()
    if heeded:  # Python, while it ends, would print a traceback
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    return status


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"flash-experts: interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    sys.exit(main())
