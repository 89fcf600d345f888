"""When a search has seen all that sampling can give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from flash_experts.generation import NameGenerator, Sampling
from flash_experts.generation.decoding import NameDecoder
from flash_experts.generation.filters.base import NoTokenLeftError
from flash_experts.generation.generator import NameSearch
from flash_experts.models.scoring import evaluating

GUIDED = {"guidance": 1.5, "type_line": "Creature"}


@pytest.fixture
def generator(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> NameGenerator:
    return NameGenerator(model, tokenizer, known_names=[])


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.2}, GUIDED])
def test_a_search_without_room_for_a_name_ends_at_once(
    generator: NameGenerator, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tried, accept = [], NameSearch._accept

    def count(search: NameSearch, *args: Any) -> str:
        tried.append(args)
        return accept(search, *args)

    monkeypatch.setattr(NameSearch, "_accept", count)
    with pytest.raises(NoTokenLeftError, match="no name can be made with starts_with='Goblin of '"):
        generator.generate(20, starts_with="Goblin of ", max_length=11, seed=3, **options)
    assert len(tried) <= 32


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.5, top_p=0.9, min_p=0.01), Sampling(top_k=3)])
def test_the_probability_of_a_try_is_how_often_it_comes(
    model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, sampling: Sampling
) -> None:
    decoder = NameDecoder(model, [tokenizer.bos_token_id], tokenizer.eos_token_id, sampling, [], 1, seed=5)
    with evaluating(model), torch.no_grad():
        drawn = [name.ids or (decoder.eos_id,) for name in decoder.stream(range(2000), 500)]
        often = max(set(drawn), key=drawn.count)
        share = drawn.count(often) / len(drawn)
        assert decoder.probability(often) == pytest.approx(share, abs=4 * (share * (1 - share) / 2000) ** 0.5)
