"""The examples, run as they stand from another directory with nothing but PYTHONPATH, and the configurations."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path
from unittest import mock

import pytest

from tests.helpers.command_line import ok, quiet_libraries

ROOT = Path(__file__).parent.parent
EXAMPLES = ("prepare_mtg_data.py", "finetune_mtg_names.py", "generate_mtg_names.py", "generate_names.py")
FINETUNE = (
    *("finetune_mtg_names.py", "--training.max-steps", "2", "--training.validation-names", "20"),
    *("--training.tokens-per-batch", "256", "--training.sample-every", "2", "--model.num-experts", "2"),
)


def example(
    capsys: pytest.CaptureFixture[str], name: str, *arguments: str, root: Path = ROOT, cwd: Path = ROOT
) -> tuple[int, str, str]:
    """Runs examples/NAME as `python examples/NAME ...` does, but in this process: status, stdout, stderr."""
    capsys.readouterr()
    script = root / "examples" / name
    path = [str(script.parent), *sys.path]  # one example imports another
    sys.modules.pop("generate_names", None)
    status = 0
    with (
        mock.patch.object(sys, "argv", [str(script), *arguments]),
        mock.patch.object(sys, "path", path),
        mock.patch.dict(os.environ),
        quiet_libraries(),
        chdir(cwd),
    ):
        try:
            runpy.run_path(str(script), run_name="__main__")
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 0
    return status, *capsys.readouterr()


@pytest.fixture(scope="module")
def checkout(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout with the examples, the configurations, a tiny base and a few prepared names."""
    root = tmp_path_factory.mktemp("check out")
    for name in ("examples", "configs"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copytree(workplace / "data", root / "data")
    for name in ("mtg-base", "mtg-names"):
        shutil.copytree(workplace / "models/base", root / "models" / name, ignore=shutil.ignore_patterns("checkpoints"))
    return root


@pytest.mark.slow
def test_finetuning_tracks_the_run_and_is_what_the_command_line_does(
    checkout: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_DIR", raising=False)
    status, out, err = example(capsys, *FINETUNE, "--minutes", "9", root=checkout, cwd=tmp_path)
    assert status == 0 and not list(tmp_path.iterdir()), "nothing in the current directory"
    assert out.splitlines()[0] == f"fine-tuning with configs/quickstart.yaml in {checkout} ..."
    stages = ["importing PyTorch", "loading models/mtg-base and upcycling", "wandb: recording offline in wandb/"]
    stages += ["validating on 20 names before", "training ...", "samples at step 2", "wandb sync wandb/offline-run-"]
    assert all(stage in out + err for stage in stages)
    run = checkout / "models/quickstart"
    assert f"The best model is in {run}" in out and list((checkout / "wandb").glob("offline-run-*/*.wandb"))
    figures = dict(
        re.findall(r"^(before|best), ?[\w ]*? +([\d.]+ +[\d.]+ +[\d.]+)$", out.replace("before", "before,"), re.M)
    )
    best = json.loads((run / "metrics.jsonl").read_text("utf-8").splitlines()[0])
    assert figures["before"].split()[2] == f"{best['validation/bits_per_char_mean']:.3f}"
    ours = json.loads((run / "run.json").read_text("utf-8"))
    same = ("--config", "configs/quickstart.yaml", *FINETUNE[1:], "--training.max-minutes", "9")
    done = ok("train", *same, cwd=checkout)
    assert "is finished (steps, step 2): nothing to do" in done.err, "the command line continues the same run"
    done = ok("train", *same, "--training.run-name", "other", "--training.tracker", "none", cwd=checkout)
    theirs = json.loads((checkout / "models/other/run.json").read_text("utf-8"))
    assert ours["config"] == theirs["config"] | {"run_name": "quickstart", "tracker": "wandb"}
    assert ours["origin"] == theirs["origin"] and ours["identity"] == theirs["identity"]
    losses = [
        [json.loads(line).get("validation/loss") for line in (checkout / "models" / name / "metrics.jsonl").open()]
        for name in ("quickstart", "other")
    ]
    assert losses[0] == losses[1]


@pytest.mark.slow
def test_generating_takes_the_newest_run_of_ones_own_and_compares_it_with_its_base(
    checkout: Path, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for age, name in enumerate(("older", "newest", "incomplete", "upcycled")):
        folder = shutil.copytree(
            workplace / "models" / ("moe" if name == "upcycled" else "base"), checkout / "models" / name
        )
        os.utime(folder / "model.safetensors", (4e9 + age, 4e9 + age))
    (checkout / "models/incomplete/tokenizer.json").unlink()
    about = {"origin": {"base": "models/older"}}
    (checkout / "models/newest/run.json").write_text(json.dumps(about), "utf-8")
    model = f"model: {checkout / 'models/newest'} (your newest run)"
    status, out, _ = example(capsys, "generate_names.py", "--count", "3", root=checkout, cwd=tmp_path)
    assert status == 0 and out.splitlines()[0] == model
    assert "nearest real card" in out and re.search(r"conservative +balanced +creative", out)
    status, out, _ = example(capsys, "generate_mtg_names.py", "--count", "2", root=checkout, cwd=tmp_path)
    assert status == 0 and out.splitlines()[0] == model
    assert re.search(r"temperature 0.5 +temperature 1 +temperature 1.5 +top-k 5", out)
    assert len(re.findall(r"^ +fine-tuned +base$", out, re.M)) == 3
    assert f"the same prompts and seed; base: {checkout / 'models/older'}" in out
    assert "raw " in out and "Wrath of the Reef, Tide-caller" in out
    for name in ("older", "newest", "incomplete", "upcycled"):
        shutil.rmtree(checkout / "models" / name)
    shutil.rmtree(checkout / "models/quickstart", ignore_errors=True)
    shutil.rmtree(checkout / "models/other", ignore_errors=True)
    _, out, _ = example(capsys, "generate_names.py", "--count", "1", root=checkout, cwd=tmp_path)
    assert f"model: {checkout / 'models/mtg-names'} (released with the repository" in out


@pytest.mark.slow
def test_preparing_writes_where_finetuning_reads_and_shows_tokens(
    checkout: Path, workplace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = str(workplace / "names.txt")
    status, out, _ = example(capsys, "prepare_mtg_data.py", "--source", source, root=checkout, cwd=tmp_path)
    assert status == 0 and f"in {checkout / 'data/mtg'}" in out and not list(tmp_path.iterdir())
    assert "train" in out and out.count("<BOS>|") == 6 and out.count("|<EOS>") == 6


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        *((name, "--no-such-option") for name in EXAMPLES),
        *((name, "no/where") for name in EXAMPLES),
        ("prepare_mtg_data.py", "--source=/no/where"),
        ("finetune_mtg_names.py", "--minutes=0"),
        ("finetune_mtg_names.py", "--minutes=soon"),
        ("finetune_mtg_names.py", "--training.learning-rat=1"),
        ("finetune_mtg_names.py", "--base=/no/where"),
        ("generate_mtg_names.py", "--base=/no/where"),
        ("generate_names.py", "--count=-1"),
    ],
)
def test_a_bad_argument_is_one_line(
    name: str, argument: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], checkout: Path
) -> None:
    status, _, err = example(capsys, name, argument, root=checkout, cwd=tmp_path)
    assert status == 2 and err.count("\n") == 1 and err.startswith((name, "flash-experts train")), err


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_needs_no_heavy_import(name: str, tmp_path: Path) -> None:
    code = f"import runpy, sys; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(ROOT / 'examples' / name)!r}, "
    code += "run_name='__main__')\nexcept SystemExit: assert not {'torch', 'transformers'} & set(sys.modules)"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT / "examples")))}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and f"usage: {name}" in done.stdout, done.stderr


@pytest.mark.slow
def test_custom_filter_example_keeps_its_word(capsys: pytest.CaptureFixture[str]) -> None:
    lines = dict(line.split(": ", 1) for line in example(capsys, "extending/custom_filter.py")[1].splitlines())
    assert len(lines["NoLetterE"].split("; ")) == 8
    assert "e" not in (lines["NoLetterE"] + lines["model.generate"]).lower()
    assert not re.search(r"[b-df-hj-np-tv-xz]{3}", lines["FewConsonants"], re.IGNORECASE)


@pytest.mark.parametrize("config", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_presets_parse_and_are_valid(config: Path) -> None:
    from flash_experts.cli import COMMANDS

    parser = COMMANDS["train"].make_parser()
    args = parser.instantiate(parser.parse_args(["--config", str(config)]))
    args.training.validate()


def test_every_key_of_the_quickstart_is_commented() -> None:
    text = (ROOT / "configs/quickstart.yaml").read_text("utf-8")
    keys = [line for line in text.splitlines() if re.match(r"\s*[a-z_]+:\s*\S", line)]
    assert len(keys) > 20 and all("#" in line for line in keys)
