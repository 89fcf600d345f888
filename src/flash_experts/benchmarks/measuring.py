"""How things are measured: contestants take turns in rounds, and the median of each counts.

A slow moment of the machine then hits all of them. On a GPU times come from CUDA events, and before each pass the L2
cache is written over: that empties it, and it keeps the GPU busy while the host queues the pass, so that what is timed
is the GPU's work and not the host's. What a pass costs when the host has to keep up is in `Timing.call`.
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
_FLUSH_BYTES, _FLUSHES = 256 * 2**20, 4  # four times the 256 MB that no L2 holds: about 0.3 ms of a Hopper GPU
_MOST_REPEATS = 20  # of one contestant in one round
_CALLS = 10


@dataclass(frozen=True, slots=True)
class Contestant:
    """Something to be timed.

    Attributes:
        run: one pass. It calls the function that it is given at the end of each of its parts.
        context: entered around the passes of a round, its own cost not timed.
    """

    run: Callable[[Lap], object]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians over all passes, in seconds.

    Attributes:
        parts: of each part of a pass.
        total: of the whole pass.
        call: of a pass among several that the host starts one after the other without waiting; None on a CPU, where it
            is the same as ``total``.
        rounds: the median of each round alone.
    """

    parts: tuple[float, ...]
    total: float
    call: float | None
    rounds: tuple[float, ...] = ()

    def times(self, baseline: Timing) -> float:
        """How many times as long as the baseline: the median over rounds of the ratio within each."""
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
        """Seconds of each part of one pass."""
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
        """Seconds of a pass when the host starts several, one after the other; None on a CPU."""
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize(self.device)
        start = time.perf_counter()
        for _ in range(_CALLS):
            run(lambda: None)
        torch.cuda.synchronize(self.device)
        return (time.perf_counter() - start) / _CALLS


def take_turns(
    contestants: Mapping[str, Contestant], device: torch.device, rounds: int, seconds: float = 0.1
) -> dict[str, Timing]:
    """Times contestants that have run before (what they compile at first is not timed).

    Args:
        contestants: by name.
        device: where they run.
        rounds: in each of which every contestant has its turn; one more comes first, to warm up.
        seconds: that a contestant may take over all rounds. At least one pass a round, and more if they are quick.
    """
    clock = Clock(device)
    parts: dict[str, list[list[float]]] = {name: [] for name in contestants}
    by_round: dict[str, list[float]] = {name: [] for name in contestants}
    repeats = dict.fromkeys(contestants, 1)
    for turn in range(rounds + 1):
        for name, contestant in contestants.items():
            with contestant.context():
                passes = [clock.parts(contestant.run) for _ in range(repeats[name])]
            if turn:
                parts[name] += passes
                by_round[name].append(statistics.median(map(sum, passes)))
            else:
                share = seconds / rounds / max(sum(passes[0]), 1e-6)
                repeats[name] = min(max(int(share), 1), _MOST_REPEATS)
    timings = {}
    for name, contestant in contestants.items():
        medians = tuple(statistics.median(column) for column in zip(*parts[name], strict=True))
        with contestant.context():
            call = clock.call(contestant.run)
        timings[name] = Timing(medians, statistics.median(map(sum, parts[name])), call, tuple(by_round[name]))
    return timings


class Deadline:
    """Whether there is time left: ``seconds`` from now, or for ever."""

    def __init__(self, seconds: float | None):
        self.end = float("inf") if seconds is None else time.monotonic() + seconds

    def is_over(self) -> bool:
        return time.monotonic() > self.end


# ---------------------------------------------------------------------------------------------------- memory and errors


class _LiveTensors(TorchDispatchMode):
    """Counts the bytes of tensors that are made under it and still live. It does not see inside an operator."""

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
    """Most bytes that a call holds beyond what there was before it.

    On a GPU the allocator says so; on a CPU it is the sum of the tensors that live at once.
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


# Largest error relative to the largest value. Rounding stays well under these; a wrong mask or index is over 0.1.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 4e-2}


def relative_error(found: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> float:
    """Over several tensors the largest ``max |found - truth| / max |truth|``; infinite if something is not finite."""
    worst = 0.0
    for mine, right in zip(found, truth, strict=True):
        error = float((mine.double() - right).abs().max() / right.abs().max())
        worst = max(worst, error if error == error else float("inf"))
    return worst


def reason_of(error: BaseException, details: Sequence[str] = ()) -> str:
    """Why a contestant did not run, as one line."""
    text = " ".join([str(error) or type(error).__name__, *details])
    if isinstance(error, torch.OutOfMemoryError):
        text = "out of memory"
    text = " ".join(text.split())
    return text if len(text) <= 240 else text[:239] + "…"
