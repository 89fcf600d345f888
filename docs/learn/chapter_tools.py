"""What the chapters share, so that each of them is about its own idea: places, figures, tables, quotes, names.

Nothing of what is explained happens here. The code that is explained is the package's own, imported by the chapters.
"""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import lzma
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from flash_experts.data.cards import Card
from flash_experts.data.cleaning import clean
from flash_experts.data.packing import EncodedName
from flash_experts.data.prepare import load_split, prepare
from flash_experts.data.sources import load_source
from flash_experts.data.splits import split_by_family
from flash_experts.data.tokenizer import load_tokenizer
from flash_experts.models.loading import load_dense, load_model

ROOT = Path(__file__).resolve().parents[2]
BASE = ROOT / "models/mtg-base"  # dense, to be taken apart and upcycled
RELEASED = ROOT / "models/mtg-names"  # what `generate` and `serve` use
DATA = ROOT / "data/mtg"
TEACHER_NAMES = ROOT / "data/teacher-names.jsonl.xz"

IN_NOTEBOOK = "ipykernel" in sys.modules

if not IN_NOTEBOOK and "MPLBACKEND" not in os.environ:
    plt.switch_backend("agg")  # a script prints its numbers and opens no window
logging.set_verbosity_error()
logging.disable_progress_bar()
plt.rcParams.update(
    {
        "figure.constrained_layout.use": True,
        "figure.dpi": 110,
        "figure.facecolor": "white",  # readable on a dark page as well
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "image.interpolation": "nearest",
    }
)


def load_base() -> tuple[Any, PreTrainedTokenizerBase]:
    """The released dense GPT-2 (float32, eval mode) and its tokenizer."""
    return load_dense(BASE), load_tokenizer(BASE)


def load_released() -> tuple[Any, PreTrainedTokenizerBase]:
    """The released model that makes names (float32, eval mode) and its tokenizer."""
    return load_model(RELEASED, "cpu"), load_tokenizer(RELEASED)


def cards(split: str) -> list[Card]:
    """The cards of a split; the embedded table is prepared first where that was not done."""
    if not (DATA / "meta.json").is_file():
        prepare(out=DATA)
    return load_split(DATA, split)


def franchise_cards() -> tuple[list[Card], list[Card]]:
    """Cards that the base has never seen, to learn and held out by family: a sample of those of franchises, which
    cleaning leaves out. The base has memorized too many of its own training names to show what a training does."""
    rows = [row for row in load_source("embedded").rows if row.flag == "franchises"]
    parts = split_by_family(clean(rows, include=["franchises"]).cards).parts
    return parts["train"][::4], [*parts["validation"], *parts["test"]][::2]  # enough for some twenty steps


def teacher_names(count: int) -> list[Card]:
    """The first names that the 135M teacher wrote, with the attributes that it was given."""
    fields = ("name", "type_line", "types", "subtypes", "supertypes", "colors", "mana_value", "source_id")
    with lzma.open(TEACHER_NAMES, "rt", encoding="utf-8") as file:
        lines = [json.loads(line) for line in islice(file, count)]
    values = [{field: line[field] for field in fields} for line in lines]
    return [
        Card(**{field: tuple(value) if isinstance(value, list) else value for field, value in each.items()})
        for each in values
    ]


def shown(text: str) -> str:
    """A token's text with a space as "·", and with "?" for a byte that is not a character by itself."""
    return text.replace(" ", "·").encode("utf-8", "replace").decode()


def token_texts(name: EncodedName, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The text of each token that the model reads, a space shown as "·"."""
    texts = [shown(tokenizer.decode([token])) for token in name.ids[:-1]]
    return ["[BOS]", *texts[1:]]


# ------------------------------------------------------------------------------------------------- showing


def show(figure: Figure, name: str) -> None:
    """Shows a figure in a notebook. A script prints its name, and saves it in the folder LEARN_FIGURES if that is set."""
    folder = os.environ.get("LEARN_FIGURES")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        figure.savefig(Path(folder) / f"{name}.png")
    if plt.get_backend().lower() == "agg":
        print(f"[figure: {name}]")
    else:
        plt.show()
    plt.close(figure)


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Prints rows in columns: the first to the left, numbers to the right. Floats should come as texts."""
    texts = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in texts) for column in range(len(header))]
    for row in texts:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join((row[0].ljust(widths[0]), *rest)).rstrip())


def quote(code: Callable[..., Any] | type | str, docstring: bool = False) -> None:
    """Prints the source of a function or class of the package, with its place, and by default without docstrings.

    Args:
        code: the object, or "module:name" of one whose module is better not imported here (Triton's).
        docstring: keep them.
    """
    if isinstance(code, str):
        module, _, wanted = code.partition(":")
        spec = importlib.util.find_spec(module)
        assert spec is not None and spec.origin is not None, module
        path, text = Path(spec.origin), Path(spec.origin).read_text(encoding="utf-8")
        node = next(node for node in ast.parse(text).body if getattr(node, "name", None) == wanted)
        first = min([node.lineno, *(line.lineno for line in getattr(node, "decorator_list", ()))])
        source = "\n".join(text.splitlines()[first - 1 : node.end_lineno])
    else:
        code = inspect.unwrap(code) if callable(code) else code  # what a decorator wraps
        path = Path(inspect.getsourcefile(code) or "")
        lines, first = inspect.getsourcelines(code)
        source = textwrap.dedent("".join(lines))
    if not docstring:
        source = _without_docstrings(source)
    print(f"# {path.relative_to(ROOT).as_posix()}, line {first}")
    print(source.rstrip() + "\n")


def _without_docstrings(source: str) -> str:
    lines = source.splitlines()
    kinds = (ast.FunctionDef, ast.ClassDef)
    for node in [node for node in ast.walk(ast.parse(source)) if isinstance(node, kinds)]:
        if ast.get_docstring(node) is not None:
            body = node.body[0]
            lines[body.lineno - 1 : body.end_lineno] = [None] * (body.end_lineno - body.lineno + 1)  # type: ignore
    return "\n".join(line for line in lines if line is not None)
