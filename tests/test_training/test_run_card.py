"""The model card of a run, as a hub reads it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from flash_experts.training.run_folder import MARK, write_run_card
from flash_experts.training.run_state import TrainingResult
from flash_experts.training.tracking import read_metrics
from tests.helpers.command_line import ok

RUN = "--training.run-name run --training.output-dir . --training.tokens-per-batch 512 --training.validation-names 20"
MOE = "--model.num-experts 4 --model.n-layer 2 --model.n-embd 32 --model.n-head 2 --model.vocab-size 400"


@pytest.fixture(scope="module")
def run_dir(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the whole command, on a user's own names."""
    place = tmp_path_factory.mktemp("run")
    settings = f"{RUN} {MOE} --training.max-steps 2 --training.max-epochs null"
    ok("train", *settings.split(), "--data", workplace / "data/mtg", cwd=place)
    return place / "run"


def test_a_hub_reads_the_card_of_every_run(run_dir: Path) -> None:
    card = ModelCard.load(run_dir / "README.md")
    assert card.data.library_name == "flash-experts" and card.data.language == "en"
    assert card.data.license == "unknown" and card.data.base_model is None, "a new model"
    assert card.data.pipeline_tag == "text-generation" and "mixture-of-experts" in card.data.tags
    best = min(
        read_metrics(run_dir / "metrics.jsonl", "validation"), key=lambda line: line["validation/bits_per_char_mean"]
    )
    found = {result.metric_name: (result.dataset_split, result.metric_value) for result in card.data.eval_results}
    assert found == {
        "bits per character, unconditional": ("validation", round(best["validation/bits_per_char"], 4)),
        "bits per character, given type, colors, mana value": (
            "validation",
            round(best["validation/bits_per_char_given_attributes"], 4),
        ),
    }
    info = json.loads((run_dir / "run.json").read_text("utf-8"))
    for said in (info["data"]["train_sha256"], 'NameGenerator.from_pretrained("run")', "export hub"):
        assert said in card.text


def test_the_snippet_of_the_card_runs(run_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = (run_dir / "README.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(run_dir.parent)
    exec(code.replace("generate(5", "generate(1, max_length=6, min_distance=0"), {})


def finished(folder: Path, step: int) -> TrainingResult:
    return TrainingResult("steps", step, None, step, folder, 1.0)


def test_a_card_follows_its_base_and_the_users_own_stays(run_dir: Path, workplace: Path, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run_dir, folder, ignore=shutil.ignore_patterns("checkpoints"))
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: mit\nbase_model: [someone/model]\n---\n# Base\n", "utf-8")
    info = json.loads((folder / "run.json").read_text("utf-8"))
    info["origin"]["base"] = str(base)
    info["data"]["meta"] = {"source": "embedded", "version": "1"}
    write_run_card(folder, info, finished(folder, 2))
    card = ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.license, card.data.datasets) == ("someone/model", "mit", ["mtgjson"])
    assert str(tmp_path) not in card.content, "no path of this machine"
    own = card.content.replace(MARK, "") + "My notes."
    (folder / "README.md").write_text(own, "utf-8")
    write_run_card(folder, info, finished(folder, 2))
    assert (folder / "README.md").read_text("utf-8") == own
    write_run_card(folder, info, finished(folder, 2), overwrite=True)
    assert MARK in (folder / "README.md").read_text("utf-8")


def test_damaged_metadata_of_a_base_is_left_out(run_dir: Path, tmp_path: Path) -> None:
    info = json.loads((run_dir / "run.json").read_text("utf-8"))
    for text in ("---\n- a\n---\n", "---\n: [\n---\n", "---\nlicense: [1, {}]\nbase_model: {a: 1}\n---\n", "\xff"):
        (tmp_path / "README.md").write_text(text, "latin-1")
        info["origin"]["base"] = str(tmp_path)
        write_run_card(run_dir, info, finished(run_dir, 2))
        assert ModelCard.load(run_dir / "README.md").data.base_model is None
