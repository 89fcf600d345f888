"""Timing: implementations run in alternating rounds, and the median of each is reported; peak memory; errors.

Alternating spreads slow moments of the machine over all of them. On a GPU, CUDA events measure the time, and before
each pass the L2 cache is overwritten: this flushes it and keeps the GPU busy while the host launches the pass, so that
only GPU time is measured. `Timing.call` includes the launch overhead of the host.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Lap = Callable[[], None]
_FLUSH_BYTES, _FLUSHES = 256 * 2**20, 4  # larger than any L2 cache; four times
_MOST_REPEATS = 20  # passes of one implementation in one round, at most
_CALLS = 10


@dataclass(frozen=True, slots=True)
class Implementation:
    """An implementation to time."""

    run: Callable[[Lap], object]  # runs one pass, and calls its argument at the end of each part
    context: Callable[[], AbstractContextManager[Any]] = nullcontext  # around the passes of a round, not timed


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians over all passes, in seconds."""

    parts: tuple[float, ...]  # of each part of a pass
    total: float  # of a whole pass
    call: float | None  # per pass of several launched without synchronization; None on a CPU
    rounds: tuple[float, ...] = ()  # of each round

    def times(self, baseline: Timing) -> float:
        """Returns the time relative to a baseline: the median over rounds of the ratio within each."""
        return statistics.median(mine / its for mine, its in zip(self.rounds, baseline.rounds, strict=True))


class Clock:
    """Times passes on one device."""

    def __init__(self, device: torch.device):
        self.device = device
        self._flush: torch.Tensor | None = None
        if device.type == "cuda":
            size = min(_FLUSH_BYTES, torch.cuda.get_device_properties(device).total_memory // 64)
            self._flush = torch.empty(size, dtype=torch.int8, device=device)

    def parts(self, run: Callable[[Lap], object]) -> list[float]:
        """Measures the seconds of each part of one pass."""
        if self._flush is None:
            moments = [time.perf_counter()]
            run(lambda: moments.append(time.perf_counter()))
            return [end - start for start, end in pairwise(moments)]
        events = [torch.cuda.Event(enable_timing=True)]

        def lap() -> None:
            events.append(torch.cuda.Event(enable_timing=True))
            events[-1].record()

        for _ in range(_FLUSHES):
            self._flush.zero_()
        events[0].record()
        run(lap)
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)]

    def call(self, run: Callable[[Lap], object]) -> float | None:
        """Measures the seconds per pass of several launched without synchronization; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(_CALLS):
            run(lambda: None)
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / _CALLS


def time_in_rounds(
    implementations: Mapping[str, Implementation], device: torch.device, rounds: int, seconds: float = 0.1
) -> dict[str, Timing]:
    """Times implementations in alternating rounds. They must have run before, so that compilation is not timed.

    Args:
        rounds: number of rounds, after one for warm-up.
        seconds: time of each implementation over all rounds: at least one pass per round, more if passes are short.
    """
    clock = Clock(device)
    parts: dict[str, list[list[float]]] = {name: [] for name in implementations}
    by_round: dict[str, list[float]] = {name: [] for name in implementations}
    repeats = dict.fromkeys(implementations, 1)
    for turn in range(rounds + 1):
        for name, implementation in implementations.items():
            with implementation.context():
                passes = [clock.parts(implementation.run) for _ in range(repeats[name])]
            if turn:
                parts[name] += passes
                by_round[name].append(statistics.median(map(sum, passes)))
            else:
                share = seconds / rounds / max(sum(passes[0]), 1e-6)
                repeats[name] = min(max(int(share), 1), _MOST_REPEATS)
    timings = {}
    for name, implementation in implementations.items():
        medians = tuple(statistics.median(column) for column in zip(*parts[name], strict=True))
        with implementation.context():
            call = clock.call(implementation.run)
        timings[name] = Timing(medians, statistics.median(map(sum, parts[name])), call, tuple(by_round[name]))
    return timings


class Deadline:
    """A time limit of ``seconds`` from now, or none."""

    def __init__(self, seconds: float | None):
        self.end = float("inf") if seconds is None else time.monotonic() + seconds

    def is_over(self) -> bool:
        return time.monotonic() > self.end


# ---------------------------------------------------------------------------------------------------- memory and errors


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of live tensors that were created under it. Memory within an operator is not counted."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for storage in _storages((args, kwargs)):
            self.known.add(storage.data_ptr())
        out = func(*args, **(kwargs or {}))
        for storage in _storages(out):
            place, size = storage.data_ptr(), storage.nbytes()
            if size and place not in self.known:
                self.known.add(place)
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(storage, self._forget, place, size)
        return out

    def _forget(self, place: int, size: int) -> None:
        self.known.discard(place)
        self.bytes -= size


def _storages(tree: Any) -> Iterator[torch.UntypedStorage]:
    for leaf in tree_leaves(tree):
        if isinstance(leaf, torch.Tensor):
            yield leaf.untyped_storage()


def peak_memory(run: Callable[[], object], device: torch.device) -> int:
    """Measures the peak memory of a call in bytes, beyond what was allocated before.

    On a GPU it is the allocator's peak; on a CPU the largest sum of live tensors.
    """
    if device.type != "cuda":
        with _LiveTensors() as live:
            run()
        return live.peak
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


# Relative to the largest value. Rounding errors are well below; a wrong mask or index gives more than 0.1.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def relative_error(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Returns the largest ``max |found - truth| / max |truth|`` over tensors; infinite for NaN."""
    worst = 0.0
    for mine, right in zip(found, truth, strict=True):
        error = float((mine.double() - right).abs().max() / right.abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def reason_of(error: BaseException, details: Sequence[str] = ()) -> str:
    """Formats why an implementation did not run, as one line."""
    text = " ".join([str(error) or type(error).__name__, *details])
    if isinstance(error, torch.OutOfMemoryError):
        text = "out of memory"
    text = " ".join(text.split())
    return text if len(text) <= 240 else text[:239] + "…"
