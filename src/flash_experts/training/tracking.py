"""The record of a run: metrics.jsonl always, wandb or TensorBoard where asked for and installed."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Callable, Mapping
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


def make_tracker(name: str, run_dir: Path, warn: Callable[[str], None]) -> Callback | None:
    """The tracker asked for; None where that is none, or its package is not installed (said in one line)."""
    if name == "none":
        return None
    if importlib.util.find_spec(name) is None:
        warn(
            f"{name} is not installed: going on without it, {METRICS_FILE} has everything (to have it: pip "
            f"install {name})"
        )
        return None
    return WandbTracker(run_dir) if name == "wandb" else TensorBoardTracker(run_dir)


class WandbTracker(Callback):
    """Weights & Biases. Offline, in the run's folder, unless WANDB_API_KEY (or WANDB_MODE) says otherwise.

    Args:
        run_dir: where the offline files go.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._run: Any = None

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "flash-experts"),
            name=run_name,
            dir=self.run_dir,
            config=dict(run_info),
            mode=mode,  # type: ignore[arg-type]
            settings=wandb.Settings(silent=True),
        )

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def on_end(self, summary: Mapping[str, object]) -> None:
        self._run.summary.update(dict(summary))
        self._run.finish()


class TensorBoardTracker(Callback):
    """Event files in ``run_dir/tensorboard``.

    Args:
        run_dir: the run's folder.
    """

    def __init__(self, run_dir: Path):
        self.run_dir = run_dir
        self._writer: Any = None

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(self.run_dir / "tensorboard"))
        self._writer.add_text("run", f"```json\n{json.dumps(run_info, indent=2, default=str)}\n```")

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        self.on_log(step, metrics)

    def on_end(self, summary: Mapping[str, object]) -> None:
        self._writer.close()
