"""A curriculum: which names, when, at which rate; and the search for the size of a step."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, PreTrainedTokenizerFast

from flash_experts.data.cards import Card
from flash_experts.training import Trainer, TrainingConfig
from flash_experts.training.batches import NameBatches
from flash_experts.training.tracking import read_metrics
from flash_experts.training.training_config import Stage
from tests.test_training import TRAIN, VALIDATION, make_model

TYPES = ("Creature", "Instant", "Land")
RARITIES = ("common", "rare")
CARDS = [
    Card(
        name=f"{'Very ' * (index % 5)}Goblin {index}",
        type_line=TYPES[index % 3],
        supertypes=(),
        types=(TYPES[index % 3],),
        subtypes=(),
        colors=("R",),
        mana_value=1,
        source_id=str(index),
        rarity=RARITIES[index % 2],
    )
    for index in range(60)
]


def names_of_steps(batches: NameBatches, steps: Sequence[int], tokenizer: PreTrainedTokenizerFast) -> list[str]:
    encoded = [name for step in steps for name in batches.names_of_step(step)]
    return [tokenizer.decode(name.ids[name.prompt_length : -1]).removeprefix(" ") for name in encoded]


STAGE = st.builds(
    Stage,
    name=st.just("any"),
    epochs=st.sampled_from([1.0, 2.0]),
    types=st.none() | st.lists(st.sampled_from(TYPES), min_size=1, max_size=2),
    min_length=st.none() | st.integers(1, 10),
    max_length=st.none() | st.integers(20, 30),
    rarities=st.none() | st.lists(st.sampled_from(RARITIES), min_size=1, max_size=1),
    order=st.sampled_from(["shuffled", "length"]),
)


@settings(max_examples=25, deadline=None)
@given(stages=st.lists(STAGE, min_size=1, max_size=3), seed=st.integers(0, 3), tokens=st.integers(20, 300))
def test_each_name_of_a_stage_comes_once_in_each_of_its_epochs(
    tokenizer: PreTrainedTokenizerFast, stages: list[Stage], seed: int, tokens: int
) -> None:
    batches = NameBatches(CARDS, tokenizer, TrainingConfig(tokens_per_batch=tokens, seed=seed, stages=stages))
    first = 0
    for stage, planned in zip(stages, batches.plan, strict=True):
        wanted = [
            card.name
            for card in CARDS
            if (stage.types is None or card.types[0] in stage.types)
            and (stage.min_length or 0) <= len(card.name) <= (stage.max_length or 99)
            and (stage.rarities is None or card.rarity in stage.rarities)
        ]
        for _ in range(int(stage.epochs or 0)):
            steps = range(first, first + planned.steps_per_epoch)
            names = names_of_steps(batches, steps, tokenizer)
            assert Counter(names) == Counter(wanted)
            if stage.order == "length":
                assert [len(name) for name in names] == sorted(map(len, names))
            assert all(batches.stage_of(step) is planned for step in steps)
            first += planned.steps_per_epoch
    assert batches.planned_steps == first


def test_a_step_of_a_curriculum_depends_on_seed_and_step_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    stages = [Stage("short", max_length=15), Stage("lands", types=["Land"], epochs=1.5), Stage("all", epochs=None)]
    config = TrainingConfig(tokens_per_batch=100, attribute_dropout=0.5, seed=3, stages=stages)
    walked, jumping = (NameBatches(CARDS, tokenizer, config) for _ in range(2))
    last = walked.plan[-1]
    assert walked.planned_steps is None and last.steps is None
    in_order = [walked.names_of_step(step) for step in range(last.first_step + 2 * last.steps_per_epoch)]
    for step in reversed(range(len(in_order))):
        assert jumping.names_of_step(step) == in_order[step]
    lands = walked.plan[1]
    assert lands.steps == math.ceil(1.5 * lands.steps_per_epoch) and last.first_epoch == 3, "a begun epoch counts"
    epochs = [walked.epochs_done(step) for step in range(len(in_order))]
    assert all(a < b for a, b in pairwise(epochs)) and epochs[last.first_step] == 3


def test_one_stage_of_all_names_is_a_run_without_stages(tokenizer: PreTrainedTokenizerFast) -> None:
    plain = NameBatches(CARDS, tokenizer, TrainingConfig(max_epochs=2, tokens_per_batch=100))
    staged = TrainingConfig(max_epochs=None, stages=[Stage("all", epochs=2)], tokens_per_batch=100)
    one = NameBatches(CARDS, tokenizer, staged)
    assert one.planned_steps == plain.planned_steps == 2 * plain.plan[0].steps_per_epoch
    for step in range(plain.plan[0].steps_per_epoch * 2):
        assert one.names_of_step(step) == plain.names_of_step(step)


# ------------------------------------------------------------------------------------------------------------- the run


@pytest.fixture
def config(tmp_path: Path) -> TrainingConfig:
    """Short names at twice the rate, then all of them."""
    return TrainingConfig(
        output_dir=str(tmp_path),
        run_name="straight",
        seed=1,
        max_epochs=None,
        stages=[
            Stage("short", max_length=10, epochs=2, learning_rate_scale=2.0),
            Stage("all", epochs=1),
        ],
        tokens_per_batch=75,
        learning_rate=1e-2,
        schedule="constant",
        warmup_steps=0,
        log_every=1,
        eval_every=None,
        checkpoint_every=1,
        keep_checkpoints=99,
        device="cpu",
    )


def test_stages_have_their_rates_and_are_announced(
    dense_config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainingConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    trainer = Trainer(make_model(dense_config), tokenizer, TRAIN, VALIDATION, config)
    short, every = trainer.batches.plan
    result = trainer.train()
    assert result.reason == "steps" and result.step == trainer.batches.planned_steps
    rates = [line["lr"] for line in read_metrics(config.run_dir / "metrics.jsonl", "train")]
    assert rates == pytest.approx([0.02] * every.first_step + [0.01] * every.steps_per_epoch)
    begun = read_metrics(config.run_dir / "metrics.jsonl", "stage")
    assert [(line["step"], line["stage"]) for line in begun] == [(1, "short"), (every.first_step + 1, "all")]
    err = capsys.readouterr().err
    assert f"stage 1 of 2, short: {len(short.cards)} names" in err and "stage 2 of 2, all: 48 names" in err


@pytest.mark.parametrize("where", ["amid the first", "at the border", "amid the second"])
def test_a_run_resumed_in_a_stage_is_the_uninterrupted_run(
    dense_config: GPT2Config, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig, where: str
) -> None:
    model = make_model(dense_config)
    trainer = Trainer(model, tokenizer, TRAIN, [], config)
    trainer.train()
    border = trainer.batches.plan[1].first_step
    step = {"amid the first": border - 1, "at the border": border, "amid the second": border + 2}[where]
    resumed = make_model(dense_config, seed=5)
    again = replace(config, run_name="resumed")
    checkpoint = config.run_dir / f"checkpoints/step-{step:06d}"
    Trainer(resumed, tokenizer, TRAIN, [], again).train(resume=checkpoint)
    assert all(map(torch.equal, model.parameters(), resumed.parameters()))
    measured = ("seconds", "tokens_per_second", "eta_seconds", "peak_memory_gib")
    one, two = (
        [
            {key: value for key, value in line.items() if key not in measured}
            for line in read_metrics(run.run_dir / "metrics.jsonl")
            if line["step"] > step
        ]
        for run in (config, again)
    )
    assert one == two and len(one) > 2


# ---------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "stages is empty"),
        ([Stage("a", types=["creature"])], "stage 'a': types has 'creature': did you mean 'Creature'?"),
        ([Stage("a", rarities=["epic"])], "it is one of common, uncommon, rare, mythic"),
        ([Stage("a", rarities=[])], "rarities is an empty list"),
        ([Stage("a", epochs=None), Stage("b")], "only the last stage"),
        ([Stage("a", epochs=0)], "epochs is 0, but it must be more than 0"),
        ([Stage("a", min_length=9, max_length=3)], "no name has a length from 9 to 3"),
        ([Stage("a", learning_rate_scale=-1)], "learning_rate_scale is -1"),
        ([Stage("a"), Stage("a")], "two stages are named 'a'"),
        ([Stage("a", order="random")], "order has 'random'"),  # type: ignore[arg-type]
        ([Stage("a", epochs=None)], "nothing ends the run"),
    ],
)
def test_nonsense_is_one_line(stages: list[Stage], message: str) -> None:
    with pytest.raises(ValueError, match="wrong") as caught:
        TrainingConfig(max_epochs=None, stages=stages).validate()
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_epochs_belong_to_the_stages() -> None:
    with pytest.raises(ValueError, match="max_epochs is for runs without stages"):
        TrainingConfig(max_epochs=3, stages=[Stage("a")]).validate()


def test_a_stage_without_names_is_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match=r"no training name passes the filters of stage 'long'"):
        NameBatches(CARDS, tokenizer, TrainingConfig(stages=[Stage("long", min_length=500)]))
    without_rarities = [replace(card, rarity=None) for card in CARDS]
    with pytest.raises(ValueError, match=r"rarities, which this data does not have.*scryfall"):
        NameBatches(without_rarities, tokenizer, TrainingConfig(stages=[Stage("rare", rarities=["rare"])]))


def test_too_few_names_for_the_micro_batches_of_a_later_stage_end_the_run_before_it_begins(
    tokenizer: PreTrainedTokenizerFast, dense_config: GPT2Config, tmp_path: Path
) -> None:
    stages = [Stage("all"), Stage("two", max_length=9)]
    few = [card for card in TRAIN if len(card.name) <= 9]
    config = TrainingConfig(
        output_dir=str(tmp_path), run_name="few", max_epochs=None, stages=stages, tokens_per_batch=400, device="cpu",
        gradient_accumulation_steps=len(few) + 1,
    )  # fmt: skip
    with pytest.raises(ValueError, match=rf"a step of stage 'two' has {len(few)} names.*lower one of them"):
        Trainer(make_model(dense_config), tokenizer, TRAIN, VALIDATION, config)
    NameBatches(TRAIN, tokenizer, replace(config, max_steps=1)).check_micro_batches(len(few) + 1)  # never reached
    small = NameBatches(TRAIN, tokenizer, TrainingConfig(tokens_per_batch=30))
    with pytest.raises(ValueError, match=r"a step has \d names, too few for 9 micro.*: raise tokens_per_batch"):
        small.check_micro_batches(9)
