"""The command line, ``flash-experts COMMAND``: finds and runs the command, and reports failures in one line.

Failures that a user can fix are ValueErrors below; here they become one line and an exit status (2 for a wrong command
line, 1 for the rest). ``--debug`` shows the traceback as well.
"""

from __future__ import annotations

import _thread
import os
import re
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from types import FrameType, TracebackType
from typing import Any, cast

from jsonargparse import Namespace

from flash_experts.commands import (
    benchmark,
    compare,
    completion,
    configs,
    evaluate,
    export,
    fetch_teacher,
    generate,
    inspect,
    plot,
    prepare,
    serve,
    train,
    upcycle,
)
from flash_experts.commands.common import shortened
from flash_experts.kernels.cpu_memory import keep_freed_memory
from flash_experts.terminal import did_you_mean, escape_unencodable, one_line, say

COMMANDS = {
    "prepare": prepare,
    "fetch-teacher": fetch_teacher,
    "upcycle": upcycle,
    "export": export,
    "train": train,
    "evaluate": evaluate,
    "compare": compare,
    "inspect": inspect,
    "generate": generate,
    "serve": serve,
    "plot": plot,
    "benchmark": benchmark,
    "configs": configs,
    "completion": completion,
}

# Turns off the telemetry of libraries. Values that are set in the environment take precedence.
NO_TELEMETRY = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "WANDB_ERROR_REPORTING": "false",
    "DO_NOT_TRACK": "1",
}


def _usage() -> str:
    lines = [f"  {name:15}{(command.run.__doc__ or '').splitlines()[0]}" for name, command in COMMANDS.items()]
    usage = "usage: flash-experts COMMAND [options]"
    hint = "flash-experts help COMMAND: the options of a command\nflash-experts --version: the version"
    return "\n".join([usage, "", *lines, "", hint])


def _dashes_to_underscores(argument: str) -> str:
    """``--top-k=5`` to ``--top_k=5``: both spellings are accepted."""
    if not argument.startswith("--"):
        return argument
    option, equals, value = argument.partition("=")
    return "--" + option[2:].replace("-", "_") + equals + value


# ------------------------------------------------------------------------------------------------------- the program


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit status: 0, 1 for an error, 2 for a wrong command line, 130 for Ctrl+C."""
    escape_unencodable(sys.stdout)
    try:
        status = _main(list(sys.argv[1:] if argv is None else argv))
        if sys.stdout is not None:
            sys.stdout.flush()  # argparse leaves its help in the buffer
        return status
    except BrokenPipeError:  # the reader of our output closed it, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _main(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and arguments[1:]:  # "help COMMAND TOPIC" is "COMMAND TOPIC --help"
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        say(_usage())
        return 0 if arguments else 2
    name = arguments[0]
    if name == "--version":
        from flash_experts import __version__

        say(f"flash-experts {__version__}")
        return 0
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS, f"use one of {', '.join(COMMANDS)}")
        say(one_line(f"flash-experts: unknown command {name!r}: {hint}"), sys.stderr)
        return 2
    with CtrlC() as ctrl_c:
        try:
            ctrl_c.listen()
            _set_up_libraries()
            status = _run(name, arguments[1:], ctrl_c)
            ctrl_c.close()
        except BaseException as error:
            ctrl_c.close()
            if ctrl_c.pressed or isinstance(error, KeyboardInterrupt):
                say(f"flash-experts {name}: interrupted", sys.stderr)
                return 130
            if not isinstance(error, SystemExit):
                raise
            status = int(error.code or 0)
    return status


def parse(name: str, arguments: Sequence[str]) -> Namespace:
    """The checked settings of a command: defaults, then ``--config``, then the other arguments.

        parse("train", ["--config", "configs/quickstart.yaml", "--training.max-steps", "100"]).training

    Raises:
        SystemExit: status 2, after one line on stderr, for a wrong argument.
    """
    parser = COMMANDS[name].make_parser()
    return cast(Namespace, parser.instantiate(parser.parse_args([_dashes_to_underscores(text) for text in arguments])))


def _run(name: str, arguments: list[str], ctrl_c: CtrlC) -> int:
    """Runs a command; a failure becomes one line on stderr."""
    command = COMMANDS[name]
    args = parse(name, arguments)
    try:
        with _model_families(args):
            command.run(args)
        return 0
    except ModuleNotFoundError as error:
        if args.debug or str(error.name).startswith("flash_experts"):
            raise
        say(f"flash-experts {name}: the package {error.name} is not installed: pip install flash-experts", sys.stderr)
        return 1
    except Exception as error:
        fixable = isinstance(error, (ValueError, OSError, RuntimeError, MemoryError))
        if ctrl_c.pressed or args.debug or isinstance(error, BrokenPipeError) or not fixable:
            raise
        say(f"flash-experts {name}: {shortened(one_line(_explain(error)))}", sys.stderr)
        return 1


def _model_families(args: Namespace) -> AbstractContextManager[None]:
    if args.get("model_family") != "any":
        return nullcontext()
    from flash_experts.model_files import any_family

    return any_family()


def _explain(error: BaseException) -> str:
    """An error in one line that says what to do."""
    text = " ".join(str(error).split()) or type(error).__name__
    is_ours = type(error).__module__.startswith("flash_experts.") or isinstance(error, ValueError)  # says what to do
    if isinstance(error, MemoryError) or (not is_ours and re.search("out of memory|can't allocate memory", text)):
        return "out of memory: lower --training.tokens-per-batch (or --batch-size), or use a smaller model"
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}"
    return text


def _set_up_libraries() -> None:
    """Turns off libraries' progress bars, warnings and telemetry, and keeps freed memory for the next step."""
    for name, value in NO_TELEMETRY.items():
        os.environ.setdefault(name, value)
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Large gradients are allocated again in every step, and mapping fresh memory page by page is slow: use huge pages
    # of 2 MB, and keep freed memory (see `kernels.cpu_memory`).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    keep_freed_memory()
    warnings.showwarning = _show_warning


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    """Shows our own warnings in one line, and hides those of libraries."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and "warnings" in frame.f_globals.get("__name__", ""):
        frame = frame.f_back  # to the code that warns, which `stacklevel` hides
    is_ours = frame is not None and frame.f_globals.get("__name__", "").startswith("flash_experts.")
    if category is UserWarning and is_ours:
        say(one_line(f"flash-experts: {message}"), sys.stderr)


# --------------------------------------------------------------------------------------------------------------- Ctrl+C

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
        # Python lets the main thread alone set handlers. An ignored SIGINT, as under nohup, stays ignored.
        if threading.current_thread() is threading.main_thread() and callable(signal.getsignal(signal.SIGINT)):
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


def _interrupt_main_thread() -> None:
    """Sends SIGINT as the key does, which also ends a wait."""
    if sys.platform == "win32":
        _thread.interrupt_main()
    else:
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)


if __name__ == "__main__":
    sys.exit(main())
