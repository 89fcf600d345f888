"""What a run measures: losses and router statistics of a logging window, bits per character of held-out names, MFU."""

from __future__ import annotations

import hashlib
import math
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import cast

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import ModelOutput

from flash_experts.data.cards import Card
from flash_experts.data.packing import PackedBatch, encode_cards, name_nats, pack_all
from flash_experts.data.prompts import Attributes
from flash_experts.models.moe_layer import MoELayer
from flash_experts.models.router import Router, in_use
from flash_experts.models.router_metrics import router_metrics
from flash_experts.training.run_state import TrainerState
from flash_experts.training.tracking import BITS_PER_CHAR, SELECTION
from flash_experts.training.training_config import PARTS, TrainingConfig

# Router buffers that are not part of the model: statistics of the logging window.
_ROUTER_BUFFERS = ("window_counts_E", "window_pairs_EE", "window_sums")
_BALANCING_LOSSES = ("aux_loss", "z_loss")
_PER_PROCESS = [0, 3, 4, 5, 6]  # those of the sums to which each process adds its own part
# Dense bfloat16 TFLOP/s by the makers' data sheets, tensor cores, without sparsity.
_PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100": 989, "A100": 312, "L40S": 362, "L4": 121, "A10G": 70}


# --------------------------------------------------------------------------------------------------- the logging window


def training_metrics(
    state: TrainerState,
    config: TrainingConfig,
    epoch: float,
    rate: float,
    share: float,
    measured: Mapping[str, float],
) -> dict[str, float]:
    """A line of metrics; ``share`` (0 to 1) of the run is done."""
    scales = {f"lr/{part}": getattr(config.lr_scale, part) for part in PARTS}
    metrics: dict[str, float] = {
        "step": state.step,
        "epoch": round(epoch, 4),
        "tokens": state.tokens,
        "lr": rate,
        **{name: rate * scale for name, scale in scales.items() if set(scales.values()) != {1}},
        "seconds": round(state.seconds, 3),
        **measured,
    }
    if config.on_nan == "skip":
        metrics["skipped_steps"] = state.skipped_steps
    if share > 0:
        first = state.evaluation_seconds  # the last validation takes as long
        metrics["eta_seconds"] = round((state.seconds - first) * (1 - share) / share + first, 1)
    return metrics


