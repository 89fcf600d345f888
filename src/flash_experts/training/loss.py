"""The loss of a step and its numerics: cross-entropy, knowledge distillation, precision, determinism, NaN/Inf checks.

Shape suffixes: L positions of a packed batch, V vocabulary, K cached logits.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from flash_experts.data.packing import PackedBatch
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.kernels.cpu import has_bfloat16
from flash_experts.models.flash_attention import separates_packed_sequences
from flash_experts.models.loading import load_model
from flash_experts.models.scoring import TopLogits, holds_top_logits
from flash_experts.training.training_config import TrainingConfig

Direction = Literal["forward", "reverse"]
SumOfRows = Callable[[torch.Tensor, slice], torch.Tensor]  # the summed loss of some rows of the logits
_NEVER = -20.0  # log-probability
_CHUNK = 2**20  # logits, 4 MB in float32
# With `on_nan: skip`: after more of them the weights themselves are likely NaN, and continuing is useless.
MOST_SKIPS_IN_A_ROW = 20

# --------------------------------------------------------------------------------------------------------------- losses


def make_loss(
    config: TrainingConfig, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> CausalLoss:
    """The loss of a run, with its teacher; a ValueError if that cannot be loaded or does not fit the model."""
    if config.teacher is None:
        return CausalLoss(config.label_smoothing)
    if holds_top_logits(config.teacher):
        if config.distill_temperature != 1:
            raise ValueError("distill_temperature must be 1 with cached top logits: they have no others to flatten")
        top_logits = TopLogits(config.teacher, tokenizer)
        return TopLogitsLoss(config.label_smoothing, top_logits, config.distill_weight, config.distill_kl)
    teacher = load_model(config.teacher, device)
    if not separates_packed_sequences(teacher.config):
        raise ValueError(f"teacher {config.teacher} is a {teacher.config.model_type}: it must be a GPT-2 or a Llama")
    teacher_tokenizer = load_tokenizer(config.teacher, teacher.config.vocab_size)
    is_same = _vocabulary(teacher_tokenizer) == _vocabulary(tokenizer)
    if not is_same or teacher.config.vocab_size != model.config.vocab_size:
        raise ValueError(
            f"teacher {config.teacher} has another tokenizer than the model ({teacher.config.vocab_size:,} tokens and "
            f"{model.config.vocab_size:,}): its probabilities are for other tokens. For a new model, set "
            "model.tokenizer to the teacher's folder"
        )
    return DistillationLoss(
        config.label_smoothing, teacher, config.distill_weight, config.distill_temperature, config.distill_kl
    )


def _vocabulary(tokenizer: PreTrainedTokenizerBase) -> object:
    """What decides how a text becomes ids."""
    special_ids = tokenizer.bos_token_id, tokenizer.eos_token_id
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        return type(tokenizer), tokenizer.get_vocab(), special_ids
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return [state[name] for name in ("normalizer", "pre_tokenizer", "model")], special_ids


class CausalLoss:
    """Cross-entropy with label smoothing s (0 to under 1); replaces transformers' ``ForCausalLMLoss`` in training.

    ``(1 - s) * nats + s * mean over the vocabulary of -log p`` (Szegedy et al. 2016, section 7).
    """

    top_logits: TopLogits | None = None  # a teacher's, for names with an `EncodedName.top_row`

    def __init__(self, smoothing: float = 0.0):
        self.smoothing = smoothing

    def prepare(self, batch: PackedBatch) -> None:
        """Called before the forward of each packed batch, on the model's device."""

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
        """The loss, a 0-dimensional float32 tensor. Arguments as in transformers' losses.

        Args:
            labels: (..., S), shifted here unless ``shift_labels``, (..., S), are given.
            num_items_in_batch: divisor of the sum; None for the number of labels.
        """
        if shift_labels is None:
            shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        targets_L = shift_labels.reshape(-1).to(logits.device)
        items = (targets_L != ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
        logits_LV = logits.reshape(-1, vocab_size)
        sum_of_rows = self._prepared(targets_L, ignore_index)
        is_large = logits_LV.device.type == "cpu" and logits_LV.numel() > _CHUNK
        if is_large and logits_LV.requires_grad and not torch.compiler.is_compiling():
            return cast(torch.Tensor, _SumInChunks.apply(logits_LV, sum_of_rows, items))
        return sum_of_rows(logits_LV, slice(None)) / items

    def _prepared(self, targets_L: torch.Tensor, ignore_index: int) -> SumOfRows:
        """The summed loss of some rows of the logits, for this batch."""

        def sum_of_rows(logits_LV: torch.Tensor, rows: slice) -> torch.Tensor:
            is_label_L = targets_L[rows] != ignore_index
            targets = targets_L[rows].where(is_label_L, 0)[:, None]
            nats_L = self._smoothed(-log_probs_at(logits_LV, targets)[:, 0], logits_LV, targets)
            return nats_L.where(is_label_L, 0.0).sum()

        return sum_of_rows

    def _smoothed(self, nats_L: torch.Tensor, logits_LV: torch.Tensor, targets_L1: torch.Tensor) -> torch.Tensor:
        """Label smoothing; the mean of -log p is the target's plus its logit, less the mean logit."""
        if not self.smoothing:
            return nats_L
        excess_L = logits_LV.gather(1, targets_L1)[:, 0] - logits_LV.to(nats_L.dtype).mean(-1)
        return nats_L + self.smoothing * excess_L


def log_probs_at(logits_LV: torch.Tensor, ids_LJ: torch.Tensor) -> torch.Tensor:
    """``logits.log_softmax(-1).gather(1, ids)``, (L, J), at least float32; on a CPU in fewer passes over the logits."""
    if logits_LV.device.type == "cpu" and not torch.compiler.is_compiling():
        return cast(torch.Tensor, _LogProbsAt.apply(logits_LV, ids_LJ))
    dtype = torch.promote_types(logits_LV.dtype, torch.float32)
    return logits_LV.to(dtype).log_softmax(-1).gather(1, ids_LJ)


class _LogProbsAt(torch.autograd.Function):
    """With e = exp(logits - their maximum) and g the gradient of the J results, the gradient of the logits is g at the
    J tokens, less ``e / sum(e) * sum(g)``: it overwrites e."""

    @staticmethod
    def forward(ctx: Any, logits_LV: torch.Tensor, ids_LJ: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(logits_LV.dtype, torch.float32)
        most_L1 = logits_LV.amax(-1, keepdim=True).to(dtype)
        exp_LV = (logits_LV - most_L1).exp_()
        sum_L1 = exp_LV.sum(-1, keepdim=True)
        ctx.save_for_backward(exp_LV, sum_L1, ids_LJ)
        ctx.dtype = logits_LV.dtype
        return logits_LV.gather(1, ids_LJ).to(dtype) - (most_L1 + sum_L1.log())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_LJ: torch.Tensor) -> tuple[torch.Tensor, None]:
        exp_LV, sum_L1, ids_LJ = ctx.saved_tensors
        exp_LV.mul_(-gradient_LJ.sum(-1, keepdim=True) / sum_L1).scatter_add_(1, ids_LJ, gradient_LJ)
        return exp_LV.to(ctx.dtype), None


class _SumInChunks(torch.autograd.Function):
    """Sums a loss over chunks of rows, each with its gradient at once, so that float32 copies stay in the cache.

    As Liger Kernel's fused cross-entropy (Hsu et al. 2024), without the matmul before it.
    """

    @staticmethod
    def forward(ctx: Any, logits_LV: torch.Tensor, sum_of_rows: SumOfRows, items: torch.Tensor | int) -> torch.Tensor:
        L, V = logits_LV.shape
        total = torch.zeros((), dtype=torch.promote_types(logits_LV.dtype, torch.float32))
        gradient_LV = torch.empty_like(logits_LV)
        for start in range(0, L, step := max(1, _CHUNK // V)):
            rows = slice(start, start + step)
            with torch.enable_grad():
                chunk = logits_LV[rows].detach().requires_grad_()
                loss = sum_of_rows(chunk, rows) / items
            (gradient_LV[rows],) = torch.autograd.grad(loss, chunk)
            total += loss.detach()
        ctx.save_for_backward(gradient_LV)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (gradient_LV,) = ctx.saved_tensors
        return gradient_LV if gradient == 1 else gradient_LV * gradient, None, None  # it is large, and 1 the usual case


class DistillationLoss(CausalLoss):
    """Knowledge distillation: ``(1 - w) * cross-entropy + w * t^2 * KL`` of teacher and student at temperature t.

    Hinton et al. 2015; with the reverse KL, KL(student || teacher), Gu et al. 2024, MiniLLM. The factor t^2 keeps the
    scale of the gradients. The teacher is in eval mode, on the student's device.
    """

    def __init__(
        self, smoothing: float, teacher: PreTrainedModel, weight: float, temperature: float, kl: Direction
    ) -> None:
        super().__init__(smoothing)
        self.teacher, self.weight, self.temperature, self.kl = teacher, weight, temperature, kl
        self._teacher_logits_LV: torch.Tensor | None = None

    def prepare(self, batch: PackedBatch) -> None:
        with torch.no_grad():
            self._teacher_logits_LV = self.teacher(**batch.inputs).logits[0]

    def _prepared(self, targets_L: torch.Tensor, ignore_index: int) -> SumOfRows:
        cross_entropy = super()._prepared(targets_L, ignore_index)
        teacher_LV, self._teacher_logits_LV = self._teacher_logits_LV, None
        assert teacher_LV is not None, "prepare comes before each forward"

        def sum_of_rows(logits_LV: torch.Tensor, rows: slice) -> torch.Tensor:
            divergence_L = kl_divergence(logits_LV, teacher_LV[rows], self.temperature, self.kl)
            hard = cross_entropy(logits_LV, rows)
            return (1 - self.weight) * hard + self.weight * self.temperature**2 * divergence_L.sum()

        return sum_of_rows


class TopLogitsLoss(CausalLoss):
    """`DistillationLoss` from top-K logits that were cached while the teacher generated the names.

    The divergence is over the K most likely tokens and the rest. Labels without logits have the cross-entropy alone.
    """

    def __init__(self, smoothing: float, top_logits: TopLogits, weight: float, kl: Direction) -> None:
        super().__init__(smoothing)
        self.top_logits, self.weight, self.kl = top_logits, weight, kl
        self._rows_L: torch.Tensor | None = None

    def prepare(self, batch: PackedBatch) -> None:
        self._rows_L = batch.top_rows

    def _prepared(self, targets_L: torch.Tensor, ignore_index: int) -> SumOfRows:
        top_rows_L, self._rows_L = self._rows_L, None
        assert top_rows_L is not None, "prepare comes before each forward"

        def sum_of_rows(logits_LV: torch.Tensor, rows: slice) -> torch.Tensor:
            return self._sum(logits_LV, targets_L[rows][:, None], top_rows_L[rows])

        return sum_of_rows

    def _sum(self, logits_LV: torch.Tensor, targets_L1: torch.Tensor, top_rows_L: torch.Tensor) -> torch.Tensor:
        assert self.top_logits is not None
        has_teacher_L = top_rows_L >= 0
        cached = top_rows_L.clamp(min=0).to(self.top_logits.ids.device)
        ids_LK, teacher_LK = (
            each[cached].to(logits_LV.device) for each in (self.top_logits.ids, self.top_logits.log_probs)
        )
        log_probs = log_probs_at(logits_LV, torch.cat([targets_L1, ids_LK.clamp(min=0)], dim=1))
        nats_L, student_LK = self._smoothed(-log_probs[:, 0], logits_LV, targets_L1), log_probs[:, 1:]
        # Tokens that the student lacks belong to the rest: nearly impossible on both sides, they add nothing.
        student_LK, teacher_LK = (each.float().masked_fill(ids_LK < 0, _NEVER) for each in (student_LK, teacher_LK))
        divergence_L = top_divergence(student_LK, teacher_LK, self.kl)
        return (nats_L + self.weight * (divergence_L - nats_L) * has_teacher_L).sum()


def top_divergence(student_LK: torch.Tensor, teacher_LK: torch.Tensor, kl: Direction) -> torch.Tensor:
    """KL divergence in nats, (L,), over K tokens and the rest of the vocabulary."""
    student, teacher = (torch.cat([each, _log_rest(each)], dim=-1) for each in (student_LK, teacher_LK))
    return _divergence(student, teacher, kl)


def _log_rest(log_probs_LK: torch.Tensor) -> torch.Tensor:
    """(L, 1) log-probability of the rest; at least -10, for float16 rounds the sum of the K."""
    return (1 - log_probs_LK.exp().sum(-1, keepdim=True)).clamp(min=4.5e-5).log()


def kl_divergence(
    student_LV: torch.Tensor, teacher_LV: torch.Tensor, temperature: float, kl: Direction
) -> torch.Tensor:
    """KL divergence in nats, (L,), at a temperature; computed in at least float32."""
    dtype = torch.promote_types(student_LV.dtype, torch.float32)
    student_LV = (student_LV.to(dtype) / temperature).log_softmax(-1)
    teacher_LV = (teacher_LV.to(dtype) / temperature).log_softmax(-1)
    return _divergence(student_LV, teacher_LV, kl)


def _divergence(student: torch.Tensor, teacher: torch.Tensor, kl: Direction) -> torch.Tensor:
    first, second = (teacher, student) if kl == "forward" else (student, teacher)
    return (first.exp() * (first - second)).sum(-1)


# -------------------------------------------------------------------------------------------- precision and determinism


def use_bfloat16(precision: str, device: torch.device) -> bool:
    """Whether forwards run under bfloat16 autocast; a ValueError if the GPU has none.

    A processor that would compute it in software gets float32 instead.
    """
    if device.type == "cpu":
        return precision == "bfloat16" and has_bfloat16()
    has_it = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    if precision == "bfloat16" and device.type == "cuda" and not has_it:
        raise ValueError("this GPU has no bfloat16: set precision to float32 or auto")
    return precision == "bfloat16" or (precision == "auto" and has_it)


def check_dtype(model: PreTrainedModel) -> PreTrainedModel:
    """Returns the model; ValueError unless its weights are float32 (16 bits lose AdamW's small steps)."""
    if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
        raise ValueError("the model's weights must be float32 to train: load it with dtype=torch.float32")
    return model


@contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """If ``wanted``, restricts PyTorch to operations that give the same bits in every run; others raise."""
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when CUDA starts
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark = torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


# ------------------------------------------------------------------------------------------------------- NaN/Inf checks


class FiniteGuard:
    """The NaN/Inf check before each update; a bad step on one process is bad for all.

    On a GPU reading the flag would synchronize: the fused optimizer skips by itself, and the host reads it at the next
    line of metrics. With ``stop``, no later update is applied either.
    """

    def __init__(self, stop: bool, device: torch.device, world: int):
        self._stop, self._world = stop, world
        self._on_cpu = device.type == "cpu"
        self._any_bad = torch.zeros((), dtype=torch.bool, device=device)
        self.reset()

    def reset(self) -> None:
        """Forgets all bad steps: a run that is resumed has the weights of before them."""
        self._unread: list[tuple[int, torch.Tensor]] = []
        self._any_bad = torch.zeros_like(self._any_bad)

    def check(self, step: int, loss: torch.Tensor, grad_norm: torch.Tensor) -> torch.Tensor:
        """Whether step ``step`` (from 1) is bad: a 0-dimensional bool tensor, equal on all processes."""
        is_bad = ~(torch.isfinite(loss) & torch.isfinite(grad_norm))
        if self._world > 1:
            # The norm is global, but the loss is this process's: without agreement, one alone could skip.
            flag = is_bad.float()
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            is_bad = flag > 0
        self._any_bad |= is_bad
        self._unread.append((step, is_bad))
        return is_bad

    def skips(self, is_bad: torch.Tensor) -> torch.Tensor:
        """Whether a step leaves the model as it is: 0-dimensional, bool."""
        return self._any_bad if self._stop else is_bad

    def update(self, optimizer: torch.optim.Optimizer, is_bad: torch.Tensor) -> bool:
        """Passes the flag to the optimizer; returns whether to call its ``step``."""
        found_bad = self.skips(is_bad)
        # torch's fused optimizers skip where `found_inf` is 1, which is GradScaler's way too.
        if self._on_cpu or not getattr(optimizer, "_step_supports_amp_scaling", False):
            return not found_bad.item()
        optimizer.found_inf = found_bad.float()  # type: ignore[attr-defined]
        return True

    def bad_steps(self) -> list[int]:
        """Bad steps since the last call. Waits for the device."""
        if not self._unread:
            return []
        flags = torch.stack([flag for _, flag in self._unread]).tolist()
        steps = [step for (step, _), is_bad in zip(self._unread, flags, strict=True) if is_bad]
        self._unread.clear()
        return steps


def write_bad_batch(run_dir: Path, step: int, names: Sequence[str]) -> None:
    """Writes the names of the batch at which a run stopped."""
    text = json.dumps({"step": step, "names": list(names)}, indent=2, ensure_ascii=False)
    (run_dir / f"bad-batch-{step:06d}.json").write_text(text + "\n", encoding="utf-8")
