"""What comes with a release is found by name: configurations and models."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest

from flash_experts import NameGenerator, released
from flash_experts.cli import parse
from tests.helpers.command_line import ok, run

ROOT = Path(__file__).parent.parent
CONFIGS = {path.stem: path for path in (ROOT / "configs").glob("*.yaml")}


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and a package that is not in a checkout."""
    monkeypatch.setattr(released, "_CHECKOUT", tmp_path / "site-packages")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_configuration_is_found_by_name_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse("train", ["--config", "quickstart"]).training.run_name == "quickstart"
    by_path = parse("train", ["--config", str(CONFIGS["quickstart"])])
    assert by_path.training == parse("train", ["--config", "quickstart"]).training
    (tmp_path / "student").mkdir()
    assert parse("train", ["--config", "student"]).model.tokenizer == "models/teacher", (
        "a folder is not a configuration"
    )
    (tmp_path / "quickstart").write_text("training:\n  run_name: mine\n", "utf-8")
    assert parse("train", ["--config", "quickstart"]).training.run_name == "mine", "a file of that name comes first"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("quikstart", "did you mean 'quickstart'?"),
        ("zzz", "(gpt2-8x-multi, gpt2-8x, names, quickstart, student, teacher)"),
        (
            "configs/quickstart.yaml",
            "there is no file configs/quickstart.yaml: the one that comes with flash-experts is",
        ),
        ("nowhere.yaml", "there is no file nowhere.yaml (see --help)"),
    ],
)
def test_an_unknown_configuration_is_one_line(given: str, message: str, tmp_path: Path) -> None:
    done = run("train", "--config", given, cwd=tmp_path)
    assert done.status == 2 and message in done.err and done.err.count("\n") == 1


def test_configs_lists_each_with_a_line(tmp_path: Path) -> None:
    lines = ok("configs", cwd=tmp_path).out.splitlines()
    assert [line.split()[0] for line in lines] == sorted(CONFIGS, key=lambda name: f"{name}.yaml")
    assert all(40 < len(line) < 120 for line in lines)
    assert json.loads(ok("configs", "--json", cwd=tmp_path).out).keys() == CONFIGS.keys()


def test_configs_prints_and_copies_one_and_replaces_nothing(tmp_path: Path) -> None:
    content = CONFIGS["quickstart"].read_text("utf-8")
    assert ok("configs", "quickstart", cwd=tmp_path).out == content
    ok("configs", "quickstart", "--out", "mine.yaml", cwd=tmp_path)
    assert (tmp_path / "mine.yaml").read_text("utf-8") == content
    (tmp_path / "mine.yaml").write_text("changed", "utf-8")
    done = run("configs", "quickstart", "--out", "mine.yaml", cwd=tmp_path)
    assert done.status == 1 and "--overwrite" in done.err and (tmp_path / "mine.yaml").read_text("utf-8") == "changed"
    ok("configs", "quickstart", "--out", "mine.yaml", "--overwrite", cwd=tmp_path)
    assert (tmp_path / "mine.yaml").read_text("utf-8") == content
    assert run("configs", "--out", "mine.yaml", cwd=tmp_path).err.count("\n") == 1


def test_models_come_from_the_folder_the_checkout_or_the_package_in_this_order(
    alone: Path, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert released.model_folder("models/mtg-names") is None and released.model_folder("models/other") is None
    package = alone / "lib/flash_experts_models"
    shutil.copytree(workplace / "models/moe", package / "mtg-names")
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(package.parent)
    try:
        assert released.model_folder("models/mtg-names") == package / "mtg-names"
        assert released.default_model() == "models/mtg-names"
        assert len(NameGenerator.from_pretrained().generate(2, seed=0, max_length=8)) == 2
        checkout = alone / "site-packages/models/mtg-names"
        shutil.copytree(workplace / "models/moe", checkout)
        assert released.model_folder("models/mtg-names") == checkout
        shutil.copytree(workplace / "models/moe", alone / "models/mtg-names")
        assert released.model_folder("models/mtg-names") == Path("models/mtg-names")
    finally:
        sys.modules.pop("flash_experts_models", None)


def test_without_them_one_line_has_the_command_and_no_hub_is_asked(
    alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flash_experts.model_files.snapshot_download", None)
    for command in ("generate", "generate --model models/mtg-base", "upcycle models/mtg-base --out new"):
        done = run(*command.split(), cwd=alone)
        assert done.status == 1 and done.err.count("\n") == 1
        assert 'pip install "flash-experts[models]"' in done.err
    with pytest.raises(ValueError, match=r'pip install "flash-experts\[models\]"'):
        NameGenerator.from_pretrained()
    assert not list(alone.iterdir())
