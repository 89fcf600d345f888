"""Reads downloaded files, plain or gzip, as a bounded stream; any damage is a `DamagedError`."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

MAX_UNPACKED_BYTES = 2**30  # six times the size of the sources; guards against decompression bombs
MAX_LINE_BYTES = 4 * 2**20  # limit for a line of JSON
_GZIP = b"\x1f\x8b"


class DamagedError(ValueError):
    """A file is truncated, altered, or of another kind."""


class _Bounded(io.RawIOBase):
    """Reads from another file and raises after `MAX_UNPACKED_BYTES`."""

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
    """Opens a file, decompressed if it starts as gzip does, and reads it to its end to verify the checksum.

    Raises:
        DamagedError: it is truncated or altered, unpacks to too much, or the ``with`` block found invalid JSON.
    """
    from ijson import JSONError

    with open(path, "rb") as file:
        magic = file.read(2)
        file.seek(0)
        try:
            content = gzip.GzipFile(fileobj=file) if magic == _GZIP else file
            stream = io.BufferedReader(_Bounded(content), 2**16)  # type: ignore[arg-type]
            yield stream
            while stream.read(2**20):  # gzip verifies its CRC at the end
                pass
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DamagedError(f"its gzip is damaged: {error}") from error
        except (JSONError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
            what = "a web page" if _is_page(path) else "not JSON"
            raise DamagedError(f"it is {what}: {' '.join(str(error).split())[:100]}") from error


def _is_page(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(200).lstrip().startswith(b"<")


def json_lines(file: BinaryIO) -> Iterator[tuple[int, Any]]:
    """Numbers (from 1) and values of non-empty JSON lines, or of a JSON array with one item per line.

    Raises:
        DamagedError: a line is too long.
    """
    number = 0
    while line := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(line) > MAX_LINE_BYTES:
            raise DamagedError(f"its line {number} has more than {MAX_LINE_BYTES:,} bytes")
        text = line.strip().removesuffix(b",")
        if text not in (b"", b"[", b"]"):
            yield number, json.loads(text)
