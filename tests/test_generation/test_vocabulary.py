"""Texts of tokens in names."""

from __future__ import annotations

import torch

from flash_experts.data.tokenizer import train_tokenizer
from flash_experts.generation import AllowedCharacters, NameVocabulary


def test_a_whole_word_token_of_prompts_is_not_allowed_in_names() -> None:
    """Its token absorbs the space before it: "Mighty creature" would become "Mightycreature"."""
    vocabulary = NameVocabulary(train_tokenizer(["Mighty Goblin"], 257, whole_words=["creature"]))
    [word] = vocabulary.encode(" creature")
    assert vocabulary.texts[word] == ""
    scores_1V = AllowedCharacters(vocabulary, 1)(torch.tensor([[vocabulary.eos_id]]), torch.zeros(1, vocabulary.size))
    assert scores_1V[0, word] == -torch.inf and scores_1V[0, vocabulary.encode("M")[0]] == 0
