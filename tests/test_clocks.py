"""The system clock may jump or have been wrong: nothing waits, ends or is chosen by it."""

from __future__ import annotations

import json
import os
import shutil
import time
from datetime import UTC, datetime, timedelta
from itertools import cycle
from pathlib import Path
from unittest import mock

import pytest

from flash_experts.data.live import download
from flash_experts.data.live.sites import MAX_AGE, Cache, CachedFiles
from flash_experts.training.checkpoint import checkpoint_steps, latest_checkpoint
from flash_experts.training.run_state import checkpoint_path
from tests.helpers.command_line import BASE_RUN, ok

NOW = datetime(2026, 11, 2, 10, tzinfo=UTC)
MEASURED = ("seconds", "tokens_per_second", "eta_seconds", "peak_memory_gib")


def lines_of(run: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]


def test_training(workplace: Path, tmp_path: Path) -> None:
    """The clock jumps by years between any two reads."""
    shutil.copytree(workplace / "data", tmp_path / "data")
    jumps = cycle([0.0, 4e9, 1e9])
    with mock.patch.object(time, "time", lambda: next(jumps)):
        ok(*BASE_RUN, cwd=tmp_path)
    lines, before = lines_of(tmp_path / "models/base"), lines_of(workplace / "models/base")
    seconds = [float(line["seconds"]) for line in lines if "seconds" in line]  # type: ignore[arg-type]
    assert seconds == sorted(seconds) and 0 <= seconds[0] <= seconds[-1] < 300
    bare = [[{key: line[key] for key in line if key not in MEASURED} for line in each] for each in (lines, before)]
    assert bare[0] == bare[1] and lines[-1]["step"] == 6


def test_the_newest_checkpoint_is_that_of_the_last_step(workplace: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = checkpoint_path(workplace / "models/base", checkpoint_steps(workplace / "models/base")[-1])
    for step, moment in ((2, 4e9), (7, 0.0), (5, 2e9)):
        shutil.copytree(first, checkpoint_path(run, step))
        for path in [*checkpoint_path(run, step).iterdir(), checkpoint_path(run, step)]:
            os.utime(path, (moment, moment))
    assert latest_checkpoint(run, pytest.fail) == checkpoint_path(run, 7)


def test_a_cache_from_the_future_is_not_fresh() -> None:
    """It was filled while the clock was wrong, and would stay fresh for years."""

    def is_fresh(age: timedelta) -> bool:
        return CachedFiles("1", NOW - age, {}, {}).is_fresh(NOW)

    assert is_fresh(timedelta(0)) and is_fresh(MAX_AGE - timedelta(seconds=1))
    assert not is_fresh(-timedelta(seconds=1)) and not is_fresh(MAX_AGE) and not is_fresh(-timedelta(days=9999))


def test_a_lock_file_of_any_date_is_no_lock(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    for moment in (0.0, 4e9):
        (tmp_path / ".lock").touch()
        os.utime(tmp_path / ".lock", (moment, moment))
        with mock.patch.object(time, "time", lambda: 0.0), cache.lock(0.0):
            pass


def test_retry_after_is_by_the_clock_of_the_server() -> None:
    """Our clock may be years behind or ahead."""
    headers = {"Retry-After": "Mon, 02 Nov 2026 10:00:30 GMT", "Date": "Mon, 02 Nov 2026 10:00:00 GMT"}
    for ours in (NOW, NOW - timedelta(days=900), NOW + timedelta(days=900)):
        assert download.requested_wait(headers, ours) == 30
    assert download.requested_wait(headers | {"Date": "yesterday"}, NOW) == 30
    assert download.requested_wait({"Retry-After": headers["Retry-After"]}, NOW) == 30
    assert download.requested_wait({"Date": headers["Date"]}, NOW) is None
