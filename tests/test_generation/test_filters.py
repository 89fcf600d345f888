"""Token filters: on texts, inside model.generate, and at dead ends."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.cards import known_names
from flash_experts.data.names import normal_form
from flash_experts.generation import (
    AllowedCharacters,
    BannedWords,
    KnownNameFilter,
    MaxLength,
    MaxWords,
    NameFilter,
    NameVocabulary,
    NoRepeatedWords,
    NoTokenLeftError,
    StartsWith,
    WellFormed,
)

REAL_NAMES = [
    "Goblin Guide", "Lim-Dûl's Vault", "Jötun Grunt", "Niv-Mizzet, Parun", "Will-o'-the-Wisp", "Wrath of God",
    "Soldier On", "Kaboom!", "Light 'Em Up", "Circle of Protection: Red", "Fire", "Ach! Hans, Run!", "Dandân",
]  # fmt: skip


def admits(name_filter: NameFilter, text: str, ids: list[int] | None = None) -> bool:
    """Whether a filter lets a text be said to its end, in the tokenizer's own tokens or in given ones."""
    vocabulary = name_filter.vocabulary
    ids = vocabulary.encode(text) if ids is None else ids
    zeros = torch.zeros(1, vocabulary.size)
    return all(
        name_filter.mask(torch.tensor([ids[:place]], dtype=torch.long), zeros)[0, token] == 0
        for place, token in enumerate([*ids, vocabulary.end_id])
    )


def byte_ids(vocabulary: NameVocabulary, text: str) -> list[int]:
    """Another tokenization of the text: one token a byte."""
    single = {vocabulary._pieces[index]: index for index in range(vocabulary.size)}
    return [single[bytes([byte])] for byte in text.encode()]


@pytest.mark.parametrize("name", REAL_NAMES)
def test_real_names_pass(vocabulary: NameVocabulary, name: str) -> None:
    for name_filter in (
        AllowedCharacters(vocabulary, 0),
        WellFormed(vocabulary, 0),
        NoRepeatedWords(vocabulary, 0),
        MaxLength(vocabulary, 0, len(name)),
        MaxWords(vocabulary, 0, len(name.split())),
    ):
        assert admits(name_filter, " " + name)
        assert admits(name_filter, " " + name, byte_ids(vocabulary, " " + name))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("Goblin", "no space before it"), ("  Goblin", "two spaces"), (" Goblin ", "space at the end"),
        (" Goblin  Guide", "two spaces within"), (" Goblin,Guide", "no space after the comma"),
        (" Niv-", "loose dash"), (" Wrath of", "ends on a small word"), (" Goblin ,", "space before a comma"),
        ("", "nothing"), (" ", "blank"),
    ],
)  # fmt: skip
def test_malformed_names_do_not_pass(vocabulary: NameVocabulary, text: str, why: str) -> None:
    assert not admits(WellFormed(vocabulary, 0), text), why
    assert not admits(WellFormed(vocabulary, 0), text, byte_ids(vocabulary, text)), why


