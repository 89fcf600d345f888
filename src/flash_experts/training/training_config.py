"""The configuration of a run: what it trains, how (hyperparameters, schedules, limits), the stages of a curriculum.

Light to import: the command line makes its options of it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, Literal

from flash_experts.data.cards import RARITIES, TYPES, Card
from flash_experts.models.moe_options import (
    EXPERTS,
    METHOD_HELP,
    Method,
    MoEOptions,
    UpcyclingOptions,
    too_many_per_token,
)
from flash_experts.options import POSITIVE, UNDER_ONE, option, problems_of, wrong_types
from flash_experts.terminal import nearest

_MOST = 10**12  # steps, tokens or names: more are a typing error
_COUNT, _POSITIVE, _UNDER_ONE, _SHARE = (1, _MOST), (POSITIVE, _MOST), (0, UNDER_ONE), (POSITIVE, 1)
# Headings of the options.
_VOCABULARY, NEW = "The vocabulary", "A new model"
_RUN, _NAMES, _OPTIMIZER, _DISTILLATION = "The run", "The names", "The optimizer", "Knowledge distillation"
_RECORDS, _DEVICE = "Validation, checkpoints and records", "The device"
PARTS = ("router", "experts", "dense")
# "none", and the names that accelerate has for its trackers.
TrackerName = Literal[
    "none", "wandb", "tensorboard", "mlflow", "trackio", "aim", "clearml", "comet_ml", "dvclive", "swanlab"
]


@dataclass
class ModelConfig(MoEOptions, UpcyclingOptions):
    """The model.

    ``num_experts: 0`` trains a base as it is, without upcycling. A base that has experts keeps them (`build`).
    """

    # A new model draws each expert at random: of these methods, granular and shared give it their shape.
    upcycling: Method = option("copy", METHOD_HELP, EXPERTS)
    trim_vocabulary: bool = option(
        False, "keep only the tokens of the base that the cards use, for speed; other words are spelled in pieces, "
        "unless keep_words is set", _VOCABULARY,
    )  # fmt: skip
    keep_words: bool = option(
        False, "keep the tokens of capitalized words and of parts of words, too, when the vocabulary is trimmed: for "
        "names with words that no card has", _VOCABULARY,
    )  # fmt: skip
    dropout: float | None = option(
        None, "probability of every dropout of the model; null keeps the base's own", NEW, bounds=(0, 0.999)
    )
    n_layer: int = option(6, "blocks of a new model (without a base)", NEW, bounds=(1, 10_000))
    n_embd: int = option(256, "width of a new model", NEW, bounds=(1, 1_000_000))
    n_head: int = option(4, "attention heads of a new model", NEW, bounds=(1, 1_000_000))
    n_positions: int = option(128, "longest text of a new model, in tokens", NEW, bounds=(2, 10_000_000))
    vocab_size: int = option(
        4096, "tokens of a new model's tokenizer, trained on the prepared cards", NEW, bounds=(257, 10_000_000)
    )
    tokenizer: str | None = option(
        None, "folder or hub id whose tokenizer a new model takes, such as that of its teacher; null trains one", NEW
    )
    teacher_embeddings: bool = option(
        False, "initialize the token embeddings of a new model from those of the model that its tokenizer is of "
        "(principal components)", NEW,
    )  # fmt: skip

    def validate(self) -> None:
        """Checks every value; raises a ValueError with all that is wrong."""
        if problems := wrong_types(self, ModelConfig) or self._problems():
            raise ValueError("the model configuration is wrong: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = problems_of(self, ModelConfig)
        if self.n_head >= 1 and self.n_embd % self.n_head:
            problems.append(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        problems += too_many_per_token(self) if self.num_experts else []
        if self.teacher_embeddings and self.tokenizer is None:
            problems.append("teacher_embeddings needs a teacher: set model.tokenizer to its folder")
        return problems

    @property
    def moe_fields(self) -> dict[str, Any]:
        """What `GPT2MoEForCausalLM.from_dense` takes."""
        names = [each.name for cls in (MoEOptions, UpcyclingOptions) for each in fields(cls)]
        return {"method": self.upcycling} | {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class LearningRateScale:
    """Factors of the learning rate; 0 freezes a part (it has no gradient and no optimizer state)."""

    router: float = option(1.0, "factor of the learning rate of the routers", _OPTIMIZER, bounds=(0, 1000))
    experts: float = option(1.0, "factor of the learning rate of the routed experts", _OPTIMIZER, bounds=(0, 1000))
    dense: float = option(
        1.0, "factor of the learning rate of everything else: embeddings, attention, norms, dense layers, shared "
        "experts", _OPTIMIZER, bounds=(0, 1000),
    )  # fmt: skip


@dataclass
class TrainingConfig:
    """Training.

    At least one of ``max_steps``, ``max_epochs`` and ``max_minutes`` is set; the first that is reached ends the run.
    """

    output_dir: str = option("models", "folder of all runs", _RUN)
    run_name: str | None = option(
        None, "name of the run's folder in output_dir; null for the date and the name of the settings file", _RUN
    )
    seed: int = option(0, "random seed of the names' order, dropout and validation", _RUN, bounds=(0, 2**32 - 1))
    max_steps: int | None = option(None, "optimizer steps; null for no limit", _RUN, bounds=_COUNT)
    max_epochs: float | None = option(
        3.0, "passes over the training names (fractions are fine); null for no limit. Must be null with stages, which "
        "have epochs of their own", _RUN, bounds=_POSITIVE,
    )  # fmt: skip
    max_minutes: float | None = option(
        None, "wall-clock budget of training and all validations, the first and the last included; null for none. The "
        "schedule then follows the clock, so two such runs are not equal to the bit", _RUN, bounds=_POSITIVE,
    )  # fmt: skip
    tokens_per_batch: int = option(
        4096, "approximate number of tokens of an optimizer step, over all processes and micro-batches. Names are "
        "packed without padding", _OPTIMIZER, bounds=_COUNT,
    )  # fmt: skip
    gradient_accumulation_steps: int = option(
        1, "micro-batches of each process in an optimizer step. More of them take less memory and give the same result",
        _OPTIMIZER, bounds=_COUNT,
    )  # fmt: skip
    learning_rate: float = option(5e-4, "peak learning rate", _OPTIMIZER, bounds=_POSITIVE)
    optimizer: Literal["adamw", "muon"] = option(
        "adamw", "optimizer: adamw, or muon for the matrices of the blocks, with AdamW for the rest",
        _OPTIMIZER,
    )  # fmt: skip
    weight_decay: float = option(
        0.1, "weight decay of the matrices (biases and norms have none)", _OPTIMIZER, bounds=(0, _MOST)
    )
    betas: tuple[float, float] = option((0.9, 0.95), "beta1 and beta2 of AdamW", _OPTIMIZER)
    muon_momentum: float = option(0.95, "momentum of Muon", _OPTIMIZER, bounds=_UNDER_ONE)
    lr_scale: LearningRateScale = option(
        LearningRateScale(), "factors of the learning rate by part of the model", _OPTIMIZER
    )
    layer_decay: float = option(
        1.0, "factor of the learning rate from each block to the one below it; 1 for none. The embeddings come below "
        "the first block", _OPTIMIZER, bounds=_SHARE,
    )  # fmt: skip
    schedule: Literal["cosine", "linear", "constant", "wsd"] = option(
        "cosine", "learning-rate schedule after the warmup: cosine, linear, constant, or wsd (warmup-stable-decay: "
        "constant until the last decay_share of the run)", _OPTIMIZER,
    )  # fmt: skip
    decay_share: float = option(0.2, "share of the run, at its end, in which wsd decays", _OPTIMIZER, bounds=_SHARE)
    warmup_steps: int | float = option(
        0.05, "warmup of the learning rate from 0: number of steps (1 or more) or share of the run (under 1)",
        _OPTIMIZER, bounds=(0, _MOST),
    )  # fmt: skip
    min_lr_ratio: float = option(0.1, "last learning rate over the peak", _OPTIMIZER, bounds=(0, 1))
    clip_norm: float | None = option(
        1.0, "largest norm of the gradient; null for no clipping", _OPTIMIZER, bounds=_POSITIVE
    )
    label_smoothing: float = option(
        0.0, "share of each label that is spread over all tokens. The logged loss includes it, the validation does not",
        _OPTIMIZER, bounds=_UNDER_ONE,
    )  # fmt: skip
    teacher: str | None = option(
        None, "larger model from whose probabilities the model learns (knowledge distillation); null for none. Folder "
        "or hub id of a model with the same tokenizer, which runs in every step; or the folder that generate "
        "--top-logits wrote, for the names of extra_names alone, which costs no time", _DISTILLATION,
    )  # fmt: skip
    distill_weight: float = option(
        0.5, "weight of the teacher in the loss; the rest is the cross-entropy of the names", _DISTILLATION,
        bounds=(0, 1),
    )  # fmt: skip
    distill_temperature: float = option(
        1.0, "temperature of both distributions; over 1, unlikely tokens count more", _DISTILLATION, bounds=_POSITIVE
    )
    distill_kl: Literal["forward", "reverse"] = option(
        "forward", "KL divergence: forward (covers everything that the teacher would write) or reverse (concentrates "
        "on what the teacher finds likely)", _DISTILLATION,
    )  # fmt: skip
    ema_decay: float | None = option(
        None, "decay of an exponential moving average of the weights over about the last 1 / (1 - ema_decay) steps, "
        "which is validated, sampled and kept; null for the weights themselves", _OPTIMIZER, bounds=_UNDER_ONE,
    )  # fmt: skip
    log_every: int = option(10, "steps between lines of metrics", _RECORDS, bounds=_COUNT)
    eval_every: int | None = option(
        200, "steps between validations; null for one at the start and one at the end. The best model is kept, by the "
        "lowest mean of the bits per character unconditional and given all attributes", _RECORDS, bounds=_COUNT,
    )  # fmt: skip
    validation_names: int | None = option(
        2000, "number of names that a validation scores (drawn by the seed); null for all", _RECORDS, bounds=_COUNT
    )
    checkpoint_every: int | None = option(
        200, "steps between checkpoints; null for one at the end", _RECORDS, bounds=_COUNT
    )
    keep_checkpoints: int = option(
        2, "number of newest checkpoints that are kept, besides that of the best validation", _RECORDS, bounds=_COUNT
    )
    save_in_background: bool = option(
        True, "write checkpoints while training continues, which takes memory for a copy of the weights and of the "
        "optimizer state", _RECORDS,
    )  # fmt: skip
    on_nan: Literal["stop", "skip"] = option(
        "stop", "reaction to a NaN or infinite loss or gradient, before the weights change: stop, or skip the step "
        "(counted and logged)", _OPTIMIZER,
    )  # fmt: skip
    early_stopping_patience: int | None = option(
        None, "validations in a row without a new best that end the run; null for never", _RUN, bounds=_COUNT
    )
    sample_every: int | None = option(
        None, "steps between sample names (needs a callback that makes them); null for never", _RECORDS, bounds=_COUNT
    )
    attribute_dropout: float = option(
        0.3, "probability that an attribute of a prompt (type, colors, mana value) is left out, drawn in each epoch, "
        "so that any subset may be given at generation; at 0 generate with --guidance 1", _NAMES, bounds=(0, 1),
    )  # fmt: skip
    names_per_prompt: int = option(
        1, "most names in a row with one prompt, whose tokens a step then computes once: fewer tokens to compute (a "
        "third for real names, half for a teacher's), less mixed steps. 1 for names in random order; without effect in "
        "stages that are ordered by length", _NAMES, bounds=_COUNT,
    )  # fmt: skip
    stages: list[Stage] | None = option(
        None, "stages of a curriculum, in order, each with filters of names (types, min_length, max_length, rarities), "
        "an order, epochs and a factor of the learning rate; null for all names all the time", _NAMES,
    )  # fmt: skip
    precision: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "data type: float32, bfloat16 (float32 on processors that compute bfloat16 in software), or auto "
        "(bfloat16 on GPUs that have it)", _DEVICE,
    )  # fmt: skip
    device: str = option("auto", "device: auto, cpu, cuda or cuda:N", _DEVICE)
    deterministic: bool = option(
        False, "use only GPU operations that give the same bits in every run, which may be slower; on a CPU the bits "
        "are the same anyway", _DEVICE,
    )  # fmt: skip
    compile: bool = option(False, "compile the model (torch.compile); pays off on GPUs and long runs", _DEVICE)
    parallel: Literal["ddp", "fsdp", "expert"] = option(
        "ddp", "parallel strategy of several processes: ddp (each has the whole model), fsdp (each has a shard of "
        "every weight, gradient and optimizer state), or expert (each has some of the experts, to which tokens are "
        "sent, and a shard of the rest). All give the same gradients, to rounding, and the same checkpoints", _DEVICE,
    )  # fmt: skip
    tracker: TrackerName = option(
        "none", "experiment tracker: none, wandb (offline unless WANDB_API_KEY is set), tensorboard, or another of "
        "accelerate's. metrics.jsonl is always written", _RECORDS,
    )  # fmt: skip

    @property
    def run_dir(self) -> Path:
        """Folder of the best model, with ``checkpoints/`` below it."""
        return Path(self.output_dir) / (self.run_name or default_run_name())

    @property
    def planned_stages(self) -> Sequence[Stage]:
        """The stages, or the one stage of a run without a curriculum."""
        return self.stages or [Stage("all", epochs=self.max_epochs)]

    def to_dict(self) -> dict[str, Any]:
        """As JSON values: tuples become lists, and numpy's numbers Python's."""
        return dict(json.loads(json.dumps(asdict(self), default=lambda number: number.item())))

    def validate(self) -> None:
        """Checks every value; raises a ValueError with all that is wrong."""
        if problems := wrong_types(self, TrainingConfig) or self._problems():
            raise ValueError("the training configuration is wrong: " + "; ".join(problems))

    def _problems(self) -> list[str]:
        problems = problems_of(self, TrainingConfig)
        problems += [f"lr_scale.{problem}" for problem in problems_of(self.lr_scale, LearningRateScale)]
        for at, beta in enumerate(self.betas):
            if not 0 <= beta < 1:
                problems.append(f"betas[{at}] is {beta}, but it must be from 0 to under 1")
        if self.stages is not None:
            problems += stage_problems(self.stages)
            if self.max_epochs is not None:
                problems.append("max_epochs is for runs without stages, which have their own epochs: set it to null")
        if self.max_steps is None and self.max_minutes is None and self.planned_stages[-1].epochs is None:
            problems.append("nothing ends the run: set max_steps, max_epochs or max_minutes")
        if self.compile and self.parallel != "ddp":
            problems.append(f"compile works with parallel: ddp, not with {self.parallel}: set it to false")
        if self.compile and self.teacher is not None:
            problems.append("compile does not work with a teacher: set it to false")
        if self.schedule == "wsd" and self.warmup_steps < 1 and self.warmup_steps + self.decay_share > 1:
            problems.append(f"warmup_steps {self.warmup_steps} and decay_share {self.decay_share} overlap")
        if self.gradient_accumulation_steps > self.tokens_per_batch:
            problems.append(
                f"gradient_accumulation_steps {self.gradient_accumulation_steps} is more than the "
                f"{self.tokens_per_batch} tokens_per_batch that it divides"
            )
        if not self.output_dir:
            problems.append("output_dir is empty: give a folder")
        name = default_run_name() if self.run_name is None else self.run_name
        if not name or Path(name).name != name or name in (".", ".."):
            problems.append(f"run_name {name!r} must be one folder name")
        elif not name.isprintable():
            problems.append(f"run_name {name!r} has a character that cannot be printed")
        if self.max_minutes is None and self.max_steps is not None and self.warmup_steps > self.max_steps:
            problems.append(f"warmup_steps {self.warmup_steps} is more than max_steps {self.max_steps}")
        return problems


def default_run_name(settings_file: str | Path = "train") -> str:
    """``2026-11-29-quickstart``: never the name of a released model."""
    return f"{date.today()}-{Path(settings_file).stem}"


# ---------------------------------------------------------------------------------------------------------- curriculum


@dataclass(frozen=True)
class Stage:
    """A stage of a curriculum. A name must pass all filters; a filter that is null passes all names.

    Attributes:
        epochs: passes over the names of the stage (fractions are fine); null, for the last stage alone: until the run
            ends by max_steps or max_minutes.
        learning_rate_scale: factor of the schedule's learning rate.
        types: card types, of which a card must have one, such as [Creature, Artifact].
        min_length: shortest name, in characters; ``max_length`` is that of the longest.
        rarities: card rarities: common, uncommon, rare, mythic.
        order: order of the names in each epoch: shuffled, or length (short ones first, equal lengths shuffled).
    """

    name: str
    epochs: float | None = 1.0
    learning_rate_scale: float = 1.0
    types: list[str] | None = None
    min_length: int | None = None
    max_length: int | None = None
    rarities: list[str] | None = None
    order: Literal["shuffled", "length"] = "shuffled"

    def takes(self, card: Card) -> bool:
        """Whether a card passes the filters."""
        return (
            (self.types is None or not set(self.types).isdisjoint(card.types))
            and (self.min_length or 0) <= len(card.name) <= (self.max_length or math.inf)
            and (self.rarities is None or card.rarity in self.rarities)
        )

    def choose(self, cards: Sequence[Card]) -> list[Card]:
        """The cards that pass the filters; raises a ValueError if there are none."""
        if chosen := [card for card in cards if self.takes(card)]:
            return chosen
        if self.rarities is not None and all(card.rarity is None for card in cards):
            raise ValueError(
                f"stage {self.name!r} filters by rarities, which this data does not have (the embedded cards do not): "
                "run `flash-experts prepare --source scryfall`, or leave rarities out"
            )
        raise ValueError(f"no training name passes the filters of stage {self.name!r}: loosen them")

    def problems(self, is_last: bool) -> list[str]:
        """What is wrong with this stage, a phrase each."""
        return [f"stage {self.name!r}: {problem}" for problem in wrong_types(self, Stage) or self._problems(is_last)]

    def _problems(self, is_last: bool) -> list[str]:
        found = [
            *_unknown("types", self.types, TYPES),
            *_unknown("rarities", self.rarities, RARITIES),
            *_unknown("order", [self.order], ("shuffled", "length")),
        ]
        if self.epochs is None and not is_last:
            found.append("epochs is null, but only the last stage may have no end")
        if self.epochs is not None and not 0 < self.epochs < math.inf:
            found.append(f"epochs is {self.epochs}, but it must be more than 0")
        if not 0 < self.learning_rate_scale < math.inf:
            found.append(f"learning_rate_scale is {self.learning_rate_scale}, but it must be more than 0")
        lengths = [length for length in (self.min_length, self.max_length) if length is not None]
        if any(length < 1 for length in lengths) or lengths != sorted(lengths):
            found.append(f"no name has a length from {self.min_length} to {self.max_length}")
        return found


def stage_problems(stages: Sequence[Stage]) -> list[str]:
    """What is wrong with a curriculum, a phrase each."""
    if not stages:
        return ["stages is empty: set it to null for a run without stages"]
    problems = [problem for stage in stages for problem in stage.problems(stage is stages[-1])]
    names = [stage.name for stage in stages]
    problems += [f"two stages are named {name!r}" for name in sorted(set(names)) if names.count(name) > 1]
    return problems


def _unknown(field: str, values: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    if not values:
        return [] if values is None else [f"{field} is an empty list: leave it out for no filter"]
    problems = []
    for value in values:
        if value not in known:
            near = nearest(str(value).title(), known) or nearest(value, known)
            hint = f"did you mean {near!r}?" if near else f"it is one of {', '.join(known)}"
            problems.append(f"{field} has {value!r}: {hint}")
    return problems
