"""Saving beside the training: a copy of the tensors is taken, and a thread writes it while the steps go on."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from flash_experts.training.sharding import gather_whole


class CpuCopy:
    """Copies tensors into buffers on the CPU, which are kept from one save to the next.

    Fresh memory is handed out page by page as it is first written, which takes several times as long as the copy; with
    buffers that are kept, only the first save pays that. On CUDA the buffers are pinned, so that the device copies
    them by itself.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def take(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors as they are now. The former copy is overwritten: nobody may still read it.

        A tensor under two names (tied weights) has one copy. One that is spread over processes is gathered.
        """
        copies: dict[str, torch.Tensor] = {}
        for name, first, tensor in gather_each(tensors):
            if tensor is not None:
                self._buffer(name, tensor).copy_(tensor, non_blocking=True)
            copies[name] = self._buffers[first]
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()  # the next step overwrites what the device still copies
        return copies

    def _buffer(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer


def gather_each(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str, torch.Tensor | None]]:
    """One after the other: a name, the first name of the same tensor, and the whole tensor if it is the first. Never
    two whole tensors at once. Where tensors are spread, every process must go through all of them."""
    first_names: dict[int, str] = {}
    for name, tensor in tensors.items():
        first = first_names.setdefault(id(tensor), name)
        yield name, first, gather_whole(tensor) if first == name else None


class Background:
    """One thread that works through what it is given, in order. The interpreter waits for it when it exits."""

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []

    def submit(self, work: Callable[[], None]) -> None:
        """Queues a piece of work."""
        self._pending.append(self._executor.submit(work))

    @property
    def busy(self) -> bool:
        """Whether a piece of work is not done yet."""
        return any(not future.done() for future in self._pending)

    def check(self) -> None:
        """Raises the error of a piece of work that has ended; never waits."""
        while self._pending and self._pending[0].done():
            self._pending.pop(0).result()

    def wait(self) -> None:
        """Waits until all is done.

        Raises:
            Exception: that of the first piece of work that failed; the others are done all the same.
        """
        pending, self._pending = self._pending, []
        errors = [error for error in [future.exception() for future in pending] if error is not None]
        if errors:
            raise errors[0]
