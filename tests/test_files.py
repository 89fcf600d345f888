"""No file of others is replaced or removed; what is written is whole, and has the place and mode that `open` gives."""

from __future__ import annotations

import json
import os
import shutil
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data import prepare as preparing
from flash_experts.data.prepare import META, load_meta, load_split, prepare
from flash_experts.files import free_name, whole_file, whole_files
from flash_experts.models.loading import load_model
from flash_experts.models.saving import write_model
from flash_experts.training import CheckpointError, TrainingConfig
from flash_experts.training.checkpoint import remove_leftovers
from tests.helpers.command_line import FIRST, SECOND, TINY_RUN, ok, run

posix = pytest.mark.skipif(os.name != "posix", reason="modes and links as POSIX has them")
NAMES = [f"{first} {second}" for first in FIRST for second in SECOND]


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------------------------ single files


@posix
@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_modes_are_those_of_open(tmp_path: Path, umask: int) -> None:
    private = tmp_path / "private.csv"
    private.write_text("former")
    private.chmod(0o640)
    before = os.umask(umask)
    try:
        with whole_files([private, tmp_path / "new.csv"]) as temporaries:
            for temporary in temporaries:
                temporary.write_text("latter")
    finally:
        os.umask(before)
    assert private.stat().st_mode & 0o777 == 0o640 and private.read_text() == "latter"
    assert (tmp_path / "new.csv").stat().st_mode & 0o777 == 0o666 & ~umask


@posix
@pytest.mark.parametrize("exists", [True, False])
def test_links_are_followed(tmp_path: Path, exists: bool) -> None:
    target, link = tmp_path / "elsewhere" / "report.html", tmp_path / "report.html"
    target.parent.mkdir()
    if exists:
        target.write_text("former")
    link.symlink_to(target)
    with whole_file(link) as temporary:
        temporary.write_text("latter")
    assert link.is_symlink() and target.read_text() == "latter" and len(list(tmp_path.rglob("*"))) == 3


def test_a_failure_leaves_what_was_there_and_touches_no_temporary_of_others(tmp_path: Path) -> None:
    """Such names as an earlier version gave its temporaries, of a process that does not run here."""
    for name in (".names.csv-999999999.csv", ".tmp-names.csv", "names.csv"):
        (tmp_path / name).write_text("not ours")
    before = contents(tmp_path)
    with pytest.raises(RuntimeError), whole_files([tmp_path / "names.csv", tmp_path / "new.csv"]) as temporaries:
        temporaries[0].write_text("half")
        raise RuntimeError
    assert contents(tmp_path) == before


def test_the_first_free_name_leaves_the_files_next_to_it(tmp_path: Path) -> None:
    report = str(tmp_path / "report.html")
    assert free_name(report, [".json"]) == report
    (tmp_path / "report.json").write_text("{}")
    (tmp_path / "report-2.html").write_text("")
    assert free_name(report, [".json"]) == str(tmp_path / "report-3.html") and free_name(report) == report


# ----------------------------------------------------------------------------------------------------- every command


