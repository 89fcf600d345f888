"""What a run is about to read: are the files as `prepare` wrote them, and does each name fit into the model?"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.packing import split_by_context
from flash_experts.data.prepare import load_meta
from flash_experts.models.scoring import context_length


def check_prepared(folder: str | Path, splits: Sequence[str] = ("train", "validation")) -> None:
    """Compares each split's file with its SHA-256 in meta.json; a file without one there is not checked.

    Raises:
        ValueError: a file is missing, or not the one that was prepared.
    """
    recorded = load_meta(folder).get("sha256", {})
    for split in splits:
        path = Path(folder) / f"{split}.jsonl"
        if path.name not in recorded or not path.is_file():  # `load_split` tells of a missing file
            continue
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != recorded[path.name]:
            raise ValueError(
                f"{path} is not the file that was prepared (its SHA-256 is not the one in meta.json): run "
                f"`flash-experts prepare --out {folder}` again, or, if you changed it on purpose, remove its line from "
                "sha256 in meta.json"
            )


def fitting_cards(
    train: Sequence[Card],
    validation: Sequence[Card],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    say: Callable[[str], None],
) -> tuple[list[Card], list[Card]]:
    """Leaves out the names that are longer than the model's context, and says how many.

    Raises:
        ValueError: no training name fits.
    """
    context, kept, left_out = context_length(model.config), [], []
    for kind, cards in (("training", train), ("validation", validation)):
        fit, too_long = split_by_context(cards, tokenizer, context)
        kept.append(fit)
        if too_long:
            left_out.append(f"{len(too_long):,} of {len(cards):,} {kind} names ({too_long[0].name[:40]!r}, ...)")
    if train and not kept[0]:
        raise ValueError(f"no training name fits into the model's {context} tokens: take a model of a longer context")
    if left_out:
        say(f"left out, since prompt and name take more than the model's {context} tokens: {', '.join(left_out)}")
    return kept[0], kept[1]