class LoggingWindow:
    """Sums since the last line of metrics, on the device, so that adding to them does not synchronize.

    Bits per character follow from plain cross-entropy alone (``is_code_length``).
    """

    def __init__(self, model: PreTrainedModel, accelerator: Accelerator, is_code_length: bool):
        self._model, self._accelerator, self._is_code_length = model, accelerator, is_code_length
        # This process's part of the losses, number of steps, norm of the last global gradient; nats of its names
        # without balancing losses, their characters, and its parts of the balancing losses.
        self._sums = torch.zeros(7, device=accelerator.device)
        self._balancing: list[str] = []  # names of those that the model has
        self._routers_before: dict[str, torch.Tensor] = {}

    def sums_of(self, output: ModelOutput, batch: PackedBatch, num_labels: int) -> torch.Tensor:
        """(5,) a micro-batch's part of the step: loss, nats without balancing losses, characters, balancing losses."""
        count = batch.labels.numel()
        balancing = {name: output[name].detach() for name in _BALANCING_LOSSES if output.get(name) is not None}
        self._balancing = list(balancing)
        loss = output["loss"].detach()
        nats = loss * num_labels
        for name, value in balancing.items():
            nats = nats - getattr(self._model.config, f"router_{name}_coef") * value * count
        shares = [balancing.get(name, torch.zeros_like(loss)) * (count / num_labels) for name in _BALANCING_LOSSES]
        characters = batch.characters.sum().to(loss.device)
        return torch.stack([part.float() for part in (loss, nats, characters, *shares)])

    def begin_step(self) -> None:
        """Keeps the statistics of the routers, which a forward changes, for the case that the step is bad."""
        self._routers_before = {name: buffer.clone() for name, buffer in self._router_buffers().items()}

    def add(self, parts: torch.Tensor, grad_norm: torch.Tensor, is_bad: torch.Tensor) -> None:
        """Counts a step, unless it is bad: the sum of its `sums_of`, and two 0-dimensional tensors."""
        for name, buffer in self._router_buffers().items():
            buffer.copy_(torch.where(is_bad, self._routers_before[name], buffer))
        loss, steps, _ = self._sums[:3]
        first = torch.stack([loss + parts[0], steps + 1, grad_norm.to(loss.dtype)])
        self._sums = torch.where(is_bad, self._sums, torch.cat([first, self._sums[3:] + parts[1:]]))

    def metrics(self) -> dict[str, float]:
        """The metrics of the window, without losses if all steps were skipped; starts again. All processes call it."""
        sums = self._sums.clone()
        sums[_PER_PROCESS] = cast(torch.Tensor, self._accelerator.reduce(sums[_PER_PROCESS], "sum"))
        total, steps, grad_norm, nats, characters, *parts = sums.tolist()
        self._sums[[1, *_PER_PROCESS]] = 0
        loss = {"loss": total / steps, "grad_norm": grad_norm} if steps else {}
        if steps and self._is_code_length:
            loss["bits_per_char"] = nats / math.log(2) / characters
        if steps:
            means = dict(zip(_BALANCING_LOSSES, (part / steps for part in parts), strict=True))
            loss |= {name: means[name] for name in self._balancing}
        self._add_up_routers()
        return loss | router_metrics(self._model)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Sums of every process, (processes, ...): their total would not restore them to the bit."""
        own = {"sums": self._sums} | self._router_buffers()
        return {name: cast(torch.Tensor, self._accelerator.gather(value[None])) for name, value in own.items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        sums = state["sums"].to(self._sums.device)
        if sums.shape[1:] != self._sums.shape:
            raise ValueError("its sums were written by another version of this program")
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        if len(sums) == world:
            self._sums = sums[rank].clone()
        else:  # another number of processes: each takes an equal part of the loss
            self._sums = sums[0].clone()
            self._sums[_PER_PROCESS] = sums[:, _PER_PROCESS].sum(0) / world
        for name, buffer in self._router_buffers().items():
            if state[name].shape[1:] != buffer.shape:
                raise ValueError(f"{name} is for another number of experts")
            if len(state[name]) == world:
                buffer.copy_(state[name][rank])
            else:  # only their total matters
                buffer.copy_(state[name].sum(0) * (rank == 0))

    def _add_up_routers(self) -> None:
        buffers = list(self._router_buffers().values())
        if self._accelerator.num_processes == 1 or not buffers:
            return
        flat = torch.cat([buffer.flatten() for buffer in buffers])
        total = cast(torch.Tensor, self._accelerator.reduce(flat, "sum"))
        for buffer, part in zip(buffers, total.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))

    def _router_buffers(self) -> dict[str, torch.Tensor]:
        buffers = self._model.named_buffers()
        return {name: buffer for name, buffer in buffers if name.rpartition(".")[2] in _ROUTER_BUFFERS}


# ----------------------------------------------------------------------------------------------------------- validation


class Validation:
    """The validation names, drawn by the seed, packed once in batches as large as a micro-batch for all processes."""

    def __init__(
        self,
        cards: Sequence[Card],
        tokenizer: PreTrainedTokenizerBase,
        config: TrainingConfig,
        rank: int,
        world: int,
    ):
        most = config.validation_names
        if most is not None and most < len(cards):
            cards = random.Random(f"validation/{config.seed}").sample(list(cards), most)
        self.num_names = len(cards)
        lines = sorted(f"{Attributes.of(card).prompt()} {card.name}\n" for card in cards)
        self.sha256 = hashlib.sha256("".join(lines).encode()).hexdigest()
        tokens_per_row = math.ceil(config.tokens_per_batch / (config.gradient_accumulation_steps * world))
        # Names of similar length together: attention pads a packed row to its longest name.
        self._batches: dict[str, list[tuple[PackedBatch, bool]]] = {}
        for suffix, attributes_of in (("", lambda card: Attributes()), ("_given_attributes", Attributes.of)):
            names = sorted(encode_cards(cards, tokenizer, attributes_of), key=lambda name: name.num_inputs)
            self._batches[suffix] = _share_of_batches(pack_all(names, tokens_per_row), rank, world)

    def score(self, model: nn.Module, accelerator: Accelerator) -> dict[str, float]:
        """Nats per token, bits per character (the EOS token counts as one) and `SELECTION`. All processes call it."""
        sums = self.sums(model, accelerator.device).to(accelerator.device)
        # All-reduced before the division: a mean of means would give more weight to a process with few names.
        totals = cast(torch.Tensor, accelerator.reduce(sums, "sum"))
        metrics = {}
        for suffix, (nats, tokens, characters) in zip(self._batches, totals.tolist(), strict=True):
            metrics[f"validation/loss{suffix}"] = nats / tokens
            metrics[f"{BITS_PER_CHAR}{suffix}"] = nats / math.log(2) / characters
        both = [metrics[f"{BITS_PER_CHAR}{suffix}"] for suffix in self._batches]
        return metrics | {SELECTION: sum(both) / len(both)}

    @torch.no_grad()
    def sums(self, model: nn.Module, device: torch.device) -> torch.Tensor:
        """This process's sums of nats, tokens and characters, (2, 3) float64: unconditional, given all attributes."""
        totals = torch.zeros(len(self._batches), 3, dtype=torch.float64)
        for total, batches in zip(totals, self._batches.values(), strict=True):
            nats = torch.zeros((), device=device)
            for batch, counts in batches:
                nats_N = name_nats(model, batch.to(device))
                if counts:
                    nats += nats_N.sum()
                    total[1] += batch.labels.numel()
                    total[2] += batch.characters.sum()
            total[0] = nats.item()
        return totals


