"""Trackers that remember what they are given."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from accelerate.tracking import GeneralTracker


class FakeRun:
    """Remembers what a run of wandb is given."""

    url = "https://wandb.example/run"

    def __init__(self, **started: Any) -> None:
        self.started = started
        self.settings = SimpleNamespace(sync_dir=str(Path.cwd() / "wandb/offline run"))
        self.logged: list[tuple[int, dict[str, Any]]] = []
        self.summary: dict[str, object] = {}
        self.is_finished = False

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged.append((step, values))

    def finish(self) -> None:
        self.is_finished = True


class Kept(GeneralTracker):
    """A tracker as accelerate's are, which remembers what it is given and cannot do more than scalars."""

    name, requires_logging_directory = "swanlab", False

    def __init__(self, project: str, **arguments: Any) -> None:
        super().__init__()
        self.given, self.logged, self.fails = (project, arguments), [], False
        made.append(self)

    @property
    def tracker(self) -> None:
        return None

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.configuration = values

    def log(self, values: dict[str, Any], step: int | None = None, **_: Any) -> None:
        print("a banner")
        if step == 3:
            raise ConnectionError("server\ngone")
        self.logged.append((step, values))


made: list[Kept] = []