@settings(max_examples=150, deadline=None)
@given(text=st.text(st.sampled_from("aZ ûö√字7-'"), min_size=1, max_size=5))
def test_alphabet_is_of_characters_not_bytes(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """ "û" and "√" share bytes with what is allowed: only whole characters decide."""
    vocabulary = NameVocabulary(tokenizer)
    name_filter = AllowedCharacters(vocabulary, 0, "aZ û-'")
    assert admits(name_filter, text, byte_ids(vocabulary, text)) == set(text).issubset("aZ û-'")


def test_a_character_cannot_be_left_half_said(vocabulary: NameVocabulary) -> None:
    half = byte_ids(vocabulary, " Dandâ")[:-1]
    assert not admits(AllowedCharacters(vocabulary, 0), "", half)


@pytest.mark.parametrize("variant", ["Lim-Dûl's Vault", "lim dul's vault", "LIM-DUL’S  VAULT", "Lim-Du\u0302l's Vault"])
def test_known_names_cannot_end_in_any_spelling(vocabulary: NameVocabulary, variant: str) -> None:
    name_filter = KnownNameFilter(vocabulary, 0, {normal_form("Lim-Dûl's Vault")})
    for ids in (vocabulary.encode(" " + variant), byte_ids(vocabulary, " " + variant)):
        assert not admits(name_filter, "", ids)
        assert admits(name_filter, "", ids + byte_ids(vocabulary, "s"))


@settings(max_examples=60, deadline=None)
@given(prefix=st.sampled_from(["Gob", "Goblin", "goblin ", "Goblin Gu", "Lim-D", "Jö", "Wrath of", "Q", "Black L"]))
def test_starts_with_allows_exactly_texts_with_the_prefix(tokenizer: PreTrainedTokenizerFast, prefix: str) -> None:
    vocabulary = NameVocabulary(tokenizer)
    name_filter = StartsWith(vocabulary, 0, prefix)
    shown = prefix[0].upper() + prefix[1:]
    for ending in ("", "lin", "lin Guide", "ide"):
        text = " " + shown + ending
        # Said as the tokenizer cuts the prefix, then on with any bytes.
        ids = vocabulary.encode(" " + shown.rstrip()) + byte_ids(vocabulary, text[1 + len(shown.rstrip()) :])
        assert admits(name_filter, "", ids) == text.startswith(" " + shown)
    assert not admits(name_filter, " Serra Angel")
    assert not admits(name_filter, " " + shown[:-1]) or shown[:-1].startswith(shown)


def test_a_token_may_straddle_the_prefix(vocabulary: NameVocabulary) -> None:
    goblin = vocabulary.encode(" Goblin")
    assert len(goblin) == 1, "the fixture's tokenizer has learned the word"
    assert admits(StartsWith(vocabulary, 0, "Gob"), "", goblin)


@settings(max_examples=100, deadline=None)
@given(words=st.lists(st.sampled_from(["Goblin", "Guide", "of", "Qx-Qy", "Serra"]), min_size=1, max_size=5))
def test_word_limit_counts_words(tokenizer: PreTrainedTokenizerFast, words: list[str]) -> None:
    vocabulary = NameVocabulary(tokenizer)
    text = " " + " ".join([*words, "Angel"])
    for limit in range(1, 7):
        name_filter = MaxWords(vocabulary, 0, limit)
        for ids in (vocabulary.encode(text), byte_ids(vocabulary, text)):
            assert admits(name_filter, "", ids) == (len(words) + 1 <= limit)


def test_a_small_word_is_not_the_last_that_is_allowed(vocabulary: NameVocabulary) -> None:
    assert len(vocabulary.encode(" of")) == 1, "the fixture's tokenizer has learned the word"
    assert not admits(MaxWords(vocabulary, 0, 2), " Wrath of")
    assert admits(MaxWords(vocabulary, 0, 3), " Wrath of God")


@settings(max_examples=60, deadline=None)
@given(name=st.sampled_from(REAL_NAMES), limit=st.integers(1, 30))
def test_length_limit_counts_characters(tokenizer: PreTrainedTokenizerFast, name: str, limit: int) -> None:
    vocabulary = NameVocabulary(tokenizer)
    if len(name) > limit:
        assert not admits(MaxLength(vocabulary, 0, limit), " " + name)
        assert not admits(MaxLength(vocabulary, 0, limit), "", byte_ids(vocabulary, " " + name))


def test_refused_words_may_go_on_but_not_end(vocabulary: NameVocabulary) -> None:
    twice = NoRepeatedWords(vocabulary, 0)
    assert not admits(twice, " Goblin goblin")
    assert not admits(twice, " Goblin Goblin Guide")
    assert admits(twice, " Goblin Goblins")
    assert admits(twice, " Lord of the Rite of the Reef")
    banned = BannedWords(vocabulary, 0, ["ELF", "Jotun"])
    for text in (" Elf", " Elf Guide", " Elf's Eye", " Jötun Grunt", " Night-Elf"):
        assert not admits(banned, text)
        assert not admits(banned, "", byte_ids(vocabulary, text))
    assert admits(banned, " Elfin Guide") and admits(banned, " Himself")


def test_inside_model_generate(model: GPT2LMHeadModel, vocabulary: NameVocabulary) -> None:
    prompt = torch.tensor([[vocabulary.end_id, *vocabulary.encode(":")]])
    length = prompt.shape[1]
    torch.manual_seed(0)
    out = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=True,
        max_new_tokens=40,
        num_return_sequences=24,
        logits_processor=[
            AllowedCharacters(vocabulary, length),
            WellFormed(vocabulary, length),
            MaxLength(vocabulary, length, 18),
            MaxWords(vocabulary, length, 3),
            StartsWith(vocabulary, length, "Gob"),
        ],
    )
    names = vocabulary.names(out, length)
    assert len(names) == 24
    for name in names:
        assert name.startswith(" Gob") and len(name) <= 19 and len(name.split()) <= 3 and name.isprintable()


def test_generate_never_gets_a_row_without_a_token(model: GPT2LMHeadModel, vocabulary: NameVocabulary) -> None:
    class Nothing(NameFilter):
        def rule(self, name: str) -> str | None:
            return "stop" if len(name) > 3 else None

        def forbidden(self, rule: object) -> torch.Tensor:
            return torch.ones(self.vocabulary.size, dtype=torch.bool)

    prompt = torch.tensor([[vocabulary.end_id]])
    with pytest.raises(NoTokenLeftError, match="Nothing leaves no token after"):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=20,
                       min_new_tokens=9, logits_processor=[Nothing(vocabulary, 1)])  # fmt: skip


def test_scores_are_not_changed_in_place(vocabulary: NameVocabulary) -> None:
    scores = torch.randn(2, vocabulary.size)
    before = scores.clone()
    AllowedCharacters(vocabulary, 0)(torch.zeros(2, 0, dtype=torch.long), scores)
    assert torch.equal(scores, before)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda v: MaxWords(v, 0, 0), "max_words"),
        (lambda v: MaxLength(v, 0, 0), "max_length"),
        (lambda v: StartsWith(v, 0, "  "), "starts_with"),
        (lambda v: BannedWords(v, 0, ["two words"]), "two words"),
        (lambda v: AllowedCharacters(v, 0)(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 7)), "7 wide"),
    ],
)
def test_bad_arguments(vocabulary: NameVocabulary, make: Callable[[NameVocabulary], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(vocabulary)


def test_a_padded_vocabulary_and_a_foreign_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    padded = NameVocabulary(tokenizer, len(tokenizer) + 20)
    mask = AllowedCharacters(padded, 0).mask(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, padded.size))
    assert (mask[0, len(tokenizer) :] == float("-inf")).all()
    with pytest.raises(ValueError, match="do not belong together"):
        NameVocabulary(tokenizer, 100)


def test_nearly_all_real_names_pass_all_filters(vocabulary: NameVocabulary) -> None:
    """What `NameGenerator` always applies must not bend the distribution of names."""
    names = [name for name in random.Random(0).sample(known_names(), 400) if len(name) <= 40]
    filters = [
        AllowedCharacters(vocabulary, 0),
        WellFormed(vocabulary, 0),
        NoRepeatedWords(vocabulary, 0),
        MaxLength(vocabulary, 0, 40),
    ]
    refused = [name for name in names if not all(admits(one, " " + name) for one in filters)]
    # Jokes and other franchises have digits, dots and ampersands; they are among the known names too.
    assert len(refused) / len(names) < 0.03, refused
