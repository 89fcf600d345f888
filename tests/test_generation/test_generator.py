"""NameGenerator: its guarantees, whatever the model prefers."""

from __future__ import annotations

import random
import re
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
from flash_experts.data.prompts import Attributes
from flash_experts.generation import (
    CARD_ALPHABET,
    GeneratedName,
    NameFilter,
    NameGenerator,
    NameRequest,
    format_name,
)
from flash_experts.generation.filters.base import NoTokenLeftError
from flash_experts.generation.generator import NameSearch
from flash_experts.generation.reranker import Reranker
from flash_experts.generation.sampling import stream_seed
from flash_experts.generation.text_rules import alliterates

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
    free = quietly(NameGenerator(model, tokenizer, []), 5, seed=seed, quality="fast")
    assert set(texts(free)) & set(REAL), "it wants them"

    names = quietly(NameGenerator(model, tokenizer, REAL), 5, preset=preset, seed=seed, quality="fast")

    assert not {normal_form(name.text) for name in names} & {normal_form(name) for name in REAL}
    assert all(name.similarity < 1 and name.nearest_card in REAL for name in names)


def test_a_model_with_few_names_gives_those_and_a_warning(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = NameGenerator(parrot(NEW), tokenizer, REAL)
    with pytest.warns(UserWarning, match=r"found \d+ of 50 names"):
        names = generator.generate(50, temperature=0.5, top_k=6, top_p=0.97, seed=1)
    assert set(NEW) <= set(texts(names))
    assert generator.generate(3, temperature=0.5, top_k=6, top_p=0.97, seed=1) == names[:3]


@pytest.mark.parametrize("batch_size", [5, 256])
def test_a_search_ends_soon_after_the_only_name(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast, batch_size: int
) -> None:
    generator = NameGenerator(parrot(NEW[:1]), tokenizer, REAL)
    with pytest.warns(UserWarning, match=r"found 1 of 3 names: there are no others, as \d+ tries show"):
        names = generator.generate(3, temperature=0.1, top_k=1, seed=1, batch_size=batch_size)
    assert texts(names) == NEW[:1]


@pytest.mark.parametrize("batch_size", [7, 256])
def test_a_search_ends_where_hardly_any_try_gives_a_name(generator: NameGenerator, batch_size: int) -> None:
    class RareStart(NameFilter):
        def rule(self, name: str) -> str | None:
            return "dropped" if name[1:2].strip("Q") else None

        def forbidden(self, rule: object) -> torch.Tensor:
            return torch.ones(self.vocabulary.size, dtype=torch.bool)

    asked = {"filters": [RareStart], "quality": "fast", "seed": 2, "batch_size": batch_size}
    with pytest.warns(UserWarning, match="of 200 names: (the last|only)"):
        names = generator.generate(200, **asked)
    assert 0 < len(names) < 200
    assert texts(names) == texts(quietly(generator, 200, **asked | {"batch_size": 31}))


def test_the_given_text_alone_is_no_name(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = NameGenerator(parrot(["Goblin Ring", "Goblin Ring Mage"]), tokenizer, REAL)
    asked = {"temperature": 0.5, "quality": "fast", "seed": 1}
    assert "Goblin Ring" in texts(quietly(generator, 5, **asked))
    for rule, text in {"starts_with": "goblin Ring", "contains": " Goblin Ring"}.items():
        names = texts(quietly(generator, 5, **asked, **{rule: text}))
        assert names and "Goblin Ring" not in names
    assert not any(
        NameRequest.of(**{rule: "ring"}).held_by("Ring") for rule in ("starts_with", "ends_with", "contains")
    )
    assert NameRequest.of(starts_with="Goblin").held_by("Goblins")


def test_a_given_text_as_long_as_the_longest_name_is_not_tried(
    generator: NameGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NameSearch, "_decode", None)
    with pytest.raises(NoTokenLeftError, match="no name can be made with starts_with='ZZZZQQ', words=1, max_length=6"):
        generator.generate(3, starts_with="ZZZZQQ", words=1, max_length=6)


def test_a_model_that_never_ends_a_name_gives_names_unless_a_length_is_asked_for(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast
) -> None:
    """As at the start of training, where sample names are drawn."""
    generator = NameGenerator(parrot(["Goblin" + "s" * 80, "Serra" + "s" * 80]), tokenizer, REAL)
    names = texts(quietly(generator, 2, temperature=0.5, seed=0))
    assert len(names) == 2 and max(map(len, names)) == 40
    with pytest.raises(ValueError, match="no name can be made"):
        generator.generate(2, temperature=0.1, max_length=20, seed=0)


def test_names_are_distinct_formatted_and_complete(generator: NameGenerator) -> None:
    names = generator.generate(40, type_line="Creature — Goblin", colors="R", mana_value=3, seed=0)
    assert len(names) == 40
    assert len({normal_form(name.text) for name in names}) == 40
    for name in names:
        assert name.text == format_name(name.text) and name.text
        assert name.log_prob < 0 and 0 <= name.similarity < 1


def test_same_seed_same_names_whatever_the_batch(generator: NameGenerator) -> None:
    names = generator.generate(16, seed=5, top_p=0.9, batch_size=64)
    for size in (1, 7):
        again = generator.generate(16, seed=5, top_p=0.9, batch_size=size)
        assert texts(again) == texts(names)
        assert [name.log_prob for name in again] == pytest.approx([name.log_prob for name in names], abs=1e-3)
    assert texts(generator.generate(6, seed=5, top_p=0.9)) == texts(names)[:6]
    assert texts(generator.generate(16, seed=6, top_p=0.9)) != texts(names)


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
        quality="fast",
    )
    assert names
    for name in names:
        assert name.text.casefold().startswith((prefix or "").casefold())
        assert len(name.text.split()) <= (max_words or 99)
        assert len(name.text) <= (max_length or 40)


def test_one_word_and_banned_words(parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast) -> None:
    generator = NameGenerator(parrot([*NEW, "Goblins", "Shivan", "Elves"]), tokenizer, REAL)
    single = texts(quietly(generator, 5, max_words=1, seed=0))
    assert single and all(" " not in text for text in single)
    banned = texts(quietly(generator, 20, banned_words=["goblin", "DARK"], seed=0, temperature=0.7))
    assert banned and not any({"goblin", "dark"} & set(text.lower().split()) for text in banned)


def test_own_filters(generator: NameGenerator) -> None:
    class NoLetterE(NameFilter):
        def rule(self, name: str) -> str:
            return "no e"

        def forbidden(self, rule: object) -> torch.Tensor:
            return self.vocabulary.where(lambda text: "e" in text.lower())

    assert not any("e" in text.lower() for text in texts(generator.generate(10, seed=0, filters=[NoLetterE])))


HELD = {
    "ends_with": lambda value, text: text.lower().endswith(value.lower().strip()),
    "contains": lambda value, text: value.lower() in text.lower(),
    "words": lambda value, text: len(text.split()) == value,
    "min_words": lambda value, text: len(text.split()) >= value,
    "min_length": lambda value, text: len(text) >= value,
    "alliterate": lambda value, text: not value or alliterates(text),
    "regex": lambda value, text: re.fullmatch(value, text),
}


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    asked=st.fixed_dictionaries(
        {},
        optional={
            "ends_with": st.sampled_from(["ing", " Elf", "storm", "ûl"]),
            "contains": st.sampled_from(["goblin", "of the", "z"]),
            "min_words": st.integers(1, 3),
            "min_length": st.integers(1, 20),
            "alliterate": st.booleans(),
            "regex": st.sampled_from([r"[A-Z].*[a-z].*", r"[^,]*"]),
        },
    ),
    seed=st.integers(0, 1000),
)
def test_all_requested_rules_hold(generator: NameGenerator, asked: dict, seed: int) -> None:
    """Even for a random model."""
    try:
        names = quietly(generator, 3, **asked, seed=seed, quality="fast")
    except ValueError as error:  # such as alliteration with letters that do not fit
        assert "no name" in str(error)
        return
    for name in names:
        assert all(HELD[key](value, name.text) for key, value in asked.items()), name
        assert len(name.text) <= 40


