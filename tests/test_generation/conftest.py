"""A model that prefers given names, for tests of the filters that forbid them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import CausalLMOutputWithPast

from flash_experts.generation import NameVocabulary


class Parrot(PreTrainedModel):
    """Generates the given names and nothing else, while the tokens so far are a prefix of one.

    Its cache has token ids and their positions, which tests operations on rows and columns, too: each row must see its
    prompt and its own tokens, each once, at consecutive positions.
    """

    config_class = GPT2Config

    def __init__(self, config: GPT2Config, prompt_length: int, scripts: Sequence[Sequence[int]]) -> None:
        super().__init__(config)
        self.prompt_length = prompt_length
        self.next_tokens: dict[tuple[int, ...], set[int]] = {}
        for script in scripts:
            for place, token in enumerate(script):
                self.next_tokens.setdefault(tuple(script[:place]), set()).add(token)
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(config.vocab_size, generator=generator)
        noise[config.eos_token_id] = 2.0  # without a matching name it soon ends
        self.noise = torch.nn.Parameter(noise)

    def forward(
        self,
        input_ids: torch.Tensor,
        past_key_values: DynamicCache,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool = True,
        logits_to_keep: int = 1,
    ) -> CausalLMOutputWithPast:
        if position_ids is None:
            position_ids = past_key_values.get_seq_length() + torch.arange(input_ids.shape[1]).expand_as(input_ids)
        pairs = torch.stack([position_ids, input_ids], dim=-1)[:, None].double()  # (B, 1 head, T, width 2)
        history, _ = past_key_values.update(pairs, pairs, 0)
        logits = self.noise.repeat(len(input_ids), 1)
        for row, columns in enumerate(history[:, 0].long()):
            if attention_mask is not None and attention_mask.ndim == 4:
                columns = columns[attention_mask[row, 0, -1]]
            seen = sorted(columns.tolist())
            assert [position for position, _ in seen] == list(range(len(seen)))
            given = tuple(token for _, token in seen[self.prompt_length :])
            for token in self.next_tokens.get(given, ()):
                logits[row, token] += 12.0
        return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=past_key_values)


@pytest.fixture
def vocabulary(tokenizer: PreTrainedTokenizerFast) -> NameVocabulary:
    return NameVocabulary(tokenizer)


@pytest.fixture
def parrot(tokenizer: PreTrainedTokenizerFast) -> Callable[..., Parrot]:
    """Makes a model that generates these texts after the prompt ":"."""

    def make(names: Sequence[str]) -> Parrot:
        end = tokenizer.eos_token_id
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_layer=1, eos_token_id=end)
        scripts = [[*tokenizer(" " + name, add_special_tokens=False)["input_ids"], end] for name in names]
        return Parrot(config, prompt_length=2, scripts=scripts)

    return make


@pytest.fixture
def model(dense: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast) -> GPT2LMHeadModel:
    """The random GPT-2, a little more willing to end a name."""
    with torch.no_grad():
        dense.transformer.wte.weight.mul_(0.5)
    return dense


CARDS_OF_A_SET = """Name;Type line;Colors;Mana value;Rarity;Starts with
;Creature — Goblin;Red;2;common;
;Creature — Goblin;R;2;rare;Serra
Old Name;Instant;U;1;common;
;Land;;;;
"""


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "my set.csv"
    path.write_text(CARDS_OF_A_SET, "utf-8-sig")
    return path
