"""The Gradio page: controls on the left, names in the middle, and the card of a chosen name on the right; its events.

On a narrow screen the card lies over the lower part of the page, and only the main controls stand before the names.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from flash_experts.app import form
from flash_experts.app.api import add_endpoints
from flash_experts.app.handlers import EMPTY, Handlers, Opened, TableView, for_browser, table_of
from flash_experts.app.service import Playground, Row, Side
from flash_experts.app.session import FORMATS, Rows, Session, picked
from flash_experts.app.sets import LONGEST_SET, MOST_EACH
from flash_experts.app.settings import LONGEST_STRING
from flash_experts.generation import PRESETS

CONCURRENT_REQUESTS = 4  # requests served at the same time
QUEUE = "names"  # one queue for all events that run a model
QUEUE_SIZE = 32  # waiting requests; further ones are refused (HTTP 503)
MAX_SESSIONS = 500  # sessions whose names are kept: 500 kB each at most
_HEADER = (
    '<div class="fe-header"><h1>flash-experts</h1>'
    "<p>New names for Magic: The Gathering cards, made on this machine.</p></div>"
)
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
_REQUEST = _QUEUED | {"trigger_mode": "multiple", "js": "(...values) => flashExperts.started(values)"}
# What the page's script does for a component: answer its buttons, announce its lines.
_PRESSED = "window.flashExperts.watch(element, trigger);"
_SPOKEN = "window.flashExperts.speak(element);"
_UNQUEUED: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
Parts = dict[str, Any]  # components of the page by name


def build_page(playground: Playground) -> gr.Blocks:
    """The page and the HTTP endpoints."""
    handlers = Handlers(playground)
    with gr.Blocks(title="flash-experts: names for cards", analytics_enabled=False, fill_width=True) as page:
        parts: Parts = {"session": gr.State(Session()), "inspected": gr.State(None)}
        # Back and Forward of the browser are an event of the header, which is always there.
        parts["header"] = _html("fe-header", _HEADER, "window.flashExperts.follow(trigger);")
        with gr.Row(elem_id="fe-page"):
            with gr.Column(scale=5, min_width=300, elem_id="fe-left"):
                parts |= _left(playground)
            with gr.Column(scale=7, min_width=300, elem_id="fe-middle"), gr.Tabs():
                with gr.Tab("Names"):
                    parts |= _names_tab()
                with gr.Tab("Compare"):
                    parts |= _compare_tab(playground)
            with gr.Column(scale=6, min_width=300, elem_id="fe-side"):
                parts["panel"] = _html("fe-panel", script=f"{_PRESSED} {_SPOKEN}")
        # What the page's script reads and writes.
        for name in ("kept", "query", "remembered", "file"):
            parts[name] = gr.Textbox(visible="hidden", elem_id=f"fe-{name}")
        _connect(page, handlers, parts)
        add_endpoints(playground, QUEUE, CONCURRENT_REQUESTS)
    page.queue(max_size=QUEUE_SIZE, api_open=False, default_concurrency_limit=CONCURRENT_REQUESTS)
    page.state_session_capacity = MAX_SESSIONS
    return page


def _html(name: str, value: str = "", script: str = _PRESSED) -> gr.HTML:
    """A component for our own HTML, without Gradio's styles of tables and buttons."""
    return gr.HTML(value, elem_id=name, js_on_load=script, apply_default_css=False)


def _left(playground: Playground) -> Parts:
    """The controls: the main ones first, then the buttons, then all others."""
    attributes = form.attribute_controls(playground.conditions(), render=False)
    controls: form.Controls = {}
    with gr.Row():
        controls |= _rendered(attributes, "types", "subtypes")
    controls |= _rendered(attributes, "colors")
    with gr.Row(elem_id="fe-start"):
        parts: Parts = {
            "make": gr.Button("Make names", variant="primary", elem_id="fe-make", scale=3, min_width=120),
            "stop": gr.Button("Stop", elem_id="fe-stop", scale=1, min_width=60),
            "reset": gr.Button("Reset", elem_id="fe-reset", scale=1, min_width=60),
        }
    with gr.Accordion("More options", open=True, elem_id="fe-options"):
        with gr.Row():
            controls |= _rendered(attributes, *form.CHOICES)
        controls["preset"] = gr.Radio(list(PRESETS), value="balanced", label=form.LABELS["preset"], elem_id="fe-preset")
        controls["quality"] = form.control("quality")
        models = list(playground.models)
        controls["model"] = gr.Dropdown(
            models, value=models[0], label=form.LABELS["model"], visible=len(models) > 1, elem_id="fe-model"
        )
        with gr.Accordion("How many", open=False):
            controls |= form.amount_controls()
        with gr.Accordion("Rules for the names", open=False):
            controls |= form.rule_controls()
        with gr.Accordion("Sampling", open=False):
            controls |= form.style_controls()
        with gr.Accordion("Several cards at once", open=False):
            parts["cards"] = gr.Textbox(
                label="Cards", lines=3, max_lines=10, max_length=LONGEST_SET, elem_id="fe-cards",
                placeholder="Creature — Angel, W, 5\nInstant, UR",
                info="one a line: type line, colors, mana value; or a set as CSV or JSON, as generate --cards takes it",
            )  # fmt: skip
            with gr.Row():
                parts["each"] = gr.Dropdown(
                    list(map(str, range(1, MOST_EACH + 1))),
                    value="5",
                    label="Names for each",
                    elem_id="fe-each",
                    min_width=120,
                )
                parts["several"] = gr.Button("Make names for each card", elem_id="fe-several", min_width=120)
            with gr.Row():
                parts["open_cards"] = gr.Button("Open a file of cards", size="sm", elem_id="fe-open", min_width=120)
                parts["save_set"] = gr.Button("Download the named set", size="sm", elem_id="fe-save-set", min_width=120)
    return parts | {"controls": controls}


