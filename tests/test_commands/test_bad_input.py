"""Invalid input to every command: exit status, one line that names the fix, no files written, no traceback."""

from __future__ import annotations

import shlex
import shutil
from collections import Counter
from pathlib import Path

import pytest

from flash_experts.cli import COMMANDS
from tests.helpers.bad_input_cases import CASES
from tests.helpers.bad_input_words import WORKING, Case
from tests.helpers.command_line import run
from tests.helpers.spoiled import spoil_files


@pytest.fixture(scope="module")
def arena(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workplace with malformed files. No case may change it."""
    folder = tmp_path_factory.mktemp("arena") / "work place"
    shutil.copytree(workplace, folder, ignore=shutil.ignore_patterns("tuned", "*.html"))
    spoil_files(folder)
    return folder


def listing(folder: Path) -> dict[Path, tuple[int, int]]:
    """Folders, and size and modification time of files."""
    found = {path: path.stat() for path in folder.rglob("*")}
    return {path: (0, 0) if path.is_dir() else (stat.st_size, stat.st_mtime_ns) for path, stat in found.items()}


def check(case: Case, folder: Path) -> None:
    before = listing(folder)
    done = run(*shlex.split(case.words), cwd=folder)
    lines = done.err.splitlines()
    assert done.status == case.status, done.err
    assert len(lines) == 1 and case.answer in lines[0], done.err
    assert lines[0].startswith("flash-experts") and len(lines[0]) < 500 and lines[0].isprintable(), done.err
    assert done.out == ""
    assert listing(folder) == before, "no files written"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.words)
def test_one_line_and_nothing_written(case: Case, arena: Path) -> None:
    check(case, arena)


def test_every_command_has_its_cases() -> None:
    counts = Counter(case.words.split()[0] for case in CASES)
    assert WORKING.keys() == COMMANDS.keys(), "a new command: give it cases of its own in bad_input_cases"
    assert all(counts[name] >= 8 for name in COMMANDS), counts
    assert len(CASES) >= 300 and len({case.words for case in CASES}) == len(CASES)


def test_an_option_of_megabytes_is_not_read(arena: Path) -> None:
    """Nested brackets would overflow the stack and end the process."""
    check(Case("prepare --include " + "[" * 100_000, 2, "characters are too long for an option"), arena)