def test_swear_words_come_out_only_when_allowed(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast
) -> None:
    word = "bast" + "ard"
    generator = NameGenerator(parrot([f"Goblin {word}", "Goblin Ring"]), tokenizer, REAL)
    swearing = texts(quietly(generator, 2, temperature=0.5, allow_profanity=True, seed=0))
    assert f"Goblin {word.title()}" in swearing
    assert word not in " ".join(texts(quietly(generator, 8, temperature=0.5, seed=0))).lower().split()


def test_real_places_come_out_only_when_allowed(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = NameGenerator(parrot(["Elf of Norway", "Goblin Ring"]), tokenizer, REAL)
    assert "Elf of Norway" in texts(quietly(generator, 2, temperature=0.5, allow_real_places=True, seed=0))
    assert "norway" not in " ".join(texts(quietly(generator, 8, temperature=0.5, seed=0))).lower()


def test_near_duplicates_are_left_out(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast
) -> None:
    generator = NameGenerator(parrot(["Goblin Guides", "Serra Angles", *NEW]), tokenizer, REAL)
    assert "Goblin Guides" in texts(quietly(generator, 20, temperature=0.5, top_k=6, seed=0))
    far = quietly(generator, 20, temperature=0.5, top_k=6, min_distance=0.2, seed=0)
    assert far and all(name.similarity <= 0.8 for name in far)
    assert "Goblin Guides" not in texts(far)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    real=st.sampled_from(REAL), place=st.integers(1, 6), letter=st.sampled_from("aeklnt"), seed=st.integers(0, 2**40)
)
def test_names_one_letter_from_a_real_card_are_left_out(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast, real: str, place: int, letter: str,
    seed: int,
) -> None:  # fmt: skip
    near = real[:place] + letter + real[place:]
    generator = NameGenerator(parrot([real, near, *NEW]), tokenizer, REAL)
    assert all(name.similarity <= 0.75 for name in quietly(generator, 4, min_distance=0.25, seed=seed, quality="fast"))


