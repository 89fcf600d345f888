"""Sample names while a model is trained, and whether each is new or was learned by heart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.data.cards import Card
from flash_experts.data.names import normal_form
from flash_experts.generation.generator import NameGenerator
from flash_experts.training.callbacks import Callback


class SampleNames(Callback):
    """Draws a few unfiltered names and says where each is found: ``Goblin Guide (in train)``, ``Mire Seer (new)``.

    Args:
        splits: the cards of each split by its name; the first split that has a name is the one told.
        count: names each time.
    """

    def __init__(self, splits: Mapping[str, Sequence[Card]], count: int = 6):
        self.count = count
        self._split_of: dict[str, str] = {}
        for split, cards in splits.items():
            for card in cards:
                self._split_of.setdefault(normal_form(card.name), split)

    def on_sample(self, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        generator = NameGenerator(model, tokenizer, known_names=())
        names = generator.generate(self.count, seed=step)
        return [f"{name.text} ({self._place(name.text)})" for name in names]

    def _place(self, name: str) -> str:
        split = self._split_of.get(normal_form(name))
        return f"in {split}" if split else "new"
