"""The layout of the Gradio page: controls on the left, names in the middle, and the card of a chosen name on the right.

On a narrow screen the card lies over the lower part of the page, and only the main controls stand before the names.
"""

from __future__ import annotations

from typing import Any

import gradio as gr

from flash_experts.app import events, form
from flash_experts.app.api import add_endpoints
from flash_experts.app.exporting import FORMATS
from flash_experts.app.handlers import EMPTY, Handlers
from flash_experts.app.service import Playground
from flash_experts.app.session import Session
from flash_experts.app.sets import LONGEST_SET, MOST_EACH
from flash_experts.app.settings import LONGEST_STRING
from flash_experts.generation import PRESETS

QUEUE_SIZE = 32  # waiting requests; further ones are refused (HTTP 503)
MAX_SESSIONS = 500  # sessions whose names are kept: 500 kB each at most
_HEADER = (
    '<div class="fe-header"><h1>flash-experts</h1>'
    "<p>New names for Magic: The Gathering cards, made on this machine.</p></div>"
)


def build_page(playground: Playground) -> gr.Blocks:
    """The page and the HTTP endpoints."""
    handlers = Handlers(playground)
    with gr.Blocks(title="flash-experts: names for cards", analytics_enabled=False, fill_width=True) as page:
        _html("fe-header", _HEADER)
        parts: events.Parts = {"session": gr.State(Session()), "inspected": gr.State(None)}
        with gr.Row(elem_id="fe-page"):
            with gr.Column(scale=5, min_width=300, elem_id="fe-left"):
                parts |= _left(playground)
            with gr.Column(scale=7, min_width=300, elem_id="fe-middle"), gr.Tabs():
                with gr.Tab("Names"):
                    parts |= _names_tab()
                with gr.Tab("Compare"):
                    parts |= _compare_tab(playground)
            with gr.Column(scale=6, min_width=300, elem_id="fe-side"):
                parts["panel"] = _html("fe-panel")
        # What the page's script reads and writes.
        for name in ("kept", "query", "remembered", "file"):
            parts[name] = gr.Textbox(visible="hidden", elem_id=f"fe-{name}")
        events.connect(page, handlers, parts)
        add_endpoints(playground, events.QUEUE, events.CONCURRENT_REQUESTS)
    page.queue(max_size=QUEUE_SIZE, api_open=False, default_concurrency_limit=events.CONCURRENT_REQUESTS)
    page.state_session_capacity = MAX_SESSIONS
    return page


def _html(name: str, value: str = "") -> gr.HTML:
    """A component for our own HTML, without Gradio's styles of tables and buttons."""
    script = "window.flashExperts.watch(element, trigger);"
    return gr.HTML(value, elem_id=name, js_on_load=script, apply_default_css=False)


def _left(playground: Playground) -> events.Parts:
    """The controls: the main ones first, then the buttons, then all others."""
    attributes = form.attribute_controls(playground.conditions(), render=False)
    controls: form.Controls = {}
    with gr.Row():
        controls |= _rendered(attributes, "types", "subtypes")
    controls |= _rendered(attributes, "colors")
    with gr.Row(elem_id="fe-start"):
        parts: events.Parts = {
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


def _names_tab() -> events.Parts:
    with gr.Row(elem_id="fe-examples"):
        parts: events.Parts = {
            "examples": {title: gr.Button(title, size="sm", min_width=110) for title in events.EXAMPLES}
        }
    parts |= {"status": _html("fe-status"), "table": _html("fe-table", EMPTY)}
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


def _compare_tab(playground: Playground) -> events.Parts:
    models = list(playground.models)
    presets = [("as on the left", ""), *((name, name) for name in PRESETS)]
    parts: events.Parts = {"compare": gr.Button("Compare", variant="primary", elem_id="fe-compare")}
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
                status = _html(f"fe-status-{letter}")
                sides.append((_html(f"fe-side-{letter}"), status, gr.State(())))
    return parts | {"choices": choices, "sides": sides}
