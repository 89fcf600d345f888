"""Limits of length and words: where a token has room, and how much a limit may take from the model."""

from __future__ import annotations

import math

import pytest
import torch

from flash_experts.generation import MaxLength, MaxWords, NameVocabulary
from flash_experts.generation.filters.limits import UpperLimit
from tests.test_generation.test_filters import admits, byte_ids


def scores_of(vocabulary: NameVocabulary, **shares: float) -> torch.Tensor:
    """The model's scores: these probabilities, of the EOS token and of letters."""
    scores = torch.full((1, vocabulary.size), -torch.inf)
    for name, share in shares.items():
        scores[0, vocabulary.eos_id if name == "end" else vocabulary.encode(name)[0]] = math.log(share)
    return scores


@pytest.mark.parametrize(("end", "is_dropped"), [(0.45, True), (0.55, False)])
def test_a_name_is_dropped_where_a_limit_takes_more_than_half(
    vocabulary: NameVocabulary, end: float, is_dropped: bool
) -> None:
    """ " Goblin" has to end, while the model would rather have it continue, or not."""
    ids, scores = torch.tensor([vocabulary.encode(" Goblin")]), scores_of(vocabulary, end=end, s=1 - end)
    one: UpperLimit
    for one in (MaxLength(vocabulary, 0, 6), MaxLength(vocabulary, 0, 6, drops=False)):
        masked = one.mask(ids, scores)
        assert bool((masked == -torch.inf).all()) == (is_dropped and one.drops)
        assert masked[0, vocabulary.encode("s")[0]] == -torch.inf
    spaced = scores_of(vocabulary, end=end)
    spaced[0, vocabulary.encode(" Guide")[0]] = math.log(1 - end)
    assert bool((MaxWords(vocabulary, 0, 1).mask(ids, spaced) == -torch.inf).all()) == is_dropped
    assert torch.equal(MaxWords(vocabulary, 0, 2).mask(ids, spaced), spaced), "there is room for one more word"


def test_a_word_that_is_refused_before_the_last_one_drops_no_name(vocabulary: NameVocabulary) -> None:
    """After "Wrath" the second word cannot be "of", but it can be another."""
    ids, scores = torch.tensor([vocabulary.encode(" Wrath")]), scores_of(vocabulary, end=0.1)
    scores[0, vocabulary.encode(" of")[0]] = math.log(0.9)
    masked = MaxWords(vocabulary, 0, 2).mask(ids, scores)
    assert (masked > -torch.inf).nonzero()[:, 1].tolist() == [vocabulary.eos_id]


def test_no_word_begins_where_one_letter_has_room(vocabulary: NameVocabulary) -> None:
    assert not admits(MaxLength(vocabulary, 0, 8), "", byte_ids(vocabulary, " Goblin A"))
    assert admits(MaxLength(vocabulary, 0, 9), "", byte_ids(vocabulary, " Goblin Ab"))
    assert admits(MaxLength(vocabulary, 0, 1), "", byte_ids(vocabulary, " A")), "the first word may be a letter"


def test_half_a_character_takes_no_room_of_its_own(vocabulary: NameVocabulary) -> None:
    assert admits(MaxLength(vocabulary, 0, 5), "", byte_ids(vocabulary, " Dandâ"))
    assert not admits(MaxLength(vocabulary, 0, 5), "", byte_ids(vocabulary, " Dandân"))


def test_no_space_follows_the_last_word(vocabulary: NameVocabulary) -> None:
    """Nothing could come after it."""
    (space,) = byte_ids(vocabulary, " ")
    ids = torch.tensor([vocabulary.encode(" Goblin")])
    for limit, is_forbidden in ((1, True), (2, False)):
        masked = MaxWords(vocabulary, 0, limit).mask(ids, torch.zeros(1, vocabulary.size))
        assert bool(masked[0, space] == -torch.inf) == is_forbidden
