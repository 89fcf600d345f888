"""What Gradio holds for clients that are gone, and how it is given back.

Gradio holds messages until a client fetches them, and a session with a copy of the page's configuration (about
100 kB) for each call of an endpoint. Neither ends with the client: the number of the former is without a bound, that
of the latter has one which many calls reach at the cost of the tables of people who are there (`MOST_SESSIONS`).
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import gradio as gr

ANSWER_SECONDS = 30.0  # an answer that is complete waits for its client for one to two of these


class Forgetting:
    """Drops what belongs to requests that are over and to clients that did not come for the answer.

    Only to be used in the thread of the server's event loop, where all of Gradio's own changes to these are made.

    Args:
        page: mounted and with its queue.
    """

    def __init__(self, page: gr.Blocks) -> None:
        self._page, self._queue = page, page._queue
        # Statistics for a page that the gate does not let through, gathered anew over 10,000 requests after each.
        self._queue.ANAYLTICS_CACHE_FREQUENCY = sys.maxsize
        self._queue.ANALYTICS_MAX_EVENTS = 1
        self._idle: dict[str, frozenset[str]] = {}

    def sweep(self) -> None:
        """Drops the answers that waited already at the last sweep, and the sessions that hold nothing of anybody."""
        queue, holder = self._queue, self._page.state_holder
        at_work = {event.session_hash for event in queue.event_ids_to_events.values()}
        idle = {
            session: frozenset(events)
            for session, events in queue.pending_event_ids_session.items()
            if session not in at_work
        }
        for session, events in idle.items():
            if self._idle.get(session) == events:
                del queue.pending_event_ids_session[session]
                queue.pending_messages_per_session.pop(session, None)
        self._idle = idle
        with holder.lock:
            for session in [session for session, held in holder.session_data.items() if not held.state_data]:
                if session not in at_work:
                    del holder.session_data[session]
                    holder.time_last_used.pop(session, None)
        if queue.server_app is not None:  # as long as nobody asked for anything
            queue.server_app.iterators_to_reset.intersection_update(queue.event_ids_to_events)

    @asynccontextmanager
    async def lifespan(self, _: object) -> AsyncIterator[None]:
        """Sweeps as long as the server runs."""
        sweeping = asyncio.create_task(self._run())
        try:
            yield
        finally:
            sweeping.cancel()
            with suppress(asyncio.CancelledError):
                await sweeping

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(ANSWER_SECONDS)
            self.sweep()
