"""Turns a finished run into a released model: bfloat16 weights, tokenizer, model card, metrics.

    python scripts/release_model.py models/RUN models/NAME --about "Learned from ..." --command "flash-experts ..."

RUN may be one of a run's checkpoints, such as models/base/checkpoints/step-001200.

The card's figures are those that `flash-experts evaluate` measures of the released (rounded) weights.
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
from flash_experts.models.loading import load_model
from flash_experts.training.tracking import read_metrics

INTRODUCTION = """A {kind} of {parameters:.1f} million parameters ({active:.1f} million active per token, bfloat16
weights) that names Magic: The Gathering cards. Its tokenizer has {vocabulary:,} tokens: {pieces}. {about}"""
CARD = """---
license: mit
pipeline_tag: text-generation
tags: [gpt2, magic-the-gathering, names]
---

# {name}

{introduction}

Made by

    {command}

and then `python scripts/release_model.py`. The training took {minutes:.0f} minutes on {device} ({steps} steps,
seed {seed}); `run.json` and `metrics.jsonl` are its record.

| held-out names | bits per character, nothing given | given type, colors, mana value | shuffled attributes |
| --- | --- | --- | --- |
{rows}

The end of a name counts as a character. Brackets: 95% bootstrap intervals over names. Summed over the one
tokenization that the tokenizer gives: an upper bound of the true figure{exact}.

The text learned is `<|endoftext|>` + prompt + space + name + `<|endoftext|>`; a prompt is
`legendary creature goblin, red, 3:` or any part of it, down to `:` alone.
The names learned from are Wizards of the Coast's; see data/README.md.
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a finished run")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--about", required=True, help="a sentence on what it learned from, for the card")
    parser.add_argument("--command", required=True, nargs="+", help="the commands that made the run, for the card")
    parser.add_argument("--data", default="data/mtg", help="folder that prepare wrote")
    parser.add_argument("--overwrite", action="store_true", help="replace the model in the folder")
    args = parser.parse_args()
    check_out_folder(str(args.out), args.overwrite, str(args.run), option="out")
    model, tokenizer = load_model(args.run, "cpu"), load_tokenizer(args.run)
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    words = len(tokenizer.get_added_vocab()) - 1
    pieces = ["the bytes", f"{len(merges):,} merges of them"] if merges else ["the bytes (names are spelled)"]
    pieces += [f"{words} words of prompts", "the end of a text"]
    args.out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
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
        kind="GPT-2 with experts" if model.config.model_type == "gpt2_moe" else "dense GPT-2",
        parameters=result.size.total / 1e6,
        active=result.size.active / 1e6,
        vocabulary=model.config.vocab_size,
        pieces=", ".join(pieces),
        about=args.about,
    )
    card = CARD.format(
        name=args.out.name,
        introduction=textwrap.fill(introduction, 118),
        exact="" if merges else ", and all but equal to it where names are spelled",
        command="\n    ".join(args.command),
        minutes=last["seconds"] / 60,
        device=run["device"],
        steps=f"{steps:,} of {metrics[-1]['step']:,}",
        seed=run["config"]["seed"],
        rows=rows,
    )
    (args.out / "README.md").write_text(card, encoding="utf-8")


if __name__ == "__main__":
    main()
