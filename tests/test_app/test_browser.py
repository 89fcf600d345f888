"""Visits to the playground in a real browser, from `flash-experts serve` to Ctrl+C: one server and one browser."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_plus

import pytest

from flash_experts import NameGenerator
from flash_experts.app.session import FORMATS
from flash_experts.app.settings import PREFIX, Settings
from tests.helpers.playground_page import (
    EVIL,
    WAIT,
    a_link_makes_its_names_again_although_some_are_kept,
    a_request_ends_the_one_before,
    back_and_forward_go_through_the_requests,
    copied,
    downloaded,
    evil_settings_are_text,
    it_fits_a_phone_and_the_dark,
    load,
    name_a_file_of_cards,
    press_load,
    replace_a_word,
    requested,
    texts,
    two_models_are_compared,
    unlabeled,
    wait_for,
)

pytest.importorskip("gradio", reason="the playground's extra is not installed: pip install -e '.[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
BASE = Path(__file__).parent.parent.parent / "models/mtg-base"
# What Gradio logs where a page is left (reloaded, closed) while one of its streams is open: `beforeunload` aborts it.
LEFT = ("AbortError: signal is aborted without reason", "Connection errored out.")
# `flash-experts serve`, whose decoding steps take 0.2 s more while a file exists: what a test stops is then still
# running, however slow the browser is.
SERVE = """
import runpy, sys, time
from pathlib import Path
from transformers.utils import logging
from flash_experts.generation import decoding
logging.disable_progress_bar()  # as the command does before its imports
slow, draw = Path(sys.argv.pop(1)), decoding.draw
def slow_draw(*arguments):
    time.sleep(0.2 if slow.exists() else 0)
    return draw(*arguments)
decoding.draw = slow_draw
sys.argv.insert(1, "serve")
runpy.run_module("flash_experts.cli", run_name="__main__")
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]


class Server(NamedTuple):
    """A running playground; decoding is slow while the file ``slow`` exists."""

    process: subprocess.Popen[str]
    address: str
    slow: Path


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, experts: NameGenerator) -> Iterator[Server]:
    """`flash-experts serve` with a dense model and one with experts, and its address."""
    folder = tmp_path_factory.mktemp("models") / "experts"
    experts.model.save_pretrained(folder)
    experts.tokenizer.save_pretrained(folder)
    slow = folder.parent / "slow"
    command = [sys.executable, "-c", SERVE, slow, "--port", "0", "--time-limit", "600", "--model", BASE, folder]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith("The playground: http://127.0.0.1:"), (first, process.stderr and process.stderr.read())
    yield Server(process, first.split()[2], slow)
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        context = driver.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("browser"),
            executable_path=CHROMIUM,
            args=FLAGS,
            viewport={"width": 1280, "height": 900},
            permissions=["clipboard-read", "clipboard-write"],
        )
        context.set_default_timeout(WAIT)
        yield context
        context.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    """A page that has just been opened. It may log no error and load nothing from elsewhere."""
    asked: list[str] = []
    errors: list[str] = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.goto(server.address)
    page.locator("#fe-make").wait_for()
    yield page
    if page.url.startswith(server.address):
        page.evaluate("localStorage.clear()")
    page.close()
    assert asked and all(address.startswith(("blob:", server.address)) for address in asked), "nothing from elsewhere"
    assert [error for error in errors if not any(each in error for each in LEFT)] == []


def test_a_visit(server: Server, page: Any, tmp_path: Path) -> None:
    names = _one_click_gives_names(page)
    _names_are_kept_by_keyboard(page, names[1])
    _more_like_those_that_are_kept(page, names[1])
    _a_name_opens_as_a_card_and_is_inspected(page)
    _a_star_that_is_pressed_while_names_come(page, names[1])
    _names_are_downloaded(page, tmp_path)
    _settings_are_shared(page)
    _names_are_copied(page, names[1])
    _an_earlier_request_is_opened(page)
    _a_reload_and_a_link_restore_the_session(page, names[1])
    _several_cards_are_named(page)
    name_a_file_of_cards(page, tmp_path)
    replace_a_word(page)
    _settings_are_reset(page, server.slow)
    a_request_ends_the_one_before(page, server.slow)
    evil_settings_are_text(page)
    two_models_are_compared(page)
    it_fits_a_phone_and_the_dark(page, server.address)


