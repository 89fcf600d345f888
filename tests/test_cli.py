"""The commands as a user runs them: what they write and print. What they refuse is in test_bad_input."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import warnings
from argparse import SUPPRESS
from pathlib import Path

import pytest

from flash_experts.cli import COMMANDS, _explain, _show_warning, main, parse
from flash_experts.commands import benchmark
from flash_experts.commands.common import CommandParser, HelpFormatter
from flash_experts.commands.train import how_to_resume
from flash_experts.training.run_state import OutOfMemoryError
from tests.helpers.command_line import BASE_RUN, TINY_RUN, ok, run, run_process


def test_help_lists_every_command(tmp_path: Path) -> None:
    done = run_process("--help", cwd=tmp_path)
    assert done.status == 0
    for command in COMMANDS:
        assert command in done.out
    assert run(cwd=tmp_path).status == 2


def every_help() -> dict[str, CommandParser]:
    """The parser of each command, and of each topic of benchmark."""
    parsers = {name: command.make_parser() for name, command in COMMANDS.items()}
    return parsers | {f"benchmark {topic}": benchmark.topic_parser(topic) for topic in benchmark.TOPICS}


def test_help_is_in_plain_english() -> None:
    private = r"\b((un)?told|tells?|says?|said|anew|peers?|the mixture|(begin|end) symbol|figures)\b"
    internals = r" object at 0x|<function|<class|Union\[|Optional\[|Literal\[|NoneType|\(type: |``|==SUPPRESS=="
    bad = []
    for name, parser in every_help().items():
        text = " ".join(parser.format_help().split())
        bad += [(name, found[0]) for found in re.finditer(f"{private}|{internals}", text)]
        assert text.startswith(f"usage: flash-experts {name}")
        for action in parser._actions:
            if action.help == SUPPRESS:
                continue
            shown = HelpFormatter(parser.prog)._get_help_string(action)
            takes_value = action.option_strings and action.nargs != 0 and action.dest != "print_config"
            ends_well = not takes_value or re.search(r"\(default: .+\)$|\(required\)$", shown)
            if len(shown) < 8 or shown.startswith(("of ", "such as ", "for ")) or not ends_well:
                bad.append((f"{name} --{action.dest}", shown))
    assert bad == []


def test_options_are_grouped() -> None:
    text = COMMANDS["generate"].make_parser().format_help()
    titles = ("The card:", "Sampling:", "Rules for the names:", "Output:", "The model:", "Other options:")
    assert [line for line in text.splitlines() if line.endswith(":") and line[0] != " "] == list(titles)
    assert "\n  --seed N                    random seed (default: a new one each run)\n" in text


def test_help_has_its_options_in_groups() -> None:
    for name, parser in every_help().items():
        groups = re.findall(r"^(\S.*):$", parser.format_help(), flags=re.MULTILINE)
        own = {action.dest for action in parser._actions if action.option_strings}
        own -= {"help", "config", "print_config", "json", "debug"}
        if len(own) > 2:
            assert groups[-1] == "Other options" and set(groups) - {"Arguments", "Other options"}, name


def test_help_and_version_are_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["help"]) == 0 and "fetch-teacher" in capsys.readouterr().out
    assert main(["help", "generate"]) == 0 and "usage: flash-experts generate" in capsys.readouterr().out
    assert main(["help", "benchmark", "moe"]) == 0 and "usage: flash-experts benchmark moe" in capsys.readouterr().out
    assert main(["help", "genrate"]) == 2 and "did you mean 'generate'" in capsys.readouterr().err
    assert main(["--version"]) == 0 and capsys.readouterr().out.startswith("flash-experts ")


@pytest.mark.parametrize(
    "given",
    [
        ["--ban", "goblin,elf"],
        ["--ban", "goblin, elf"],
        ["--ban=goblin,elf"],
        ["--ban", "[goblin,elf]"],
        ["--ban", '["goblin", elf]'],
        ["--ban", "goblin", "--ban", "elf"],
    ],
)
def test_a_list_is_given_in_one_way_everywhere(given: list[str]) -> None:
    assert COMMANDS["generate"].make_parser().parse_args(given).ban == ["goblin", "elf"]
    place = [part.replace("--ban", "--model") for part in given]
    assert COMMANDS["serve"].make_parser().parse_args(place).model == ["goblin", "elf"]
    numbers = [part.replace("--ban", "--lengths").replace("goblin", "64").replace("elf", "128") for part in given]
    assert benchmark.topic_parser("attention").parse_args(numbers).lengths == [64, 128]


def test_lists_with_spaces_and_with_commas_in_them() -> None:
    parser = COMMANDS["serve"].make_parser()
    assert parser.parse_args(["--model", "a", "b", "--port", "1"]).model == ["a", "b"]
    assert parser.parse_args(["--model", '["a,b", c]']).model == ["a,b", "c"]
    assert COMMANDS["train"].make_parser().parse_args(["--training.betas", "0.8,0.9"]).training.betas == (0.8, 0.9)
    assert COMMANDS["generate"].make_parser().parse_args(["--ban", "on,1,null"]).ban == ["on", "1", "null"]


@pytest.mark.parametrize("text", ["Null", "~", "#1", "NULL", "2026-13-45"])
def test_a_text_stays_as_it_is_given(text: str) -> None:
    assert parse("generate", ["--starts-with", text]).starts_with == text
    assert parse("train", ["--training.run-name", text]).training.run_name == text


def test_null_is_a_text_where_no_option_is_null() -> None:
    assert parse("generate", ["--starts-with", "null"]).starts_with == "null"
    assert parse("generate", []).starts_with is None
    assert parse("train", ["--training.run-name", "null"]).training.run_name is None


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (OutOfMemoryError(12, 1), "gradient_accumulation_steps to 2"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "lower --training.tokens-per-batch"),
        (MemoryError(), "lower --training.tokens-per-batch"),
        (ValueError("there is no file out of memory.csv"), "no file out of memory.csv"),
    ],
)
def test_out_of_memory_has_the_advice_that_changes_least(error: Exception, shown: str) -> None:
    assert shown in _explain(error)


def test_warnings_of_libraries_are_hidden(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "showwarning", _show_warning)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        for module in ("torch.nn", "flash_experts.models.moe"):
            code = f"import warnings\nwarnings.warn('from {module}', stacklevel=2)"
            exec(code, {"__name__": module})
    assert capsys.readouterr().err == "flash-experts: from flash_experts.models.moe\n"


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


@pytest.mark.parametrize(
    ("words", "how"),
    [
        ("--training.run-name tiny", "run the same command again"),
        ("--config quickstart", "run the same command again"),
        ("", "run the same command again with --training.run-name 2026-12-01-train"),
        (
            "--training.run-name tiny --resume null --overwrite",
            "run the same command again with --resume auto and without --overwrite",
        ),
    ],
)
def test_how_an_interrupted_training_is_resumed(words: str, how: str) -> None:
    """The default name has the date: tomorrow the same command would start another run."""
    assert how_to_resume(parse("train", words.split()), "2026-12-01-train") == how


def test_train_reports_missing_data_before_it_loads_torch(tmp_path: Path) -> None:
    code = "import sys; from flash_experts.cli import main; main(['train']); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    problem = "no prepared names in data/mtg: run `flash-experts prepare --out data/mtg`"
    assert (done.returncode, done.stderr) == (0, f"flash-experts train: {problem}\n")


@pytest.mark.parametrize("arguments", ["help", "--version", "generate --help", "configs"])
def test_a_reader_that_closes_the_pipe_early_is_no_error(arguments: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "flash_experts", *arguments.split()]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, timeout=300)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_an_encoding_lacks_is_escaped(tmp_path: Path) -> None:
    """Windows writes cp1252 into files and pipes, which lacks the lines of tables."""
    done = run_process("generate", "--help", cwd=tmp_path, PYTHONIOENCODING="ascii")
    assert (done.status, done.err) == (0, "") and r"Creature \u2014 Goblin" in done.out


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    done = run_process("evaluate", "nowhere", "--debug", cwd=tmp_path)
    assert done.status == 1 and "Traceback" in done.err
