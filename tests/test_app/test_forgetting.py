"""What requests leave behind: nothing, and not before they are over. The long form is `benchmarks/server_faults.py`."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest

from flash_experts import NameGenerator
from flash_experts.app.service import Playground

pytest.importorskip("gradio", reason="the playground's extra is not installed: pip install -e '.[app]'")
import gradio as gr

from flash_experts.app import forgetting
from flash_experts.app.forgetting import Forgetting
from flash_experts.app.server import make_app

CALL = "/gradio_api/call/v2/generate"
ONE = {"settings": {"count": 1}}


@asynccontextmanager
async def serving(playground: Playground) -> AsyncIterator[tuple[httpx.AsyncClient, gr.Blocks]]:
    """A client of the whole application, and its page, all in the event loop of the caller."""
    app = make_app(playground)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
            yield client, app.routes[-1].app.get_blocks()  # type: ignore[attr-defined]


async def join(client: httpx.AsyncClient) -> str:
    return str((await client.post(CALL, json=ONE)).json()["event_id"])


async def is_over(page: gr.Blocks) -> None:
    while page._queue.event_ids_to_events:
        await asyncio.sleep(0.01)


def held(page: gr.Blocks) -> tuple[set[str], set[str], set[str]]:
    """Sessions with events, with messages, and with state."""
    queue = page._queue
    sessions = set(page.state_holder.session_data)
    assert set(page.state_holder.time_last_used) == sessions and len(queue.event_analytics) <= 1
    return set(queue.pending_event_ids_session), set(queue.pending_messages_per_session), sessions


def test_answers_that_nobody_fetches_are_dropped_and_no_others(
    base: NameGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forgetting, "ANSWER_SECONDS", 3600.0)
    playground = Playground({"dense": base})

    async def visits() -> None:
        async with serving(playground) as (client, page):
            sweep = Forgetting(page).sweep
            sweep()  # before anybody was there
            fetched = [await join(client) for _ in range(2)]
            for event in fetched:
                assert '"names"' in (await client.get(f"{CALL}/{event}")).text
            waiting = [await join(client) for _ in range(2)]
            await is_over(page)
            sweep()
            assert held(page) == ({*fetched, *waiting}, {*fetched, *waiting}, set())
            assert '"names"' in (await client.get(f"{CALL}/{waiting[0]}")).text, "it may be fetched late"
            with playground.model().lock:
                working = await join(client)
                for _ in range(3):
                    sweep()
            assert '"names"' in (await client.get(f"{CALL}/{working}")).text, "as long as it works it is not late"
            await is_over(page)
            sweep()
            sweep()
            assert held(page) == (set(), set(), set())

    asyncio.run(visits())


def test_a_server_sweeps_and_spares_the_tables_of_people(base: NameGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forgetting, "ANSWER_SECONDS", 0.05)

    async def visits() -> None:
        async with serving(Playground({"dense": base})) as (client, page):
            state = next(block._id for block in page.blocks.values() if isinstance(block, gr.State))
            page.state_holder["a person"][state] = ()
            for _ in range(3):
                await join(client)
            async with asyncio.timeout(60):
                while held(page) != (set(), set(), {"a person"}):
                    await asyncio.sleep(0.01)

    asyncio.run(visits())
