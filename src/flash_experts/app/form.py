"""The controls of the page, and how their values become `Settings` and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import gradio as gr

from flash_experts.app.settings import LARGEST_SEED, MOST_NAMES, Settings
from flash_experts.data.cards import COLORLESS, SUPERTYPES, TYPES, parse_colors
from flash_experts.data.prompts import SELDOM_TOLD, Conditions, known_subtypes, parse_type_line
from flash_experts.generation import PRESETS, Sampling

ANY = "any"
_COLORS = [("White", "W"), ("Blue", "U"), ("Black", "B"), ("Red", "R"), ("Green", "G"), (COLORLESS.capitalize(), "C")]
CHOICES = ("mana_value", *SELDOM_TOLD)  # dropdowns with "any"
ATTRIBUTES = ("types", "subtypes", "colors", *CHOICES)
_BEST = [("the most natural", "score"), ("the truest to type and colors", "fit")]
TEXTS = ("starts_with", "contains", "ends_with", "regex", "banned_words")  # Enter in them makes names
SLIDERS = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "guidance")
_NUMBERS = ("mana_value", "released", "min_words", "max_words")  # dropdowns with "any"
_SAME = (
    *("starts_with", "contains", "ends_with", "regex", "min_length", "max_length", "alliterate", "min_distance"),
    *("best_of", "best_by"),
)

Controls = dict[str, Any]  # Gradio components by name; which events one has depends on its kind


def attribute_controls(conditions: Conditions) -> Controls:
    """What card the names are for: with the rarities, sets and years that a model here knows, if any."""
    labels = {"rarity": "Rarity", "set_code": "Set", "released": "Year of release"}
    told = {  # custom values, because settings that are loaded may have others: the model says what it knows
        name: gr.Dropdown(
            _any_or(conditions.get(name, [])), value=ANY, allow_custom_value=True, visible=name in conditions,
            label=labels[name], elem_id=f"fe-{name}",
        )
        for name in SELDOM_TOLD
    }  # fmt: skip
    return {
        "types": gr.Dropdown([*SUPERTYPES, *TYPES], multiselect=True, label="Type", elem_id="fe-types"),
        "subtypes": gr.Dropdown(list(known_subtypes()), multiselect=True, label="Subtypes", elem_id="fe-subtypes"),
        "colors": gr.CheckboxGroup(_COLORS, label="Colors", elem_id="fe-colors"),
        "mana_value": gr.Dropdown(_any_or(range(17)), value=ANY, label="Mana value", elem_id="fe-mana"),
        **told,
    }


def style_controls() -> Controls:
    """How bold the names are."""
    sampling = PRESETS["balanced"]
    sliders = {
        "temperature": gr.Slider(0.1, 2, sampling.temperature, step=0.05, label="Temperature"),
        "top_k": gr.Slider(0, 1000, sampling.top_k, step=10, label="Top-k (0: all tokens)"),
        "top_p": gr.Slider(0.05, 1, sampling.top_p, step=0.01, label="Top-p"),
        "min_p": gr.Slider(0, 0.5, sampling.min_p, step=0.01, label="Min-p"),
        "repetition_penalty": gr.Slider(0.8, 2, sampling.repetition_penalty, step=0.05, label="Repetition penalty"),
        "guidance": gr.Slider(1, 3, sampling.guidance, step=0.1, label="Guidance", info="sticks to type and colors"),
    }
    return {
        **sliders,
        "best_of": gr.Slider(1, 8, 1, step=1, label="Best of", info="names drawn for each: the best is kept"),
        "best_by": gr.Dropdown(_BEST, value="score", label="The best is", elem_id="fe-best-by"),
    }


def rule_controls() -> Controls:
    """What every name must hold."""
    with gr.Row():
        texts: Controls = {
            "starts_with": gr.Textbox(label="Starts with", max_lines=1, max_length=40, elem_id="fe-starts"),
            "contains": gr.Textbox(label="Contains", max_lines=1, max_length=40),
            "ends_with": gr.Textbox(label="Ends with", max_lines=1, max_length=40),
        }
    with gr.Row():
        lengths: Controls = {
            "min_words": gr.Dropdown(_any_or(range(1, 9)), value=ANY, label="Words, at least", min_width=80),
            "max_words": gr.Dropdown(_any_or(range(1, 9)), value=ANY, label="Words, at most", min_width=80),
            "min_length": gr.Number(label="Letters, at least", precision=0, min_width=80),
            "max_length": gr.Number(label="Letters, at most", precision=0, min_width=80),
        }
    return {
        **texts,
        **lengths,
        "regex": gr.Textbox(label="Regular expression", placeholder=".* of the .*", max_lines=1, max_length=100),
        "banned_words": gr.Textbox(label="Banned words", placeholder="dragon, fire", max_lines=1),
        "like": gr.Textbox(label="Like these names", placeholder="Goblin Guide; Lightning Bolt", max_lines=2),
        "min_distance": gr.Slider(0, 0.8, 0, step=0.05, label="Distance from every real card"),
        "alliterate": gr.Checkbox(label="All words begin with one letter"),
    }


def amount_controls() -> Controls:
    """How many names, and which."""
    return {
        "count": gr.Slider(1, MOST_NAMES, 20, step=1, label="Names"),
        "seed": gr.Number(label="Seed", info="the same gives the same names; blank: a new one", precision=0,
                          minimum=0, maximum=LARGEST_SEED),
    }  # fmt: skip


def settings_of(values: Mapping[str, Any]) -> Settings:
    """The settings that the controls say.

    Args:
        values: by the names of the controls, and "preset".

    Raises:
        ValueError: a value is not allowed.
    """
    given: dict[str, Any] = {name: values[name] for name in ("preset", "banned_words", "like", "count", "seed", *_SAME)}
    given |= {name: None if values[name] == ANY else _whole(name, values[name]) for name in _NUMBERS}
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
    values: dict[str, Any] = {name: getattr(settings, name) for name in ("preset", "count", "seed", *_SAME)}
    values |= {name: values[name] or "" for name in ("starts_with", "contains", "ends_with", "regex")}
    exact = settings.words
    numbers = {
        "mana_value": settings.mana_value,
        "released": settings.released,
        "min_words": exact or settings.min_words,
        "max_words": exact or settings.max_words,
    }
    values |= {name: ANY if number is None else str(number) for name, number in numbers.items()}
    told = settings.attributes()
    values |= {"rarity": told.rarity or ANY, "set_code": told.set_code or ANY}
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


def _whole(name: str, text: Any) -> int:
    if not isinstance(text, str) or not text.isdecimal() or len(text) > 4:
        raise ValueError(f"{name} is {text!r:.40}: give a whole number")
    return int(text)
