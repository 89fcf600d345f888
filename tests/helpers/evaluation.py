"""What the tests of evaluation build by hand."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.cards import Card

_FIRST = "Goblin Elvish Angelic Dark Shivan Serra Crystal Thorn Ember Storm Grave Silver Iron Vile Gilded"
_SECOND = "Guide Dragon Ritual Angel Bolt Herald Keeper Blade Shaman Oracle Growth Warden Thief Rider"
FIRST, SECOND = _FIRST.split(), _SECOND.split()


def make_card(name: str, index: int = 0) -> Card:
    """A card whose type and color follow from ``index``."""
    types = (("Creature",), ("Instant",), ("Artifact", "Creature"))[index % 3]
    colors = ((), ("R",), ("W", "U"))[index % 3]
    return Card(
        name=name,
        type_line=" ".join(types),
        supertypes=(),
        types=types,
        subtypes=(),
        colors=colors,
        mana_value=index % 5,
        source_id=str(index),
    )


def write_data(folder: Path, splits: dict[str, list[str]]) -> Path:
    """Writes a prepared folder that holds these names."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, names in splits.items():
        lines = [json.dumps(make_card(name, index).to_json()) for index, name in enumerate(names)]
        (folder / f"{split}.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    known = [name for names in splits.values() for name in names]
    (folder / "known_names.txt").write_text("\n".join(known) + "\n", encoding="utf-8")
    meta = {"source": "test", "version": "1", "cleaning_version": 1, "counts": {}, "files": {}}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


def tiny_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> GPT2LMHeadModel:
    """A dense GPT-2 with random weights."""
    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=2,
        n_embd=32,
        n_head=2,
        n_positions=64,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    return GPT2LMHeadModel(config).eval()
