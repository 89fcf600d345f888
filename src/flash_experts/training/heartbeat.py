"""How a run with several processes notices that one of them has fallen silent.

A process that dies closes its connections, and the others fail at once. A machine that hangs, loses power or its
network closes nothing: the others would wait in their next exchange until its time-out, which is long, since the main
process does some work alone (sample names). So every process says that it is alive, on a thread, through the store by
which the processes found each other.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from types import TracebackType

from accelerate import Accelerator
from torch.distributed import DistError, PrefixStore, TCPStore

# A silence of so many seconds is taken for the end of a process. With what it takes to notice, under a minute.
SILENCE_SECONDS = 45.0
_BEATS_IN_A_SILENCE = 9
_ENDED = "ended"


class Heartbeat:
    """While open, ends this process when another one has been silent for too long.

    The main thread is then most likely waiting for the other inside of PyTorch, where no exception reaches it. So the
    thread says what has happened and ends the process, as NCCL's own watchdog does. Nothing is lost by that: a
    checkpoint is written under another name and renamed when it is whole.

    Args:
        rank: of this process.
        world: number of processes.
        address: of the store, host and port (torchrun and accelerate name it in the environment).
        silence: seconds.
        end: what to do when a process is lost; told its rank.
    """

    def __init__(self, rank: int, world: int, address: tuple[str, int], silence: float, end: Callable[[int], None]):
        self._rank, self._others = rank, [other for other in range(world) if other != rank]
        self._address, self._silence, self._end = address, silence, end
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        host, port = self._address
        patience = timedelta(seconds=self._silence)
        # A connection of its own: a wait on another thread's would hold this one up.
        self._store = PrefixStore("heartbeat", TCPStore(host, port, is_master=False, timeout=patience))
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._thread.join(self._silence)

    def _run(self) -> None:
        heard = {other: ("", time.monotonic()) for other in self._others}
        beat = 0
        try:
            while not self._closing.wait(self._silence / _BEATS_IN_A_SILENCE):
                beat += 1
                self._store.set(str(self._rank), str(beat))
                for other in self._others:
                    word = self._store.get(str(other)).decode() if self._store.check([str(other)]) else ""
                    if word != heard[other][0] or word == _ENDED:
                        heard[other] = word, time.monotonic()
                    elif time.monotonic() - heard[other][1] > self._silence:
                        self._end(other)
            self._store.set(str(self._rank), _ENDED)  # its silence from here on means nothing
        except DistError:
            # The store is gone with the machine that has it: a silent one after a time-out, a dead one at once. At the
            # end of a run the first process may be gone already.
            if not self._closing.is_set():
                self._end(0)


def watch_the_others(accelerator: Accelerator) -> AbstractContextManager[object]:
    """A `Heartbeat` of this process, or nothing where it is alone."""
    if accelerator.num_processes == 1:
        return nullcontext()
    address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    return Heartbeat(accelerator.process_index, accelerator.num_processes, address, SILENCE_SECONDS, _end_this_process)


def _end_this_process(lost: int) -> None:
    sys.stderr.write(
        f"flash-experts: process {lost} of this run has been silent for {SILENCE_SECONDS:.0f} seconds: its machine or "
        "the network is gone. Start the run again: it goes on from the last checkpoint (--resume auto)\n"
    )
    sys.stderr.flush()
    os._exit(1)
