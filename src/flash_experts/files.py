"""Where results go: looked at before anything is computed, and written whole or not at all."""

from __future__ import annotations

import glob
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A place to write a file to, which gets its name when the block ends, and is gone if the block fails.

    Raises:
        OSError: it cannot be written.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(target)
    try:
        yield temporary
        os.chmod(temporary, 0o644)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def temporary_beside(target: Path) -> Path:
    """A name that only this process uses, of the same suffix; what killed processes left under theirs is removed."""
    start = f".{target.name[:100]}-"
    for left in target.parent.glob(f"{glob.escape(start)}[0-9]*"):
        process = left.name.removeprefix(start).split(".")[0]
        if process.isdigit() and not _is_alive(int(process)):
            shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    return target.with_name(f"{start}{os.getpid()}{target.suffix}")


def _is_alive(process: int) -> bool:
    if process == os.getpid():
        return False  # this process is done with what it wrote before
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def check_out_folder(out: str, source: str | None = None, *, option: str = "--out") -> None:
    """Looks at a folder that is to be written to before anything is computed.

    Raises:
        ValueError: it is a file, cannot be made, is that of a training run, or of the model that is read (``source``).
    """
    path = Path(out)
    if out == "" or (path.exists() and not path.is_dir()):
        raise ValueError(f"{option} {out!r} is no folder: give a new one")
    if source is not None and path.exists() and path.resolve() == Path(source).resolve():
        raise ValueError(f"{option} {out} is the model that is read: give a new folder")
    if (path / "checkpoints").is_dir():
        raise ValueError(f"{option} {out} is the folder of a training run, which is kept as it is: give a new one")
    _check_parents(path)


def check_out_file(out: str, *, option: str = "--out", never: str | None = None) -> None:
    """Looks at a file that is to be written before anything is computed.

    Args:
        out: its path.
        option: that named it.
        never: a suffix that it must not have, since another file is written there.

    Raises:
        ValueError: it is a folder, has that suffix, or the folder that it is to be in cannot be written.
    """
    path = Path(out)
    if not path.name or path.is_dir():
        raise ValueError(f"{option} {out!r} is a folder: give a file name")
    if path.exists() and not path.is_file():  # written by renaming, which would put a plain file in a device's place
        raise ValueError(f"{option} {out} is a device or a pipe: give a file name")
    if never is not None and path.suffix.lower() == never:
        raise ValueError(f"{option} {out} must not end in {never}: the figures are written beside it under that name")
    _check_parents(path)


def _check_parents(path: Path) -> None:
    """Whether the nearest folder that is there can be written."""
    there = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not there.is_dir():
        raise ValueError(f"cannot write {path}: {there} is no folder: give another --out")
    if not os.access(there, os.W_OK):
        raise ValueError(f"cannot write {path}: {there} is read-only: give another --out")
