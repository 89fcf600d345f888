"""A full or read-only disk under every command that writes: one line, status 1, all files unchanged."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.helpers.command_line import BASE_RUN, Done, ok, run

resource = pytest.importorskip("resource", reason="Windows limits no file's size")

COMMANDS = {
    "prepare": "prepare --source names.txt --out data/new",
    "upcycle": "upcycle models/base --out models/new",
    "export": "export hub models/moe --out models/new",
    "generate": "generate --model models/base --count 200 --seed 0 --out names/new.csv",
    "compare": "compare models/base --samples 0 --out pages/new.html",
    "inspect": "inspect models/moe --out pages/new.html",
    "plot": "plot models/base --out pages/new.svg",
}
LARGEST = 2_000  # bytes of a file: our stderr fits


@pytest.fixture
def place(workplace: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "place"
    shutil.copytree(workplace, folder, ignore=shutil.ignore_patterns("tuned", "*.html"))
    return folder


@contextmanager
def small_files() -> Iterator[None]:
    """Limits the files of this process to `LARGEST` bytes: a full disk that needs no rights to make."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nothing in the folder can be written. For root, only a read-only mount does that."""
    if os.geteuid() != 0:
        modes = {path: path.stat().st_mode for path in [folder, *folder.rglob("*")] if path.is_dir()}
        for path in modes:
            path.chmod(0o555)
        yield
        for path, mode in modes.items():
            path.chmod(mode)
        return
    mounts = [["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)]]
    if shutil.which("mount") is None or subprocess.run(["mount", *mounts[0]], capture_output=True).returncode:
        pytest.skip("root may not mount here")
    try:
        subprocess.run(["mount", *mounts[1]], check=True)
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check(done: Done, name: str, words: tuple[str, ...]) -> None:
    lines = done.err.splitlines()
    assert done.status == 1 and len(lines) == 1, done.err
    assert lines[0].startswith(f"flash-experts {name}: ") and any(word in lines[0] for word in words), done.err


@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_disk(name: str, place: Path) -> None:
    before = contents(place)
    with small_files():
        done = run(*COMMANDS[name].split(), cwd=place)
    check(done, name, ("File too large",))
    assert contents(place) == before
    if name in ("compare", "inspect", "plot"):  # the slow ones; `whole_file` keeps an existing file, as in generate
        return
    ok(*COMMANDS[name].split(), cwd=place)
    (place / "names.txt").write_text("Ember Seer\n" * 3 + (place / "names.txt").read_text("utf-8") + "\nNew One")
    after = contents(place)
    assert len(after) > len(before)
    with small_files():
        done = run(*COMMANDS[name].split(), "--overwrite", cwd=place)
    check(done, name, ("File too large",))
    assert contents(place) == after


def test_a_read_only_disk(place: Path) -> None:
    before = contents(place)
    with read_only(place):
        for name, words in COMMANDS.items():
            check(run(*words.split(), cwd=place), name, ("read-only", "Read-only", "Permission denied"))
        words = [word.replace("run-name=base", "run-name=new") for word in BASE_RUN]
        check(run(*words, cwd=place), "train", ("read-only", "Read-only", "Permission denied"))
    assert contents(place) == before