def test_every_accordion_tab_and_button(page: Any) -> None:
    """Names can be requested after each is opened or pressed, and nothing has changed a setting."""
    seeds = {requested(page)}
    accordions = page.locator("button.label-wrap")
    assert [text.split("\n")[0] for text in accordions.all_inner_texts()] == [
        "More options", "How many", "Rules for the names", "Sampling", "Several cards at once", "History",
        "Share these settings",
    ]  # fmt: skip
    for accordion in accordions.all()[1:]:
        accordion.click()
    page.wait_for_function("document.querySelectorAll('button.label-wrap.open').length === 7")
    assert unlabeled(page) == []
    seeds.add(requested(page))
    assert len(seeds) == 2, "a new seed each time"
    fields = page.locator("#fe-seed, #fe-min_length, #fe-max_length").locator("input, textarea")
    assert [field.input_value() for field in fields.all()] == ["", "", ""]
    fields.last.fill("6x")
    fields.last.press("Enter")
    page.wait_for_selector("#fe-status .fe-failure >> text=Most characters must be a whole number, not '6x'")
    fields.last.fill("")

    others = page.locator("button.label-wrap, button[data-do], footer button").all_inner_texts()
    titles = [text for text in page.get_by_role("button").all_inner_texts() if text.strip("\n ↺")]
    titles = [text for text in titles if text not in others]
    assert {"Make names", "Stop", "Reset", "Red Goblins", "More like the kept ones", "Copy kept names", "Copy link",
            "Release all", "Copy these settings", "Download kept names", "Download all", "Make names for each card",
            "Open a file of cards", "Download the named set",
            "Load these settings"} <= set(titles)  # fmt: skip
    for title in titles:
        page.get_by_role("button", name=title, exact=True).click()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#fe-compare").click()
    for side in "AB":
        wait_for(page, 20, f"#fe-side-{side}")
    page.get_by_role("tab", name="Names").click()
    requested(page)


def test_back_and_forward(page: Any) -> None:
    back_and_forward_go_through_the_requests(page)


def test_a_link_to_kept_names(server: Server, page: Any) -> None:
    a_link_makes_its_names_again_although_some_are_kept(page, server.address)


def test_ctrl_c_closes_the_playground(server: Server, page: Any) -> None:
    process = server.process
    page.goto("about:blank")
    process.send_signal(signal.SIGINT)
    out, failed = process.communicate(timeout=60)
    assert out == "The playground is closed.\n" and failed == "" and process.returncode == 0


def _one_click_gives_names(page: Any) -> list[str]:
    assert page.get_by_label("Quality").input_value() == "good: the best of 8"
    page.get_by_role("button", name="Make names", exact=True).click()
    names = wait_for(page, 20)
    assert len(set(names)) == 20 and all(names)
    assert page.locator("#fe-table td.fe-card").count() == 20
    status = page.locator("#fe-status p").inner_text()
    assert status.startswith("20 names") and "seed" in status
    return names


def _names_are_kept_by_keyboard(page: Any, name: str) -> None:
    """The focus is visible, stays on the button although the table is replaced, and Tab continues from there."""
    page.locator("#fe-colors input").last.focus()
    for button in ("fe-make", "fe-stop", "fe-reset"):
        page.keyboard.press("Tab")
        assert page.evaluate("[document.activeElement.id, getComputedStyle(document.activeElement).outlineStyle]") == [
            button, "solid",
        ]  # fmt: skip
    page.get_by_role("button", name=f"Keep {name}", exact=True).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f'#fe-table [data-key="lock {name}"][aria-pressed=true]')
    focused = "document.activeElement.dataset.key"
    page.wait_for_function(f"key => {focused} === key", arg=f"lock {name}")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == f"name {name}"


def _more_like_those_that_are_kept(page: Any, name: str) -> None:
    page.get_by_role("button", name="More like the kept ones").click()
    names = wait_for(page, 21)
    assert names[0] == name and name not in names[1:]
    page.get_by_role("button", name="Share these settings").click()
    assert f"like={quote_plus(name.split()[0])}" in page.locator("#fe-share textarea").input_value()


