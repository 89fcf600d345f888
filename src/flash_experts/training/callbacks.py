"""What a run tells to whoever listens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase


class Callback:
    """Hooks of a run, all doing nothing. A subclass overrides those it wants.

    They run on the main process alone. None of them can disturb the training: dropout is seeded anew at each
    step.
    """

    def on_start(self, run_name: str, run_info: Mapping[str, object]) -> None:
        """Before the first step. ``run_info`` is what `run.json` holds."""

    def on_log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Every ``log_every`` steps: loss, rate, speed, router statistics."""

    def on_eval(self, step: int, metrics: Mapping[str, float]) -> None:
        """After each validation."""

    def on_sample(self, step: int, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Sequence[str]:
        """Every ``sample_every`` steps, the model in eval mode: may make names, which the trainer prints and
        keeps."""
        return ()

    def on_names(self, step: int, groups: Mapping[str, Sequence[str]]) -> None:
        """The sample names of a step in groups: ``new``, ``in train``, ``in validation``."""

    def on_end(self, summary: Mapping[str, object]) -> None:
        """After the last step, or when the run is interrupted."""
