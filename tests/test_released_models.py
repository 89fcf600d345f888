"""The models that the repository carries: small enough, whole, and better than letter statistics at unseen names."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import flash_experts  # noqa: F401  registers the mixture with AutoModel
from flash_experts.data.prepare import load_split, prepare
from flash_experts.data.prompts import UNCONDITIONAL, Attributes
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.evaluation.ngram import ConditionalNGrams
from flash_experts.evaluation.scorers import LanguageModel
from flash_experts.models.loading import load_model
from flash_experts.models.moe import GPT2MoEForCausalLM
from flash_experts.training.run_folder import fingerprint

MODELS = Path(__file__).parents[1] / "models"
RELEASED = ("mtg-base", "mtg-names")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mtg")
    prepare("embedded", folder)
    return folder


def test_they_are_small() -> None:
    folders = *(MODELS / name for name in RELEASED), MODELS.parent / "data"
    held = sum(path.stat().st_size for folder in folders for path in folder.glob("*") if path.is_file())
    assert held <= 64e6, "models and data together"


@pytest.mark.parametrize("name", RELEASED)
def test_they_learned_from_the_training_split_of_this_cleaning(name: str, data: Path) -> None:
    """A held-out name that they had read would flatter them: their records name the files that they read."""
    run = json.loads((MODELS / name / "run.json").read_text(encoding="utf-8"))
    assert run["data"]["validation_sha256"] == fingerprint(load_split(data, "validation"))


@pytest.mark.parametrize("name", RELEASED)
def test_their_tokenizers_cut_what_is_too_long_and_write_prompts_as_they_were(name: str) -> None:
    positions = AutoConfig.from_pretrained(MODELS / name).n_positions
    for tokenizer in (AutoTokenizer.from_pretrained(MODELS / name), load_tokenizer(MODELS / name)):
        assert tokenizer.model_max_length == positions
        assert len(tokenizer("Goblin " * 200, truncation=True)["input_ids"]) == positions
        prompt = "<|endoftext|>legendary creature human wizard, white blue, 4:"
        assert tokenizer.decode(tokenizer(prompt)["input_ids"]) == prompt


def test_auto_model_loads_the_mixture() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / "mtg-names")
    assert isinstance(model, GPT2MoEForCausalLM)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert load_model(MODELS / "mtg-base", "cpu").config.model_type == "gpt2"


def test_they_predict_unseen_names_better_than_letter_statistics(data: Path) -> None:
    cards = load_split(data, "test")[::10]
    names = [card.name for card in cards]
    no_attributes = [UNCONDITIONAL] * len(names)
    letters = ConditionalNGrams(load_split(data, "train")).nats(names, no_attributes).sum()
    model = LanguageModel.load(MODELS / "mtg-names", "cpu")
    nothing_told = model.nats(names, no_attributes).sum()
    all_told = model.nats(names, [Attributes.of(card) for card in cards]).sum()
    assert all_told < nothing_told < letters


def test_readme_repeats_the_figures_of_the_model_cards() -> None:
    readme = (MODELS.parent / "README.md").read_text("utf-8")
    for name in RELEASED:
        rows = re.findall(
            r"^\| (test(?:_iid)?) \(.*?\) \| (.*?) \| (.*?) \|", (MODELS / name / "README.md").read_text("utf-8"), re.M
        )
        card = {split: figures for split, *figures in rows}
        for place, what in enumerate(("unconditional", "given type, colors, mana value")):
            assert f"| `models/{name}`, {what} | {card['test_iid'][place]} | {card['test'][place]} |" in readme


def test_the_page_on_the_data_has_the_counts_of_this_cleaning(data: Path) -> None:
    meta = json.loads((data / "meta.json").read_text("utf-8"))
    page = " ".join((MODELS.parent / "data/README.md").read_text("utf-8").split())
    dropped = meta["dropped"]
    groups = {
        "franchises (Universes Beyond)": ["franchises"],
        "jokes and play-test cards": ["jokes"],
        "duplicates (mostly the back of a card that has its own row)": ["repeated"],
        'rebalanced duplicates ("A-")': ["rebalanced"],
        "planes, phenomena": ["plane"],
        "vanguards, schemes, sticker sheets, conspiracies, heroes": "vanguard scheme stickers conspiracy hero".split(),
        "attractions, contraptions, hosts, augments": ["attraction", "contraption", "host", "augment"],
        "odd types, names with blanks": ["odd_type", "blank"],
    }
    assert sorted(kind for kinds in groups.values() for kind in kinds) == sorted(dropped)
    for title, kinds in groups.items():
        assert f"| {title} | -{sum(dropped[kind] for kind in kinds):,} |" in page
    counts, families = meta["counts"], meta["families"]
    assert f"Measured with cleaning version {meta['cleaning_version']};" in page
    assert f"| faces of {meta['rows']:,} cards | {meta['faces']:,} |" in page and f"| **{meta['names']:,}** |" in page
    assert f"In {families['count']:,} families, the largest of {families['largest']} names: " in page
    assert ", ".join(f"{count:,} {split}" for split, count in counts.items()) in page
    assert f"`known_names.txt` has {meta['known_names']:,} names" in page
