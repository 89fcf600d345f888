"""Contains, ends-with and regular expressions: in any tokenization, inside model.generate, and near the limit."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.generation import (
    AllowedCharacters,
    Contains,
    EndsWith,
    MatchesRegex,
    MaxLength,
    NameFilter,
    NameVocabulary,
    WellFormed,
)
from flash_experts.generation.filters.text import LeadsTo, WantedText
from tests.test_generation.test_filters import admits, byte_ids

TEXTS = [
    "Goblin Storm",
    "Storm Goblin",
    "Goblin Stormer",
    "Firestorm",
    "Fire Storm",
    "Storms of Fire",
    "Goblin",
    "Stor",
]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("wanted", ["storm", " Storm", "STORM", "rm", "Goblin Storm", "e s"])
def test_names_with_the_letters_pass_and_no_others(vocabulary: NameVocabulary, text: str, wanted: str) -> None:
    for ids in (vocabulary.encode(" " + text), byte_ids(vocabulary, " " + text)):
        low = (" " + text).lower()
        assert admits(Contains(vocabulary, 0, wanted, 30), "", ids) == (wanted.lower() in low)
        assert admits(EndsWith(vocabulary, 0, wanted, 30), "", ids) == low.endswith(wanted.lower())


@settings(max_examples=60, deadline=None)
@given(wanted=st.text("abc ", min_size=1, max_size=5).filter(str.strip), text=st.text("abc ", max_size=9))
def test_the_state_is_the_longest_beginning_at_the_end(
    tokenizer: PreTrainedTokenizerFast, wanted: str, text: str
) -> None:
    wanted = " ".join(wanted.split())
    one = EndsWith(NameVocabulary(tokenizer), 0, wanted, 30)
    assert one.state(text) == max(size for size in range(len(wanted) + 1) if text.endswith(wanted[:size]))


@pytest.mark.parametrize("make", [Contains, EndsWith])
@pytest.mark.parametrize("limit", [5, 6, 9, 17])
def test_every_name_has_the_letters_in_time(
    model: GPT2LMHeadModel, vocabulary: NameVocabulary, make: type[Contains], limit: int
) -> None:
    """Inside transformers' generate, with a random model, for texts up to the length limit."""
    prompt = torch.tensor([[vocabulary.eos_id, *vocabulary.encode(":")]])
    filters = [AllowedCharacters(vocabulary, 2), make(vocabulary, 2, "storm", limit), MaxLength(vocabulary, 2, limit)]
    torch.manual_seed(0)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=40,
                         num_return_sequences=16, logits_processor=filters)  # fmt: skip
    names = [name.lower() for name in vocabulary.names(out, 2)]
    assert all(len(name) <= limit + 1 for name in names)
    assert all(name.endswith("storm") if make is EndsWith else "storm" in name for name in names)


def test_wanted_letters_are_favored_where_the_tokenizer_would_start_them(vocabulary: NameVocabulary) -> None:
    first = vocabulary.encode(" Goblin")[0]
    scores = torch.zeros(1, vocabulary.size)
    name_ids = torch.tensor([vocabulary.encode(" Serra")])
    raised = Contains(vocabulary, 0, "goblin", 30).mask(name_ids, scores)
    assert raised[0, first] > 0 and raised[0, vocabulary.encode(" Serra")[0]] == 0
    done = torch.tensor([vocabulary.encode(" Goblin")])
    assert torch.equal(Contains(vocabulary, 0, "goblin", 30).mask(done, scores), scores)


def test_biases_are_added_to_the_models_scores(vocabulary: NameVocabulary) -> None:
    """4 nats, and half of one for each character past the twelfth; the same for the end after the wanted end."""
    first, end = vocabulary.encode(" Goblin")[0], vocabulary.eos_id
    scores = torch.randn(1, vocabulary.size)
    before = scores.clone()
    for name, bias in ((" Serra", 4.0), (" Serra Angel of Dandân", 4.0 + 10 / 2)):
        raised = Contains(vocabulary, 0, "goblin", 40).apply([name], scores)
        assert raised[0, first].item() == pytest.approx(scores[0, first].item() + bias)
    raised = EndsWith(vocabulary, 0, "goblin", 40).apply([" Goblin"], scores)
    assert raised[0, end].item() == pytest.approx(scores[0, end].item() + 4.0)
    assert torch.equal(scores, before)