def _share_of_batches(batches: Sequence[PackedBatch], rank: int, world: int) -> list[tuple[PackedBatch, bool]]:
    """Every ``world``-th batch from ``rank`` on, each with whether it counts.

    Sharded weights need equally many on all processes: one that has none left computes the first again, uncounted.
    """
    share = [(batches[index], True) for index in range(rank, len(batches), world)]
    rounds = -(-len(batches) // world)
    return share + [(batches[0], False)] * (rounds - len(share))


# ---------------------------------------------------------------------------------------------- speed, FLOPs and memory


class SpeedMeter:
    """Training speed of all processes, without pauses (validation, samples, checkpoints)."""

    def __init__(self, counts: dict[str, int], device: torch.device, world: int):
        self._counts, self._device = counts, device
        peak = peak_flops(device)
        self._peak = None if peak is None else peak * world
        self.begin()

    def begin(self) -> None:
        self._tokens = self._computed = self._labels = 0
        self._paused = 0.0
        self._start = time.perf_counter()

    def add(self, tokens: int, labels: int, computed: int) -> None:
        """Counts a step; the model multiplies ``computed`` tokens: fewer where names share prompts."""
        self._tokens += tokens
        self._labels += labels
        self._computed += computed

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Time in it does not count."""
        start = time.perf_counter()
        yield
        self._paused += time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """``tokens_per_second``, ``peak_memory_gib`` of this process, ``mfu`` if the peak is known; starts again."""
        seconds = max(1e-9, time.perf_counter() - self._start - self._paused)
        metrics = {"tokens_per_second": round(self._tokens / seconds, 1)} | peak_memory(self._device)
        if self._peak is not None:
            metrics["mfu"] = training_flops(self._counts, self._computed, self._labels) / seconds / self._peak
        self.begin()
        return metrics


def multiplied_parameters(model: PreTrainedModel) -> dict[str, int]:
    """Counts weights: ``total``; ``body``, which multiply a token in the blocks (k experts); ``head``, the output's.

    ``body_flops`` per token and ``head_flops`` per label count 2 per weight for the forward, 2 for the gradient of its
    input, if anything before it is trained, and 2 for its own, if it is trained.
    """
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    head = model.get_output_embeddings().weight
    shares = expert_shares(model)
    body = body_flops = 0.0
    trained_before = False  # parameters are named in the order of the forward
    for parameter in model.parameters():
        if id(parameter) not in looked_up and parameter is not head:
            multiplied = parameter.numel() * shares.get(parameter, 1.0)
            body += multiplied
            body_flops += 2 * multiplied * (1 + trained_before + parameter.requires_grad)
        trained_before = trained_before or parameter.requires_grad
    head_flops = 2 * head.numel() * (1 + trained_before + head.requires_grad)
    total = sum(parameter.numel() for parameter in model.parameters())
    counts = {"total": total, "body": round(body), "head": head.numel()}
    return counts | {"body_flops": round(body_flops), "head_flops": head_flops}


def expert_shares(model: nn.Module) -> dict[nn.Parameter, float]:
    """Share of each routed expert's parameter that is active per token (k of E experts)."""
    shares: dict[nn.Parameter, float] = {}
    for layer in model.modules():
        if isinstance(layer, MoELayer):
            router = in_use(layer.router, Router)
            shares |= dict.fromkeys(layer.experts.parameters(), router.top_k / router.num_experts)
    return shares


def training_flops(counts: dict[str, int], tokens: int, labels: int) -> float:
    """FLOPs of forward and backward, without attention's own matmuls: names are short."""
    return float(counts["body_flops"] * tokens + counts["head_flops"] * labels)


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 FLOP/s by data sheet; None if unknown."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for key, tflops in _PEAK_TFLOPS.items() if key in name), None)


def peak_memory(device: torch.device) -> dict[str, float]:
    """``peak_memory_gib`` since the process began: tensors on a GPU, the process on a CPU; {} if unknown."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
    elif device.type == "cpu" and sys.platform != "win32":
        import resource

        # Linux counts in KiB, macOS in bytes.
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    else:
        return {}
    return {"peak_memory_gib": round(peak / 2**30, 3)}
