"""The commands as a user runs them: what they write and print, and one line for every bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command_line import BASE_RUN, TINY_RUN, ok, run, run_process

from flash_experts.cli import COMMANDS


def test_help_lists_every_command(tmp_path: Path) -> None:
    done = run_process("--help", cwd=tmp_path)
    assert done.status == 0
    for command in COMMANDS:
        assert command in done.out
        assert "--config" in ok(command, "--help", cwd=tmp_path).out
    assert run(cwd=tmp_path).status == 2


def test_what_a_run_leaves(workplace: Path) -> None:
    base = workplace / "models/base"
    present = {path.name for path in base.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.jsonl", "run.json"} <= present
    assert not list(base.rglob("*.bin")) and not list(base.rglob("*.pt"))
    assert "nothing to do" in ok(*BASE_RUN, cwd=workplace).err


def test_upcycled_it_scores_as_the_dense_model(workplace: Path) -> None:
    figures = []
    for model in ("models/base", "models/moe"):
        result = json.loads(ok("evaluate", model, "--names", "names.txt", "--json", cwd=workplace).out)
        figures.append(result["bits"]["value"])
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)


def test_finetune_from_yaml_then_compare_and_generate(workplace: Path) -> None:
    (workplace / "run.yaml").write_text(
        "base: models/moe\nmodel:\n  num_experts: 4\ntraining:\n  run_name: tuned\n  max_steps: 4\n", "utf-8"
    )
    said = ok("train", "--config", "run.yaml", *TINY_RUN, "--training.max-steps", "6", cwd=workplace).err
    assert "step 6" in said
    models = ("models/base", "models/tuned", "ngram")
    said = ok("compare", *models, "--samples", "20", "--out", "r.html", cwd=workplace).out
    assert "base" in said and "tuned" in said and "ngram" in said
    assert "<html" in (workplace / "r.html").read_text("utf-8")
    assert json.loads((workplace / "r.json").read_text("utf-8"))["models"]
    options = ("generate", "--model", "models/tuned", "--count", "5", "--seed", "7", "--preset", "creative")
    names = json.loads(ok(*options, "--json", cwd=workplace).out)
    assert len(names) == 5 and {"text", "log_prob", "nearest_card", "similarity"} <= set(names[0])
    piped = run_process(*options, cwd=workplace)
    assert piped.status == 0 and piped.err == ""
    assert piped.out.splitlines() == [name["text"] for name in names], "one a line for pipes, the same in any process"


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
    assert done.status == status, done.err
    lines = done.err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0], done.err
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


def test_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    """Where the other tests call the program as a function: a few as it starts and ends on its own."""
    for arguments in (("trian",), ("generate", "--model", "nowhere")):
        done = run_process(*arguments, cwd=tmp_path)
        assert done == run(*arguments, cwd=tmp_path) and done.err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run_process("evaluate", "nowhere", "--debug", cwd=tmp_path)
    assert done.status == 1 and "Traceback" in done.err
