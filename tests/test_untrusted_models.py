"""Model folders from strangers: one line within seconds and little memory; nothing of theirs runs or is written."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from command_line import run
from spoiled import MODELS, spoil_models

ANSWERS = {
    "pickled": "is a pickle, which can run code when loaded: refused",
    "cut": "model.safetensors is damaged",
    "no-config": "config.json is missing",
    "no-weights": "model.safetensors is missing",
    "no-tokenizer": "no tokenizer at",
    "config-text": "config.json is damaged",
    "config-list": "config.json is damaged: it holds no settings",
    "config-deep": "config.json is damaged",
    "config-binary": "config.json is damaged",
    "config-huge": "where 1,048,576 are plenty",
    "other-model": "the checkpoint is not whole, or of another model",
    "unknown-model": "gpt17",
    "no-model-type": "cannot be loaded",
    "layers": "asks for 1,000,000,000 layers, but the weights are 28",
    "wide": "asks for what cannot be",
    "vocabulary": "asks for 32,",
    "positions": "asks for 32,",
    "negative": "asks for -1 layers",
    "word": "n_embd",
    "heads": "divisible",
    "no-heads": "asks for what cannot be",
    "activation": "os.system",
    "more-layers": "the checkpoint is not whole, or of another model",
    "dtype": "cannot be loaded",
    "kernel": "names kernels of a hub to run",
    "adapter": "is an adapter to another model",
    "tokenizer-list": "no tokenizer at",
    "quantized": "is quantized",
    "nan": "ln_1.weight has values that are not finite numbers",
    "swapped": "a weight has not the shape that config.json gives it",
    "one-missing": "the checkpoint is not whole, or of another model",
    "no-tensor": "asks for 2 layers, but the weights are 0",
    "header-length": "a header of 1,152,921,504,606,846,976 bytes",
    "header-text": "model.safetensors is damaged",
    "gigabyte": "but 1,073,741,910 were written",
    "gigabyte-named": "but 1,073,741,931 were written",
    "empty-weights": "model.safetensors is damaged",
    "tokenizer-text": "no tokenizer at",
    "tokenizer-deep": "no tokenizer at",
    "tokenizer-other": "they do not belong together",
    "remote-code": "names code of its own to run",
    "remote-tokenizer": "no tokenizer at",
    "index-above": "names weights that are not in its folder",
    "index-root": "names weights that are not in its folder",
    "index-text": "model.safetensors.index.json is damaged",
    "experts": "the checkpoint is not whole, or of another model",
    "top": "num_experts_per_tok (99)",
}
HARMLESS = ("generation-text",)  # transformers goes on without it
SECONDS, BYTES = 5, 2**30


@pytest.fixture(scope="module")
def strangers(workplace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("strangers") / "place"
    shutil.copytree(workplace, folder, ignore=shutil.ignore_patterns("tuned", "*.html"))
    spoil_models(folder / "models")
    return folder


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.parametrize("name", ANSWERS)
def test_it_is_refused_in_one_line(name: str, strangers: Path) -> None:
    before, start, memory = sorted(strangers.rglob("*")), time.process_time(), peak_bytes()
    done = run("evaluate", f"models/{name}", "--names", "names.txt", cwd=strangers)
    assert time.process_time() - start < SECONDS and peak_bytes() - memory < BYTES
    assert done.status == 1 and done.out == "", done.err
    assert len(done.err.splitlines()) == 1 and ANSWERS[name] in done.err, done.err
    assert sorted(strangers.rglob("*")) == before and not list(strangers.rglob("pwned"))


def test_every_spoiled_folder_is_tried() -> None:
    assert ANSWERS.keys() | set(HARMLESS) == MODELS.keys() | {"experts", "top"}


@pytest.mark.parametrize("name", ["tokenizer-other", "remote-tokenizer", "nan", "layers"])
@pytest.mark.parametrize("command", ["generate --count 1 --model", "upcycle --out new", "train --base"])
def test_the_other_commands_refuse_it_too(name: str, command: str, strangers: Path) -> None:
    done = run(*command.split(), f"models/{name}", cwd=strangers)
    assert done.status == 1 and len(done.err.splitlines()) == 1 and ANSWERS[name] in done.err, done.err
    assert not (strangers / "new").exists() and not list(strangers.rglob("pwned"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS is Linux's")
def test_a_gigabyte_that_is_claimed_is_never_asked_of_the_system(strangers: Path) -> None:
    """A process of its own that may take one gigabyte of memory beyond what its imports took."""
    script = """
import resource, sys
from pathlib import Path
from flash_experts.models.loading import load_model
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + 2**30
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
for name in ("gigabyte", "gigabyte-named", "experts", "layers", "vocabulary", "header-length", "config-huge"):
    try:
        load_model(f"models/{name}")
    except ValueError as error:
        print(name)
"""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=strangers, env=environment, capture_output=True, text=True, timeout=300
    )
    assert len(done.stdout.split()) == 7, done.stderr
