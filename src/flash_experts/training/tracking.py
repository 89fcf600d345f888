"""The record of a run: metrics.jsonl always, wandb or TensorBoard where asked for and installed."""

from __future__ import annotations

import importlib.util
import json
import netrc
import os
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flash_experts.files import whole_file
from flash_experts.training.callbacks import Callback

METRICS_FILE = "metrics.jsonl"
_OFFLINE = ("offline", "dryrun")
_WANDB_MODES = (*_OFFLINE, "online", "run", "shared", "disabled")


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
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def read_metrics(path: str | Path, event: str | None = None) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, of one kind of event (train, validation, samples) or of all."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if event in (None, line["event"])]


def make_tracker(name: str, run_dir: Path, step: int, warn: Callable[[str], None]) -> Callback | None:
    """The tracker of a run; None for "none", or with a warning where its package is not installed.

    Args:
        name: none, wandb or tensorboard.
        run_dir: the run's folder.
        step: optimizer steps that a resumed run has done already.
        warn: shows a line to the user.
    """
    if name == "none":
        return None
    if importlib.util.find_spec(name) is None:
        warn(f"{name} is not installed: training without it, {METRICS_FILE} has all metrics (or: pip install {name})")
        return None
    return WandbTracker(run_dir, warn) if name == "wandb" else TensorBoardTracker(run_dir, step)


def wandb_mode(warn: Callable[[str], None]) -> str:
    """``WANDB_MODE`` if it is set; else online with a key and offline without one.

    wandb would ask for a missing key, so there is no online mode without one.

    Raises:
        ValueError: wandb has no such mode.
    """
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
    if mode not in _WANDB_MODES:
        raise ValueError(f"WANDB_MODE is {mode!r}: set it to online, offline or disabled, or unset it")
    if mode in (*_OFFLINE, "disabled") or _has_wandb_key():
        return mode
    warn(f"wandb has no API key for WANDB_MODE={mode}: recording offline (set WANDB_API_KEY, or run `wandb login`)")
    return "offline"


def _has_wandb_key() -> bool:
    """Whether a key is in the environment, or in .netrc, where `wandb login` puts it."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
    places = [os.environ["NETRC"]] if os.environ.get("NETRC") else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for place in places:
        try:
            if netrc.netrc(str(place)).hosts.get(str(host)):
                return True
        except (OSError, ValueError, netrc.NetrcParseError):
            continue
    return False


class WandbTracker(Callback):
    """Weights & Biases, online with a key and offline without one. It never asks for anything.

    wandb writes to ``$WANDB_DIR/wandb``, or to ``wandb`` in the current directory. A resumed run continues the same
    wandb run, by the id in ``wandb_id.txt``. wandb ignores steps that it has already: those after the checkpoint are
    the same the second time.

    Args:
        run_dir: where the id is kept.
        say: shows a line to the user.
    """

    def __init__(self, run_dir: Path, say: Callable[[str], None]):
        self.run_dir, self._say = run_dir, say
        self._run: Any = None
        self._is_offline = True

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        import wandb

        path = self.run_dir / "wandb_id.txt"
        if not path.exists() or not path.stat().st_size:  # a kill may have come before the id was in it
            path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        place = Path(os.environ.get("WANDB_DIR") or ".")
        place.mkdir(parents=True, exist_ok=True)  # else wandb takes another place
        settings: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "flash-experts"),
            "name": run_name,
            "id": path.read_text(encoding="utf-8").strip(),
            "config": dict(run_info),
            "dir": str(place),  # by itself wandb would keep to where the process's first run went
            "settings": wandb.Settings(silent=True),
        }
        mode = wandb_mode(self._say)
        try:
            # There is nobody to ask offline; `wandb sync` joins what has one id.
            resume = {} if mode in _OFFLINE else {"resume": "allow"}
            self._run = wandb.init(mode=mode, **settings, **resume)  # type: ignore[arg-type]
        except wandb.Error as error:
            self._say(f"wandb cannot go online ({' '.join(str(error).split())}): recording offline")
            wandb.teardown()  # wandb's own process holds on to the id of the run that it could not start
            self._run = wandb.init(mode="offline", **settings)
            mode = "offline"
        self._is_offline = mode in _OFFLINE
        if self._is_offline:
            self._say(f"wandb: recording offline in {self._place()}")
        elif mode != "disabled":
            self._say(f"wandb: recording online at {self._run.url}")

    def _place(self) -> str:
        """Folder of the offline run, as an argument of a shell command."""
        folder = Path(self._run.settings.sync_dir)
        return shlex.quote(str(folder.relative_to(Path.cwd()) if folder.is_relative_to(Path.cwd()) else folder))

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
        if self._is_offline:
            self._say(f"wandb: to upload this run, log in once (wandb login), then: wandb sync {self._place()}")


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
