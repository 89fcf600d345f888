"""One trainer for one run folder, and no other folder."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType

from accelerate import Accelerator
from filelock import FileLock, Timeout

from flash_experts.files import check_replaced
from flash_experts.training.checkpoint import checkpoint_steps
from flash_experts.training.processes import most_of_all

LOCK_FILE = Path("checkpoints", ".lock")


def check_run_folder(run_dir: Path, overwrite: bool) -> None:
    """A run is written into a new folder, an empty one, or that of a run, which has a lock file or checkpoints.

    Raises:
        ValueError: it holds something else, such as a model, and ``overwrite`` is not given.
    """
    if not (run_dir / LOCK_FILE).is_file() and not checkpoint_steps(run_dir):
        check_replaced(run_dir, overwrite, "the run's folder")


class RunLock:
    """Held while a run folder is trained into; a second trainer is refused.

    The operating system holds the lock (``flock``) for as long as the process lives, so a crash or a kill cannot
    leave it behind. The empty file that stays is no lock.

    Args:
        run_dir: the run's folder; it is made.
        accelerator: its main process holds the lock, and tells the others.

    Raises:
        ValueError: on entering: another process trains into the folder.
    """

    def __init__(self, run_dir: Path, accelerator: Accelerator):
        self._run_dir, self._accelerator = run_dir, accelerator
        self._lock = FileLock(run_dir / LOCK_FILE, blocking=False)

    def __enter__(self) -> RunLock:
        refused = False
        if self._accelerator.is_main_process:
            (self._run_dir / "checkpoints").mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout:
                refused = True
        if self._accelerator.num_processes > 1:
            refused = most_of_all(self._accelerator, [float(refused)]) == [1.0]
        if refused:
            raise ValueError(
                f"another process is training into {self._run_dir}: wait for its end, stop it, or choose another "
                "run_name"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self._lock.is_locked:
            self._remove_if_nothing_was_written()
        self._lock.release()

    def _remove_if_nothing_was_written(self) -> None:
        """A run that failed before its first file leaves no folder."""
        checkpoints = self._run_dir / "checkpoints"
        if [*self._run_dir.iterdir()] == [checkpoints] and [*checkpoints.iterdir()] == [self._run_dir / LOCK_FILE]:
            (self._run_dir / LOCK_FILE).unlink()
            checkpoints.rmdir()
            self._run_dir.rmdir()
