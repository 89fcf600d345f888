"""The controls of the page, and the conversion of their values to `Settings` and back.

Controls of sampling and rules are made from the option declarations. The card has its own: lists for its type line.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import gradio as gr

from flash_experts.app.settings import DEFAULTS, KINDS, OPTIONS, Settings
from flash_experts.data.cards import COLORLESS, SUPERTYPES, TYPES, parse_colors
from flash_experts.data.prompts import OPTIONAL_ATTRIBUTES, Conditions
from flash_experts.data.type_lines import known_subtypes, parse_type_line
from flash_experts.generation import PRESETS, Sampling
from flash_experts.generation.request import RULES, SAMPLING, NameRequest
from flash_experts.options import options_of, type_of

ANY = "any"
_MOST_CHOICES = 20  # integers in a dropdown; larger ranges are typed
# Labels of the options on the page, also used in its error messages.
LABELS = {name: known.label or name for name, known in OPTIONS.items()} | {
    "types": "Type", "subtypes": "Subtypes", "model": "Model",
}  # fmt: skip
_COLORS = [("White", "W"), ("Blue", "U"), ("Black", "B"), ("Red", "R"), ("Green", "G"), (COLORLESS.capitalize(), "C")]
CHOICES = ("mana_value", *OPTIONAL_ATTRIBUTES)  # card attributes chosen from a dropdown with "any"
ATTRIBUTES = ("types", "subtypes", "colors", *CHOICES)
SLIDERS = tuple(options_of(Sampling))  # set by the preset
_ROW = ("starts_with", "contains", "ends_with"), ("min_words", "max_words", "min_length", "max_length")
_LEFT_OUT = {"words"}  # the page has min_words and max_words instead


def _is_number_of_choices(name: str) -> bool:
    low, high = OPTIONS[name].page_bounds or (0, 0)
    return KINDS[name] == "integer" and OPTIONS[name].slider is None and high - low < _MOST_CHOICES


def _is_typed_number(name: str) -> bool:
    is_chosen = name in CHOICES or OPTIONS[name].slider is not None or _is_number_of_choices(name)
    return KINDS[name] == "integer" and not is_chosen


_RULES = tuple(name for name, known in OPTIONS.items() if known.group == RULES and name not in _LEFT_OUT)
_STYLE = tuple(name for name, known in OPTIONS.items() if known.group == SAMPLING and name not in ("preset", "seed"))
_AMOUNT = ("count", "seed")
_GENERIC = (*_RULES, *_STYLE, *_AMOUNT, "like")
# Text fields in which Enter makes names.
TEXTS = (*(name for name in _GENERIC if KINDS[name] == "text" or _is_typed_number(name)), "banned_words")

Controls = dict[str, Any]  # Gradio components by name


def attribute_controls(conditions: Conditions, render: bool) -> Controls:
    """Controls of the card, with the rarities, sets and years that a served model has learned."""
    look: dict[str, Any] = {"render": render, "min_width": 130}
    lowest, highest = map(int, OPTIONS["mana_value"].page_bounds or (0, 0))
    printing = {  # custom values are allowed, because loaded settings may have others: the model checks them
        name: gr.Dropdown(
            _any_or(conditions.get(name, [])), value=ANY, allow_custom_value=True, visible=name in conditions,
            label=LABELS[name], elem_id=f"fe-{name}", **look,
        )
        for name in OPTIONAL_ATTRIBUTES
    }  # fmt: skip
    return {
        "types": gr.Dropdown(
            [*SUPERTYPES, *TYPES], multiselect=True, label=LABELS["types"], elem_id="fe-types", **look
        ),
        "subtypes": gr.Dropdown(
            list(known_subtypes()), multiselect=True, label=LABELS["subtypes"], elem_id="fe-subtypes", **look
        ),
        "colors": gr.CheckboxGroup(_COLORS, label=LABELS["colors"], elem_id="fe-colors", **look),
        "mana_value": gr.Dropdown(
            _any_or(range(lowest, highest + 1)), value=ANY, label=LABELS["mana_value"], elem_id="fe-mana", **look
        ),
        **printing,
    }


def style_controls() -> Controls:
    return {name: control(name) for name in _STYLE if name != "quality"}


def rule_controls() -> Controls:
    controls: Controls = {}
    for names in _ROW:
        with gr.Row():
            controls |= {name: control(name, min_width=120) for name in names}
    return controls | {name: control(name) for name in ("like", *_RULES) if name not in controls}


def amount_controls() -> Controls:
    return {name: control(name) for name in _AMOUNT}


def control(name: str, **look: Any) -> Any:
    """The control that suits an option's kind."""
    known, default = OPTIONS[name], DEFAULTS[name]
    look |= {"label": known.label, "elem_id": f"fe-{name}"}
    hint = known.hint.replace("_", "\\_") or None  # Gradio reads it as Markdown
    if KINDS[name] == "flag":
        return gr.Checkbox(**look)
    if KINDS[name] == "choice":
        choices = list(zip(known.labels, get_args(type_of(NameRequest, name)), strict=True))
        return gr.Dropdown(choices, value=default, **look)
    if known.slider is not None:
        low, high, step = known.slider
        value = getattr(PRESETS["balanced"], name) if name in SLIDERS else default
        return gr.Slider(low, high, value, step=step, info=hint, **look)
    if _is_number_of_choices(name):
        low, high = known.page_bounds or (0, 0)
        return gr.Dropdown(_any_or(range(int(low), int(high) + 1)), value=ANY, **look)
    # An optional number is a text box: a blank `gr.Number` becomes 0 when its accordion opens (gradio#6728).
    longest = int((known.page_bounds or (0, 10))[1]) if KINDS[name] == "text" else None
    longest = 10 if _is_typed_number(name) else longest
    lines = 2 if name == "like" else 1
    return gr.Textbox(max_lines=lines, max_length=longest, placeholder=known.placeholder or None, info=hint, **look)


