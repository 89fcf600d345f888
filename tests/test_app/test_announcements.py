"""What a screen reader announces of a request: its start, its end with the number of names, and errors."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.playground_page import press_load, texts, wait_for
from tests.test_app.test_browser import browser, page, pytestmark, server  # noqa: F401

# Texts of all live regions, and how often they change.
_LISTEN = """() => {
    window.heard = [];
    const live = '[role=status], [role=alert], [role=log], [aria-live]:not([aria-live=off])';
    const hear = (node) => {
        const region = (node.nodeType === 1 ? node : node.parentElement)?.closest(live);
        if (region?.textContent.trim()) heard.push(region.textContent.trim());
    };
    new MutationObserver((changes) => {
        const regions = new Set();
        for (const {target, addedNodes} of changes) for (const node of [target, ...addedNodes]) {
            const element = node.nodeType === 1 ? node : node.parentElement;
            const region = element?.closest(live) ?? element?.querySelector?.(live);
            if (region && !regions.has(region)) { regions.add(region); hear(region); }
        }
    }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""


def heard(page: Any) -> list[str]:  # noqa: F811
    found: list[str] = page.evaluate("heard.splice(0)")
    return found


def test_a_request_is_announced_in_a_few_words(page: Any) -> None:  # noqa: F811
    page.evaluate(_LISTEN)
    page.locator("#fe-make").click()
    page.wait_for_selector("#fe-status >> text=/^20 names ·/")
    page.wait_for_function("heard.includes('20 names')")
    assert heard(page) == ["Making names", "20 names"] and len(wait_for(page, 20)) == 20
    page.get_by_role("button", name="Share these settings").click()
    press_load(page, "nonsense")
    page.wait_for_function("heard.at(-1)?.startsWith('not a settings string')")
    assert len(heard(page)) == 1
    page.get_by_role("tab", name="Compare").click()
    page.locator("#fe-compare").click()
    # In one message if both sides end within a second, else in two.
    page.wait_for_function("heard.join().split('20 names').length > 2")
    assert len(heard(page)) <= 3 and len(texts(page, "#fe-side-A")) == 20


@pytest.mark.parametrize("cards", ["Land\nGoblinn\nInstant"])
def test_several_cards_are_announced_once(page: Any, cards: str) -> None:  # noqa: F811
    page.get_by_role("button", name="Several cards at once").click()
    page.locator("#fe-cards textarea").fill(cards)
    page.evaluate(_LISTEN)
    page.get_by_role("button", name="Make names for each card").click()
    message = "10 names for 2 of 3 cards, cards without a name are listed"
    page.wait_for_function("message => heard.includes(message)", arg=message)
    assert heard(page) == ["Making names", message]
