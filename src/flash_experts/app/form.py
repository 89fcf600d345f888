"""The controls of the page, and how their values become `Settings` and back."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import gradio as gr

from flash_experts.app.settings import MOST_NAMES, Settings
from flash_experts.data.cards import COLORLESS, SUPERTYPES, TYPES, parse_colors
from flash_experts.data.prompts import SELDOM_TOLD, Conditions, known_subtypes, parse_type_line
from flash_experts.generation import PRESETS, Sampling

ANY = "any"
# What the page calls the fields of `Settings`, in its labels and in its errors.
LABELS = {
    "types": "Type",
    "subtypes": "Subtypes",
    "colors": "Colors",
    "mana_value": "Mana value",
    "rarity": "Rarity",
    "set_code": "Set",
    "released": "Year of release",
    "preset": "Style",
    "model": "Model",
    "temperature": "Temperature",
    "top_k": "Top-k",
    "top_p": "Top-p",
    "min_p": "Min-p",
    "repetition_penalty": "Repetition penalty",
    "guidance": "Guidance",
    "best_of": "Candidates per name",
    "best_by": "Keep the candidate that",
    "starts_with": "Starts with",
    "contains": "Contains",
    "ends_with": "Ends with",
    "min_words": "Fewest words",
    "max_words": "Most words",
    "min_length": "Fewest characters",
    "max_length": "Most characters",
    "regex": "Regular expression",
    "banned_words": "Banned words",
    "like": "Similar to these names",
    "min_distance": "Distance from real cards",
    "alliterate": "All words start with the same letter",
    "allow_profanity": "Allow swear words",
    "allow_real_places": "Allow places of the real world",
    "count": "Number of names",
    "seed": "Seed",
}
_COLORS = [("White", "W"), ("Blue", "U"), ("Black", "B"), ("Red", "R"), ("Green", "G"), (COLORLESS.capitalize(), "C")]
CHOICES = ("mana_value", *SELDOM_TOLD)  # dropdowns with "any"
ATTRIBUTES = ("types", "subtypes", "colors", *CHOICES)
_BEST = [("reads most naturally", "score"), ("fits type and colors best", "fit")]
_OPTIONAL = ("min_length", "max_length", "seed")  # numbers in text fields that may be blank
TEXTS = ("starts_with", "contains", "ends_with", "regex", "banned_words", *_OPTIONAL)  # Enter in them makes names
SLIDERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "guidance")
_NUMBERS = ("mana_value", "released", "min_words", "max_words")  # dropdowns with "any"
_SAME = (
    *("starts_with", "contains", "ends_with", "regex", "alliterate", "min_distance", "best_of", "best_by"),
    *("allow_profanity", "allow_real_places"),
)

Controls = dict[str, Any]  # Gradio components by name; which events one has depends on its kind


def attribute_controls(conditions: Conditions) -> Controls:
    """The card that the names are for, with the rarities, sets and years that a model here knows, if any."""
    printing = {  # custom values, because loaded settings may have others: the model checks them
        name: gr.Dropdown(
            _any_or(conditions.get(name, [])), value=ANY, allow_custom_value=True, visible=name in conditions,
            label=LABELS[name], elem_id=f"fe-{name}",
        )
        for name in SELDOM_TOLD
    }  # fmt: skip
    return {
        "types": gr.Dropdown([*SUPERTYPES, *TYPES], multiselect=True, label=LABELS["types"], elem_id="fe-types"),
        "subtypes": gr.Dropdown(
            list(known_subtypes()), multiselect=True, label=LABELS["subtypes"], elem_id="fe-subtypes"
        ),
        "colors": gr.CheckboxGroup(_COLORS, label=LABELS["colors"], elem_id="fe-colors"),
        "mana_value": gr.Dropdown(_any_or(range(17)), value=ANY, label=LABELS["mana_value"], elem_id="fe-mana"),
        **printing,
    }


def style_controls() -> Controls:
    """How varied the names are."""
    sampling = PRESETS["balanced"]
    ranges = {  # lowest, highest, step, hint
        "temperature": (0.1, 2, 0.05, "higher: more surprising names"),
        "top_k": (0, 1000, 10, "only the k most likely tokens; 0: all"),
        "top_p": (0.05, 1, 0.01, "only the most likely tokens that add up to p; 1: all"),
        "min_p": (0, 0.5, 0.01, "only tokens at least p times as likely as the best; 0: all"),
        "repetition_penalty": (0.8, 2, 0.05, "1: no penalty"),
        "guidance": (1, 3, 0.1, "higher: closer to type and colors; 1: off"),
    }
    sliders = {
        name: gr.Slider(low, high, getattr(sampling, name), step=step, label=LABELS[name], info=hint)
        for name, (low, high, step, hint) in ranges.items()
    }
    return {
        **sliders,
        "best_of": gr.Slider(
            1, 8, 1, step=1, label=LABELS["best_of"], info="names drawn for each one shown; the best is kept"
        ),
        "best_by": gr.Dropdown(_BEST, value="score", label=LABELS["best_by"], elem_id="fe-best-by"),
    }


def rule_controls() -> Controls:
    """Rules that every name follows."""
    with gr.Row():
        texts: Controls = {
            name: gr.Textbox(label=LABELS[name], max_lines=1, max_length=40, elem_id=f"fe-{name}")
            for name in ("starts_with", "contains", "ends_with")
        }
    with gr.Row():
        lengths: Controls = {
            name: gr.Dropdown(_any_or(range(1, 9)), value=ANY, label=LABELS[name], min_width=80)
            for name in ("min_words", "max_words")
        }
        lengths |= {name: _optional_number(name, min_width=80) for name in ("min_length", "max_length")}
    return {
        **texts,
        **lengths,
        "regex": gr.Textbox(
            label=LABELS["regex"], info="for the whole name", placeholder=".* of the .*", max_lines=1, max_length=100
        ),
        "banned_words": gr.Textbox(label=LABELS["banned_words"], placeholder="dragon, fire", max_lines=1),
        "like": gr.Textbox(label=LABELS["like"], placeholder="Goblin Guide; Lightning Bolt", max_lines=2),
        "min_distance": gr.Slider(
            0, 0.8, 0, step=0.05, label=LABELS["min_distance"], info="share of letters that differ from any real card"
        ),
        **{name: gr.Checkbox(label=LABELS[name]) for name in ("alliterate", "allow_profanity", "allow_real_places")},
    }


def amount_controls() -> Controls:
    """How many names, and the seed."""
    return {
        "count": gr.Slider(1, MOST_NAMES, 20, step=1, label=LABELS["count"]),
        "seed": _optional_number("seed", info="the same seed gives the same names; blank: a new seed each time"),
    }


def _optional_number(name: str, **look: Any) -> gr.Textbox:
    """A number that may be blank: a blank `gr.Number` becomes 0 when its accordion is opened (gradio#6728)."""
    return gr.Textbox(label=LABELS[name], max_lines=1, max_length=10, elem_id=f"fe-{name}", **look)


def settings_of(values: Mapping[str, Any]) -> Settings:
    """The settings that the controls show.

    Args:
        values: by the names of the controls, and "preset".

    Raises:
        ValueError: a value is not allowed.
    """
    given: dict[str, Any] = {name: values[name] for name in ("preset", "banned_words", "like", "count", *_SAME)}
    given |= {name: _whole(name, values[name]) for name in (*_NUMBERS, *_OPTIONAL)}
    given |= {name: None if values[name] == ANY else values[name] for name in ("rarity", "set_code")}
    parts = [" ".join(values["types"] or ()), " ".join(values["subtypes"] or ())]
    given["type_line"] = " — ".join(part for part in parts if part)
    given["colors"] = "".join(values["colors"] or ())
    preset = PRESETS.get(values["preset"], Sampling())
    given |= {name: values[name] for name in SLIDERS if values[name] != getattr(preset, name)}
    return Settings.from_values(given)


def values_of(settings: Settings) -> dict[str, Any]:
    """What the controls show for settings: the inverse of `settings_of`."""
    supertypes, types, subtypes = parse_type_line(settings.type_line)
    values: dict[str, Any] = {name: getattr(settings, name) for name in ("preset", "count", *_SAME)}
    values |= {name: values[name] or "" for name in ("starts_with", "contains", "ends_with", "regex")}
    exact = settings.words
    numbers = {
        "mana_value": settings.mana_value,
        "released": settings.released,
        "min_words": exact or settings.min_words,
        "max_words": exact or settings.max_words,
    }
    values |= {name: ANY if number is None else str(number) for name, number in numbers.items()}
    values |= {name: "" if (own := getattr(settings, name)) is None else str(own) for name in _OPTIONAL}
    attributes = settings.attributes()
    values |= {"rarity": attributes.rarity or ANY, "set_code": attributes.set_code or ANY}
    values["types"], values["subtypes"] = [*(supertypes or ()), *(types or ())], list(subtypes or ())
    values["colors"] = _letters(settings.colors)
    values |= {"banned_words": ", ".join(settings.banned_words), "like": "; ".join(settings.like)}
    preset = PRESETS[settings.preset]
    for name in SLIDERS:
        own = getattr(settings, name)
        values[name] = getattr(preset, name) if own is None else own
    return values


def sliders_of(preset: str) -> list[float]:
    """Values of the sliders, in their order, for a preset."""
    return [getattr(PRESETS[preset], name) for name in SLIDERS]


def _letters(colors: str | None) -> list[str]:
    found = parse_colors(colors)
    return [] if found is None else list(found) or ["C"]


def _any_or(values: Iterable[Any]) -> list[str]:
    return [ANY, *map(str, values)]


def in_words(message: str) -> str:
    """An error about fields of `Settings`, with the labels of the page."""
    return re.sub(r"\b[a-z]+_[a-z]+\b", lambda match: LABELS.get(match[0], match[0]), message)


def _whole(name: str, text: Any) -> int | None:
    """The number in a field; None if it is blank or says "any"."""
    if text is None or text == ANY or (isinstance(text, str) and not text.strip()):
        return None
    if not isinstance(text, str) or not re.fullmatch("[0-9]{1,10}", text.strip()):
        raise ValueError(f"{LABELS[name]} must be a whole number, not {text!r:.40}")
    return int(text)
