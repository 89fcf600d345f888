"""The page: controls on the left, names on the right, and a look into the model below them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import gradio as gr

from flash_experts.app import form, rendering
from flash_experts.app.api import add_endpoints
from flash_experts.app.comparing import Side
from flash_experts.app.handlers import (
    EMPTY,
    Handlers,
    Rows,
    Shown,
    Table,
    csv_of,
    picked,
    read_settings,
    table_of,
)
from flash_experts.app.service import Playground, Row
from flash_experts.app.settings import LONGEST_STRING
from flash_experts.generation import PRESETS

AT_ONCE = 4  # requests that take turns at the models
MOST_WAITING = 32  # requests that wait; the next are told that the playground is busy
MOST_SESSIONS = 500  # tables that are remembered: 300 kB each at most
_QUEUE = "names"  # all that computes waits in one queue
_COMPUTES: dict[str, Any] = {
    "concurrency_id": _QUEUE, "concurrency_limit": AT_ONCE, "api_visibility": "private", "show_progress": "hidden",
}  # fmt: skip
_AT_ONCE: dict[str, Any] = {"queue": False, "api_visibility": "private", "show_progress": "hidden"}
_HEADER = (
    '<div class="fe-header"><h1>flash-experts</h1>'
    "<p>New names for Magic: The Gathering cards, made on this machine.</p></div>"
)
_EXAMPLES: dict[str, dict[str, Any]] = {
    "Red Goblins": {"types": ["Creature"], "subtypes": ["Goblin"], "colors": ["R"]},
    "Legendary Dragons": {"types": ["Legendary", "Creature"], "subtypes": ["Dragon"]},
    "Blue instants": {"types": ["Instant"], "colors": ["U"]},
    "Equipment": {"types": ["Artifact"], "subtypes": ["Equipment"]},
}
# Buttons within a piece of HTML tell what they do. The piece is written anew for each answer: the focus goes back.
_ON_LOAD = """
let key = null;
element.addEventListener('click', (event) => {
  const button = event.target.closest('button[data-do]');
  if (button) { key = button.dataset.key; trigger('click', {...button.dataset}); }
});
new MutationObserver(() => {
  if (key === null || document.activeElement !== document.body) return;
  const button = element.querySelector(`[data-key="${CSS.escape(key)}"]`);
  if (button) button.focus({preventScroll: true});
}).observe(element, {childList: true, subtree: true});
"""
_DOWNLOAD = """(text) => { const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([text], {type: 'text/csv'})); link.download = 'names.csv'; link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000); }"""
_SHOW_LOOK = """() => setTimeout(() => { const title = document.getElementById('fe-looked'); if (!title) return;
  title.focus({preventScroll: true}); title.scrollIntoView({block: 'nearest', behavior: 'smooth'}); }, 50)"""


def build_page(playground: Playground) -> gr.Blocks:
    """The page and the HTTP endpoints."""
    handlers = Handlers(playground)
    with gr.Blocks(title="flash-experts: names for cards", analytics_enabled=False, fill_width=True) as page:
        _html("fe-header", _HEADER)
        with gr.Row():
            with gr.Column(scale=4, min_width=300):
                controls, make, stop = _left(playground)
            with gr.Column(scale=7, min_width=300):
                looked, panel = gr.State(None), _html("fe-panel", render=False)
                with gr.Tabs():
                    with gr.Tab("Names"):
                        running = _names_tab(handlers, controls, make, looked, panel)
                    with gr.Tab("Compare"):
                        running += _compare_tab(handlers, controls, looked, panel)
                panel.render()
        stop.click(None, cancels=running, **_AT_ONCE)
        panel.click(_look_again(handlers), looked, panel, **_COMPUTES)
        add_endpoints(playground, _QUEUE, AT_ONCE)
    page.queue(max_size=MOST_WAITING, api_open=False, default_concurrency_limit=AT_ONCE)
    page.state_session_capacity = MOST_SESSIONS
    return page


def _html(name: str, value: str = "", render: bool = True) -> gr.HTML:
    """A place for our own HTML, without Gradio's styles of tables and buttons."""
    return gr.HTML(value, elem_id=name, js_on_load=_ON_LOAD, apply_default_css=False, render=render)


