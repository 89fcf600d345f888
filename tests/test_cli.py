"""The commands as a user runs them: what they write and print. What they refuse is in test_bad_input."""

from __future__ import annotations

import json
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


def test_the_ngram_that_measures_a_list_learns_from_the_data_asked_for(workplace: Path) -> None:
    done = run("evaluate", "ngram", "--names", "names.txt", "--data", "nowhere", cwd=workplace)
    assert done.status == 1 and "no prepared data in nowhere" in done.err


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


def test_a_process_of_its_own_says_the_same(tmp_path: Path) -> None:
    """Where the other tests call the program as a function: a few as it starts and ends on its own."""
    for arguments in (("trian",), ("generate", "--model", "nowhere")):
        done = run_process(*arguments, cwd=tmp_path)
        assert done == run(*arguments, cwd=tmp_path) and done.err.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run_process("evaluate", "nowhere", "--debug", cwd=tmp_path)
    assert done.status == 1 and "Traceback" in done.err
