"""What tests do on the playground's page in a browser."""

from __future__ import annotations

import csv
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest

from flash_experts.app.settings import Settings

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install -e '.[dev]'")

WAIT = 60_000  # ms
EVIL = "<script>window.evil=1</script>"


def texts(page: Any, table: str = "#fe-table") -> list[str]:
    return page.locator(f"{table} .fe-name").all_inner_texts()


def wait_for(page: Any, count: int, table: str = "#fe-table") -> list[str]:
    """The names of a table, once it has that many and the request is over."""
    page.wait_for_function(
        "([table, count]) => document.querySelectorAll(`${table} .fe-name`).length === count", arg=[table, count]
    )
    return texts(page, table)


def requested(page: Any, count: int = 20) -> str:
    """The seed of names requested now, with no other names on the table."""
    page.locator("#fe-status").evaluate("element => element.querySelector('p')?.remove()")
    page.locator("#fe-make").click()
    page.wait_for_selector(f"#fe-status >> text=/^{count} names ·/")
    wait_for(page, count)
    return page.locator("#fe-status p").inner_text().rpartition("seed ")[2]


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
    loaded = page.locator("#fe-status >> text=Settings loaded")
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


def name_a_file_of_cards(page: Any, folder: Path) -> None:
    """It is read by the browser; the file that comes back has all cards."""
    button = page.get_by_role("button", name="Open a file of cards")
    for name, content, message in (
        ("large.csv", b"type_line\n" + b"Land\n" * 10_000, "large.csv has more than 48 kB"),
        ("other.csv", "type_line\nCréature\n".encode("latin-1"), "save it as CSV UTF-8"),
        ("set.csv", f"name,type_line,notes\nOld Name,Land,\n,Instant,{EVIL}\n".encode("utf-8-sig"), "Read set.csv"),
    ):
        (folder / name).write_bytes(content)
        with page.expect_file_chooser() as chooser:
            button.click()
        chooser.value.set_files(folder / name)
        page.wait_for_function(
            "text => document.getElementById('fe-announced')?.textContent.includes(text)", arg=message
        )
    page.wait_for_function("document.querySelector('#fe-cards textarea').value.startsWith('name,type_line')")
    page.get_by_role("button", name="Make names for each card").click()
    page.wait_for_selector("#fe-status >> text=2 names for 1 of 1 cards")
    page.get_by_label("File format").click()
    page.get_by_role("option", name="CSV").click()
    old, new = csv.DictReader(downloaded(page, "Download the named set", folder / "named-set.csv").splitlines())
    assert old["name"] == "Old Name" and new["notes"] == EVIL and new["name"] in texts(page)
    page.locator("#fe-cards textarea").fill("type_line\nInstannt\n")
    page.get_by_role("button", name="Make names for each card").click()
    page.wait_for_selector("#fe-status .fe-failure >> text=the cards:2")


def replace_a_word(page: Any) -> None:
    """By keyboard, on the name's card, which stays open."""
    load(page, Settings(starts_with="Storm of", count=1, quality="fast"))
    page.locator("#fe-make").click()
    page.wait_for_selector("#fe-status >> text=/^1 names?/")
    page.locator("#fe-table [data-name^='Storm of'].fe-name").first.click()
    page.wait_for_selector("#fe-panel [data-key='word 0'] >> text=Storm")
    page.wait_for_function("document.activeElement.id === 'fe-looked'")  # the card takes the focus when it opens
    rest = page.locator("#fe-looked").inner_text().removeprefix("Storm")
    page.locator("#fe-panel [data-key='word 0']").focus()
    page.keyboard.press("Enter")
    page.wait_for_function(
        """rest => { const names = [...document.querySelectorAll('#fe-table tr:not(.fe-kept) .fe-name')];
           return names.length && names.every((name) => name.textContent.toLowerCase().endsWith(rest)); }""",
        arg=rest.lower(),
    )
    assert page.evaluate("document.activeElement.dataset.key") == "word 0"
    page.get_by_role("button", name="Close the card").click()
    page.locator("#fe-side").wait_for(state="hidden")
    page.get_by_role("button", name="Stop").click()


def a_request_ends_the_one_before(page: Any, slow: Path) -> None:
    """Nobody has to stop one first; and what ended late changes nothing. Decoding is slow while the file exists."""
    load(page, Settings(colors="R", quality="best", count=100))
    slow.touch()
    page.locator("#fe-make").click()
    page.wait_for_selector("#fe-status >> text=of 100 names")
    page.get_by_role("button", name="Reset").click()
    page.wait_for_function("() => document.querySelector('#fe-colors input:checked') === null")
    slow.unlink()
    page.locator("#fe-make").click()
    page.wait_for_selector("#fe-status >> text=/^20 names/")
    wait_for(page, 20)
    page.wait_for_url(lambda address: address.endswith("?v=1&model=mtg-base"))
    page.get_by_role("button", name="Reset").click()
    page.wait_for_selector("#fe-status >> text=All settings are at their defaults")


