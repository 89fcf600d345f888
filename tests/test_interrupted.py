"""Ctrl+C at any moment of any command: one line, status 130, nothing half-written."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import Done, run, run_process

from flash_experts import cli

COMMANDS = {
    "prepare": "prepare --source names.txt --out data/again",
    "upcycle": "upcycle models/base --out models/up",
    "downcycle": "downcycle models/moe --out models/down",
    "evaluate": "evaluate models/base --samples 200",
    "compare": "compare models/base --samples 200 --out pages/report.html",
    "inspect": "inspect models/moe --out pages/inspect.html",
    "generate": "generate --model models/base --count 500 --out names/new.csv",
    "plot": "plot models/base --out curves.json",
    "train": "train --base models/base --model.num-experts 0 --training.run-name again --training.max-steps 40 "
    "--training.max-epochs null --training.tokens-per-batch 512 --training.checkpoint-every 2",
}
OWN_FILES = (".tmp-", ".prepare-", ".export", ".new.csv", ".report.html", ".inspect.html", ".curves.json")

if not hasattr(signal, "setitimer"):
    pytest.skip("Windows has no timers of a process", allow_module_level=True)


@contextmanager
def ctrl_c_after(seconds: float) -> Iterator[list[bool]]:
    """Sends SIGINT to this process once it has computed for so long; the list says whether it came."""
    sent: list[bool] = []

    def send(*_: object) -> None:
        sent.append(True)
        signal.raise_signal(signal.SIGINT)

    before = signal.signal(signal.SIGVTALRM, send)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield sent
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def interrupted(words: str, seconds: float, folder: Path) -> tuple[Done | None, bool]:
    try:
        with ctrl_c_after(seconds) as sent:
            done = run(*words.split(), cwd=folder)
    except KeyboardInterrupt:  # between the program's end and the timer's
        return None, True
    return done, bool(sent)


@pytest.mark.parametrize("seconds", [0.004, 0.06, 0.2])
@pytest.mark.parametrize("name", COMMANDS)
def test_one_line_and_nothing_half_written(name: str, seconds: float, workplace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "work place"
    shutil.copytree(workplace, folder, ignore=shutil.ignore_patterns("tuned", "*.html"))
    before = {path for path in folder.rglob("*") if path.is_file()}
    done, sent = interrupted(COMMANDS[name], seconds, folder)
    new = {path for path in folder.rglob("*") if path.is_file()} - before
    assert not [path for path in new for part in path.relative_to(folder).parts if part.startswith(OWN_FILES)], new
    if done is None or not sent:
        return  # it was over before
    assert "Traceback" not in done.err, done.err
    if done.status == 0:  # it came with the last words
        return
    assert done.status == 130 and done.err.splitlines()[-1] == f"flash-experts {name}: interrupted", done.err
    if name != "train":  # which saves first, and says so
        assert len(done.err.splitlines()) == 1 and not new, done.err


def test_while_options_are_read_and_libraries_imported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def parser() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.COMMANDS["train"], "make_parser", parser)
    done = run("train", cwd=tmp_path)
    assert done == Done(130, "", "flash-experts train: interrupted\n")


def test_while_a_library_tidies_up_and_fails_at_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """transformers' no_init_weights, interrupted in its first lines, raises UnboundLocalError in its last ones."""

    def read(_: object) -> None:
        try:
            try:
                raise KeyboardInterrupt
            finally:
                raise UnboundLocalError("cannot access local variable")
        except UnboundLocalError as error:
            raise ValueError("the model cannot be read") from error

    monkeypatch.setattr(cli.COMMANDS["plot"], "run", read)
    assert run("plot", "models", cwd=tmp_path) == Done(130, "", "flash-experts plot: interrupted\n")


@pytest.mark.slow
def test_another_language_no_home_and_a_folder_with_accents(workplace: Path, tmp_path: Path) -> None:
    """LANG=C, a home that cannot be written, and a path that ASCII has not."""
    folder = tmp_path / "Werkstatt für Jötun 🐉"
    shutil.copytree(workplace / "models/base", folder / "modèle", ignore=shutil.ignore_patterns("checkpoints"))
    settings = {"LANG": "C", "LC_ALL": "C", "HOME": "/dev/null/home", "XDG_CACHE_HOME": ""}
    done = run_process("generate", "--model", "modèle", "--count", "2", "--starts-with", "Jö", cwd=folder, **settings)
    assert done.status == 0 and done.err == "", done.err
    assert [line[:2] for line in done.out.splitlines()] == ["Jö", "Jö"]
