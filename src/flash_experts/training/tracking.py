"""Experiment tracking: callbacks, metrics.jsonl, Weights & Biases (wandb) and TensorBoard."""

from __future__ import annotations

import json
import netrc
import os
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.extras import is_installed, missing
from flash_experts.files import whole_file

METRICS_FILE = "metrics.jsonl"
_MAX_BYTES = 2**30  # of a metrics.jsonl
_MAX_STEP = 2**53
_OFFLINE = ("offline", "dryrun")
_WANDB_MODES = (*_OFFLINE, "online", "run", "shared", "disabled")


class Callback:
    """Hooks of a run, on the main process alone; a subclass overrides some.

    They may draw random numbers: dropout is seeded at each step.
    """

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        """Before the first step. ``run_info`` is what `run.json` holds."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Every ``log_every`` steps: loss, learning rate, speed, router statistics."""

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each validation."""

    def on_sample(self, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        """Every ``sample_every`` steps, with the model in eval mode. Returns sample names, which are shown and kept."""
        return ()

    def on_names(self, step: int, groups: Mapping[str, Sequence[str]]) -> None:
        """The sample names of a step in groups: ``new``, ``in train``, ``in validation``."""

    def on_end(self, summary: Mapping[str, object]) -> None:
        """After the last step, or when the run is interrupted."""


# ------------------------------------------------------------------------------------------------------ metrics.jsonl


class MetricsFile:
    """``metrics.jsonl``: one JSON object a line, in order of steps, each step and event once."""

    def __init__(self, path: Path):
        self.path = path

    def append(self, event: str, values: Mapping[str, object]) -> None:
        """Adds ``{"event": event, **values}``; ``values`` includes the step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"event": event, **values}, ensure_ascii=False) + "\n")

    def truncate(self, step: int) -> None:
        """Removes lines after ``step``, which a resumed run writes again, and a line that a kill cut off."""
        if not self.path.exists():
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if parse_metrics(line, "step")["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, TypeError):
                continue
        with whole_file(self.path) as temporary:
            temporary.write_text("".join(kept), encoding="utf-8")


def parse_metrics(text: str, *fields: str) -> dict[str, Any]:
    """Parses one line of a metrics.jsonl.

    Raises:
        ValueError: it is not a JSON object with these fields.
    """
    try:
        line: dict[str, Any] = json.loads(text)
        for field in fields:
            line[field]
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error
    return line


def read_metrics(path: str | Path, event: str | None = None) -> list[dict[str, Any]]:
    """Reads the lines of a metrics.jsonl, of one event (train, validation, samples) or of all.

    A last line that a kill truncated is left out.

    Raises:
        ValueError: there is no such file, it is not UTF-8 text or too large, or a line is damaged (``file:line``).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no {path}: give the folder of a run that `flash-experts train` wrote")
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"{path} has more than {_MAX_BYTES:,} bytes: it is not the metrics.jsonl of a run")
    try:
        texts = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not the metrics.jsonl of a run: it is not UTF-8 text") from error
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            lines.append(parse_metrics(text, "event", "step"))
        except ValueError as error:
            if number == len(texts) and lines:
                break  # the run is still writing, or was killed
            raise ValueError(f"{path}:{number} is not a line of metrics: {error}") from error
    return [line for line in lines if event in (None, line["event"])]


def read_untrusted_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a metrics.jsonl that have a step, and skips all others; empty if there is no such file."""
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = parse_metrics(text, "step")
        except ValueError:
            continue
        if type(line["step"]) is int and abs(line["step"]) < _MAX_STEP:
            lines.append(line)
    return lines


def make_tracker(name: str, run_dir: Path, step: int, warn: Callable[[str], None]) -> Callback | None:
    """The tracker ``name`` (wandb or tensorboard); None for "none", or if its package is not installed, with a warning.

    Args:
        step: optimizer steps that are done already.
        warn: shows a line to the user.
    """
    if name == "none":
        return None
    if not is_installed(name):
        warn(f"training without tracking, {METRICS_FILE} has all metrics: {missing(name, 'training.tracker')}")
        return None
    return WandbTracker(run_dir, warn) if name == "wandb" else TensorBoardTracker(run_dir, step)


def wandb_mode(warn: Callable[[str], None]) -> str:
    """``WANDB_MODE``, or online if there is an API key; always offline without one, for wandb would ask for it.

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
    """Whether an API key is in the environment, or in .netrc, where `wandb login` puts it."""
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
    """Weights & Biases, online with an API key and offline without one; never interactive.

    It writes to ``$WANDB_DIR/wandb``, or ``wandb`` in the current directory. A resumed run continues the same wandb
    run, by the id in ``wandb_id.txt``; wandb ignores steps that it has already.
    """

    def __init__(self, run_dir: Path, notify: Callable[[str], None]):
        self.run_dir, self._notify = run_dir, notify
        self._run: Any = None
        self._is_offline = True

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        import wandb

        path = self.run_dir / "wandb_id.txt"
        if not path.exists() or not path.stat().st_size:  # a kill may have left it empty
            path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        place = Path(os.environ.get("WANDB_DIR") or ".")
        place.mkdir(parents=True, exist_ok=True)  # else wandb chooses another folder
        settings: dict[str, Any] = {
            "project": os.environ.get("WANDB_PROJECT", "flash-experts"),
            "name": run_name,
            "id": path.read_text(encoding="utf-8").strip(),
            "config": dict(run_info),
            "dir": str(place.resolve()),  # wandb has a process of its own, perhaps with another current directory
            "settings": wandb.Settings(silent=True),
        }
        mode = wandb_mode(self._notify)
        try:
            # Offline there is nothing to resume; `wandb sync` joins runs of one id.
            resume = {} if mode in _OFFLINE else {"resume": "allow"}
            self._run = wandb.init(mode=mode, **settings, **resume)  # type: ignore[arg-type]
        except wandb.Error as error:
            self._notify(f"wandb cannot go online ({' '.join(str(error).split())}): recording offline")
            wandb.teardown()  # wandb's own process keeps the id of the run that it could not start
            self._run = wandb.init(mode="offline", **settings)
            mode = "offline"
        self._is_offline = mode in _OFFLINE
        if self._is_offline:
            self._notify(f"wandb: recording offline in {self._place()}")
        elif mode != "disabled":
            self._notify(f"wandb: recording online at {self._run.url}")

    def _place(self) -> str:
        """Folder of the offline run, quoted for a shell."""
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
            self._notify(f"wandb: to upload this run, log in once (wandb login), then: wandb sync {self._place()}")


class TensorBoardTracker(Callback):
    """Event files in ``run_dir/tensorboard``; those of a killed run after ``step`` are not shown."""

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