def test_a_single_letter_within_a_word_is_not_favored(vocabulary: NameVocabulary) -> None:
    """It would be repeated: "Serraqqq"."""
    scores = torch.zeros(1, vocabulary.size)
    raised = Contains(vocabulary, 0, "qx", 30).apply([" Serra"], scores)
    assert (raised > 0).nonzero()[:, 1].tolist() == vocabulary.encode(" Q")[:1]


PATTERNS = [
    r"Goblin.*",
    r".*(ing|er)",
    r"\w+ of the \w+",
    r"(?i).*storm",
    r"[A-Z][a-z]+(, the [A-Z][a-z]+)?",
    r".*/?.*",
]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_regex_admits_what_it_matches(vocabulary: NameVocabulary, pattern: str) -> None:
    one = MatchesRegex(vocabulary, 0, pattern, 30)
    for text in [*TEXTS, "Rider", "Wrath of the Reef", "Serra, the Angel", "Dandân"]:
        expected = re.fullmatch(pattern, text) is not None
        assert one.matches(text) == expected
        assert admits(one, " " + text) == expected
        # Where the expression leaves one text alone, only the tokenizer's own cut of it is offered.
        assert not admits(one, "", byte_ids(vocabulary, " " + text)) or expected


READ_AGAIN = [*PATTERNS, r"(Goblin|Giant) (Guide|Growth)", r".*[aeiou].{8}[bcd].*", r"(Serra's )?Angel( of Dandân)?"]


@settings(max_examples=60)
@given(data=st.data(), pattern=st.sampled_from(READ_AGAIN))
def test_the_mask_of_a_regex_depends_on_one_text_alone(
    tokenizer: PreTrainedTokenizerFast, data: st.DataObject, pattern: str
) -> None:
    """One matcher reads all texts in any order: prefixes, continuations, and texts that cannot match."""
    vocabulary = NameVocabulary(tokenizer)
    one = MatchesRegex(vocabulary, 0, pattern, 20)
    names = [""]
    for _ in range(data.draw(st.integers(1, 12))):
        name = data.draw(st.sampled_from(names))
        rule = one.rule(name)
        assert rule == MatchesRegex(vocabulary, 0, pattern, 20).rule(name)
        free = (~one.mask_of(rule)).nonzero()[:, 0].tolist()
        anything = st.integers(0, vocabulary.size - 1).filter(lambda token: vocabulary.texts[token] != "")
        token = data.draw(st.sampled_from(free) if free and data.draw(st.integers(0, 5)) else anything)
        names.append(vocabulary.extend(name, token) if token != vocabulary.eos_id else name)


def test_a_regex_reads_words_that_prompts_have_as_one_token() -> None:
    vocabulary = NameVocabulary(train_tokenizer(["Goblin land"], 257, whole_words=["land"]))
    one = MatchesRegex(vocabulary, 0, r"Goblin .*", 30)
    assert one.matches("Goblin land") and one.matches("Goblin landing") and not one.matches("land")
    # The first byte of an accented letter, and a byte that no text has.
    allowed = (~one.forbidden(one.rule(" Goblin land\udcc3"))).nonzero()[:, 0].tolist()
    assert vocabulary.encode("é")[1] in allowed and vocabulary.eos_id not in allowed
    assert one.forbidden(one.rule(" Goblin land\udcff")).all() and one.forbidden(one.rule("\udcff")).all()


@pytest.mark.parametrize("pattern", [r".*storm", r"[A-Z]\w{3,} of \w{3,}", r"(Go|Ba)+x"])
def test_a_regex_is_always_completed(model: GPT2LMHeadModel, vocabulary: NameVocabulary, pattern: str) -> None:
    """Every token offered can lead to a match in time: a random model reaches no dead end."""
    prompt = torch.tensor([[vocabulary.eos_id, *vocabulary.encode(":")]])
    one = MatchesRegex(vocabulary, 2, pattern, 16)
    torch.manual_seed(0)
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_new_tokens=60,
                         num_return_sequences=16, logits_processor=[one])  # fmt: skip
    for name in vocabulary.names(out, 2):
        assert re.fullmatch(pattern, name[1:]) and len(name) <= 17


