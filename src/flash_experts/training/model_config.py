"""What a run trains, as options. Light to import: the command line shows it in --help."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

from flash_experts.models import moe_options
from flash_experts.options import option, problems_of

_VOCABULARY, _NEW = "The vocabulary", "A new model"


@dataclass
class ModelConfig(moe_options.MoEOptions, moe_options.UpcyclingOptions):
    """The model.

    ``num_experts: 0`` trains a base as it is, without upcycling.
    """

    upcycling: moe_options.Method = option("copy", moe_options.METHOD_HELP, "The experts")
    trim_vocabulary: bool = option(
        False, "keep only the tokens of the base that the cards use; the rest cost time and memory for nothing",
        _VOCABULARY,
    )  # fmt: skip
    keep_words: bool = option(
        False, "keep the tokens of capitalized words and of parts of words, too, when the vocabulary is trimmed: for "
        "names with words that no card has", _VOCABULARY,
    )  # fmt: skip
    dropout: float | None = option(
        None, "probability of every dropout of the model; null keeps the base's own", _NEW, bounds=(0, 0.999)
    )
    n_layer: int = option(6, "blocks of a new model (without a base)", _NEW, bounds=(1, 10_000))
    n_embd: int = option(256, "width of a new model", _NEW, bounds=(1, 1_000_000))
    n_head: int = option(4, "attention heads of a new model", _NEW, bounds=(1, 1_000_000))
    n_positions: int = option(128, "longest text of a new model, in tokens", _NEW, bounds=(2, 10_000_000))
    vocab_size: int = option(
        4096, "tokens of a new model's tokenizer, trained on the prepared cards", _NEW, bounds=(257, 10_000_000)
    )
    tokenizer: str | None = option(
        None, "folder or hub id whose tokenizer a new model takes, such as that of its teacher; null trains one", _NEW
    )
    teacher_embeddings: bool = option(
        False, "initialize the token embeddings of a new model from those of the model that its tokenizer is of "
        "(principal components)", _NEW,
    )  # fmt: skip

    def validate(self) -> None:
        """Checks every value; raises a ValueError with all that is wrong."""
        problems = problems_of(self, ModelConfig)
        if self.n_head >= 1 and self.n_embd % self.n_head:
            problems.append(f"n_embd ({self.n_embd}) must be a multiple of n_head ({self.n_head})")
        if self.num_experts:
            problems += moe_options.too_many_per_token(self)
        if self.teacher_embeddings and self.tokenizer is None:
            problems.append("teacher_embeddings needs a teacher: set model.tokenizer to its folder")
        if problems:
            raise ValueError("the model configuration is wrong: " + "; ".join(problems))

    @property
    def moe_fields(self) -> dict[str, Any]:
        """What `GPT2MoEForCausalLM.from_dense` takes."""
        names = [each.name for cls in (moe_options.MoEOptions, moe_options.UpcyclingOptions) for each in fields(cls)]
        return {"method": self.upcycling} | {name: getattr(self, name) for name in names}
