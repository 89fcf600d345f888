"""The model card of a run: README.md in its folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flash_experts.files import whole_file
from flash_experts.model_files import CONFIG
from flash_experts.models.model_card import CARD, bits_per_character, card_data, origin_of, write_card
from flash_experts.training.run_state import TrainingResult
from flash_experts.training.tracking import METRICS_FILE, read_untrusted_metrics
from flash_experts.training.validation import BITS_PER_CHAR

# A card without this line is the user's own.
MARK = "<!-- Written by flash-experts train. Remove this line, and a resumed run keeps your changes. -->"
_GIVEN = {"unconditional": BITS_PER_CHAR, "given type, colors, mana value": f"{BITS_PER_CHAR}_given_attributes"}
_TEXT = """{mark}

# {name}

A GPT-2{experts} of {parameters:.1f} million parameters that writes names, trained by flash-experts.

## Load it

```python
from flash_experts import NameGenerator

generator = NameGenerator.from_pretrained("{name}")  # this folder
print([name.text for name in generator.generate(5)])
```
{transformers}
## Training

| | |
| --- | --- |
| started from | {base} |
| names for training | {train_names:,}, SHA-256 `{train_sha256}` |
| names for validation | {validation_names:,}, SHA-256 `{validation_sha256}` |
| source of the names | {source} |
| steps | {steps} |
| seed, device | {seed}, {device} ({processes} process{es}) |
| versions | {versions} |

The whole configuration is in `run.json`, the metrics of each step in `metrics.jsonl`.
"""
_TRANSFORMERS = """
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model, tokenizer = AutoModelForCausalLM.from_pretrained("{name}"), AutoTokenizer.from_pretrained("{name}")
```
"""
_HUB = """
transformers alone loads what `flash-experts export hub` makes of it.
"""
_RESULTS = """
## Results

Bits per character of {names} names that the model has not learned from; the end of a name counts as a character.

| | bits per character |
| --- | --- |
{rows}
"""


def write_run_card(run_dir: Path, info: Mapping[str, Any], result: TrainingResult, overwrite: bool = False) -> None:
    """Writes the card of the model in a run's folder from ``info``, what run.json holds; nothing if there is no model
    yet, or a card of the user's own without ``overwrite``."""
    path = run_dir / CARD
    if not (run_dir / CONFIG).is_file():
        return
    if path.exists() and not overwrite and MARK not in path.read_text("utf-8", errors="replace"):
        return
    data, origin = info["data"], info["origin"]
    source = data.get("meta", {}).get("source")
    validations = [line for line in read_untrusted_metrics(run_dir / METRICS_FILE) if line["event"] == "validation"]
    best = next((line for line in validations if line["step"] == result.best_step), {})
    values = {given: best[name] for given, name in _GIVEN.items() if name in best}
    base_model, license = origin_of(origin.get("base"))
    bits = bits_per_character(source, "validation", values)
    metadata = card_data(run_dir.name, info["model"]["type"], source, base_model, license, bits)
    with whole_file(path) as temporary:
        write_card(temporary, metadata, _text(run_dir.name, info, result, values))


def _text(name: str, info: Mapping[str, Any], result: TrainingResult, values: Mapping[str, float]) -> str:
    data, base, config = info["data"], info["origin"].get("base"), info["config"]
    meta = data.get("meta", {})
    is_moe = info["model"]["type"] == "gpt2_moe"
    best = f", of which the best, step {result.best_step:,}, is here" if values else ""
    text = _TEXT.format(
        mark=MARK,
        name=name,
        experts=" with mixture-of-experts layers" if is_moe else "",
        parameters=info["model"]["parameters"]["total"] / 1e6,
        transformers=_HUB if is_moe else _TRANSFORMERS.format(name=name),
        base="nothing: a new model" if base is None else f"`{Path(base).name if Path(base).exists() else base}`",
        source=", ".join(str(meta[key]) for key in ("source", "version") if meta.get(key)) or "not known",
        steps=f"{result.step:,} ({result.reason}){best}",
        seed=config["seed"],
        device=info["device"],
        processes=info["processes"],
        es="" if info["processes"] == 1 else "es",
        versions=", ".join(f"{package} {version}" for package, version in info["versions"].items()),
        **{key: data[key] for key in ("train_names", "train_sha256", "validation_names", "validation_sha256")},
    )
    if not values:
        return text
    rows = "\n".join(f"| {given} | {value:.3f} |" for given, value in values.items())
    scored = min(data["validation_names"], config["validation_names"] or data["validation_names"])
    return text + _RESULTS.format(names=f"{scored:,}", rows=rows)
