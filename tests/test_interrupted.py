"""Ctrl+C at any moment of any command: one line, status 130, nothing half-written."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from flash_experts import cli
from flash_experts.cli import CtrlC
from flash_experts.files import deferred_ctrl_c
from flash_experts.models.saving import CheckpointError, with_manifest
from flash_experts.training.run_state import StopSignals
from tests.helpers.command_line import Done, run, run_process

# Endless, of its own parser, in need of a download, over at once.
NOT_RUN = ("serve", "benchmark", "fetch-teacher", "configs", "completion")
MOMENTS = ("0.004", "0.06", "0.2")  # seconds of computing
TEMPORARY = (".tmp-", ".flash-experts-")

if not hasattr(signal, "setitimer"):
    pytest.skip("Windows has no timers of a process", allow_module_level=True)


@pytest.fixture(scope="module")
def ended(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], dict[str, Any]]:
    """Results of every command, by name and moment: see `interrupted_runs`."""
    folder = tmp_path_factory.mktemp("interrupted runs")
    command = [sys.executable, "-m", "tests.helpers.interrupted_runs", str(workplace), str(folder), *MOMENTS]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    return {(one["name"], str(one["seconds"])): one for one in found}


def is_complete(path: Path, workplace: Path) -> bool:
    """Whether a result is what an undisturbed run leaves."""
    if path.parent.name == "again" and path.suffix == ".jsonl" and path.name != "metrics.jsonl":
        return path.read_bytes() == (workplace / "data/mtg" / path.name).read_bytes()
    if path.parent.parent.name == "models":
        sizes = json.loads((path.parent / "MANIFEST.json").read_text())
        return path.name == "MANIFEST.json" or sizes[path.name]["bytes"] == path.stat().st_size
    end = path.read_bytes()[-20:].strip()
    return end.endswith({".html": b"</html>", ".json": b"}", ".png": b"IEND\xaeB`\x82"}.get(path.suffix, b""))


@pytest.mark.parametrize("seconds", MOMENTS)
@pytest.mark.parametrize("name", [name for name in cli.COMMANDS if name not in NOT_RUN])
def test_one_line_and_nothing_half_written(name: str, seconds: str, ended: dict[Any, Any], workplace: Path) -> None:
    found = ended[name, seconds]
    err, new = found["err"], [Path(path) for path in found["new"]]
    assert not [path for path in new if any(part.startswith(TEMPORARY) for part in path.parts)], new
    assert "Traceback" not in err, err
    if found["status"] == 0 or (found["status"] == -signal.SIGINT and err == ""):
        return  # it ended before the signal, or while it exited
    assert found["sent"] and found["status"] == 130, found
    assert err.splitlines()[-1] in (f"flash-experts {name}: interrupted", "flash-experts: interrupted"), err
    if name != "train":  # which saves first, and reports it
        assert len(err.splitlines()) == 1 and all(is_complete(path, workplace) for path in new), found


# ---------------------------------------------------------------------------------------- moments that matter, in turn


def press() -> None:
    signal.raise_signal(signal.SIGINT)


def test_while_the_program_is_imported() -> None:
    code = """if True:
        import signal, sys
        from flash_experts import __main__
        class Press:
            def find_spec(self, name, path=None, target=None):
                if name == "flash_experts.cli":
                    signal.raise_signal(signal.SIGINT)
        sys.meta_path.insert(0, Press())
        __main__.main()"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "flash-experts: interrupted\n")


def test_while_options_are_read_and_libraries_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cli.COMMANDS["train"], "make_parser", press)
    assert run("train", cwd=tmp_path) == Done(130, "", "flash-experts train: interrupted\n")


def tidies_up_and_fails() -> None:
    """transformers' no_init_weights, interrupted in its first lines, raises UnboundLocalError in its last ones."""
    with suppress(KeyboardInterrupt):
        press()
    raise UnboundLocalError("cannot access local variable")


def converts_the_exception() -> None:
    with suppress(KeyboardInterrupt):
        press()
    raise RuntimeError("a call from C failed")


class PressedWhenItGoes:
    def __del__(self) -> None:
        press()


def raises_in_del() -> None:
    """Python cannot raise in `__del__`: the interrupt must be raised again."""
    PressedWhenItGoes()
    gc.collect()
    time.sleep(60)


@pytest.mark.parametrize("what", [tidies_up_and_fails, converts_the_exception, raises_in_del])
def test_whatever_becomes_of_the_exception(what: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGINT), sys.unraisablehook
    monkeypatch.setattr(cli.COMMANDS["plot"], "run", lambda _: what())
    assert run("plot", "models", cwd=tmp_path) == Done(130, "", "flash-experts plot: interrupted\n")
    assert (signal.getsignal(signal.SIGINT), sys.unraisablehook) == before


def test_other_unraisable_errors_are_still_reported(capsys: pytest.CaptureFixture[str]) -> None:
    class Fails:
        def __del__(self) -> None:
            raise ValueError("of its own")

    reported: list[str] = []
    hook, sys.unraisablehook = sys.unraisablehook, lambda about: reported.append(str(about.exc_value))
    try:
        with CtrlC() as ctrl_c:
            ctrl_c.listen()
            Fails()
            gc.collect()
    finally:
        sys.unraisablehook = hook
    assert reported == ["of its own"]


def test_it_is_ignored_where_it_was() -> None:
    """As under nohup, and of a shell's background jobs."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with CtrlC() as ctrl_c, deferred_ctrl_c():
            ctrl_c.listen()
            press()
        assert not ctrl_c.pressed
    finally:
        signal.signal(signal.SIGINT, before)


def test_renames_that_belong_together_are_all_done() -> None:
    done = []
    with pytest.raises(KeyboardInterrupt), deferred_ctrl_c():
        press()
        done.append("the rest")
    assert done == ["the rest"]
    with pytest.raises(KeyboardInterrupt):
        press()


def test_the_second_one_during_training_interrupts_at_once() -> None:
    with CtrlC() as ctrl_c, StopSignals() as signals:
        ctrl_c.listen()
        press()
        assert signals.received == "SIGINT" and not ctrl_c.pressed
        with pytest.raises(KeyboardInterrupt):
            press()
        assert ctrl_c.pressed


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (Exception("No space left on device"), CheckpointError, "No space left.*Free some disk space"),
    ],
)
def test_a_model_that_is_not_written_whole_leaves_nothing(
    error: BaseException, raised: type[BaseException], said: str | None, tmp_path: Path
) -> None:
    """A plain Exception is how tokenizers reports a full disk."""

    def write(folder: Path) -> None:
        (folder / "model.safetensors").write_text("half")
        raise error

    with pytest.raises(raised, match=said):
        with_manifest(tmp_path / "new", write)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_another_language_no_home_and_a_folder_with_accents(workplace: Path, tmp_path: Path) -> None:
    """LANG=C, a home that cannot be written, and a path outside ASCII."""
    folder = tmp_path / "Werkstatt für Jötun 🐉"
    shutil.copytree(workplace / "models/base", folder / "modèle", ignore=shutil.ignore_patterns("checkpoints"))
    settings = {"LANG": "C", "LC_ALL": "C", "HOME": "/dev/null/home", "XDG_CACHE_HOME": ""}
    done = run_process("generate", "--model", "modèle", "--count", "2", "--starts-with", "Jö", cwd=folder, **settings)
    assert done.status == 0 and done.err == "", done.err
    assert [line[:2] for line in done.out.splitlines()] == ["Jö", "Jö"]
