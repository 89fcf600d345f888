"""Experiment trackers: accelerate's classes behind the hooks of a run, with panels ``train/``, ``eval/``, ``router/``.

A tracker never ends a run: if it fails, training goes on without it, and metrics.jsonl has everything.
"""

from __future__ import annotations

import json
import netrc
import os
import secrets
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from statistics import fmean
from typing import Any
from urllib.parse import urlsplit

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker, TensorBoardTracker, WandBTracker

from flash_experts.extras import is_installed, missing
from flash_experts.training.tracking import METRICS_FILE, Callback

OFFLINE = ("offline", "dryrun")
_MODES = (*OFFLINE, "online", "run", "shared", "disabled")
PROJECT = "flash-experts"  # WANDB_PROJECT, MLFLOW_EXPERIMENT_NAME and CLEARML_PROJECT win
_VALIDATION, _ROUTER = "validation/", "router/"
_MOST_BINS = 512  # of a histogram in wandb


def make_tracker(name: str, run_dir: Path, step: int, notify: Callable[[str], None]) -> Callback | None:
    """The tracker ``name`` of `TrackerName` after ``step`` steps.

    None for "none", or, with a warning, if its package is not installed. A ValueError for an unknown ``WANDB_MODE``.
    """
    if name == "none":
        return None
    if not is_installed(name):
        notify(f"training without tracking, {METRICS_FILE} has all metrics: {missing(name, 'training.tracker')}")
        return None
    if name == "wandb":
        return Wandb(run_dir, step, notify, wandb_mode(notify))
    kind = {"tensorboard": TensorBoard, "mlflow": Mlflow}.get(name)
    return Tracker(name, run_dir, step, notify) if kind is None else kind(name, run_dir, step, notify)


# -------------------------------------------------------------------------------------------------------------- panels


def by_layer(metrics: Mapping[str, float]) -> tuple[dict[int, list[float]], dict[int, dict[str, float]]]:
    """Splits ``router/`` metrics by block: the loads of the experts, and other statistics."""
    loads: dict[int, list[float]] = {}
    statistics: dict[int, dict[str, float]] = {}
    for name, value in metrics.items():
        if not name.startswith(_ROUTER):
            continue
        _, block, statistic, *expert = name.split("/")
        if expert:
            loads.setdefault(int(block), []).append(value)
        else:
            statistics.setdefault(int(block), {})[statistic] = value
    return loads, statistics