@pytest.fixture(scope="module")
def place(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the workplace with files of a user: no command may change them."""
    folder = tmp_path_factory.mktemp("place") / "work place"
    shutil.copytree(workplace, folder, ignore=shutil.ignore_patterns("tuned", "*.html"))
    (folder / "mine").mkdir()
    for name in ("mine/notes.txt", "mine/train.jsonl", *(f"a.{kind}" for kind in "html json csv png svg".split())):
        (folder / name).write_text("of the user")
    shutil.copytree(folder / "models/base", folder / "models/released", ignore=shutil.ignore_patterns("checkpoints"))
    return folder


TRAIN = "train --base models/base --model.num-experts 0 --training.max-steps 2"


@pytest.mark.parametrize(
    "words",
    [
        "prepare --source names.txt --out mine",
        "prepare --source data/mtg/train.jsonl --out data/mtg",
        "prepare --source mine/train.jsonl --out mine --overwrite",
        "upcycle models/base --out models/moe",
        "upcycle models/base --out mine",
        "upcycle models/base --out models/base --overwrite",
        "export dense models/moe --out models/released",
        f"{TRAIN} --training.run-name released",
        f"{TRAIN} --training.run-name moe",
        f"{TRAIN} --training.output-dir . --training.run-name mine",
        f"{TRAIN} --training.run-name base --resume null",
        "compare models/base --out a.html",
        "compare models/base --out models/released/config.html",
        "compare models/base --out new.html --png mine",
        "inspect models/moe --out a.html",
        "inspect models/moe --out models/moe/config.html",
        "generate --model models/base --count 2 --out a.csv",
        "generate --model models/base --count 2 --out mine/notes.txt",
        "plot models/base --out a.svg",
        "plot models/base --out models/base/config.json",
        "benchmark moe --out a.json",
        "benchmark moe --plot a.png",
        "benchmark moe --out new.png --plot new.png",
    ],
)
def test_what_is_there_is_not_replaced(words: str, place: Path) -> None:
    before = contents(place)
    done = run(*words.split(), cwd=place)
    assert done.status == 1 and len(done.err.splitlines()) == 1, done.err
    advice = ("--overwrite", "overwrite: true", "give another --out", "give a", "of its own")
    assert any(text in done.err for text in advice), done.err
    assert contents(place) == before


def test_overwrite_replaces_and_other_files_stay(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "place"
    shutil.copytree(place, folder)
    (folder / "models/moe/notes.txt").write_text("of the user")
    for words in ("plot models/base --out a.svg", "upcycle models/base --num-experts 2 --out models/moe"):
        assert run(*words.split(), cwd=folder).status == 1
        ok(*words.split(), "--overwrite", cwd=folder)
    assert "<svg" in (folder / "a.svg").read_text("utf-8")
    assert json.loads((folder / "models/moe/config.json").read_text())["num_experts"] == 2
    assert (folder / "models/moe/notes.txt").read_text() == "of the user"


def test_runs_without_a_name_are_named_by_date_and_settings(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "place"
    shutil.copytree(place, folder)
    (folder / "tiny.yaml").write_text("base: models/base\nmodel: {num_experts: 0}\ntraining: {max_steps: 1}\n")
    before = set((folder / "models").iterdir())
    config = ["train", "--config", "tiny.yaml"]
    for words in (config, config, [*TRAIN.split(), "--training.max-steps", "1"]):  # the second finds the first finished
        err = ok(*words, *TINY_RUN, cwd=folder).err
    new = sorted(path.name for path in set((folder / "models").iterdir()) - before)
    assert [name[10:] for name in new] == ["-tiny", "-train"] and all(name[:2] == "20" for name in new)
    assert f"models/{new[1]}" in err
    for released in ("mtg-names", "mtg-base"):
        assert TrainingConfig().run_dir.name != released


# ----------------------------------------------------------------------------------------------------- prepared data


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "names.txt").write_text("\n".join(NAMES), "utf-8")
    prepare(tmp_path / "names.txt", tmp_path / "data")
    return tmp_path / "data"


def test_prepare_renews_its_own_files_only(prepared: Path) -> None:
    (prepared / ".prepare-2023").mkdir()
    (prepared / ".prepare-2023" / "notes").write_text("of the user")
    names = prepared.parent / "more.txt"
    names.write_text("\n".join([*NAMES, "Willow Bard", "Onyx Wurm"]), "utf-8")
    assert prepare(names, prepared)["changes"]["added"] == 2
    with (prepared / "train.jsonl").open("a", encoding="utf-8") as file:
        file.write((prepared / "train.jsonl").read_text("utf-8").splitlines()[0] + "\n")
    before = contents(prepared)
    with pytest.raises(ValueError, match=r"train\.jsonl was not written by prepare, or has changed since"):
        prepare(prepared.parent / "names.txt", prepared)
    assert contents(prepared) == before
    prepare(prepared.parent / "names.txt", prepared, overwrite=True)
    assert (prepared / ".prepare-2023" / "notes").exists() and not (prepared / preparing._REPLACING).exists()


def test_prepare_killed_between_two_renames_is_repeated(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the kill one file is new, the others are old, and meta.json is gone."""
    names = prepared.parent / "more.txt"
    names.write_text("\n".join([*NAMES, "Willow Bard", "Onyx Wurm"]), "utf-8")
    replace = os.replace

    def killed(source: Path, target: Path) -> None:
        if Path(target).name == "validation.jsonl":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            prepare(names, prepared)
    assert not (prepared / META).exists()
    assert prepare(names, prepared)["up_to_date"] is False
    assert load_meta(prepared)["names"] == len(NAMES) + 2 and load_split(prepared, "validation")
    assert not list(prepared.glob(".*"))


@posix
def test_prepare_keeps_modes_and_links(prepared: Path) -> None:
    elsewhere = prepared.parent / "disk"
    elsewhere.mkdir()
    for name in (META, "train.jsonl"):
        shutil.move(prepared / name, elsewhere / name)
        (prepared / name).symlink_to(elsewhere / name)
    (elsewhere / "train.jsonl").chmod(0o640)
    names = prepared.parent / "more.txt"
    names.write_text("\n".join([*NAMES, "Willow Bard"]), "utf-8")
    prepare(names, prepared)
    assert all((prepared / name).is_symlink() for name in (META, "train.jsonl"))
    assert load_meta(elsewhere)["names"] == len(NAMES) + 1
    assert (elsewhere / "train.jsonl").stat().st_mode & 0o777 == 0o640


# ------------------------------------------------------------------------------------------------------------ models


@posix
def test_weights_have_the_mode_of_their_neighbors(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    write_model(tmp_path / "new", dense, tokenizer)
    (tmp_path / "there").mkdir()
    write_model(tmp_path / "there", dense, tokenizer)
    (tmp_path / "plain").write_text("")
    modes = {path.stat().st_mode for name in ("new", "there") for path in (tmp_path / name).iterdir()}
    assert modes == {(tmp_path / "plain").stat().st_mode}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "plain", "there"]
    assert not list((tmp_path / "there").glob(".*"))


def test_weights_that_are_replaced_by_shards_are_gone(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """A single file goes before shards: the old weights would be loaded. Other files stay."""
    write_model(tmp_path / "model", dense, tokenizer)
    (tmp_path / "model/mine.safetensors").write_text("mine", "utf-8")
    with torch.no_grad():
        dense.transformer.wpe.weight.add_(1)
    save = dense.save_pretrained
    dense.save_pretrained = partial(save, max_shard_size="20KB")  # type: ignore[method-assign]
    write_model(tmp_path / "model", dense, tokenizer, overwrite=True)
    assert not (tmp_path / "model/model.safetensors").exists() and (tmp_path / "model/mine.safetensors").exists()
    assert torch.equal(load_model(tmp_path / "model").transformer.wpe.weight, dense.transformer.wpe.weight)
    dense.save_pretrained = save  # type: ignore[method-assign]
    write_model(tmp_path / "model", dense, tokenizer, overwrite=True)
    assert [path.name for path in (tmp_path / "model").glob("model*")] == ["model.safetensors"]


@pytest.mark.parametrize("exists", [False, True])
def test_of_two_models_for_one_folder_the_second_is_refused(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, exists: bool
) -> None:
    """Both found the folder free; they meet when both are about to give their files their place."""
    out, meeting = tmp_path / "new", threading.Barrier(2, timeout=60)
    if exists:
        out.mkdir()
    ended: list[BaseException | None] = []
    save, first = dense.save_pretrained, threading.local()

    def save_and_meet(*args: Any, **options: Any) -> None:
        save(*args, **options)
        if not exists and not hasattr(first, "met"):
            first.met = True
            meeting.wait()

    dense.save_pretrained = save_and_meet  # type: ignore[method-assign]

    def write() -> None:
        try:
            write_model(out, dense, tokenizer)
            ended.append(None)
        except ValueError as error:
            ended.append(error)

    threads = [threading.Thread(target=write) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(error is None for error in ended) == [False, True]
    error = next(error for error in ended if error is not None)
    words = "is not empty" if exists else "another process has written"
    assert words in str(error) and "give a new folder" in str(error) and "\n" not in str(error)
    assert isinstance(error, CheckpointError) or exists
    assert [path.name for path in tmp_path.iterdir()] == ["new"] and not list(out.glob(".*"))
    GPT2LMHeadModel.from_pretrained(out)


def test_a_runs_leftovers_are_its_own_alone(tmp_path: Path) -> None:
    kept = ("run/.tmp-mine", "run/.export", "run/checkpoints/.tmp-mine", "run/checkpoints/.tmp-step-notes")
    for name in (*kept, "run/checkpoints/.tmp-step-000012", "run/checkpoints/.tmp-export"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("")
    remove_leftovers(tmp_path / "run")
    assert sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("file")) == sorted(kept)