def _rendered(controls: form.Controls, *names: str) -> form.Controls:
    return {name: controls[name].render() for name in names}


def _names_tab() -> Parts:
    with gr.Row(elem_id="fe-examples"):
        parts: Parts = {"examples": {title: gr.Button(title, size="sm", min_width=110) for title in EXAMPLES}}
    parts |= {"status": _html("fe-status", script=_SPOKEN), "table": _html("fe-table", EMPTY)}
    with gr.Row(elem_classes="fe-tools"):
        parts["more"] = gr.Button("More like the kept ones", size="sm", elem_id="fe-more", min_width=150)
        parts["copy_kept"] = gr.Button("Copy kept names", size="sm", elem_id="fe-copy-kept", min_width=120)
        parts["copy_link"] = gr.Button("Copy link", size="sm", elem_id="fe-copy-link", min_width=90)
        parts["release"] = gr.Button("Release all", size="sm", elem_id="fe-release", min_width=90)
    with gr.Row(elem_classes="fe-tools"):
        parts["format"] = gr.Dropdown(
            list(FORMATS.items()), value="csv", label="File format", elem_id="fe-format", min_width=110, scale=1
        )
        parts["download_kept"] = gr.Button("Download kept names", size="sm", elem_id="fe-save-kept", min_width=140)
        parts["download"] = gr.Button("Download all", size="sm", elem_id="fe-save", min_width=110)
    with gr.Accordion("History", open=False, elem_id="fe-past"):
        parts["history"] = _html("fe-history", "")
    with gr.Accordion("Share these settings", open=False):
        parts["share"] = gr.Textbox(
            label="Settings string", info="makes the same names again: copy it, or paste another one and load it",
            max_length=LONGEST_STRING, lines=2, max_lines=4, elem_id="fe-share",
        )  # fmt: skip
        with gr.Row():
            parts["copy_settings"] = gr.Button("Copy these settings", size="sm", elem_id="fe-copy-settings")
            parts["load"] = gr.Button("Load these settings", size="sm", elem_id="fe-load")
    return parts


def _compare_tab(playground: Playground) -> Parts:
    models = list(playground.models)
    presets = [("as on the left", ""), *((name, name) for name in PRESETS)]
    parts: Parts = {"compare": gr.Button("Compare", variant="primary", elem_id="fe-compare")}
    choices: list[Any] = []
    sides: list[tuple[Any, Any, Any]] = []
    with gr.Row():
        for place, letter in enumerate("AB"):
            with gr.Column(min_width=280):
                model, preset = models[place % len(models)], "" if len(models) > 1 else list(PRESETS)[2 * place]
                label = f"Model {letter}"
                choices.append(gr.Dropdown(models, value=model, label=label, visible=len(models) > 1))
                choices.append(
                    gr.Dropdown(presets, value=preset, label=f"Style {letter}", elem_id=f"fe-style-{letter}")
                )
                status = _html(f"fe-status-{letter}", script=_SPOKEN)
                sides.append((_html(f"fe-side-{letter}"), status, gr.State(())))
    return parts | {"choices": choices, "sides": sides}


# ---------------------------------------------------------------------------------------------------------- events


def _connect(page: gr.Blocks, handlers: Handlers, parts: Parts) -> None:
    """Connects each control with the handler that answers it."""
    _make_names(handlers, parts)
    _compare(handlers, parts)
    stopped = "(session) => { flashExperts.say('Stopped'); return session; }"
    parts["stop"].click(handlers.stopped, parts["session"], _after(parts), js=stopped, **_UNQUEUED)
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
    def name_pressed(rows: Rows, event: gr.EventData) -> tuple[Row | None, str]:
        row = picked(rows, _button_data(event).get("name"))
        return row, handlers.inspect(row)

    outputs = [component for side in parts["sides"] for component in side]
    inputs = [*parts["controls"].values(), *parts["choices"], parts["session"]]
    for table, _, rows in parts["sides"]:
        pressed = table.click(name_pressed, rows, [parts["inspected"], parts["panel"]], **_QUEUED)
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
    """From the page's address, a settings string, the page's or the browser's history; or they are reset."""
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

    def revisit(session: Session, event: gr.EventData) -> list[Any]:
        data = _button_data(event)
        opened = handlers.revisit(data.get("query"), data.get("link"), session)
        return [*handlers.finished(session), session, *of(opened)]

    def reset(session: Session) -> list[Any]:
        session.reset(query="")
        return [for_browser(session, address="", link=""), *of(handlers.defaults())]

    page.load(
        open_page, [parts["kept"], parts["query"], session], [parts["table"], parts["history"], session, *shown],
        js="(kept, query, session) => [...flashExperts.opened(), session]", **_UNQUEUED,
    )  # fmt: skip
    parts["load"].click(lambda text: of(handlers.load(text)), parts["share"], shown, **_UNQUEUED)
    after = [*_after(parts), session, *shown]
    parts["history"].click(open_request, session, after, **_UNQUEUED)
    parts["header"].click(revisit, session, after, trigger_mode="multiple", **_UNQUEUED)
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


def _button_data(event: gr.EventData) -> dict[str, Any]:
    """The data attributes of the button that was pressed. Untrusted: they come from the browser."""
    data = event._data
    return data if isinstance(data, dict) else {}