def over_layers(statistics: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """Each router statistic's mean over the blocks; the largest for ``max_load``, ``max_pair``."""
    by_name: dict[str, list[float]] = {}
    for values in statistics.values():
        for name, value in values.items():
            by_name.setdefault(name, []).append(value)
    return {
        f"{_ROUTER}{name}": max(values) if name.startswith("max_") else fmean(values)
        for name, values in by_name.items()
    }


def flat(info: Mapping[str, object], prefix: str = "") -> dict[str, Any]:
    """Nested settings as ``config.lr_scale.router: 1.0``; lists as JSON."""
    found: dict[str, Any] = {}
    for name, value in info.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            is_plain = value is None or isinstance(value, (str, int, float))
            found[prefix + name] = value if is_plain else json.dumps(value, default=str)
    return found


# ------------------------------------------------------------------------------------------------------------ trackers


class Tracker(Callback):
    """Any tracker of accelerate: records scalars, and tables if accelerate's class has `log_table`."""

    def __init__(self, name: str, run_dir: Path, step: int, notify: Callable[[str], None]):
        self.name, self.run_dir = name, run_dir
        self._step, self._notify = step, notify
        self._tracker: Any = None
        self._layers: dict[int, dict[str, float]] = {}

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        with self._guarded():
            self._tracker = self._start(run_name, run_info)

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._tracker is None:
            return
        loads, self._layers = by_layer(metrics)
        values = {f"train/{name}": value for name, value in metrics.items() if not name.startswith(_ROUTER)}
        values.pop("train/step", None)
        with self._guarded():
            self._log(values | over_layers(self._layers) | self._layer_panels(loads, step), step)

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        if self._tracker is None:
            return
        found = {name: value for name, value in metrics.items() if name.startswith(_VALIDATION)}
        with self._guarded():
            self._log({f"eval/{name.removeprefix(_VALIDATION)}": value for name, value in found.items()}, step)
            if self._layers:
                names = list(next(iter(self._layers.values())))
                rows = [[block, *(values.get(name) for name in names)] for block, values in self._layers.items()]
                self._log_table("router/layers", ["block", *names], rows, step)

    def on_names(self, step: int, groups: Mapping[str, Sequence[str]]) -> None:
        if self._tracker is None:
            return
        rows = [[group, name] for group, names in groups.items() for name in names]
        with self._guarded():
            self._log_table("eval/samples", ["group", "name"], rows, step)

    def on_end(self, summary: Mapping[str, object]) -> None:
        if self._tracker is None:
            return
        with self._guarded():
            self._end(summary)

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Keeps a tracker's output off stdout, which may be JSON, and its failure from ending the run."""
        try:
            with redirect_stdout(sys.stderr):
                yield
        except Exception as error:  # whatever its network or its server raises
            self._tracker = None
            problem = f"{self.name} has failed ({_one_line(error)})"
            self._notify(f"{problem}: training continues without it, {METRICS_FILE} has all metrics")

    def _start(self, run_name: str, run_info: Mapping[str, object]) -> GeneralTracker:
        kind = LOGGER_TYPE_TO_CLASS[self.name]
        arguments: dict[str, dict[str, Any]] = {
            "aim": {"logging_dir": str(self.run_dir)},
            "clearml": {"task_name": os.environ.get("CLEARML_TASK", run_name)},
            "dvclive": {"dir": str(self.run_dir / "dvclive"), "resume": self._step > 0},
            "swanlab": {"experiment_name": run_name},
            # "never" starts another run of this name, "allow" continues the newest one.
            "trackio": {"name": run_name, "resume": "allow" if self._step else "never"},
        }
        tracker = kind(run_name if self.name == "aim" else PROJECT, **arguments.get(self.name, {}))
        tracker.start()
        tracker.store_init_configuration(flat(run_info))
        self._notify(f"{self.name}: recording {run_name}")
        return tracker

    def _log(self, values: dict[str, Any], step: int) -> None:
        self._tracker.log(values, step=step)

    def _layer_panels(self, loads: Mapping[int, Sequence[float]], step: int) -> dict[str, Any]:
        """The panels of each block: scalars, without the loads of many experts."""
        return {
            f"{_ROUTER}block_{block}/{name}": value
            for block, values in self._layers.items()
            for name, value in values.items()
        }

    def _log_table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        if hasattr(self._tracker, "log_table"):
            self._tracker.log_table(name, columns=columns, data=rows, step=step)

    def _end(self, summary: Mapping[str, object]) -> None:
        self._tracker.finish()
        if self.name == "trackio":
            import trackio

            trackio.finish()  # else it does so when the interpreter exits, and prints a line on stdout


class Wandb(Tracker):
    """Weights & Biases, online with an API key and offline without one; never interactive.

    A resumed run has the id in ``wandb_id.txt``: online it continues the same run of wandb, offline it writes another
    folder, and one `wandb sync` of all appends each to the one before. A run that starts over has a new id: wandb
    ignores steps that it has.
    """

    def __init__(self, run_dir: Path, step: int, notify: Callable[[str], None], mode: str):
        super().__init__("wandb", run_dir, step, notify)
        self._mode = mode

    def _start(self, run_name: str, run_info: Mapping[str, object]) -> GeneralTracker:
        import wandb

        path = self.run_dir / "wandb_id.txt"
        if not self._step or not path.exists() or not path.stat().st_size:  # a kill may have left it empty
            path.write_text(secrets.token_hex(4) + "\n", encoding="utf-8")
        place = Path(os.environ.get("WANDB_DIR") or ".")
        place.mkdir(parents=True, exist_ok=True)  # else wandb chooses another folder
        settings: dict[str, Any] = {
            "name": run_name,
            "id": path.read_text(encoding="utf-8").strip(),
            "config": dict(run_info),
            "dir": str(place.resolve()),  # wandb has a process of its own, perhaps with another current directory
            "settings": wandb.Settings(silent=True),
        }

        def start(**more: str) -> WandBTracker:
            tracker = WandBTracker(os.environ.get("WANDB_PROJECT", PROJECT), **settings, **more)
            tracker.start()
            self._tracker = tracker
            return tracker

        try:
            # Offline there is nothing to resume.
            tracker = start(mode=self._mode, **({} if self._mode in OFFLINE else {"resume": "allow"}))
        except wandb.Error as error:
            self._notify(f"wandb cannot go online ({_one_line(error)}): recording offline")
            wandb.teardown()  # wandb's own process keeps the id of the run that it could not start
            self._mode = "offline"
            tracker = start(mode=self._mode)
        if self._mode in OFFLINE:
            self._notify(f"wandb: recording offline in {shlex.quote(_shown(self._folder()))}")
        elif self._mode != "disabled":
            self._notify(f"wandb: recording online at {tracker.tracker.url}")
        return tracker

    def _folder(self) -> Path:
        return Path(self._tracker.tracker.settings.sync_dir)

    def _layer_panels(self, loads: Mapping[int, Sequence[float]], step: int) -> dict[str, Any]:
        """Histograms with the experts as bins, which wandb draws as heat maps over the steps."""
        import wandb

        panels = {}
        for block, load_E in loads.items():
            if len(load_E) <= _MOST_BINS:
                histogram = wandb.Histogram(np_histogram=(list(load_E), list(range(len(load_E) + 1))))  # type: ignore[arg-type]
                panels[f"{_ROUTER}load_block_{block}"] = histogram
        return panels

    def _end(self, summary: Mapping[str, object]) -> None:
        self._tracker.tracker.summary.update(dict(summary))
        self._tracker.finish()
        if self._mode in OFFLINE:
            folder = self._folder()
            # A run that was resumed has a folder for each part; their names begin with the time of the start.
            parts = sorted(folder.parent.glob(f"offline-run-*-{folder.name.rpartition('-')[2]}")) or [folder]
            places = shlex.join(_shown(part) for part in parts)
            self._notify(f"wandb: to upload this run, log in once (wandb login), then: wandb sync {places}")


class TensorBoard(Tracker):
    """Event files in ``run_dir/tensorboard``, without those of a killed run after ``step``."""

    def _start(self, run_name: str, run_info: Mapping[str, object]) -> GeneralTracker:
        tracker = TensorBoardTracker("tensorboard", self.run_dir, purge_step=self._step + 1)
        tracker.start()
        # accelerate's store_init_configuration takes no nested settings, and writes a folder for each start.
        text = f"```json\n{json.dumps(run_info, indent=2, default=str)}\n```"
        tracker.log({"run": text}, step=self._step)
        return tracker

    def _layer_panels(self, loads: Mapping[int, Sequence[float]], step: int) -> dict[str, Any]:
        """Histograms with the experts as bins, which accelerate's class cannot log."""
        for block, load_E in loads.items():
            moments = [sum(load * (expert + 0.5) ** power for expert, load in enumerate(load_E)) for power in range(3)]
            self._tracker.tracker.add_histogram_raw(
                f"{_ROUTER}load_block_{block}",
                0.0,
                float(len(load_E)),
                *moments,
                bucket_limits=[float(expert + 1) for expert in range(len(load_E))],
                bucket_counts=list(load_E),
                global_step=step,
            )
        return {}

    def _log_table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        lines = [columns, ["---"] * len(columns), *rows]
        cells = [[f"{cell:.4g}" if isinstance(cell, float) else str(cell) for cell in line] for line in lines]
        self._log({name: "\n".join(f"| {' | '.join(line)} |" for line in cells)}, step)

    def _end(self, summary: Mapping[str, object]) -> None:
        self._tracker.log({"end": json.dumps(dict(summary), default=str)})
        self._tracker.finish()


class Mlflow(Tracker):
    """MLflow, in its local store or that of ``MLFLOW_TRACKING_URI``.

    A resumed run continues the run in ``mlflow_run_id.txt`` and keeps its configuration, which MLflow does not change.
    """

    def _start(self, run_name: str, run_info: Mapping[str, object]) -> GeneralTracker:
        import mlflow

        path = self.run_dir / "mlflow_run_id.txt"
        known = (path.read_text(encoding="utf-8").strip() if self._step and path.exists() else "") or None
        tracker = LOGGER_TYPE_TO_CLASS["mlflow"](PROJECT, run_name=run_name, run_id=known)
        tracker.start()
        run_id = tracker.tracker.info.run_id
        if run_id != known:
            path.write_text(run_id + "\n", encoding="utf-8")
            tracker.store_init_configuration(flat(run_info))
        self._notify(f"mlflow: recording run {run_id} in {mlflow.get_tracking_uri()}")
        return tracker


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _shown(path: Path) -> str:
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def wandb_mode(warn: Callable[[str], None]) -> str:
    """``WANDB_MODE``, or online if there is an API key; offline without one, for wandb would ask for it."""
    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    if mode not in _MODES:
        raise ValueError(f"WANDB_MODE is {mode!r}: set it to online, offline or disabled, or unset it")
    if mode in (*OFFLINE, "disabled") or _has_key():
        return mode
    warn(f"wandb has no API key for WANDB_MODE={mode}: recording offline (set WANDB_API_KEY, or run `wandb login`)")
    return "offline"


def _has_key() -> bool:
    """Whether an API key is in the environment or .netrc (`wandb login`)."""
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