def _a_name_opens_as_a_card_and_is_inspected(page: Any) -> None:
    """Next to the names; Escape closes it, and the focus returns to the name."""
    name = texts(page)[3]
    page.locator("#fe-table .fe-name").nth(3).focus()
    page.keyboard.press("Enter")
    page.wait_for_function("document.activeElement.id === 'fe-looked'")
    panel = page.locator("#fe-panel")
    assert panel.locator(".fe-frame h2").inner_text() == name
    table, side = (page.locator(each).bounding_box() for each in ("#fe-table", "#fe-side"))
    assert side["x"] >= table["x"] + table["width"] and side["y"] < 900, "next to the names, without scrolling"
    page.evaluate("scrollTo(0, 300)")
    assert 0 <= page.locator("#fe-side").bounding_box()["y"] < 50, "and it stays there"
    assert "dense: it has no experts" in panel.inner_text()
    assert panel.locator(".fe-steps tbody tr").last.locator("th").inner_text() == "[EOS]"
    first = panel.locator(".fe-attention").inner_text()
    panel.get_by_role("group", name="Head of the attention").get_by_role("button", name="2").click()
    page.wait_for_function("first => document.querySelector('.fe-attention').innerText !== first", arg=first)
    panel.get_by_role("button", name="Copy this name").click()
    assert copied(page, f"Copied {name}") == name
    page.keyboard.press("Escape")
    page.wait_for_function("name => document.activeElement.dataset.key === name", arg=f"name {name}")
    assert panel.locator(".fe-frame").count() == 0 and not page.locator("#fe-side").is_visible()


def _a_star_that_is_pressed_while_names_come(page: Any, kept: str) -> None:
    """It is there when all have come, and lets go for what follows."""
    load(page, Settings(count=40, seed=987654321))
    page.locator("#fe-make").click()
    page.wait_for_selector("#fe-status >> text=seed 987654321")
    name = texts(page)[1]
    star = page.get_by_role("button", name=f"Keep {name}", exact=True)
    star.click()
    assert wait_for(page, 1 + 40)[:2] == [kept, name]
    page.wait_for_selector("#fe-status >> text=/^40 names/")
    page.wait_for_selector(f'#fe-table [data-key="lock {name}"][aria-pressed=true]')
    star.click()
    page.wait_for_selector(f'#fe-table [data-key="lock {name}"][aria-pressed=false]')


def _names_are_downloaded(page: Any, folder: Path) -> None:
    """All of them or the kept ones, in each format."""
    kept = [*page.locator("#fe-table .fe-kept .fe-name").all_inner_texts()]
    rows = list(csv.DictReader(downloaded(page, "Download all", folder / "names.csv").splitlines()))
    assert [row["text"] for row in rows] == texts(page) and len(rows) > len(kept) == 1
    assert all(0 < float(row["similarity"]) < 1 for row in rows)
    for title, suffix in FORMATS.items():
        page.get_by_label("File format").click()
        page.get_by_role("option", name=title).click()
        text = downloaded(page, "Download kept names", folder / f"names.{suffix}")
        assert kept[0] in text and rows[1]["text"] not in text
        assert suffix != "json" or [row["text"] for row in json.loads(text)] == kept


def _settings_are_shared(page: Any) -> None:
    """A string fills the controls, whose values give the same string again."""
    settings = Settings(type_line="Legendary Creature — Goblin", colors="BR", mana_value=3, preset="creative",
                        temperature=1.3, contains="ar", max_words=3, banned_words=("fire",), count=3,
                        seed=5)  # fmt: skip
    load(page, settings)
    page.locator("#fe-make").click()
    names = wait_for(page, 1 + 3)[1:]
    assert all("ar" in name.lower() for name in names)
    assert page.locator("#fe-share textarea").input_value() == settings.to_string()
    page.get_by_role("button", name="Copy these settings").click()
    assert copied(page, "Copied the settings") == settings.to_string()
    press_load(page, PREFIX + "cuont=3")
    page.wait_for_selector("#fe-status .fe-failure >> text=did you mean 'count'")


