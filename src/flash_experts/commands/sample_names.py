"""Sample names while a model is trained. The trainer reports which of them are new and which are memorized."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flash_experts.generation.generator import NameGenerator
from flash_experts.training.tracking import Callback


class SampleNames(Callback):
    """Draws a few unconditional names, real cards allowed, so that copies show."""

    def __init__(self, count: int = 6):
        self.count = count

    def on_sample(self, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        """Names of the model as it is now; the step is the seed."""
        generator = NameGenerator(model, tokenizer, known_names=())
        return [name.text for name in generator.generate(self.count, seed=step, quality="fast")]
