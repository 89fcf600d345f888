"""NameGenerator: its promises to users, whatever the model wants to say."""

from __future__ import annotations

import random
import string
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.names import normal_form
from flash_experts.generation import GeneratedName, NameFilter, NameGenerator, format_name

REAL = ["Goblin Guide", "Lightning Bolt", "Jötun Grunt", "Lim-Dûl's Vault", "Serra Angel", "Wrath of God"]
NEW = ["Goblin Ring", "Serra Bolt", "Wrath of Elves", "Giant Ritual", "Black Dragon", "Shivan Growth"]


@pytest.fixture
def generator(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> NameGenerator:
    return NameGenerator(model, tokenizer, known_names=REAL)


def texts(names: list[GeneratedName]) -> list[str]:
    return [name.text for name in names]


def quietly(generator: NameGenerator, *args: object, **kwargs: object) -> list[GeneratedName]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return generator.generate(*args, **kwargs)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**63 - 1), preset=st.sampled_from(["conservative", "balanced", "creative"]))
def test_a_model_that_wants_real_names_gives_none(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast, seed: int, preset: str
) -> None:
    model = parrot([*REAL, "goblin guide", "JÖTUN GRUNT", "Lim-Dul's Vault", "Serra-Angel"])
    assert set(texts(quietly(NameGenerator(model, tokenizer, []), 5, seed=seed))) & set(REAL), "it wants them"

    names = quietly(NameGenerator(model, tokenizer, REAL), 5, preset=preset, seed=seed)

    assert not {normal_form(name.text) for name in names} & {normal_form(name) for name in REAL}
    assert all(name.similarity < 1 and name.nearest_card in REAL for name in names)


def test_a_model_with_few_names_gives_those_and_a_warning(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = NameGenerator(parrot(NEW), tokenizer, REAL)
    with pytest.warns(UserWarning, match=r"found \d+ of 50 names"):
        names = generator.generate(50, temperature=0.5, top_k=6, seed=1)
    assert set(NEW) <= set(texts(names))
    assert generator.generate(3, temperature=0.5, top_k=6, seed=1) == names[:3]


def test_names_are_distinct_formatted_and_complete(generator: NameGenerator) -> None:
    names = generator.generate(40, type_line="Creature — Goblin", colors="R", mana_value=3, seed=0)
    assert len(names) == 40
    assert len({normal_form(name.text) for name in names}) == 40
    for name in names:
        assert name.text == format_name(name.text) and name.text
        assert name.log_prob < 0 and 0 <= name.similarity < 1


def test_same_seed_same_names_whatever_the_batch(generator: NameGenerator) -> None:
    names = generator.generate(24, seed=5, top_p=0.9, batch_size=64)
    for size in (1, 7, 24):
        again = generator.generate(24, seed=5, top_p=0.9, batch_size=size)
        assert texts(again) == texts(names)
        assert [name.log_prob for name in again] == pytest.approx([name.log_prob for name in names], abs=1e-3)
    assert texts(generator.generate(6, seed=5, top_p=0.9)) == texts(names)[:6]
    assert texts(generator.generate(24, seed=6, top_p=0.9)) != texts(names)


def test_without_a_seed_names_differ(generator: NameGenerator) -> None:
    assert texts(generator.generate(4)) != texts(generator.generate(4))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    prefix=st.none() | st.sampled_from(["Gob", "goblin", "Serra A", "Jö", "q", "Wrath of", "Vault 7", "Goblin "]),
    max_words=st.none() | st.integers(3, 5),
    max_length=st.none() | st.integers(12, 30),
    seed=st.integers(0, 1000),
)
def test_limits_hold(
    generator: NameGenerator, prefix: str | None, max_words: int | None, max_length: int | None, seed: int
) -> None:
    names = quietly(
        generator,
        6,
        starts_with=prefix,
        max_words=max_words,
        max_length=max_length,
        seed=seed,
        preset="creative",
    )
    assert names
    for name in names:
        assert name.text.casefold().startswith((prefix or "").casefold())
        assert len(name.text.split()) <= (max_words or 99)
        assert len(name.text) <= (max_length or 40)


def test_one_word_and_banned_words(parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast) -> None:
    generator = NameGenerator(parrot(NEW), tokenizer, REAL)
    assert all(" " not in text for text in texts(quietly(generator, 5, max_words=1, seed=0)))
    banned = texts(quietly(generator, 20, banned_words=["goblin", "DARK"], seed=0, temperature=0.7))
    assert banned and not any({"goblin", "dark"} & set(text.lower().split()) for text in banned)


def test_own_filters(generator: NameGenerator) -> None:
    class NoLetterE(NameFilter):
        def rule(self, name: str) -> str:
            return "no e"

        def forbidden(self, rule: object) -> torch.Tensor:
            return self.vocabulary.where(lambda text: "e" in text.lower())

    assert not any("e" in text.lower() for text in texts(generator.generate(10, seed=0, filters=[NoLetterE])))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"starts_with": "Goblin", "max_length": 3}, "more than max_length 3"),
        ({"starts_with": "Goblin of the", "max_words": 2}, "more words than max_words 2"),
        ({"starts_with": "  "}, "starts_with is blank"),
        ({"max_words": 0}, "max_words"),
        ({"max_length": 0}, "max_length"),
        ({"preset": "wild"}, "unknown preset"),
        ({"temperature": 0}, "temperature"),
        ({"count": -1}, "count"),
        ({"batch_size": 0}, "batch_size"),
        ({"seed": -1}, "seed"),
        ({"starts_with": "Elf", "max_length": 3, "banned_words": ["elf"]}, "no name can be made"),
    ],
)
def test_bad_and_contradictory_arguments(generator: NameGenerator, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generator.generate(**arguments)


def test_no_names_wanted(generator: NameGenerator) -> None:
    assert generator.generate(0) == []


def test_a_live_model_and_all_global_generators_are_left_alone(generator: NameGenerator) -> None:
    model = generator.model.train()
    torch.manual_seed(1)
    random.seed(1)
    np.random.seed(1)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    names = generator.generate(8, seed=3)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    assert all(module.training for module in model.modules())
    assert texts(NameGenerator(model.eval(), generator.tokenizer, REAL).generate(8, seed=3)) == texts(names)
    model.train()(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, 3]])).loss.backward()


def test_from_pretrained_round_trip(generator: NameGenerator, tmp_path: Path) -> None:
    generator.model.save_pretrained(tmp_path)
    generator.tokenizer.save_pretrained(tmp_path)
    loaded = NameGenerator.from_pretrained(tmp_path, device="cpu")
    names = loaded.generate(5, seed=0)
    assert texts(names) == texts(NameGenerator(generator.model, generator.tokenizer).generate(5, seed=0))
    assert len(loaded.known.names) > 30_000
    with pytest.raises(ValueError, match="nowhere"):
        NameGenerator.from_pretrained(tmp_path / "nowhere")


def test_prompt_too_long_for_the_model(generator: NameGenerator) -> None:
    generator.model.config.n_positions = 4
    with pytest.raises(ValueError, match="prompt takes"):
        generator.generate(1, type_line="Legendary Creature — Goblin Warrior")


def test_only_card_letters_come_out(generator: NameGenerator) -> None:
    letters = set(string.ascii_letters + " ,'-:!?áàâäéèêëíîïñóôöúûüÁÂÄÉÍÎÓÖÚÛÜ")
    assert all(set(text) <= letters for text in texts(generator.generate(40, preset="creative", seed=2)))
