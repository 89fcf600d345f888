"""The events of the Gradio page: which handler answers which control, with Gradio's signatures."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from flash_experts.app import form
from flash_experts.app.handlers import Handlers, Opened, TableView, for_browser, table_of
from flash_experts.app.service import Row, Side
from flash_experts.app.session import Rows, Session, picked

CONCURRENT_REQUESTS = 4  # requests served at the same time
QUEUE = "names"  # one queue for all events that run a model
EXAMPLES: dict[str, dict[str, Any]] = {
    "Red Goblins": {"types": ["Creature"], "subtypes": ["Goblin"], "colors": ["R"]},
    "Legendary Dragons": {"types": ["Legendary", "Creature"], "subtypes": ["Dragon"]},
    "Blue instants": {"types": ["Instant"], "colors": ["U"]},
    "Equipment": {"types": ["Artifact"], "subtypes": ["Equipment"]},
}
_QUEUED: dict[str, Any] = {
    "concurrency_id": QUEUE, "concurrency_limit": CONCURRENT_REQUESTS, "api_visibility": "private",
    "show_progress": "hidden",
}  # fmt: skip
# A request ends the one before it in its session (`Session.begin`), so a button may be pressed again while it runs.
# Gradio's `cancels` would let the thread go on, and fails when two buttons cancel the same request.
_REQUEST = _QUEUED | {"trigger_mode": "multiple"}
_UNQUEUED: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
Parts = dict[str, Any]  # components of the page by name


def connect(page: gr.Blocks, handlers: Handlers, parts: Parts) -> None:
    _make_names(handlers, parts)
    _compare(handlers, parts)
    parts["stop"].click(handlers.stopped, parts["session"], _after(parts), **_UNQUEUED)
    _settings_are_opened(page, handlers, parts)
    _names_are_pressed(handlers, parts)
    _names_leave_the_page(handlers, parts)
    parts["remembered"].change(None, parts["remembered"], js="(text) => flashExperts.remember(text)", **_UNQUEUED)


def _make_names(handlers: Handlers, parts: Parts) -> None:
    controls, session = parts["controls"], parts["session"]
    inputs = [*controls.values(), session]
    shown = [parts["table"], parts["status"], session, parts["share"]]
    starts = [parts["make"].click, *(controls[name].submit for name in form.TEXTS)]
    make = _streaming(handlers.make, controls)
    running = [gr.on(starts, make, inputs, shown, **_REQUEST)]
    running.append(parts["more"].click(_streaming(handlers.more_like, controls), inputs, shown, **_REQUEST))
    cards = [*controls.values(), parts["cards"], parts["each"], session]
    running.append(parts["several"].click(_streaming(handlers.make_several, controls), cards, shown, **_REQUEST))
    read = "(text) => flashExperts.readFile(text)"
    parts["open_cards"].click(None, parts["cards"], parts["cards"], js=read, trigger_mode="multiple", **_UNQUEUED)
    for title, button in parts["examples"].items():
        filled = button.click(_filling(title), None, [controls[name] for name in form.ATTRIBUTES], **_UNQUEUED)
        running.append(filled.then(make, inputs, shown, **_REQUEST))
    words = [parts["inspected"], session]
    running.append(parts["panel"].submit(_another_word(handlers), words, shown, **_REQUEST))
    for run in running:  # a star may have been pressed after a request sent its last table
        run.then(handlers.finished, session, _after(parts), **_UNQUEUED)
    sliders = [controls[name] for name in form.SLIDERS]
    controls["preset"].input(form.sliders_of, controls["preset"], sliders, **_UNQUEUED)


def _after(parts: Parts) -> list[Any]:
    return [parts["table"], parts["history"], parts["remembered"]]


def _compare(handlers: Handlers, parts: Parts) -> None:
    outputs = [component for side in parts["sides"] for component in side]
    inputs = [*parts["controls"].values(), *parts["choices"], parts["session"]]
    for table, _, rows in parts["sides"]:
        pressed = table.click(_side_pressed(handlers), rows, [parts["inspected"], parts["panel"]], **_QUEUED)
        pressed.then(None, js="() => flashExperts.showPanel()", **_UNQUEUED)
    parts["compare"].click(_comparing(handlers, parts["controls"]), inputs, outputs, **_REQUEST)


def _streaming(
    handler: Callable[..., Iterator[TableView]], controls: form.Controls
) -> Callable[..., Iterator[tuple[Any, ...]]]:
    """The handler with the values of the controls as one mapping; the last value is the session."""
    names = list(controls)

    def run(*values: Any) -> Iterator[tuple[Any, ...]]:
        given, others = dict(zip(names, values, strict=False)), values[len(names) :]
        for shown in handler(given, *others):
            yield shown.table, shown.status, others[-1], shown.settings

    return run


def _another_word(handlers: Handlers) -> Callable[..., Iterator[tuple[Any, ...]]]:
    def run(row: Row | None, session: Session, event: gr.EventData) -> Iterator[tuple[Any, ...]]:
        for shown in handlers.another_word(row, _button_data(event).get("number"), session):
            yield shown.table, shown.status, session, shown.settings

    return run


def _comparing(handlers: Handlers, controls: form.Controls) -> Callable[..., Iterator[list[Any]]]:
    names = list(controls)

    def run(*values: Any) -> Iterator[list[Any]]:
        given, (model_a, preset_a, model_b, preset_b, session) = values[: len(names)], values[len(names) :]
        sides = [Side(model_a, preset_a), Side(model_b, preset_b)]
        for both in handlers.compare(dict(zip(names, given, strict=True)), sides, session):
            yield [part for shown in both for part in (shown.table, shown.status, shown.rows)]

    return run


def _filling(title: str) -> Callable[[], list[Any]]:
    blank = {"types": [], "subtypes": [], "colors": [], **dict.fromkeys(form.CHOICES, form.ANY)}
    values = blank | EXAMPLES[title]
    return lambda: [values[name] for name in form.ATTRIBUTES]


def _settings_are_opened(page: gr.Blocks, handlers: Handlers, parts: Parts) -> None:
    """From the page's address, a settings string, or the history; or they are reset."""
    controls, session = parts["controls"], parts["session"]
    names = list(controls)
    shown = [parts["status"], parts["share"], *controls.values()]

    def of(opened: Opened) -> list[Any]:
        values = (opened.values.get(name, gr.skip()) for name in names)
        return [opened.status or gr.skip(), opened.settings or gr.skip(), *values]

    def open_page(kept: Any, query: Any, session: Session) -> list[Any]:
        opened = handlers.open_page(kept, query, session)
        return [table_of(session.rows), handlers.history(session), session, *of(opened)]

    def open_request(session: Session, event: gr.EventData) -> list[Any]:
        opened = handlers.open_request(_button_data(event).get("number"), session)
        return [*handlers.finished(session), session, *of(opened)]

    def reset(session: Session) -> list[Any]:
        session.reset()
        return [for_browser(session, address="", link=""), *of(handlers.defaults())]

    page.load(
        open_page, [parts["kept"], parts["query"], session], [parts["table"], parts["history"], session, *shown],
        js="(kept, query, session) => [...flashExperts.opened(), session]", **_UNQUEUED,
    )  # fmt: skip
    parts["load"].click(lambda text: of(handlers.load(text)), parts["share"], shown, **_UNQUEUED)
    after = [*_after(parts), session, *shown]
    parts["history"].click(open_request, session, after, **_UNQUEUED)
    parts["reset"].click(reset, session, [parts["remembered"], *shown], **_UNQUEUED)


