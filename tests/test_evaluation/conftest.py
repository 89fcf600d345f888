"""A small prepared folder and small models."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.tokenizer import train_tokenizer
from tests.helpers.evaluation import FIRST, SECOND, tiny_model, write_data


@pytest.fixture(scope="session")
def names() -> dict[str, list[str]]:
    """210 names in four splits."""
    every = [f"{first} {second}" for first in FIRST for second in SECOND]
    random.Random(0).shuffle(every)
    return {
        "train": every[:120],
        "validation": every[120:150],
        "test": every[150:180],
        "test_iid": every[180:],
    }


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory, names: dict[str, list[str]]) -> Path:
    return write_data(tmp_path_factory.mktemp("data") / "mtg", names)


@pytest.fixture(scope="session")
def name_tokenizer(names: dict[str, list[str]]) -> PreTrainedTokenizerFast:
    return train_tokenizer([" " + name for name in names["train"]], vocab_size=300)


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory, name_tokenizer: PreTrainedTokenizerFast) -> list[Path]:
    """Two model folders, one with a metrics.jsonl."""
    folders = []
    for seed, name in enumerate(("one", "two")):
        folder = tmp_path_factory.mktemp("models") / name
        tiny_model(name_tokenizer, seed).save_pretrained(folder)
        name_tokenizer.save_pretrained(folder)
        folders.append(folder)
    lines = [{"step": step, "tokens": 10 * step, "seconds": 0.5 * step, "loss": 5.0 - step} for step in (1, 2, 3)]
    record = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "lo'
    (folders[0] / "metrics.jsonl").write_text(record, encoding="utf-8")
    return folders


@pytest.fixture
def model(name_tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    return tiny_model(name_tokenizer, seed=0)
