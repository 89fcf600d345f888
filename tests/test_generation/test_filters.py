"""Token filters: on texts, inside model.generate, and at dead ends."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.card_table import known_names
from flash_experts.data.names import normal_form
from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.generation import (
    Alliterates,
    AllOf,
    AllowedCharacters,
    BannedWords,
    Constraints,
    Contains,
    EndsWith,
    KnownNameFilter,
    MatchesRegex,
    MaxLength,
    MaxWords,
    MinLength,
    MinWords,
    NameFilter,
    NameGenerator,
    NameVocabulary,
    NoProfanity,
    NoRealPlaces,
    NoRepeatedWords,
    NoTokenLeftError,
    StartsWith,
    WellFormed,
)
from flash_experts.generation.text_rules import alliterates

REAL_NAMES = [
    "Goblin Guide", "Lim-Dûl's Vault", "Jötun Grunt", "Niv-Mizzet, Parun", "Will-o'-the-Wisp", "Wrath of God",
    "Soldier On", "Kaboom!", "Light 'Em Up", "Circle of Protection: Red", "Fire", "Ach! Hans, Run!", "Dandân",
]  # fmt: skip


def admits(name_filter: NameFilter, text: str, ids: list[int] | None = None) -> bool:
    """Whether a filter admits a whole text, in the tokenizer's own tokens or in given ones."""
    vocabulary = name_filter.vocabulary
    ids = vocabulary.encode(text) if ids is None else ids
    for place, token in enumerate([*ids, vocabulary.eos_id]):
        wants = torch.zeros(1, vocabulary.size)
        wants[0, token] = 20.0
        if name_filter.mask(torch.tensor([ids[:place]], dtype=torch.long), wants)[0, token] == -torch.inf:
            return False
    return True


def byte_ids(vocabulary: NameVocabulary, text: str) -> list[int]:
    """Another tokenization of the text: one token per byte."""
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


def test_a_character_cannot_be_left_incomplete(vocabulary: NameVocabulary) -> None:
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
        # The prefix as the tokenizer cuts it, then any bytes.
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


def test_refused_words_may_continue_but_not_end(vocabulary: NameVocabulary) -> None:
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


def test_all_filters_as_one_are_the_filters_one_after_another(vocabulary: NameVocabulary) -> None:
    filters = [
        AllowedCharacters(vocabulary, 1),
        WellFormed(vocabulary, 1),
        NoRepeatedWords(vocabulary, 1),
        KnownNameFilter(vocabulary, 1, {normal_form(name) for name in REAL_NAMES}),
        MaxWords(vocabulary, 1, 2),
        Contains(vocabulary, 1, "storm", 30),
        MaxLength(vocabulary, 1, 18),
    ]
    for place in (0, 3, 7, 12):
        rows = [[5, *byte_ids(vocabulary, " " + name)][: place + 1] for name in REAL_NAMES]
        ids = torch.tensor([row for row in rows if len(row) == place + 1])
        scores = torch.randn(len(ids), vocabulary.size, generator=torch.Generator().manual_seed(place))
        expected = scores
        for one in filters:
            expected = one.mask(ids, expected)
        assert torch.equal(AllOf(filters).mask(ids, scores), expected)


def test_texts_grow_token_by_token(vocabulary: NameVocabulary) -> None:
    for name in ("Dandân Éfreet", "Lim-Dûl's Vault", "√字"):
        text = ""
        ids = byte_ids(vocabulary, name)
        for place, token in enumerate(ids):
            text = vocabulary.extend(text, token)
            assert text == vocabulary.decode(ids[: place + 1])


def test_lower_limits(vocabulary: NameVocabulary) -> None:
    assert not admits(MinWords(vocabulary, 0, 3), " Goblin Guide")
    assert admits(MinWords(vocabulary, 0, 2), " Goblin Guide")
    assert not admits(MinLength(vocabulary, 0, 13), " Goblin Guide")
    assert admits(MinLength(vocabulary, 0, 12), " Goblin Guide")