def test_names_are_streamed_as_they_are_found(generator: NameGenerator) -> None:
    calls: list[int] = []
    generator.model.register_forward_hook(lambda *_: calls.append(1))
    model = generator.model.train()
    stream = generator.stream(9, seed=4, batch_size=2)
    first = next(stream)
    steps_of_one_batch = len(calls)
    assert model.training and torch.is_grad_enabled(), "between names the model is as it was"
    rest = list(stream)
    assert len(calls) > steps_of_one_batch
    assert [first, *rest] == generator.generate(9, seed=4, batch_size=2)
    with pytest.raises(ValueError, match="max_words"):
        generator.stream(1, max_words=0)  # before the first name is asked for


def test_the_best_of_the_candidates_so_far_are_chosen_whatever_the_batch_size(generator: NameGenerator) -> None:
    """One after every four candidates, from all that wait: by the reranker alone, fed the same candidates."""
    candidates = generator.generate(40, seed=9, colors="R", quality="fast")
    reranker: Reranker[GeneratedName] = Reranker(Attributes.parse(None, "R", None))
    expected = []
    for start in range(0, 40, 4):
        reranker.add(candidates[start : start + 4])
        chosen = reranker.choose()
        assert chosen is not None
        expected.append(chosen.text)
    for size in (1, 7, 256):
        assert texts(generator.generate(10, seed=9, colors="R", best_of=4, batch_size=size)) == expected
    assert texts(generator.generate(6, seed=9, colors="R", best_of=4)) == expected[:6], "a larger count only adds names"
    assert [name.score for name in candidates] == [name.log_prob / (len(name.text) + 1) for name in candidates]


def test_quality_sets_the_number_of_candidates(generator: NameGenerator) -> None:
    for quality, candidates in {"fast": 1, "good": 8, "best": 32}.items():
        assert generator.generate(2, seed=9, quality=quality) == generator.generate(2, seed=9, best_of=candidates)
    assert generator.generate(2, seed=9) == generator.generate(2, seed=9, quality="good")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("Serra ___", "Serra .+"),
        ("___, the Bolt", ".+, the Bolt"),
        ("___ of ____", ".+ of .+"),
        ("serra ___ ring", "Serra .+ Ring"),
        ("___-eye Bolt", ".+-[eE]ye Bolt"),
        ("S___t", "S.+t"),
    ],
)
def test_gaps_of_a_pattern_are_filled(generator: NameGenerator, pattern: str, expected: str) -> None:
    """Its own letters stay as given or become those of cards: "STorm" is neither."""
    names = generator.generate(12, seed=3, pattern=pattern, quality="fast")
    assert len(names) == 12 and all(re.fullmatch(expected, name.text) for name in names), texts(names)


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
    with pytest.raises(ValueError, match=r"load one from a folder with NameGenerator\.from_pretrained"):
        NameGenerator(str(tmp_path), generator.tokenizer)


def test_prompt_too_long_for_the_model(generator: NameGenerator) -> None:
    generator.model.config.n_positions = 4
    with pytest.raises(ValueError, match="prompt takes"):
        generator.generate(1, type_line="Legendary Creature — Goblin Warrior")


def test_each_prompt_has_random_numbers_of_its_own() -> None:
    prompts = [[0], [0, 0], [0, 1], [1, 0], [0, 2**31]]
    seeds = {stream_seed(seed, prompt) for seed in (0, 1, 2**63 - 1) for prompt in prompts}
    assert len(seeds) == 15
    assert stream_seed(7, [1, 2]) == stream_seed(7, (1, 2))


def test_only_card_letters_come_out(generator: NameGenerator) -> None:
    # Seed 2 has a name that ends in "? ôx", whose last word becomes "Ôx".
    assert all(set(text) <= CARD_ALPHABET for text in texts(generator.generate(40, preset="creative", seed=2)))


def test_the_alphabet_has_the_capital_of_each_letter() -> None:
    assert {letter.upper() for letter in CARD_ALPHABET} <= CARD_ALPHABET
    assert set(string.ascii_letters + " ,'-:!?áàâäéèêëíîïñóôöúûüÁÀÂÄÉÈÊËÍÎÏÑÓÔÖÚÛÜ") >= CARD_ALPHABET
