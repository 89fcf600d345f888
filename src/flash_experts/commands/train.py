"""``flash-experts train``, with sample names of the model in training."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jsonargparse import Namespace

from flash_experts.commands.common import CommandParser, add_model_family, command_parser
from flash_experts.terminal import say
from flash_experts.training.tracking import Callback

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class SampleNames(Callback):
    """Draws a few unconditional names, real cards allowed: the trainer reports which are new and which are copies."""

    def __init__(self, count: int = 6):
        self.count = count

    def on_sample(self, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        """Names of the model as it is now; the step is the seed."""
        from flash_experts.generation.generator import NameGenerator

        generator = NameGenerator(model, tokenizer, known_names=())
        return [name.text for name in generator.generate(self.count, seed=step, quality="fast")]


def run(args: Namespace) -> None:
    """Train or fine-tune a model on prepared names; an interrupted run resumes."""
    from dataclasses import asdict, replace

    from flash_experts.data.prepare import check_prepared, extra_cards, load_meta, load_split
    from flash_experts.training.training_config import default_run_name

    config = args.training if args.seed is None else replace(args.training, seed=args.seed)
    named = config.run_name is not None or not args.config
    config = config if named else replace(config, run_name=default_run_name(str(args.config[-1])))
    config.validate()
    check_prepared(args.data)
    cards = {split: load_split(args.data, split) for split in ("train", "validation")}
    if args.extra_names is not None:
        cards["train"] += extra_cards(args.extra_names, args.data)

    # Slow to import: after the checks of settings and data.
    from flash_experts.models.moe import GPT2MoEForCausalLM
    from flash_experts.training.build import build_model, settings_in_force
    from flash_experts.training.trainer import Trainer

    args.model.validate()
    settings = settings_in_force(args.base, args.model)
    model, tokenizer = build_model(args.base, settings, cards["train"], config.seed)
    if config.sample_every and isinstance(model, GPT2MoEForCausalLM) and not model.may_generate:
        raise ValueError(
            "a model with expert choice is not causal and draws no sample names: set training.sample_every to null, or "
            "model.allow_noncausal_generation to true"
        )
    trainer = Trainer(
        model,
        tokenizer,
        cards["train"],
        cards["validation"],
        config,
        callbacks=[SampleNames()],
        data_info=load_meta(args.data),
        origin={name: args[name] for name in ("base", "data", "extra_names")} | {"model": asdict(settings)},
        how_to_resume=how_to_resume(args, config.run_dir.name),
    )
    if kept := [f"{name} {value}" for name, value in asdict(settings).items() if value != getattr(args.model, name)]:
        trainer.report.notify(f"{args.base} has experts already, and keeps its {', '.join(kept)}")
    result = trainer.train(args.resume, args.overwrite)
    if args.json and trainer.is_main:  # once, of all processes
        say(json.dumps(asdict(result), default=str, indent=2))
    if result.interrupted:
        raise KeyboardInterrupt


def how_to_resume(args: Namespace, run_name: str) -> str:
    """The same command, where it would resume this run: the default name has the date, and may be another tomorrow."""
    added = [] if args.resume == "auto" else ["--resume auto"]
    added += [] if args.training.run_name else [f"--training.run-name {shlex.quote(run_name)}"]
    changes = [f"with {' '.join(added)}"] if added else []
    changes += ["without --overwrite"] if args.overwrite else []
    return " ".join(["run the same command again", " and ".join(changes)]).strip()


def make_parser() -> CommandParser:
    from flash_experts.training.training_config import ModelConfig, TrainingConfig

    parser = command_parser("train", run)
    parser.section("The run")
    parser.add_optional("--base", "model folder or hub id to start from; null: a new model")
    add_model_family(parser)
    parser.add_argument("--data", default="data/mtg", help="folder written by prepare")
    parser.add_optional(
        "--extra_names", "file of additional names, written by generate --attributes-from (default: none)"
    )
    parser.add_argument(
        "--resume",
        type=str | None,
        default="auto",
        help="checkpoint to resume from: auto (the newest), a folder, or null to start over",
    )
    parser.add_argument("--overwrite", action="store_true", help="start over, replacing the run or model in the folder")
    parser.add_optional("--seed", "short for --training.seed (default: that of --training.seed)", int)
    parser.add_options_of(ModelConfig, "model")
    parser.add_options_of(TrainingConfig, "training")
    return parser
