"""Sets, years and rarities in the playground: offered where a model learned them."""

from __future__ import annotations

import pytest

from flash_experts import NameGenerator
from flash_experts.app.service import Playground
from flash_experts.app.settings import Settings
from flash_experts.training.build import build_model
from tests.test_data.test_printings import SMALL, cards

pytest.importorskip("gradio", reason="the playground's extra is not installed: pip install -e '.[app]'")
from flash_experts.app import form
from flash_experts.app.handlers import Handlers
from flash_experts.app.page import build_page
from flash_experts.app.session import Session


@pytest.fixture(scope="module")
def both(base: NameGenerator) -> Playground:
    printings = NameGenerator(*build_model(None, SMALL, cards(printed=True), seed=0), known_names=[])
    return Playground({"dense": base, "printings": printings})


def test_what_a_model_learned_is_offered(both: Playground, base: NameGenerator) -> None:
    assert both.conditions() == {"set_code": ["M10", "ZEN"], "released": [2009, 2019]}
    shown = {
        block.elem_id: (block.visible, [value for value, _ in block.choices])
        for block in build_page(both).blocks.values()
        if getattr(block, "elem_id", None) in ("fe-rarity", "fe-set_code", "fe-released")
    }
    assert shown == {
        "fe-rarity": (False, ["any"]),
        "fe-set_code": (True, ["any", "M10", "ZEN"]),
        "fe-released": (True, ["any", "2009", "2019"]),
    }
    assert Playground({"dense": base}).conditions() == {}


def test_names_of_a_set_and_a_year(both: Playground) -> None:
    settings = Settings(set_code="zen", released=2009, rarity=None, count=2, seed=1, max_length=12)
    values = form.values_of(settings)
    assert (values["set_code"], values["released"], values["rarity"]) == ("ZEN", "2009", "any")
    assert form.settings_of(values).attributes() == settings.attributes()
    *_, last = both.names(settings, "printings")
    *_, other = both.names(Settings(count=2, seed=1, max_length=12), "printings")
    assert [row.name for row in last.rows] != [row.name for row in other.rows], "the prompt is another"


def test_a_model_that_knows_none_reports_it(both: Playground) -> None:
    values = form.values_of(Settings(set_code="ZEN", count=1, seed=1))
    *_, shown = Handlers(both).make(values | {"model": "dense"}, Session())
    assert "not trained with sets" in shown.status
    *_, shown = Handlers(both).make(values | {"model": "printings", "set_code": "ZEM"}, Session())
    assert "nearest is &#39;ZEN&#39;" in shown.status or "nearest is 'ZEN'" in shown.status
