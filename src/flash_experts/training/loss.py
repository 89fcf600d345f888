"""The loss that a run minimizes: cross-entropy, and with a teacher its distribution, too (knowledge distillation)."""

from __future__ import annotations

import json
from typing import Any, Literal

import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flash_experts.data.packing import PackedBatch
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.models.flash_attention import keeps_packed_apart
from flash_experts.models.loading import load_model
from flash_experts.training.training_config import TrainingConfig

Direction = Literal["forward", "reverse"]


class CausalLoss:
    """Cross-entropy with label smoothing, in the place of transformers' ``ForCausalLMLoss``.

    ``(1 - s) * nats + s * mean over the vocabulary of -log p`` (Szegedy et al. 2016, section 7). The sum over the
    labels is divided by ``num_items_in_batch``, as without smoothing. Validation and scoring do not call it.

    Args:
        smoothing: s, from 0 to under 1.
    """

    def __init__(self, smoothing: float):
        self.smoothing = smoothing

    def prepare(self, row: PackedBatch) -> None:
        """Called before the forward of a row, on the model's device."""

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        """Loss of (..., S, vocabulary) logits, a 0-dimensional float32; arguments as transformers' losses have them.

        Args:
            logits: of any floating type; the loss is computed in float32.
            labels: (..., S) int64, shifted here unless ``shift_labels`` is given.
            vocab_size: size of the last dimension.
            num_items_in_batch: what the sum is divided by; None for the number of labels.
            ignore_index: positions without a label.
            shift_labels: the label of each position.
        """
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets = shift_labels.reshape(-1).to(logits.device)
        total = F.cross_entropy(
            logits.float().view(-1, vocab_size),
            targets,
            ignore_index=ignore_index,
            reduction="sum",
            label_smoothing=self.smoothing,
        )
        return total / ((targets != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch)


class DistillationLoss(CausalLoss):
    """``(1 - w) * cross-entropy + w * t^2 * KL`` between the distributions of teacher and student at temperature t.

    Hinton et al. 2015, Distilling the Knowledge in a Neural Network; with the reverse KL, Gu et al. 2024, MiniLLM. The
    factor t^2 keeps the size of the gradients.

    The teacher runs next to the student, on the same packed rows. Nothing of it is stored: an epoch draws other
    prompts for the names, so a cache of its logits would be read once, and a resumed run finds the same logits.

    Args:
        smoothing: label smoothing of the cross-entropy.
        teacher: in eval mode, on the model's device, of the student's vocabulary.
        weight: w, from 0 to 1.
        temperature: t, more than 0.
        kl: forward is KL(teacher || student), which covers all that the teacher would write; reverse is
            KL(student || teacher), which keeps to what it finds likely.
    """

    def __init__(
        self, smoothing: float, teacher: PreTrainedModel, weight: float, temperature: float, kl: Direction
    ) -> None:
        super().__init__(smoothing)
        self.teacher = teacher.requires_grad_(False)
        self.weight, self.temperature, self.kl = weight, temperature, kl
        self._teacher_logits_LV: torch.Tensor | None = None

    def prepare(self, row: PackedBatch) -> None:
        with torch.no_grad():
            self._teacher_logits_LV = self.teacher(**row.inputs).logits[0]

    def __call__(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: torch.Tensor | int | None = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **_: Any,
    ) -> torch.Tensor:
        hard = super().__call__(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels)
        teacher_LV, self._teacher_logits_LV = self._teacher_logits_LV, None
        assert teacher_LV is not None, "prepare comes before each forward"
        divergence_L = kl_divergence(logits.reshape(-1, vocab_size), teacher_LV, self.temperature, self.kl)
        items = divergence_L.numel() if num_items_in_batch is None else num_items_in_batch
        return (1 - self.weight) * hard + self.weight * self.temperature**2 * divergence_L.sum() / items


def kl_divergence(
    student_LV: torch.Tensor, teacher_LV: torch.Tensor, temperature: float, kl: Direction
) -> torch.Tensor:
    """(L,) divergence in nats of two rows of logits, both divided by the temperature; at least float32."""
    dtype = torch.promote_types(student_LV.dtype, torch.float32)
    student_LV = (student_LV.to(dtype) / temperature).log_softmax(-1)
    teacher_LV = (teacher_LV.to(dtype) / temperature).log_softmax(-1)
    first, second = (teacher_LV, student_LV) if kl == "forward" else (student_LV, teacher_LV)
    return (first.exp() * (first - second)).sum(-1)


def make_loss(
    config: TrainingConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> CausalLoss:
    """The loss of a run; its teacher is loaded.

    Raises:
        ValueError: the teacher cannot be loaded, reads no packed rows, or has another vocabulary than the model.
    """
    if config.teacher is None:
        return CausalLoss(config.label_smoothing)
    teacher = load_model(config.teacher, device)
    if not keeps_packed_apart(teacher.config):
        raise ValueError(f"teacher {config.teacher} is a {teacher.config.model_type}: it must be a GPT-2 or a Llama")
    its_tokenizer = load_tokenizer(config.teacher, teacher.config.vocab_size)
    is_same = _vocabulary(its_tokenizer) == _vocabulary(tokenizer)
    if not is_same or teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"teacher {config.teacher} has another tokenizer than the model ({teacher.config.vocab_size:,} tokens and "
            f"{model.config.vocab_size:,}): its probabilities are of other tokens. For a new model, give "
            "model.tokenizer the teacher's folder"
        )
    return DistillationLoss(
        config.label_smoothing, teacher, config.distill_weight, config.distill_temperature, config.distill_kl
    )


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> object:
    """All that decides how a text becomes ids."""
    symbols = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return type(tokenizer), tokenizer.get_vocab(), symbols
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return [state[name] for name in ("normalizer", "pre_tokenizer", "model")], symbols