def test_a_whole_word_is_not_stretched_to_a_lower_limit(vocabulary: NameVocabulary) -> None:
    """A model that prefers the EOS token, then the letter "s", has to start another word."""
    ids = torch.tensor([vocabulary.encode(" Goblin")])
    scores = torch.zeros(1, vocabulary.size)
    scores[0, vocabulary.eos_id], scores[0, vocabulary.encode("s")[0]] = 9.0, 8.0
    for one in (MinWords(vocabulary, 0, 2), MinLength(vocabulary, 0, 12), Contains(vocabulary, 0, "elf", 30)):
        best = int(one.mask(ids, scores).argmax())
        assert best != vocabulary.eos_id and not vocabulary.texts[best][0].isalnum()
        wants_more = scores.clone()
        wants_more[0, vocabulary.encode("s")[0]] = 10.0
        assert int(one.mask(ids, wants_more).argmax()) == vocabulary.encode("s")[0]


@pytest.mark.parametrize("limit", [8, 9, 10, 11])
def test_no_word_is_cut_at_the_limit(
    parrot: Callable[..., torch.nn.Module], tokenizer: PreTrainedTokenizerFast, limit: int
) -> None:
    """Of "Goblin Lightning" and "Elves" only the short one comes out, never "Goblin Li"."""
    generator = NameGenerator(parrot(["Goblin Lightning", "Elves"]), tokenizer, [])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        names = generator.generate(1, max_length=limit, temperature=0.3, seed=0)
    assert [name.text for name in names] == ["Elves"]


def test_alliteration(vocabulary: NameVocabulary) -> None:
    one = Alliterates(vocabulary, 0)
    for text in (" Goblin Guide", " Eager Éfreet", " Wall of Wood", " Lord of the Lightning", " Giant's Growth"):
        assert admits(one, text), text
        assert admits(one, "", byte_ids(vocabulary, text)), text
    for text in (" Goblin", " Goblin King", " Wall of Elves", " Goblin ogre", " Lord of", " Serra the Angel"):
        assert not admits(one, text), text
        assert not admits(one, "", byte_ids(vocabulary, text)), text
    masked = one.apply([" Goblin o"], torch.zeros(1, vocabulary.size))
    (f, space) = byte_ids(vocabulary, "f ")
    assert masked[0, f] == 0 and masked[0, space] == -torch.inf, "it may become of, but not end"


def test_inside_model_generate(model: GPT2LMHeadModel, vocabulary: NameVocabulary) -> None:
    prompt = torch.tensor([[vocabulary.eos_id, *vocabulary.encode(":")]])
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


def test_words_that_alliterate_inside_model_generate(model: GPT2LMHeadModel, vocabulary: NameVocabulary) -> None:
    """Names that a random model ends satisfy both filters; without them they hardly ever do."""
    prompt = torch.tensor([[vocabulary.eos_id, *vocabulary.encode(":")]])
    base = [AllowedCharacters(vocabulary, 2), WellFormed(vocabulary, 2)]
    asked = [*base, Alliterates(vocabulary, 2), MinWords(vocabulary, 2, 3)]
    shares = []
    for filters in (asked, base):
        torch.manual_seed(0)
        out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=60,
                             num_return_sequences=24, logits_processor=filters)  # fmt: skip
        names = [vocabulary.decode(row) for row in out[:, 2:].tolist() if vocabulary.eos_id in row]
        kept = [alliterates(name) and len(name.split()) >= 3 for name in names]
        assert len(kept) >= 4
        shares.append(sum(kept) / len(kept))
    assert shares[0] == 1 and shares[1] < 0.25


