"""The commands as a user runs them: what they write and print, and one line for every bad input."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TINY = (
    "--model.n-layer=2 --model.n-embd=32 --model.n-head=2 --model.vocab-size=400 --training.tokens-per-batch=1024 "
    "--training.max-epochs=null --training.eval-every=4 --training.validation-names=40 --training.log-every=2"
).split()


def run(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """`flash-experts ...` in a folder, as a process of its own, without a network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "flash_experts.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def ok(*arguments: str | Path, cwd: Path) -> str:
    """What a command that must succeed prints as its result."""
    done = run(*arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train(*arguments: str, cwd: Path) -> str:
    """What a training run says of its progress."""
    done = run("train", *arguments, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where everything was run once: prepared real cards, a tiny dense model, its experts fine-tuned."""
    folder = tmp_path_factory.mktemp("work place")
    names = [f"{first} {second}" for first in _FIRST for second in _SECOND]
    (folder / "names.txt").write_text("\n".join(names), "utf-8")
    ok("prepare", "--source", "names.txt", cwd=folder)
    train("--model.num-experts=0", *TINY, "--training.run-name=base", "--training.max-steps=6", cwd=folder)
    ok("upcycle", "models/base", "--num-experts", "4", "--out", "models/moe", cwd=folder)
    return folder


_FIRST = "Ember Storm Grave Mire Thorn Frost Dawn Iron Hollow Silver Ash Raven Crystal Gale Dusk River Stone".split()
_SECOND = "Seer Warden Colossus Adept Stalker Shaman Herald Sphinx Reaver Golem Druid Knight Serpent Titan".split()


def test_help_lists_every_command(tmp_path: Path) -> None:
    text = ok("--help", cwd=tmp_path)
    for command in ("prepare", "upcycle", "train", "evaluate", "compare", "generate"):
        assert command in text
        assert "--config" in ok(command, "--help", cwd=tmp_path)
    assert run(cwd=tmp_path).returncode == 2


def test_what_a_run_leaves(workplace: Path) -> None:
    base = workplace / "models/base"
    present = {path.name for path in base.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "run.json"} <= present
    assert not list(base.rglob("*.bin")) and not list(base.rglob("*.pt"))
    same = ("--model.num-experts=0", *TINY, "--training.run-name=base", "--training.max-steps=6")
    assert "nothing to do" in train(*same, cwd=workplace)


def test_upcycled_it_scores_as_the_dense_model(workplace: Path) -> None:
    figures = []
    for model in ("models/base", "models/moe"):
        result = json.loads(ok("evaluate", model, "--names", "names.txt", "--json", cwd=workplace))
        figures.append(result["bits"]["value"])
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)


def test_finetune_from_yaml_then_compare_and_generate(workplace: Path) -> None:
    (workplace / "run.yaml").write_text(
        "base: models/moe\nmodel:\n  num_experts: 4\ntraining:\n  run_name: tuned\n  max_steps: 4\n", "utf-8"
    )
    said = train("--config", "run.yaml", *TINY[4:], "--training.max-steps", "6", cwd=workplace)
    assert "step 6" in said
    said = ok("compare", "models/base", "models/tuned", "ngram", "--samples", "20", "--out", "r.html", cwd=workplace)
    assert "base" in said and "tuned" in said and "ngram" in said
    assert "<html" in (workplace / "r.html").read_text("utf-8")
    assert json.loads((workplace / "r.json").read_text("utf-8"))["models"]
    options = ("generate", "--model", "models/tuned", "--count", "5", "--seed", "7", "--preset", "creative")
    names = json.loads(ok(*options, "--json", cwd=workplace))
    assert len(names) == 5 and {"text", "log_prob", "nearest_card", "similarity"} <= set(names[0])
    assert ok(*options, cwd=workplace).splitlines() == [name["text"] for name in names], "one a line for pipes"


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        ("trian", 2, "did you mean 'train'"),
        ("train --training.learning-rat 1", 2, "did you mean 'training.learning_rate'"),
        ("train --training.learning-rate fast", 2, "training.learning_rate"),
        ("train --config nowhere.yaml", 2, "nowhere.yaml"),
        ("train --config bad.yaml", 2, "did you mean 'model.num_experts'"),
        ("train --data nowhere", 1, "flash-experts prepare"),
        ("train --base models/base --model.num-experts 2 --model.num-experts-per-tok 3", 1, "num_experts_per_tok"),
        ("train --base models/base --training.learning-rate -1", 1, "learning_rate"),
        ("train --base nowhere", 1, "no model at nowhere"),
        ("train --training.device cuda:0 --base models/base", 1, "CUDA"),
        ("train --model.num-experts 0 --model.n-embd 30 --model.n-head 4", 1, "multiple of n_head"),
        ("prepare --source embeded", 1, "embedded"),
        ("prepare --source empty.txt", 1, "empty.txt"),
        ("prepare --source bad.jsonl", 1, "bad.jsonl:2"),
        ("upcycle nowhere --out x", 1, "nowhere"),
        ("upcycle models/moe --out x", 1, "experts already"),
        ("upcycle models/base --num-experts 0 --out x", 1, "--num-experts"),
        ("upcycle models/base", 2, "out"),
        ("evaluate nowhere", 1, "nowhere"),
        ("evaluate pickled", 1, "pickle"),
        ("evaluate truncated", 1, "damaged"),
        ("evaluate models/base --names empty.txt", 1, "no name"),
        ("compare", 2, "models"),
        ("generate --model nowhere", 1, "nowhere"),
        ("generate --model models/base --preset bold", 1, "preset"),
        ("generate --model models/base --colors purple", 1, "purple"),
        ("generate --model models/base --type Goblinn", 1, "did you mean 'Goblin'"),
        ("generate --model models/base --count -1", 1, "count"),
        ("generate --model models/base --temperature -1", 1, "temperature"),
        ("generate --model models/base --device cuda", 1, "CUDA"),
        ("generate --model models/base --top-q 3", 2, "did you mean"),
    ],
)
def test_bad_input_is_one_line(workplace: Path, arguments: str, status: int, message: str) -> None:
    _spoiled_files(workplace)
    before = sorted(str(path) for path in workplace.rglob("*"))
    done = run(*arguments.split(), cwd=workplace)
    assert done.returncode == status, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.stderr
    assert sorted(str(path) for path in workplace.rglob("*")) == before, "nothing half-written"


def _spoiled_files(folder: Path) -> None:
    (folder / "bad.yaml").write_text("model:\n  num_expert: 4\n", "utf-8")
    (folder / "empty.txt").write_text("", "utf-8")
    (folder / "bad.jsonl").write_text('{"name": "Mire Seer"}\n{"name": \n', "utf-8")
    for name in ("pickled", "truncated"):
        if not (folder / name).exists():
            shutil.copytree(folder / "models/base", folder / name, ignore=shutil.ignore_patterns("checkpoints"))
    weights = folder / "pickled/model.safetensors"
    if weights.exists():
        weights.rename(folder / "pickled/pytorch_model.bin")
    short = folder / "truncated/model.safetensors"
    short.write_bytes((folder / "models/base/model.safetensors").read_bytes()[:2000])


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run("evaluate", "nowhere", "--debug", cwd=tmp_path)
    assert done.returncode == 1 and "Traceback" in done.stderr