def evil_settings_are_text(page: Any) -> None:
    """In a name, in an error, and in the panel of a name."""
    load(page, Settings(starts_with="B&amp; C", count=1, seed=2))
    page.locator("#fe-make").click()
    name = wait_for(page, 1)[0]
    assert name.startswith("B&amp; C")
    page.locator("#fe-table .fe-name").first.click()
    page.wait_for_function("name => document.querySelector('#fe-looked')?.innerText === name", arg=name)
    load(page, Settings(regex=EVIL))
    page.locator("#fe-make").click()
    page.wait_for_selector(f"#fe-status .fe-failure >> text={EVIL}")
    assert page.evaluate("window.evil === undefined")
    assert page.locator("#fe-table script, #fe-status script, #fe-panel script").count() == 0


def two_models_are_compared(page: Any) -> None:
    load(page, Settings(count=5))
    page.get_by_role("tab", name="Compare").click()
    page.locator("#fe-compare").click()
    left, right = (wait_for(page, 5, f"#fe-side-{side}") for side in "AB")
    assert left == right, "experts that were copied make the dense model's names, seed for seed"
    page.locator("#fe-side-B .fe-name").first.click()
    page.wait_for_selector("#fe-panel .fe-map")
    assert re.search(r"Of 4 experts in each of \d blocks", page.locator("#fe-panel").inner_text())


def it_fits_a_phone_and_the_dark(page: Any, url: str) -> None:
    """At 360 x 640 the button and the first names are visible at once, and the card does not cover its name."""
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 360, "height": 640})
    page.goto(url)
    page.locator("#fe-options > button:not(.open)").wait_for()
    page.locator("#fe-make").click()
    page.wait_for_selector("#fe-status >> text=/^20 names/")
    third = page.locator("#fe-table .fe-name").nth(2).bounding_box()
    assert page.evaluate("scrollY") == 0 and third["y"] + third["height"] < 640
    page.locator("#fe-table .fe-name").nth(9).click()
    page.wait_for_function("document.activeElement.id === 'fe-looked'")
    row, side = (page.locator(each).bounding_box() for each in ("tr.fe-chosen", "#fe-side"))
    assert row["y"] >= 0 and row["y"] + row["height"] <= side["y"] < 640
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(map(int, background.removeprefix("rgb(").rstrip(")").split(",")[:3])) < 64, background
    page.keyboard.press("Escape")
    for width in (320, 640, 1280):  # 640: a small screen at 200%
        page.set_viewport_size({"width": width, "height": 640})
        scroll = page.locator("#fe-table .fe-scroll")
        assert scroll.evaluate("element => element.scrollWidth <= element.clientWidth"), f"the table is cut at {width}"
        assert page.locator("footer").inner_text().strip() in ("Use via API", ""), "no dots between hidden links"


def back_and_forward_go_through_the_requests(page: Any) -> None:
    """With their names; after a reload, which ends the session of the server, with their settings."""

    def made(settings: Settings) -> list[str]:
        load(page, settings)
        requested(page, settings.count)
        page.wait_for_url(lambda address: settings.colors is None or f"colors={settings.colors}" in address)
        page.wait_for_function("() => history.state?.link.includes('seed=')")
        return texts(page)

    def entries() -> int:
        number: int = page.evaluate("history.length")
        return number

    page.get_by_role("button", name="Share these settings").click()
    first = entries()
    default = made(Settings())
    assert entries() == first, "the page opened with these settings"
    made(Settings(colors="R", count=3))
    red = made(Settings(colors="R", count=3))
    assert entries() == first + 1, "the same settings again"
    blue = made(Settings(colors="U", count=4))
    assert entries() == first + 2
    for step, color, names in (
        (page.go_back, "Red", red), (page.go_back, None, default), (page.go_forward, "Red", red),
        (page.go_forward, "Blue", blue),
    ):  # fmt: skip
        step()
        page.wait_for_selector(f"#fe-status >> text=/^{len(names)} names of an earlier request/")
        wait_for(page, len(names))
        assert texts(page) == names
        checked = page.locator("#fe-colors label:has(input:checked)").all_inner_texts()
        assert [text.strip() for text in checked] == [color] * (color is not None)
    assert entries() == first + 2
    page.go_back()
    page.wait_for_function("() => flashExperts.link?.includes('count=3')")
    page.get_by_role("button", name="Copy link").click()
    assert "seed=" in copied(page, "Copied the link")
    page.reload()
    page.wait_for_selector("#fe-status >> text=Settings of the link")
    page.go_forward()
    page.wait_for_function("() => document.querySelectorAll('#fe-colors input')[1].checked")
    assert texts(page) == [] and "colors=U" in page.url
    page.get_by_role("button", name="Copy link").click()
    assert copied(page, "Copied the link") == page.url


def a_link_makes_its_names_again_although_some_are_kept(page: Any, url: str) -> None:
    page.goto(f"{url}?v=1&seed=11&count=3")
    page.wait_for_selector("#fe-status >> text=Settings of the link")
    page.locator("#fe-make").click()
    names = wait_for(page, 3)
    for name in names[:2]:
        page.get_by_role("button", name=f"Keep {name}", exact=True).click()
        page.wait_for_selector(f'#fe-table [data-key="lock {name}"][aria-pressed=true]')
    page.reload()
    assert wait_for(page, 2) == names[:2]
    page.wait_for_selector("#fe-status >> text=Settings of the link")
    requested(page, 3)
    assert texts(page) == names
    assert page.locator("#fe-table .fe-kept .fe-name").all_inner_texts() == names[:2]