@pytest.mark.parametrize(
    "asked",
    [
        {"contains": "ar", "banned_words": ["elf"]},
        {"ends_with": "ing", "min_length": 6},
        {"regex": "[A-Za-z ]+"},
        {"max_words": 3, "min_length": 4},
    ],
)
def test_filters_of_every_constraint_inside_model_generate(
    model: GPT2LMHeadModel, vocabulary: NameVocabulary, asked: dict
) -> None:
    constraints = Constraints(max_length=24, **asked)
    prompt = torch.tensor([[vocabulary.eos_id, *vocabulary.encode(":")]])
    filters = constraints.filters(vocabulary, prompt.shape[1], {"goblin guide"})
    torch.manual_seed(0)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=50, num_return_sequences=8,
        logits_processor=list(filters),
    )  # fmt: skip
    rows = out[:, prompt.shape[1] :]
    ended = [vocabulary.decode(row) for row in rows.tolist() if vocabulary.eos_id in row]
    assert ended and all(constraints.held_by(name.strip()) for name in ended)


def test_generate_never_gets_a_row_without_a_token(model: GPT2LMHeadModel, vocabulary: NameVocabulary) -> None:
    class Nothing(NameFilter):
        def rule(self, name: str) -> str | None:
            return "stop" if len(name) > 3 else None

        def forbidden(self, rule: object) -> torch.Tensor:
            return torch.ones(self.vocabulary.size, dtype=torch.bool)

    prompt = torch.tensor([[vocabulary.eos_id]])
    with pytest.raises(NoTokenLeftError, match="Nothing leaves no token after"):
        model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=20,
                       min_new_tokens=9, logits_processor=[Nothing(vocabulary, 1)])  # fmt: skip


def test_a_limit_that_leaves_no_token_with_another_filter_is_an_error(vocabulary: NameVocabulary) -> None:
    ids = torch.tensor([[vocabulary.eos_id, *vocabulary.encode(" Goblin")]])
    scores = torch.zeros(1, vocabulary.size)
    scores[0, vocabulary.eos_id] = -torch.inf  # as a regex does where a name is not whole yet
    with pytest.raises(NoTokenLeftError, match="MaxLength leaves no token after 'Goblin'"):
        MaxLength(vocabulary, 1, 6)(ids, scores)


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
        (lambda v: MinWords(v, 0, 0), "min_words"),
        (lambda v: MinLength(v, 0, 0), "min_length"),
        (lambda v: Contains(v, 0, " ", 20), "blank"),
        (lambda v: EndsWith(v, 0, "Goblin", 5), "more than max_length 5"),
        (lambda v: MatchesRegex(v, 0, "x{9}", 8), "matches no name"),
        (lambda v: AllowedCharacters(v, 0)(torch.zeros(1, 0, dtype=torch.long), torch.zeros(1, 7)), "7 tokens"),
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
    """The filters that `NameGenerator` always applies must not distort the distribution of names."""
    names = [name for name in random.Random(0).sample(known_names(), 400) if len(name) <= 40]
    filters = [
        AllowedCharacters(vocabulary, 0),
        WellFormed(vocabulary, 0),
        NoRepeatedWords(vocabulary, 0),
        NoProfanity(vocabulary, 0),
        NoRealPlaces(vocabulary, 0),
        MaxLength(vocabulary, 0, 40),
    ]
    refused = [name for name in names if not all(admits(one, " " + name) for one in filters)]
    # Jokes and other franchises have digits, dots and ampersands; they are among the known names too.
    assert len(refused) / len(names) < 0.03, refused


def test_a_whole_word_token_of_prompts_is_not_allowed_in_names() -> None:
    """Its token absorbs the space before it: "Mighty creature" would become "Mightycreature"."""
    vocabulary = NameVocabulary(train_tokenizer(["Mighty Goblin"], 257, whole_words=["creature"]))
    [word] = vocabulary.encode(" creature")
    assert vocabulary.texts[word] == ""
    scores_1V = AllowedCharacters(vocabulary, 1)(torch.tensor([[vocabulary.eos_id]]), torch.zeros(1, vocabulary.size))
    assert scores_1V[0, word] == -torch.inf and scores_1V[0, vocabulary.encode("M")[0]] == 0
