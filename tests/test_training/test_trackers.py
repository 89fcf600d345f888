"""What a tracker is started with; `test_tracking` has what it records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from flash_experts.training.trackers import make_tracker


def test_trackio_continues_a_resumed_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, Any]] = []

    class Started:
        def __init__(self, project: str, **arguments: Any) -> None:
            started.append(arguments)

        def start(self) -> None: ...

        def store_init_configuration(self, values: dict[str, Any]) -> None: ...

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "trackio", Started)
    monkeypatch.setattr("flash_experts.training.trackers.is_installed", lambda name: True)
    for step in (0, 2):
        tracker = make_tracker("trackio", tmp_path, step, lambda line: None)
        assert tracker is not None
        tracker.on_start("run", {})
    assert started == [{"name": "run", "resume": "never"}, {"name": "run", "resume": "allow"}]
