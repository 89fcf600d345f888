"""What tests do on the playground's page in a browser."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest

from flash_experts.app.settings import Settings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

WAIT = 60_000  # ms


def texts(page: Any, table: str = "#fe-table") -> list[str]:
    return page.locator(f"{table} .fe-name").all_inner_texts()


def wait_for(page: Any, count: int, table: str = "#fe-table") -> list[str]:
    """The names of a table, once it has that many and the request is over."""
    page.wait_for_function(
        "([table, count]) => document.querySelectorAll(`${table} .fe-name`).length === count", arg=[table, count]
    )
    return texts(page, table)


def unlabeled(page: Any) -> list[str]:
    """Visible controls without a name for screen readers."""
    found: list[str] = page.evaluate("""[...document.querySelectorAll('button, input, textarea, [role=button]')]
        .filter((each) => each.checkVisibility() && !(each.labels?.length || each.ariaLabel || each.title
                                                      || each.textContent.trim()))
        .map((each) => each.outerHTML)""")
    return found


def copied(page: Any, message: str) -> str:
    """The clipboard, once the page has said what it copied."""
    page.wait_for_function("text => document.getElementById('fe-announced')?.textContent === text", arg=message)
    text: str = page.evaluate("navigator.clipboard.readText()")
    return text


def downloaded(page: Any, button: str, path: Path) -> str:
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    assert download.value.suggested_filename == path.name
    download.value.save_as(path)
    if path.suffix == ".mse-set":
        with zipfile.ZipFile(path) as archive:
            return archive.read("set").decode("utf-8")
    return path.read_text("utf-8")


def load(page: Any, settings: Settings) -> None:
    """Load settings. The last answer of a request that has just ended may replace the note: then once more."""
    loaded = page.locator("text=Settings loaded")
    for _ in range(3):
        press_load(page, settings.to_string())
        try:
            return loaded.wait_for(timeout=WAIT / 3)
        except playwright.TimeoutError:
            continue
    raise AssertionError("the settings were not loaded")


def press_load(page: Any, text: str) -> None:
    page.locator("#fe-share textarea").fill(text)
    page.get_by_role("button", name="Load these settings").click()
