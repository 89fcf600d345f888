"""Output paths, checked before anything is computed, and atomic writes: complete, or not at all.

**No command writes to an existing file or a folder with content without ``--overwrite``** (`check_replaced`), with two
exceptions that lose nothing: `train` resumes its own run, and `prepare` renews its own files while their hashes match
meta.json.

Temporary files have unguessable names, and only the process that made them removes them, never by pattern: another
machine may still be writing those that a `kill -9` left behind.
"""

from __future__ import annotations

import errno
import hashlib
import os
import secrets
import shutil
import signal
import stat
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path

if os.name == "posix":
    import fcntl


def check_replaced(path: str | Path, overwrite: bool, option: str = "--out") -> None:
    """Raises a ValueError by the rule above. Hidden files in a folder do not count: we write none."""
    path = Path(path)
    if overwrite or not os.path.lexists(path):
        return
    if path.is_dir():
        if any(not name.startswith(".") for name in os.listdir(path)):
            raise ValueError(
                f"{option} {path} is not empty: give a new folder, or --overwrite to replace files of the same name"
            )
    elif path.exists():  # a link to nothing is written through
        raise ValueError(f"{option} {path} exists already: give another name, or --overwrite to replace it")


def check_out_folder(out: str, overwrite: bool, source: str | None = None, *, option: str = "--out") -> None:
    """Raises a ValueError for an output folder that is a file, cannot be made, has content, or is that of a training
    run or of the model that is read (``source``)."""
    path = _named(out, option, "folder")
    if path.exists() and not path.is_dir():
        raise ValueError(f"{option} {out!r} is not a directory: give a new one")
    if source is not None and path.exists() and path.resolve() == Path(source).resolve():
        raise ValueError(f"{option} {out} is the model that is read: give a new folder")
    if (path / "checkpoints").is_dir():
        raise ValueError(f"{option} {out} is the folder of a training run, which is kept as it is: give a new one")
    check_replaced(path, overwrite, option)
    _check_writable(path, option)


def check_out_file(out: str, overwrite: bool, *, option: str = "--out", also: Sequence[str] = ()) -> None:
    """Raises a ValueError for an output file that is a folder, exists, cannot be written, or has one of the suffixes
    ``also``, of files that are written next to it."""
    path = _named(out, option, "file")
    if not path.name or path.is_dir():
        raise ValueError(f"{option} {out!r} is a directory: give a file name")
    if path.suffix.lower() in also:
        raise ValueError(
            f"{option} {out} must not end in {path.suffix.lower()}: the numbers are written next to it under that name"
        )
    for file in (path, *(path.with_suffix(suffix) for suffix in also)):
        if file.exists() and not file.is_file():  # the rename would replace a device by a regular file
            raise ValueError(f"{option} {file} is not a regular file: give another name")
        check_replaced(file, overwrite, option)
        _check_writable(file, option)


def _named(out: str, option: str, kind: str) -> Path:
    if not out:
        raise ValueError(f"{option} is empty: give the name of a {kind}")
    return Path(out)


def free_name(name: str, also: Sequence[str] = ()) -> str:
    """``report.html``, or the first of ``report-2.html``, ... that does not exist, nor with the suffixes ``also``."""
    first = Path(name)
    for number in count(1):
        path = first if number == 1 else first.with_stem(f"{first.stem}-{number}")
        if not any(map(os.path.lexists, (path, *(path.with_suffix(suffix) for suffix in also)))):
            break
    return str(path)


def _check_writable(path: Path, option: str) -> None:
    if path.exists():
        if not os.access(path, os.W_OK):
            raise ValueError(f"cannot write {path}: it is read-only: give another {option}")
        if path.is_dir():
            return
    there = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not there.is_dir():
        raise ValueError(f"cannot write {path}: {there} is not a directory: give another {option}")
    if not os.access(there, os.W_OK):
        raise ValueError(f"cannot write {path}: {there} is read-only: give another {option}")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """`whole_files` for a single file."""
    with whole_files([path]) as (temporary,):
        yield temporary


@contextmanager
def whole_files(paths: Sequence[str | Path]) -> Iterator[list[Path]]:
    """Yields temporary paths, which are renamed in this order when the block ends, and removed if it fails.

    As with `open`, links are followed, an existing file keeps its mode, and a new one gets that of the umask.
    """
    targets = [Path(os.path.realpath(path)) for path in paths]
    temporaries = [temporary_next_to(target) for target in targets]
    try:
        for target, temporary in zip(targets, temporaries, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists() and not os.access(target, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(target))
            os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            _take_mode(temporary, target)
        yield temporaries
        for temporary in temporaries:
            flush_file(temporary)
        with deferred_ctrl_c():
            for target, temporary in zip(targets, temporaries, strict=True):
                os.replace(temporary, target)
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise


@contextmanager
def deferred_ctrl_c() -> Iterator[None]:
    """Defers Ctrl+C to the end of the block, for a few renames that belong together."""
    if threading.current_thread() is not threading.main_thread() or not callable(signal.getsignal(signal.SIGINT)):
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


def temporary_next_to(target: Path) -> Path:
    """An unguessable path next to ``target``, with the same suffix."""
    return target.with_name(f".flash-experts-{secrets.token_hex(8)}{target.suffix[:20]}")


def move_into_place(file: Path, target: Path) -> None:
    """Renames a finished file to its place, as `whole_files` does: links are followed, modes kept."""
    target = Path(os.path.realpath(target))
    _take_mode(file, target)
    try:
        os.replace(file, target)
    except OSError as error:
        if error.errno != errno.EXDEV:  # a link to another file system: copy instead
            raise
        with whole_file(target) as temporary:
            shutil.copyfile(file, temporary)
        file.unlink()


def _take_mode(file: Path, target: Path) -> None:
    with suppress(FileNotFoundError):
        file.chmod(stat.S_IMODE(target.stat().st_mode))


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """An exclusive lock of a folder: other processes wait. It ends with the process and leaves no file."""
    if os.name != "posix":
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def flush_file(path: Path) -> None:
    """Flushes a file to the disk (fsync)."""
    with path.open("r+b") as file:  # Windows flushes only what is open for writing
        os.fsync(file.fileno())


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal text."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
