"""Model cards: README.md of a model, with the metadata that a hub reads, written by huggingface_hub."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import cast

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from flash_experts.released import model_folder

CARD = "README.md"
# Where a source of cards has its names from.
_DATASETS = {"embedded": "mtgjson", "mtgjson": "mtgjson", "mtgjson-printings": "mtgjson", "scryfall": "scryfall"}
_NAMES = "names of Magic: The Gathering cards"


def card_data(
    name: str,
    model_type: str,
    source: str | None = None,
    base_model: str | None = None,
    license: str = "unknown",
    results: Iterable[EvalResult] = (),
) -> ModelCardData:
    """The metadata of a model's card. transformers alone loads every ``model_type`` but ``gpt2_moe``.

    ``source`` is that of its cards, as in meta.json; a file of the user's own is not a dataset that a hub knows.
    """
    is_moe = model_type == "gpt2_moe"
    found = list(results)
    return ModelCardData(
        language="en",
        license=license,
        library_name="flash-experts" if is_moe else "transformers",
        base_model=base_model,
        datasets=[_DATASETS[source]] if source in _DATASETS else None,
        pipeline_tag="text-generation",
        tags=["gpt2" if is_moe else model_type, *(["mixture-of-experts"] if is_moe else []), "names"],
        model_name=name,
        eval_results=found or None,
    )


def bits_per_character(source: str | None, split: str, values: Mapping[str, float]) -> list[EvalResult]:
    """Results for the ``model-index``; ``values`` by what the model was given, as "unconditional" or "given type"."""
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=_DATASETS.get(str(source), "names"),
            dataset_name=_NAMES if source in _DATASETS else "names",
            dataset_split=split,
            metric_type="bits_per_character",
            metric_name=f"bits per character, {given}",
            metric_value=round(value, 4),
        )
        for given, value in values.items()
    ]


def write_card(path: Path, data: ModelCardData, text: str) -> None:
    path.write_text(f"---\n{data.to_yaml()}\n---\n\n{text}", encoding="utf-8")


def read_card(folder: Path) -> tuple[ModelCardData, str]:
    """Metadata and text of a folder's card; its name alone without a card, or with damaged metadata."""
    try:
        card = ModelCard((folder / CARD).read_text("utf-8"), ignore_metadata_errors=True)
    except (OSError, ValueError, yaml.YAMLError):
        return ModelCardData(), f"# {folder.name}\n"
    return cast(ModelCardData, card.data), card.text


def origin_of(base: str | None) -> tuple[str | None, str]:
    """Hub id and license of a run's base, from the card of a folder."""
    if base is None:
        return None, "unknown"
    folder = model_folder(base)
    if folder is None:
        return base, "unknown"
    data, _ = read_card(folder)
    first = data.base_model[0] if isinstance(data.base_model, list) and data.base_model else data.base_model
    return (first if isinstance(first, str) else None), str(data.license or "unknown")
