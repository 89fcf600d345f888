"""Downloaded files, plain or gzip, read as a stream with bounds; whatever is wrong with one is one error."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_UNPACKED_BYTES = 2**30  # six times what the sources have; a small file that unpacks to more is a bomb
MAX_LINE_BYTES = 4 * 2**20  # of JSON lines
_GZIP = b"\x1f\x8b"


class DamagedError(ValueError):
    """A file is not what it should be: cut off, altered, or something else altogether."""


class _Bounded(io.RawIOBase):
    """Reads from another file, and gives up after `MAX_UNPACKED_BYTES`."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self._total = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._file.read(len(buffer))
        self._total += len(data)
        if self._total > MAX_UNPACKED_BYTES:
            raise DamagedError(f"it unpacks to more than {MAX_UNPACKED_BYTES:,} bytes")
        buffer[: len(data)] = data
        return len(data)


@contextmanager
def unpacked(path: Path) -> Iterator[BinaryIO]:
    """The content of a file, unpacked if its first bytes say that it is gzip, read to its end and its checksum.

    Raises:
        DamagedError: it is cut off or altered, unpacks to too much, or the block under ``with`` met no JSON.
    """
    from ijson import JSONError

    with open(path, "rb") as file:
        magic = file.read(2)
        file.seek(0)
        try:
            content = gzip.GzipFile(fileobj=file) if magic == _GZIP else file
            stream = io.BufferedReader(_Bounded(content), 2**16)  # type: ignore[arg-type]
            yield stream
            while stream.read(2**20):  # gzip checks its CRC at the end, so the end is always read
                pass
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedError(f"its gzip is damaged: {error}") from error
        except (JSONError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            what = "a web page" if _is_page(path) else "no JSON"
            raise DamagedError(f"it is {what}: {' '.join(str(error).split())[:100]}") from error


def _is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(200).lstrip().startswith(b"<")


def json_lines(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Line numbers, from 1, and the value of each line that is not empty.

    Lines of one array, with brackets around and commas between them, are read as well.

    Raises:
        DamagedError: a line has more than `MAX_LINE_BYTES`.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DamagedError(f"its line {number} has more than {MAX_LINE_BYTES:,} bytes")
        text = line.strip().removesuffix(b",")
        if text not in (b"", b"[", b"]"):
            yield number, json.loads(text)