def _left(playground: Playground) -> tuple[form.Controls, gr.Button, gr.Button]:
    """The controls, and the buttons that start and stop."""
    controls = form.attribute_controls(playground.conditions())
    controls["preset"] = gr.Radio(list(PRESETS), value="balanced", label=form.LABELS["preset"], elem_id="fe-preset")
    models = list(playground.models)
    controls["model"] = gr.Dropdown(
        models, value=models[0], label=form.LABELS["model"], visible=len(models) > 1, elem_id="fe-model"
    )
    with gr.Row():
        make = gr.Button("Make names", variant="primary", elem_id="fe-make", scale=3)
        stop = gr.Button("Stop", elem_id="fe-stop", scale=1, min_width=70)
    with gr.Accordion("How many", open=False):
        controls |= form.amount_controls()
    with gr.Accordion("Rules for the names", open=False):
        controls |= form.rule_controls()
    with gr.Accordion("Sampling", open=False):
        controls |= form.style_controls()
    sliders = [controls[name] for name in form.SLIDERS]
    controls["preset"].input(form.sliders_of, controls["preset"], sliders, **_AT_ONCE)
    return controls, make, stop


def _names_tab(
    handlers: Handlers, controls: form.Controls, make: gr.Button, looked: gr.State, panel: gr.HTML
) -> list[Any]:
    """The table of names with what can be done to it. Returns the events that can be stopped."""
    names = gr.State(Table())
    with gr.Row(elem_id="fe-examples"):
        examples = {title: gr.Button(title, size="sm", min_width=110) for title in _EXAMPLES}
    status = _html("fe-status")
    table = _html("fe-table", EMPTY)
    with gr.Row():
        more = gr.Button("More like the kept ones", size="sm", elem_id="fe-more", min_width=120)
        download = gr.Button("Download CSV", size="sm", elem_id="fe-csv", min_width=120)
    with gr.Accordion("Share these settings", open=False):
        share = gr.Textbox(
            label="Settings string", info="makes the same names again: copy it, or paste another one and load it",
            max_length=LONGEST_STRING, lines=2, max_lines=4, buttons=["copy"], elem_id="fe-share",
        )  # fmt: skip
        load = gr.Button("Load these settings", size="sm", elem_id="fe-load")
    csv = gr.Textbox(visible="hidden", elem_id="fe-csv-text")

    inputs, shown = [*controls.values(), names], [table, status, names, share]
    starts: list[Any] = [make.click, *(controls[name].submit for name in form.TEXTS)]
    running = [start(_streaming(handlers.make, controls), inputs, shown, **_COMPUTES) for start in starts]
    running.append(more.click(_streaming(handlers.more_like, controls), inputs, shown, **_COMPUTES))
    for title, button in examples.items():
        filled = button.click(_filling(title), None, _attribute_controls(controls), **_AT_ONCE)
        running.append(filled.then(_streaming(handlers.make, controls), inputs, shown, **_COMPUTES))
    for run in running:  # the last table of a request may have been on its way when a star was pressed
        run.then(lambda names: table_of(names.rows), names, table, **_AT_ONCE)
    pressed = table.click(_row_pressed(handlers), [names, looked], [table, names, looked, panel], **_COMPUTES)
    pressed.then(None, js=_SHOW_LOOK, **_AT_ONCE)
    download.click(csv_of, names, csv, **_AT_ONCE).then(None, csv, js=_DOWNLOAD, **_AT_ONCE)
    loadable = [name for name in controls if name != "model"]
    load.click(_loading(loadable), share, [status, *(controls[name] for name in loadable)], **_AT_ONCE)
    return running


