"""What the tests share: tiny models and tokenizers, made anew and never downloaded."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest
import torch
from hypothesis import settings

os.environ["HF_HUB_OFFLINE"] = "1"  # before its first import: nothing in the tests may ask a hub
if not torch.cuda.is_available():  # Triton's own functions are made at its first import: interpreted, or for a GPU
    os.environ["TRITON_INTERPRET"] = "1"

from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.tokenizer import train_tokenizer

# A shell that starts the tests in the background has them ignore Ctrl+C, and the programs that they start as well.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Speed is measured in benchmarks: a busy machine fails no test.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")

# A real browser or several processes at once can starve on a busy machine: these run once more before they fail, and
# pytest reports them as RERUN. Everything else passes at the first try or fails.
STARVING = (
    "test_app/test_browser.py",
    "test_app/test_http.py",
    "tests/test_browser_example.py",
    "test_training/test_distributed.py",
    "test_training/test_training_processes.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.as_posix().endswith(STARVING):
            item.add_marker(pytest.mark.flaky(reruns=1))


WORDS = (
    "Goblin Guide Lightning Bolt Llanowar Elves Serra Angel Shivan Dragon Dark Ritual Giant Growth Ancestral Recall "
    "Healing Salve Black Lotus Wrath of God Sol Ring Counterspell Birds of Paradise Jötun Grunt, the Unwilling"
).split()


@pytest.fixture(scope="session", autouse=True)
def _offline() -> None:
    """One thread: the tests run side by side."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 300 tokens."""
    texts = [f"Creature Goblin, red, 3: {first} {second}" for first in WORDS for second in WORDS]
    return train_tokenizer(texts, vocab_size=300)


@pytest.fixture
def dense_config(tokenizer: PreTrainedTokenizerFast) -> GPT2Config:
    return GPT2Config(
        n_layer=4,
        n_embd=32,
        n_head=4,
        n_positions=64,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


@pytest.fixture
def dense(dense_config: GPT2Config) -> GPT2LMHeadModel:
    """A dense GPT-2 with weights large enough that every part of it matters."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(dense_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.fixture(scope="session")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a blank in its name where the first commands were run: see `command_line.make_workplace`."""
    from tests.helpers.command_line import make_workplace

    folder = tmp_path_factory.mktemp("work place")
    make_workplace(folder)
    return folder
