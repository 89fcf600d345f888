"""HTML report of a comparison: one self-contained file without external fonts, scripts or images."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping
from datetime import date
from functools import cache
from importlib.resources import files
from pathlib import Path

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from flash_experts.evaluation import tables
from flash_experts.evaluation.compare import REAL, ComparisonResult
from flash_experts.evaluation.plots import all_plots, svg
from flash_experts.files import whole_files


def render_report(result: ComparisonResult, title: str = "Models compared", day: date | None = None) -> str:
    """Renders a comparison as an HTML page, with all text of models, names and data escaped.

    The same result with the same ``day`` (default: today) gives the same bytes.
    """
    script = _resource("blind_test.js")
    first = result.models[0]
    return load_template(__package__, "report").render(
        title=title,
        day=day or date.today(),
        style=Markup(_resource("report.css")),
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data=first.data,
        seed=first.seed,
        labels=[model.label for model in result.models],
        bits=tables.bits_table(result.models, result.differences),
        differences=tables.difference_table(result),
        association=tables.association_table(result.models),
        novelty=tables.novelty_table(result.models),
        variety=tables.variety_table(result.models),
        detection=tables.detection_table(result.models),
        control=tables.control_table(result.models),
        cost=tables.cost_table(result.models),
        groups=[tables.group_table(model, split) for model in result.models for split in model.splits],
        prompts=result.prompts,
        blind_test=result.blind_test,
        real=REAL,
        plots={name: svg(draw(), caption) for name, (draw, caption) in all_plots(result).items()},
    )


@cache
def load_template(package: str, name: str) -> Template:
    """Loads the template ``name.html.jinja`` of a package, with escaping and strict variables."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files(package).joinpath(f"{name}.html.jinja").read_text(encoding="utf-8"))


def _resource(name: str) -> str:
    return files("flash_experts.evaluation").joinpath(name).read_text(encoding="utf-8")


def write_report(result: ComparisonResult, path: str | Path, title: str = "Models compared") -> Path:
    return write_page(render_report(result, title), path)


def write_page(page: str, path: str | Path) -> Path:
    """Writes a text file atomically and returns its path; raises a ValueError if it cannot be written."""
    write_pages({Path(path): page})
    return Path(path)


def write_pages(pages: Mapping[Path, str]) -> None:
    """Writes several text files, all or none; raises a ValueError if one cannot be written."""
    try:
        with whole_files(list(pages)) as temporaries:
            for temporary, page in zip(temporaries, pages.values(), strict=True):
                temporary.write_text(page, encoding="utf-8")
    except OSError as error:
        raise ValueError(f"cannot write the report {', '.join(map(str, pages))}: {error.strerror}") from error