def _names_are_copied(page: Any, kept: str) -> None:
    name = texts(page)[2]
    page.get_by_role("button", name=f"Copy {name}", exact=True).click()
    assert copied(page, f"Copied {name}") == name
    page.get_by_role("button", name="Copy kept names").click()
    assert copied(page, "Copied 1 name") == kept + "\n"


def _an_earlier_request_is_opened(page: Any) -> None:
    """The first one: its names, and its settings without the seed that was drawn."""
    names = texts(page)
    page.get_by_role("button", name="History").click()
    page.locator("#fe-history [data-do=open]").last.click()
    page.wait_for_selector("#fe-status >> text=20 names of an earlier request")
    assert len(wait_for(page, 20)) == 20 and texts(page) != names
    assert page.get_by_label("Mana value", exact=True).input_value() == "any"
    page.wait_for_url(lambda address: address.endswith("?v=1&model=mtg-base"))
    page.locator("#fe-history [data-do=open]").first.click()
    assert wait_for(page, 4) == names


def _a_reload_and_a_link_restore_the_session(page: Any, kept: str) -> None:
    names = texts(page)
    page.get_by_role("button", name="Copy link").click()
    link = copied(page, "Copied the link")
    page.reload()
    page.wait_for_selector("#fe-status >> text=Settings of the link")
    assert wait_for(page, 1) == [kept] and page.get_by_label("Mana value", exact=True).input_value() == "3"
    page.get_by_role("button", name="Reset").click()
    page.wait_for_selector("#fe-status >> text=All settings are at their defaults")
    page.goto(link)
    page.wait_for_selector("#fe-status >> text=Settings of the link")
    page.locator("#fe-make").click()
    assert wait_for(page, 1 + 3) == names, "the link has the seed"
    page.goto(f"{link}&{quote_plus(EVIL)}=1")
    page.wait_for_selector(f"#fe-status .fe-failure >> text={EVIL}")
    page.get_by_role("button", name="Share these settings").click()


def _several_cards_are_named(page: Any) -> None:
    page.get_by_role("button", name="Several cards at once").click()
    page.get_by_label("Names for each").click()
    page.get_by_role("option", name="2", exact=True).click()
    page.locator("#fe-cards textarea").fill("Creature — Angel, W\nInstant, U")
    page.get_by_role("button", name="Make names for each card").click()
    page.wait_for_selector("#fe-status >> text=/^4 names/")
    assert page.locator("#fe-table .fe-group").all_inner_texts() == ["Creature — Angel · white", "Instant · blue"]
    page.locator("#fe-table .fe-name").last.click()
    page.wait_for_selector("#fe-panel .fe-type >> text=Instant")
    words = page.get_by_label("Words of the prompt").get_by_role("listitem").all_inner_texts()
    assert [word.split()[0] for word in words] == ["instant", "blue"]
    page.get_by_role("button", name="Close the card").click()
    page.locator("#fe-side").wait_for(state="hidden")


def _settings_are_reset(page: Any, slow: Path) -> None:
    load(page, Settings(colors="R", mana_value=2, quality="best", count=100))
    slow.touch()
    page.locator("#fe-make").click()
    page.wait_for_selector("#fe-status >> text=of 100 names")
    page.get_by_role("button", name="Stop").dblclick()
    page.wait_for_function("() => location.search.includes('quality=best')")
    slow.unlink()
    assert 0 < len(texts(page)) < 100, "names that came before it stopped"
    page.get_by_role("button", name="Reset").click()
    page.wait_for_selector("#fe-status >> text=All settings are at their defaults")
    assert (
        not page.get_by_label("Red", exact=True).is_checked()
        and page.get_by_label("Mana value", exact=True).input_value() == "any"
    )
    assert page.get_by_label("Quality").input_value() == "good: the best of 8"
    page.wait_for_url(lambda address: "?" not in address)
    page.evaluate("flashExperts.remember(JSON.stringify({number: 1, address: 'v=1&colors=R', link: null, kept: []}))")
    assert "?" not in page.url, "an answer that was overtaken by a later one is ignored"
    page.get_by_role("button", name="Release all").click()
    page.wait_for_function("() => !document.querySelector('#fe-table .fe-kept')")
    page.reload()
    page.wait_for_selector(".fe-empty")
    page.get_by_role("button", name="Share these settings").click()