def _names_are_pressed(handlers: Handlers, parts: Parts) -> None:
    """The buttons of the table and of the panel."""
    session, inspected, panel = parts["session"], parts["inspected"], parts["panel"]

    def pressed(names: Session, event: gr.EventData) -> list[Any]:
        data = _button_data(event)
        if data.get("do") == "lock":
            rows = names.press(data.get("name"))
            return [table_of(rows), names, gr.skip(), gr.skip(), for_browser(names)]
        row = picked(names.rows, data.get("name"))
        return [gr.skip(), gr.skip(), row, handlers.inspect(row), gr.skip()]

    def panel_pressed(row: Row | None, event: gr.EventData) -> list[Any]:
        data = _button_data(event)
        if data.get("do") == "close":
            return [None, ""]
        return [gr.skip(), handlers.inspect(row, data.get("block"), data.get("head"))]

    outputs = [parts["table"], session, inspected, panel, parts["remembered"]]
    run = parts["table"].click(pressed, session, outputs, **_QUEUED)
    run.then(None, js="() => flashExperts.showPanel()", **_UNQUEUED)
    run = panel.click(panel_pressed, inspected, [inspected, panel], **_QUEUED)
    run.then(None, js="() => flashExperts.closePanel()", **_UNQUEUED)


def _names_leave_the_page(handlers: Handlers, parts: Parts) -> None:
    """Copies, files, and kept names that are released."""
    session = parts["session"]

    def release(names: Session) -> list[Any]:
        return [table_of(names.release()), names, for_browser(names)]

    def export(is_kept: bool) -> Callable[[Session, str], str]:
        return lambda names, suffix: handlers.export(names, suffix, is_kept)

    parts["release"].click(release, session, [parts["table"], session, parts["remembered"]], **_UNQUEUED)
    parts["copy_kept"].click(None, js="() => flashExperts.copyKept()", **_UNQUEUED)
    parts["copy_link"].click(None, js="() => flashExperts.copyLink()", **_UNQUEUED)
    copy_settings = "(text) => flashExperts.copy(text, 'Copied the settings')"
    parts["copy_settings"].click(None, parts["share"], js=copy_settings, **_UNQUEUED)
    saved = parts["save_set"].click(handlers.export_set, [session, parts["format"]], parts["file"], **_UNQUEUED)
    saved.then(None, parts["file"], js="(text) => flashExperts.download(text)", **_UNQUEUED)
    for button, is_kept in ((parts["download"], False), (parts["download_kept"], True)):
        written = button.click(export(is_kept), [session, parts["format"]], parts["file"], **_UNQUEUED)
        written.then(None, parts["file"], js="(text) => flashExperts.download(text)", **_UNQUEUED)


def _side_pressed(handlers: Handlers) -> Callable[..., Any]:
    def pressed(rows: Rows, event: gr.EventData) -> tuple[Row | None, str]:
        row = picked(rows, _button_data(event).get("name"))
        return row, handlers.inspect(row)

    return pressed


def _button_data(event: gr.EventData) -> dict[str, Any]:
    """The data attributes of the button that was pressed. Untrusted: they come from the browser."""
    data = event._data
    return data if isinstance(data, dict) else {}
