"""The record of a run: metrics.jsonl always, wandb or TensorBoard where asked for and installed."""

from __future__ import annotations

import importlib.util
import json
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flash_experts.training.callbacks import Callback

METRICS_FILE = "metrics.jsonl"


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, in order of steps, each step and event once.

    Args:
        path: the file; it is created with the first line.
    """

    def __init__(self, path: Path):
        self.path = path

    def append(self, event: str, values: Mapping[str, object]) -> None:
        """Adds ``{"event": event, **values}``; ``values`` has the step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}, ensure_ascii=False) + "\n")

    def truncate(self, step: int) -> None:
        """Drops what was written after ``step`` (a resumed run writes it again), and a line cut off by a
        kill."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text("".join(kept), encoding="utf-8")
        os.replace(temporary, self.path)


def read_metrics(path: str | Path, event: str | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, of one kind of event (train, validation, samples) or of all."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def make_tracker(name: str, run_dir: Path, step: int, warn: Callable[[str], None]) -> Callback | None:
    """The tracker asked for; None where that is none, or its package is not installed (said in one line).

    Args:
        name: none, wandb or tensorboard.
        run_dir: the run's folder.
        step: optimizer steps done already, by the run that this one goes on with.
        warn: tells the person who watches.
    """
    if name == "none":
        return None
    if importlib.util.find_spec(name) is None:
        warn(
            f"{name} is not installed: going on without it, {METRICS_FILE} has everything (to have it: pip "
            f"install {name})"
        )
        return None
    return WandbTracker(run_dir, warn) if name == "wandb" else TensorBoardTracker(run_dir, step)


class WandbTracker(Callback):
    """Weights & Biases. Offline, in the run's folder, unless WANDB_API_KEY (or WANDB_MODE) says otherwise. No prompts.

    A resumed run goes on as the same run of wandb, by the id that is kept in ``wandb_id.txt``. wandb leaves out steps
    that it has already: those after the checkpoint are the same the second time.

    Args:
        run_dir: where the id and the offline files go.
        warn: tells the person who watches.
    """

    def __init__(self, run_dir: Path, warn: Callable[[str], None]):
        self.run_dir, self._warn = run_dir, warn
        self._run: Any = None

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        import wandb

        path = self.run_dir / "wandb_id.txt"
        if not path.exists() or not path.stat().st_size:  # a kill may have come before the id was in it
            path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        settings: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "flash-experts"),
            "name": run_name,
            "id": path.read_text(encoding="utf-8").strip(),
            "resume": "allow",
            "dir": self.run_dir,
            "config": dict(run_info),
            "settings": wandb.Settings(silent=True),
        }
        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        if mode == "offline":
            settings.pop("resume")  # there is nobody to ask; `wandb sync` joins what has one id
        try:
            self._run = wandb.init(mode=mode, **settings)  # type: ignore[arg-type]
        except wandb.Error as error:
            self._warn(f"wandb cannot go online ({' '.join(str(error).split())}): it goes on offline")
            wandb.teardown()  # wandb's own process holds on to the id of the run that it could not begin
            settings.pop("resume", None)
            self._run = wandb.init(mode="offline", **settings)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def on_names(self, step: int, groups: Mapping[str, Sequence[str]]) -> None:
        import wandb

        rows = [[step, group, name] for group, names in groups.items() for name in names]
        self._run.log({"samples": wandb.Table(columns=["step", "group", "name"], data=rows)}, step=step)

    def on_end(self, summary: Mapping[str, object]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()


class TensorBoardTracker(Callback):
    """Event files in ``run_dir/tensorboard``.

    Args:
        run_dir: the run's folder.
        step: optimizer steps done already; what a killed run wrote after them is not shown.
    """

    def __init__(self, run_dir: Path, step: int):
        self.run_dir, self._step = run_dir, step
        self._writer: Any = None

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.run_dir / "tensorboard"), purge_step=self._step + 1)
        self._writer.add_text("run", f"```json\n{json.dumps(run_info, indent=2, default=str)}\n```", self._step)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self.on_log(step, metrics)

    def on_names(self, step: int, groups: Mapping[str, Sequence[str]]) -> None:
        rows = [f"| {group} | {name} |" for group, names in groups.items() for name in names]
        self._writer.add_text("samples", "\n".join(["| group | name |", "| --- | --- |", *rows]), step)

    def on_end(self, summary: Mapping[str, object]) -> None:
        self._writer.add_text("end", json.dumps(dict(summary), default=str))
        self._writer.close()