def settings_of(values: Mapping[str, Any]) -> Settings:
    """Settings from the values of the controls, by name; raises a ValueError if one is not allowed."""
    given: dict[str, Any] = {"preset": values["preset"]}
    for name in (*_GENERIC, *CHOICES):
        is_number = name in ("mana_value", "released") or _is_typed_number(name) or _is_number_of_choices(name)
        is_any = name in CHOICES and values[name] == ANY  # in a text it is a word
        given[name] = whole(name, values[name]) if is_number else None if is_any else values[name]
    parts = [" ".join(values["types"] or ()), " ".join(values["subtypes"] or ())]
    given["type_line"] = " — ".join(part for part in parts if part)
    given["colors"] = "".join(values["colors"] or ())
    preset = PRESETS.get(values["preset"], Sampling())
    for name in SLIDERS:
        if given[name] == getattr(preset, name):
            del given[name]
    return Settings.from_values(given)


def values_of(settings: Settings) -> dict[str, Any]:
    """Values of the controls for settings: the inverse of `settings_of`."""
    values: dict[str, Any] = {"preset": settings.preset}
    for name in (*_GENERIC, "mana_value", "released"):
        own = getattr(settings, name)
        if name in ("min_words", "max_words"):
            own = settings.words or own
        if name in SLIDERS:
            own = getattr(PRESETS[settings.preset], name) if own is None else own
        elif name in CHOICES or _is_number_of_choices(name):
            own = ANY if own is None else str(own)
        elif KINDS[name] == "list":
            own = ("; " if name == "like" else ", ").join(own or ())
        elif KINDS[name] == "text" or _is_typed_number(name):
            own = "" if own is None else str(own)
        values[name] = own
    attributes = settings.attributes()
    values |= {"rarity": attributes.rarity or ANY, "set_code": attributes.set_code or ANY}
    supertypes, types, subtypes = parse_type_line(settings.type_line)
    values["types"], values["subtypes"] = [*(supertypes or ()), *(types or ())], list(subtypes or ())
    values["colors"] = _letters(settings.colors)
    return values


def sliders_of(preset: str) -> list[float]:
    """A preset's values of `SLIDERS`, in order."""
    return [getattr(PRESETS[preset], name) for name in SLIDERS]


def _letters(colors: str | None) -> list[str]:
    found = parse_colors(colors)
    return [] if found is None else list(found) or ["C"]


def _any_or(values: Iterable[Any]) -> list[str]:
    return [ANY, *map(str, values)]


def with_labels(message: str) -> str:
    """An error message with option names replaced by their labels on the page."""
    return re.sub(r"\b[a-z]+_[a-z]+\b", lambda match: LABELS.get(match[0], match[0]), message)


def whole(name: str, text: Any) -> int | None:
    """The integer in a field; None if it is blank or "any"."""
    if text is None or text == ANY or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str) or not re.fullmatch("[0-9]{1,10}", text.strip()):
        raise ValueError(f"{LABELS[name]} must be a whole number, not {text!r:.40}")
    return int(text)