@pytest.mark.parametrize("make", [Contains, EndsWith])
def test_no_word_is_begun_for_a_mark(vocabulary: NameVocabulary, make: type[WantedText]) -> None:
    """Else a name would get more and more spaces, after which no "!" can follow."""
    one = make(vocabulary, 0, "!", 40)
    assert [token for token, _ in one.favored(" Goblin Guide")] == vocabulary.encode("!")


@pytest.mark.parametrize(
    ("pattern", "limit", "also", "message"),
    [
        (r"a[^\s\S]", 20, (), "matches no name"),
        (r"x{21}", 20, (), "matches no name"),
        (r"[0-9]+", 20, (), "matches no name"),  # not in the alphabet
        (r"[a-z]+", 20, (), "matches no name"),  # names begin with a capital
        (r"Goblin.*", 20, (".*x", "[^x]*"), "satisfies the other constraints"),
        (r"(", 20, (), "unclosed group"),
        (r"(a)\1", 20, (), "backreferences"),
        ("a\nb", 20, (), "not a regular expression"),
        ("^Goblin.*$|^Elf.*$", 20, (), r"has \^, \$, .* within it: leave them out"),
        (r"\bElf", 20, (), r"has \^, \$, .* within it: leave them out"),
        (r"Fire\$", 20, (), "matches no name"),  # a dollar sign, which no card has
        ("A{2000}{2000}", 20, (), "matches no name"),  # millions of states, were they built
    ],
)
def test_a_regex_that_no_name_can_match_is_refused_at_once(
    vocabulary: NameVocabulary, pattern: str, limit: int, also: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        MatchesRegex(vocabulary, 0, pattern, limit, also=also)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda v: Contains(v, 0, "storm", 20),
        lambda v: EndsWith(v, 0, "storm", 20),
        lambda v: MatchesRegex(v, 0, ".*storm", 20),
        lambda v: MaxLength(v, 0, 7),
        lambda v: WellFormed(v, 0),
    ],
)
def test_scores_are_not_changed_in_place(
    vocabulary: NameVocabulary, make: Callable[[NameVocabulary], NameFilter]
) -> None:
    ids = torch.tensor([byte_ids(vocabulary, " Goblin"), byte_ids(vocabulary, " Serras")])
    scores = torch.randn(2, vocabulary.size)
    before = scores.clone()
    make(vocabulary).mask(ids, scores)
    assert torch.equal(scores, before)


def test_a_bias_leads_to_the_text_after_a_gap(vocabulary: NameVocabulary) -> None:
    one = LeadsTo(vocabulary, 0, "", [", the storm ", " axe"], ends=True)
    comma, the, *_ = vocabulary.encode(", the Storm")
    axe = vocabulary.encode(" Axe")[0]

    def favored(name: str) -> list[int]:
        scores = torch.zeros(1, vocabulary.size)
        raised = one.apply([name], scores)
        assert not scores.any() and (raised >= 0).all(), "a bias, and no token is forbidden"
        return raised[0].nonzero()[:, 0].tolist()

    assert favored("") == favored(" ") == favored(" Go") == [], "a gap has three letters or more"
    assert favored(" Goblin") == [comma] and favored(" Goblin,") == [the]
    spaced = [token for token, text in enumerate(vocabulary.texts) if text.startswith(" ")]
    assert favored(" Goblin, the Storm") == spaced, "not Stormer"
    assert favored(" Goblin, the STORM Gob") == [axe]
    assert favored(" Goblin, the Storm Gob Axe") == [vocabulary.eos_id]
    long = one.apply([" Goblin" * 4], torch.zeros(1, vocabulary.size)).max()
    assert long > one.apply([" Goblin"], torch.zeros(1, vocabulary.size)).max(), "more for a longer name"