def _compare_tab(handlers: Handlers, controls: form.Controls, looked: gr.State, panel: gr.HTML) -> list[Any]:
    """Two sides with the attributes, rules and seed of the left. Returns the events that can be stopped."""
    models = list(handlers.playground.models)
    presets = [("as on the left", ""), *((name, name) for name in PRESETS)]
    button = gr.Button("Compare", variant="primary", elem_id="fe-compare")
    choices: list[gr.components.Component] = []
    outputs: list[gr.components.Component] = []
    with gr.Row():
        for place, letter in enumerate("AB"):
            with gr.Column(min_width=280):
                model, preset = models[place % len(models)], "" if len(models) > 1 else list(PRESETS)[2 * place]
                label = f"Model {letter}"
                choices.append(gr.Dropdown(models, value=model, label=label, visible=len(models) > 1))
                choices.append(
                    gr.Dropdown(presets, value=preset, label=f"Style {letter}", elem_id=f"fe-style-{letter}")
                )
                status, rows = _html(f"fe-status-{letter}"), gr.State(())
                table = _html(f"fe-side-{letter}")
                outputs += [table, status, rows]
                pressed = table.click(_side_pressed(handlers), rows, [looked, panel], **_COMPUTES)
                pressed.then(None, js=_SHOW_LOOK, **_AT_ONCE)
    run = button.click(_comparing(handlers, controls), [*controls.values(), *choices], outputs, **_COMPUTES)
    return [run]


# ----------------------------------------------------------------------- handlers in the shape that Gradio calls them


def _streaming(
    handler: Callable[..., Iterator[Shown]], controls: form.Controls
) -> Callable[..., Iterator[tuple[Any, ...]]]:
    names = list(controls)

    def run(*values: Any) -> Iterator[tuple[Any, ...]]:
        *given, table = values
        for shown in handler(dict(zip(names, given, strict=True)), table):
            yield shown.table, shown.status, table, shown.settings

    return run


def _comparing(handlers: Handlers, controls: form.Controls) -> Callable[..., Iterator[list[Any]]]:
    names = list(controls)

    def run(*values: Any) -> Iterator[list[Any]]:
        given, (model_a, preset_a, model_b, preset_b) = values[: len(names)], values[len(names) :]
        sides = [Side(model_a, preset_a), Side(model_b, preset_b)]
        for both in handlers.compare(dict(zip(names, given, strict=True)), sides):
            yield [part for shown in both for part in (shown.table, shown.status, shown.rows)]

    return run


def _row_pressed(handlers: Handlers) -> Callable[..., Any]:
    def pressed(names: Table, looked: Row | None, event: gr.EventData) -> tuple[Any, ...]:
        told = _told(event)
        if told.get("do") == "lock":
            return table_of(names.press(told.get("name"))), names, looked, gr.skip()
        row = picked(names.rows, told.get("name"))
        return gr.skip(), gr.skip(), row, handlers.look(row)

    return pressed


def _side_pressed(handlers: Handlers) -> Callable[..., Any]:
    def pressed(rows: Rows, event: gr.EventData) -> tuple[Row | None, str]:
        row = picked(rows, _told(event).get("name"))
        return row, handlers.look(row)

    return pressed


def _look_again(handlers: Handlers) -> Callable[..., str]:
    def pressed(looked: Row | None, event: gr.EventData) -> str:
        told = _told(event)
        return handlers.look(looked, told.get("block"), told.get("head"))

    return pressed


def _told(event: gr.EventData) -> dict[str, Any]:
    """What a button told of itself. It comes from the browser: anything may be in it."""
    data = event._data
    return data if isinstance(data, dict) else {}


def _attribute_controls(controls: form.Controls) -> list[gr.components.Component]:
    return [controls[name] for name in form.ATTRIBUTES]


def _filling(title: str) -> Callable[[], list[Any]]:
    blank = {"types": [], "subtypes": [], "colors": [], **dict.fromkeys(form.CHOICES, form.ANY)}
    values = blank | _EXAMPLES[title]
    return lambda: [values[name] for name in form.ATTRIBUTES]


def _loading(names: Sequence[str]) -> Callable[[str], list[Any]]:
    def load(text: str) -> list[Any]:
        try:
            values = read_settings(text)
        except ValueError as error:
            return [rendering.failure(str(error)), *(gr.skip() for _ in names)]
        return [rendering.note("Settings loaded: press Make names."), *(values[name] for name in names)]

    return load
