"""Visits to the playground in a real browser, from `flash-experts serve` to Ctrl+C: one server and one browser."""

from __future__ import annotations

import csv
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from flash_experts import NameGenerator
from flash_experts.app.settings import PREFIX, Settings

pytest.importorskip("gradio", reason="the playground's extra is not installed: pip install -e '.[app]'")
playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

CHROMIUM = shutil.which("chromium")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()
BASE = Path(__file__).parent.parent.parent / "models/mtg-base"
EVIL = "<script>window.evil=1</script>"
WAIT = 30_000  # ms

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def server(
    tmp_path_factory: pytest.TempPathFactory, experts: NameGenerator
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`flash-experts serve` with a dense model and one with experts, and its address."""
    folder = tmp_path_factory.mktemp("models") / "experts"
    experts.model.save_pretrained(folder)
    experts.tokenizer.save_pretrained(folder)
    command = [sys.executable, "-m", "flash_experts.cli", "serve", "--port", "0", "--model", BASE, folder]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        list(map(str, command)), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    first = process.stdout.readline()
    assert first.startswith("The playground: http://127.0.0.1:"), (first, process.stderr and process.stderr.read())
    yield process, first.split()[2]
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
        )
        context.set_default_timeout(WAIT)
        yield context
        context.close()


@pytest.fixture
def page(browser: Any, server: tuple[subprocess.Popen[str], str]) -> Iterator[Any]:
    """A page that has just been opened. It may log no error and load nothing from elsewhere."""
    asked: list[str] = []
    errors: list[str] = []
    page = browser.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.goto(server[1])
    page.locator("#fe-make").wait_for()
    yield page
    page.close()
    assert asked and all(address.startswith(("blob:", server[1])) for address in asked), "nothing from elsewhere"
    assert errors == []


def test_a_visit(server: tuple[subprocess.Popen[str], str], page: Any, tmp_path: Path) -> None:
    names = _one_click_gives_names(page)
    _names_are_kept_by_keyboard(page, names[1])
    _more_like_those_that_are_kept(page, names[1])
    _a_name_is_looked_into(page)
    _a_star_that_is_pressed_while_names_come(page, names[1])
    _the_table_is_downloaded(page, tmp_path)
    _settings_are_shared(page)
    _evil_settings_are_text(page)
    _two_models_are_compared(page)
    _it_fits_a_phone_and_the_dark(page, server[1])


def test_every_accordion_tab_and_button(page: Any) -> None:
    """Names can be requested after each is opened or pressed, and nothing has changed a setting."""
    seeds = {_requested(page)}
    accordions = page.locator("button.label-wrap")
    titles = accordions.all_inner_texts()
    assert len(titles) == 4
    for place in range(len(titles)):
        accordions.nth(place).click()
        page.wait_for_selector(f"button.label-wrap.open >> nth={place}")
        seeds.add(_requested(page))
    assert len(seeds) == 5, "a new seed each time"
    fields = page.locator("#fe-seed, #fe-min_length, #fe-max_length").locator("input, textarea")
    assert [field.input_value() for field in fields.all()] == ["", "", ""]
    fields.last.fill("6x")
    page.locator("#fe-make").click()
    page.wait_for_selector("#fe-status [role=alert] >> text=Most characters must be a whole number, not '6x'")
    fields.last.fill("")

    page.get_by_role("button", name=re.compile("^Keep ")).first.click()
    page.wait_for_selector("#fe-table [aria-pressed=true]")
    others = page.locator("button.label-wrap, button[data-do], footer button").all_inner_texts()
    titles = [text for text in page.get_by_role("button").all_inner_texts() if text.strip("\n ↺")]
    titles = [text for text in titles if text not in others]
    assert {"Make names", "Stop", "Red Goblins", "More like the kept ones", "Load these settings"} <= set(titles)
    for title in titles:
        page.get_by_role("button", name=title, exact=True).click()
    page.get_by_role("tab", name="Compare").click()
    page.locator("#fe-compare").click()
    for side in "AB":
        _wait_for(page, 20, f"#fe-side-{side}")
    page.get_by_role("tab", name="Names").click()
    _requested(page, kept=1)


def _requested(page: Any, kept: int = 0) -> str:
    """The seed of 20 names requested now, with nothing else in the settings that make them again."""
    page.locator("#fe-status").evaluate("element => element.querySelector('p')?.remove()")
    page.locator("#fe-make").click()
    page.wait_for_selector("#fe-status >> text=/^20 names/")
    _wait_for(page, kept + 20)
    return page.locator("#fe-status p").inner_text().rpartition("seed ")[2]


def test_ctrl_c_closes_the_playground(server: tuple[subprocess.Popen[str], str], page: Any) -> None:
    process, _ = server
    page.goto("about:blank")
    process.send_signal(signal.SIGINT)
    said, failed = process.communicate(timeout=60)
    assert said == "The playground is closed.\n" and failed == "" and process.returncode == 0


def _texts(page: Any, table: str = "#fe-table") -> list[str]:
    return page.locator(f"{table} .fe-name").all_inner_texts()


def _wait_for(page: Any, count: int, table: str = "#fe-table") -> list[str]:
    """The names of a table, once it has so many and the request is over."""
    page.wait_for_function(
        "([table, count]) => document.querySelectorAll(`${table} .fe-name`).length === count", arg=[table, count]
    )
    return _texts(page, table)


def _one_click_gives_names(page: Any) -> list[str]:
    page.get_by_role("button", name="Make names").click()
    names = _wait_for(page, 20)
    assert len(set(names)) == 20 and all(names)
    assert page.locator("#fe-table .fe-card").count() == 20
    status = page.locator("#fe-status [role=status]").inner_text()
    assert status.startswith("20 names") and "seed" in status
    return names


def _names_are_kept_by_keyboard(page: Any, name: str) -> None:
    """The focus stays on the button though the table is written anew, and Tab goes on from there."""
    page.get_by_role("button", name=f"Keep {name}", exact=True).focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(f'#fe-table [data-key="lock {name}"][aria-pressed=true]')
    focused = "document.activeElement.dataset.key"
    page.wait_for_function(f"key => {focused} === key", arg=f"lock {name}")
    page.keyboard.press("Tab")
    assert page.evaluate(focused) == f"name {name}"


def _more_like_those_that_are_kept(page: Any, name: str) -> None:
    page.get_by_role("button", name="More like the kept ones").click()
    names = _wait_for(page, 21)
    assert names[0] == name and name not in names[1:]
    page.get_by_role("button", name="Share these settings").click()
    assert f"like={name.split()[0]}" in page.locator("#fe-share textarea").input_value()


def _a_name_is_looked_into(page: Any) -> None:
    page.locator("#fe-table .fe-name").nth(3).click()
    title = page.locator("#fe-looked")
    assert title.inner_text() == _texts(page)[3]
    panel = page.locator("#fe-panel")
    assert "dense: it has no experts" in panel.inner_text()
    assert panel.locator(".fe-steps tbody tr").last.locator("th").inner_text() == "[EOS]"
    first = panel.locator(".fe-attention").inner_text()
    panel.get_by_role("group", name="Head of the attention").get_by_role("button", name="2").click()
    page.wait_for_function("first => document.querySelector('.fe-attention').innerText !== first", arg=first)


def _a_star_that_is_pressed_while_names_come(page: Any, kept: str) -> None:
    """It is there when all have come, and lets go for what follows."""
    _load(page, Settings(count=40, seed=987654321).to_string())
    page.wait_for_selector("text=Settings loaded")
    page.get_by_role("button", name="Make names").click()
    page.wait_for_selector("#fe-status >> text=seed 987654321")
    name = _texts(page)[1]
    star = page.get_by_role("button", name=f"Keep {name}", exact=True)
    star.click()
    assert _wait_for(page, 1 + 40)[:2] == [kept, name]
    page.wait_for_selector("#fe-status >> text=/^40 names/")
    page.wait_for_selector(f'#fe-table [data-key="lock {name}"][aria-pressed=true]')
    star.click()
    page.wait_for_selector(f'#fe-table [data-key="lock {name}"][aria-pressed=false]')


def _the_table_is_downloaded(page: Any, folder: Path) -> None:
    with page.expect_download() as download:
        page.get_by_role("button", name="Download CSV").click()
    assert download.value.suggested_filename == "names.csv"
    download.value.save_as(folder / "names.csv")
    with (folder / "names.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == _texts(page)
    assert all(0 < float(row["similarity"]) < 1 for row in rows)


def _settings_are_shared(page: Any) -> None:
    """A string fills the controls; what they then say makes the same string again."""
    settings = Settings(type_line="Legendary Creature — Goblin", colors="BR", mana_value=3, preset="creative",
                        temperature=1.3, contains="ar", max_words=3, banned_words=("fire",), count=3,
                        seed=5)  # fmt: skip
    _load(page, settings.to_string())
    page.wait_for_selector("text=Settings loaded")
    page.get_by_role("button", name="Make names").click()
    names = _wait_for(page, 1 + 3)[1:]
    assert all("ar" in name.lower() for name in names)
    assert page.locator("#fe-share textarea").input_value() == settings.to_string()
    _load(page, PREFIX + "cuont=3")
    page.wait_for_selector("#fe-status [role=alert] >> text=did you mean 'count'")


def _load(page: Any, text: str) -> None:
    page.locator("#fe-share textarea").fill(text)
    page.get_by_role("button", name="Load these settings").click()


def _evil_settings_are_text(page: Any) -> None:
    """In a name, in an error, and in the panel of a name."""
    _load(page, Settings(starts_with="<script>", count=1, seed=2).to_string())
    page.wait_for_selector("text=Settings loaded")
    page.get_by_role("button", name="Make names").click()
    name = _wait_for(page, 2)[1]
    assert name.lower().startswith("<script>")
    page.locator("#fe-table .fe-name").nth(1).click()
    page.wait_for_function("name => document.querySelector('#fe-looked').innerText === name", arg=name)
    _load(page, Settings(regex=EVIL).to_string())
    page.wait_for_selector("text=Settings loaded")
    page.get_by_role("button", name="Make names").click()
    page.wait_for_selector(f"#fe-status [role=alert] >> text={EVIL}")
    assert page.evaluate("window.evil === undefined")
    assert page.locator("#fe-table script, #fe-status script, #fe-panel script").count() == 0


def _two_models_are_compared(page: Any) -> None:
    _load(page, Settings(count=5).to_string())
    page.wait_for_selector("text=Settings loaded")
    page.get_by_role("tab", name="Compare").click()
    page.locator("#fe-compare").click()
    left, right = (_wait_for(page, 5, f"#fe-side-{side}") for side in "AB")
    assert left == right, "experts that were copied make the dense model's names, seed for seed"
    page.locator("#fe-side-B .fe-name").first.click()
    page.wait_for_selector("#fe-panel .fe-map")
    assert "Of 4 experts in each of 2 blocks" in page.locator("#fe-panel").inner_text()


def _it_fits_a_phone_and_the_dark(page: Any, url: str) -> None:
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(url)
    page.locator("#fe-make").click()
    _wait_for(page, 20)
    page.locator("#fe-table .fe-name").first.click()
    page.wait_for_selector("#fe-looked")
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background.removeprefix("rgb(").rstrip(")").split(",")[:3])) < 64, background
