"""The order of names: a pure function of seed and step, complete, new in each epoch."""

from __future__ import annotations

import copy
import math
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from flash_experts.data.cards import Card
from flash_experts.training.batches import NameBatches, split_evenly
from flash_experts.training.trainer import Trainer
from flash_experts.training.training_config import Stage, TrainingConfig
from tests.test_training import make_model


def make_cards(count: int) -> list[Card]:
    return [
        Card(
            name=f"Goblin {'Guide ' * (index % 4)}{index}",
            type_line="Legendary Creature — Goblin",
            supertypes=("Legendary",),
            types=("Creature",),
            subtypes=("Goblin",),
            colors=("R",),
            mana_value=index % 7,
            source_id=str(index),
        )
        for index in range(count)
    ]


def make_batches(
    cards: list[Card], tokenizer: PreTrainedTokenizerFast, tokens: int, dropout: float, seed: int, **options: Any
) -> NameBatches:
    config = TrainingConfig(tokens_per_batch=tokens, attribute_dropout=dropout, seed=seed, **options)
    return NameBatches(cards, tokenizer, config)


def names_of_epoch(batches: NameBatches, epoch: int, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Of a run without stages."""
    per_epoch = batches.plan[0].steps_per_epoch
    steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
    encoded = [name for step in steps for name in batches.names_of_step(step)]
    return [tokenizer.decode(name.ids[name.prompt_length : -1]).removeprefix(" ") for name in encoded]


@given(st.lists(st.integers(1, 30), min_size=1, max_size=200), st.data())
def test_split_evenly_covers_all_in_order_and_is_even(lengths: list[int], data: st.DataObject) -> None:
    parts = data.draw(st.integers(1, len(lengths)))
    runs = split_evenly(lengths, parts)
    assert len(runs) == parts and all(len(run) > 0 for run in runs)
    assert [index for run in runs for index in run] == list(range(len(lengths)))
    if sum(lengths) / parts >= 2 * max(lengths):
        assert all(abs(sum(lengths[i] for i in run) - sum(lengths) / parts) <= max(lengths) for run in runs)


def test_split_evenly_by_hand() -> None:
    assert split_evenly([5, 1, 1, 1, 4], 3) == [range(0, 1), range(1, 4), range(4, 5)]


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 60),
    tokens=st.integers(10, 400),
    dropout=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 3),
    order=st.sampled_from(["shuffled", "length"]),
)
def test_each_name_comes_once_in_each_epoch(
    tokenizer: PreTrainedTokenizerFast, count: int, tokens: int, dropout: float, seed: int, order: Any
) -> None:
    cards = make_cards(count)
    batches = make_batches(cards, tokenizer, tokens, dropout, seed, stages=[Stage("all", epochs=None, order=order)])
    for epoch in (0, 1):
        assert Counter(names_of_epoch(batches, epoch, tokenizer)) == Counter(card.name for card in cards)


def test_a_step_depends_on_seed_and_step_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    cards = make_cards(50)
    walked = make_batches(cards, tokenizer, 100, 0.5, 3)
    in_order = [walked.names_of_step(step) for step in range(3 * walked.plan[0].steps_per_epoch)]
    jumping = make_batches(cards, tokenizer, 100, 0.5, 3)
    for step in reversed(range(len(in_order))):
        assert jumping.names_of_step(step) == in_order[step]
    other_seed = make_batches(cards, tokenizer, 100, 0.5, 4)
    assert names_of_epoch(other_seed, 0, tokenizer) != names_of_epoch(walked, 0, tokenizer)


def test_epochs_differ_in_order_and_in_prompts(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = make_batches(make_cards(50), tokenizer, 100, 0.5, 0)
    assert names_of_epoch(batches, 0, tokenizer) != names_of_epoch(batches, 1, tokenizer)
    per_epoch = batches.plan[0].steps_per_epoch
    lengths = []
    for epoch in (0, 1):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        names = sorted(name.ids for step in steps for name in batches.names_of_step(step))
        lengths.append(sum(map(len, names)))
    assert lengths[0] != lengths[1]


@settings(max_examples=15, deadline=None)
@given(most=st.integers(1, 9), seed=st.integers(0, 3))
def test_names_of_one_prompt_come_in_runs(tokenizer: PreTrainedTokenizerFast, most: int, seed: int) -> None:
    cards = make_cards(60)
    batches = make_batches(cards, tokenizer, 10_000, 0.0, seed, names_per_prompt=most)
    assert Counter(names_of_epoch(batches, 0, tokenizer)) == Counter(card.name for card in cards)
    prompts = [name.ids[: name.prompt_length] for name in batches.names_of_step(0)]
    runs = sum(math.ceil(count / most) for count in Counter(prompts).values())
    if most > 1:  # adjacent runs may have the same prompt
        assert 1 + sum(one != other for one, other in pairwise(prompts)) <= runs
    else:
        assert names_of_epoch(batches, 0, tokenizer) == names_of_epoch(
            make_batches(cards, tokenizer, 10_000, 0.0, seed), 0, tokenizer
        )
    assert names_of_epoch(batches, 1, tokenizer) != names_of_epoch(batches, 0, tokenizer)


def test_batches_have_about_the_tokens_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = make_batches(make_cards(400), tokenizer, 200, 0.3, 0)
    for step in range(2 * batches.plan[0].steps_per_epoch):
        assert 160 <= sum(name.num_inputs for name in batches.names_of_step(step)) <= 240


def test_rows_cut_the_same_names_for_any_number_of_them(tokenizer: PreTrainedTokenizerFast) -> None:
    batches = make_batches(make_cards(60), tokenizer, 200, 0.3, 0)
    for rows in (1, 2, 5):
        assert [name for row in batches.micro_batches_of_step(1, rows) for name in row] == batches.names_of_step(1)
    with pytest.raises(ValueError, match="raise tokens_per_batch"):
        batches.micro_batches_of_step(0, 50)


@pytest.mark.parametrize(("epochs", "steps"), [(1.12, 28), (1.0, 25), (0.01, 1), (1e-9, 1), (1.13, 29)])
def test_a_fraction_of_an_epoch_is_rounded_up_to_steps(
    tokenizer: PreTrainedTokenizerFast, epochs: float, steps: int
) -> None:
    """1.12 * 25 is 28.000000000000004 in floating point."""
    batches = make_batches(make_cards(25), tokenizer, 1, 0.3, 0, max_epochs=epochs)
    assert batches.plan[0].steps_per_epoch == 25 and batches.planned_steps == steps


def test_names_of_equal_length_are_shuffled_anew_in_each_epoch(tokenizer: PreTrainedTokenizerFast) -> None:
    cards = [replace(card, name=f"{letter}ob") for letter, card in zip("GBMNRSTW", make_cards(8), strict=True)]
    by_length = [Stage("all", epochs=None, order="length")]
    batches = make_batches(cards, tokenizer, 1000, 0.0, 0, stages=by_length)
    assert batches.plan[0].steps_per_epoch == 1
    assert len({tuple(name.ids for name in batches.names_of_step(epoch)) for epoch in range(4)}) > 1


def test_no_names_is_an_error_with_advice(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="prepare"):
        make_batches([], tokenizer, 200, 0.3, 0)


def test_a_model_that_cannot_keep_packed_names_apart_is_named(
    dense_config: GPT2Config,
    tokenizer: PreTrainedTokenizerFast,
    config: TrainingConfig,
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_hidden_layers": 1}
    qwen = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=4, vocab_size=len(tokenizer)))
    sdpa = make_model(dense_config)
    sdpa.set_attn_implementation("sdpa")
    shared = replace(config, names_per_prompt=2)
    for model, family in ((qwen, "qwen2"), (sdpa, "gpt2")):
        with pytest.raises(ValueError, match=f"names_per_prompt is 2, .* not this {family} model: set it to 1"):
            Trainer(model, tokenizer, make_cards(9), [], shared)
        Trainer(model, tokenizer, make_cards(9), [], config)
        warned = "a qwen2 model may not separate names in a packed sequence" in capsys.readouterr().err
        assert warned is (family == "qwen2")
    Trainer(make_model(dense_config), tokenizer, make_cards(9), [], shared)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ("bos_token", "the tokenizer has no BOS token: set tokenizer.bos_token"),
        ("eos_token", "the tokenizer has no EOS token: set tokenizer.eos_token"),
        ("tokens", "the tokenizer has 301 tokens but the model only 300: they do not belong together"),
        ("cards", "names are given as cards, not as str: read them with"),
    ],
)
def test_what_does_not_belong_to_the_model_is_refused_in_a_sentence(
    dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, config: TrainingConfig, spoil: str, message: str
) -> None:
    own, cards = copy.deepcopy(tokenizer), list[Any](make_cards(9))
    if spoil == "tokens":
        own.add_tokens(["Goblinguide"])
    elif spoil == "cards":
        cards = [card.name for card in cards]
    else:
        setattr(own, spoil, None)
    with pytest.raises(ValueError, match=re.escape(message)):
        Trainer(dense, own, cards, [], config)
    assert not config.run_dir.exists()
