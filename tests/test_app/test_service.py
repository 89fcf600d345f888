"""Requests with limits, comparison, inspection, and HTML."""

from __future__ import annotations

import threading
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("gradio", reason="the playground's extra is not installed: pip install -e '.[app]'")

from flash_experts import NameGenerator
from flash_experts.app import rendering
from flash_experts.app.handlers import Handlers
from flash_experts.app.service import Playground, Progress, Row, Side, compare, inspect_name
from flash_experts.app.session import MOST_KEPT, Session
from flash_experts.app.settings import Settings
from flash_experts.generation import GeneratedName

GOBLINS = Settings(type_line="Creature — Goblin", colors="R", count=6, seed=3)


def last(playground: Playground, settings: Settings, model: str | None = None) -> Progress:
    return list(playground.names(settings, model))[-1]


def test_names_are_those_of_the_generator(playground: Playground, base: NameGenerator) -> None:
    found = last(playground, GOBLINS)
    expected = base.generate(6, type_line="Creature — Goblin", colors="R", seed=3)
    assert [row.name.text for row in found.rows] == [name.text for name in expected]
    assert found.is_over and not found.note and found.seed == 3


def test_kept_names_are_not_repeated(playground: Playground) -> None:
    first = [row.name.text for row in last(playground, GOBLINS).rows]
    *_, again = playground.names(GOBLINS, without=first[:2])
    assert [row.name.text for row in again.rows][:4] == first[2:] and len(again.rows) == 6


def test_a_seed_is_drawn_and_returned(playground: Playground) -> None:
    drawn = last(playground, Settings(count=2))
    again = last(playground, Settings.from_string(drawn.settings.to_string()))
    assert again.rows == drawn.rows


def test_the_time_limit_is_kept_while_nothing_is_found(base: NameGenerator) -> None:
    found = last(Playground({"a": base}, time_limit=0.5), Settings(min_distance=0.8, count=100))
    assert found.is_over and "stopped after 0.5 s" in found.note and len(found.rows) < 100


def test_constraints_that_leave_no_name_are_reported(playground: Playground) -> None:
    with pytest.raises(ValueError, match="matches no name"):
        last(playground, Settings(regex="x{20}y{30}"))
    with pytest.raises(ValueError, match="no model 'x' here"):
        last(playground, GOBLINS, "x")


def test_threads_share_a_model(playground: Playground) -> None:
    expected = last(playground, GOBLINS).rows
    found: list[tuple[Row, ...]] = []
    threads = [threading.Thread(target=lambda: found.append(last(playground, GOBLINS).rows)) for _ in range(4)]
    for thread in threads:
        thread.start()
    name = expected[0].name.text
    inspections = [inspect_name(playground.model("dense"), name, GOBLINS) for _ in range(3)]
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
    assert all(np.array_equal(one.attention[0], inspections[0].attention[0]) for one in inspections)


def test_both_sides_have_one_seed(playground: Playground) -> None:
    sides = [Side("dense", "conservative"), Side("dense", "creative")]
    *_, (left, right) = compare(playground, Settings(count=4, temperature=1.0), sides)
    assert left is not None and right is not None and left.seed == right.seed
    assert left.settings == Settings(count=4, seed=left.seed, preset="conservative")
    assert left.rows != right.rows
    *_, (dense, moe) = compare(playground, GOBLINS, [Side("dense"), Side("experts")])
    assert dense is not None and moe is not None
    assert [row.name.text for row in dense.rows] == [row.name.text for row in moe.rows], "upcycling is exact"


# ---------------------------------------------------------------------------------------------------------- inspection


def test_an_inspection_shows_what_the_model_computes(playground: Playground, base: NameGenerator) -> None:
    name = base.generate(1, type_line="Creature — Goblin", colors="R", seed=3)[0]
    found = inspect_name(playground.model("dense"), name.text, GOBLINS)
    assert found.prompt == "creature goblin, red:" and found.tokens[0] == "[BOS]"
    read = "".join(found.tokens[1:]).replace("·", " ")
    assert read == f"{found.prompt} {name.text}", "prompt words that are one token each, too"
    assert len(found.tokens) == found.prompt_length + len(found.steps) - 1 and found.steps[-1].token == "[EOS]"
    assert sum(np.log(step.probability) for step in found.steps) == pytest.approx(name.log_prob, abs=1e-3)
    for step in found.steps:
        assert len(step.alternatives) == 5
        shares = [share for _, share in step.alternatives]
        assert shares == sorted(shares, reverse=True)
        if step.rank <= 5:
            assert step.alternatives[step.rank - 1] == (step.token, pytest.approx(step.probability))
    T = len(found.tokens)
    size = base.model.config
    assert [block.shape for block in found.attention] == [(size.n_head, T, T)] * size.n_layer
    assert np.allclose(found.attention[1].sum(-1), 1, atol=1e-5) and not np.triu(found.attention[1], 1).any()
    assert found.experts is None


def test_an_inspection_shows_the_experts(playground: Playground, experts: NameGenerator) -> None:
    found = inspect_name(playground.model("experts"), "Goblin Warfang", GOBLINS)
    assert found.num_experts == 4 and found.experts is not None
    assert list(found.experts.experts) == list(range(1, experts.model.config.n_layer, 2)), "every second block"
    for tokens in found.experts.experts.values():
        assert len(tokens) == len(found.tokens)
        assert all(len(pairs) == 2 and sum(gate for _, gate in pairs) == pytest.approx(1, abs=1e-3) for pairs in tokens)
    panel = rendering.inspection(found, "experts", 1, None)
    assert "block 3" in panel and "dense" not in panel


def test_an_inspection_shows_the_words_of_the_prompt(playground: Playground) -> None:
    found = inspect_name(playground.model("dense"), "Goblin Warfang", GOBLINS)
    weights_TT = found.attention[0].mean(0)
    words = dict(rendering._prompt_words(found, weights_TT))
    assert list(words) == ["creature", "goblin", "red"]
    of_prompt = 100 * weights_TT[found.prompt_length - 1 :, 1 : found.prompt_length].mean(0).sum()
    assert 0 < sum(words.values()) <= of_prompt + len(words)
    unconditional = inspect_name(playground.model("dense"), "Goblin Warfang", Settings())
    assert "no attribute of the card was given" in rendering.inspection(unconditional, "dense", 0, None)


def test_a_card_is_drawn_with_what_is_known_of_it(playground: Playground) -> None:
    name = GeneratedName("Ann <b>", -1.0, None, 0.0)
    card = Settings(type_line="Legendary Creature — Elf", colors="GW", mana_value=3)
    drawn = rendering.panel(Row(name, card, "dense"), card.attributes(), "")
    assert "Legendary Creature — Elf" in drawn and "white and green · mana value 3" in drawn
    assert ">W</span>" in drawn and ">G</span>" in drawn and ">3</span>" in drawn and "Ann &lt;b&gt;" in drawn
    colorless = rendering.panel(Row(name, Settings(colors="C"), "dense"), Settings(colors="C").attributes(), "")
    assert "Any type" in colorless and ">C</span>" in colorless
    assert "fe-dot" not in rendering.panel(Row(name, Settings(), "dense"), Settings().attributes(), "")
    like = Row(name, Settings(like=("Goblin Guide", "Goblin King")), "dense")
    assert "Creature — Goblin" in Handlers(playground).inspect(like), "what the similar names share"


def test_a_name_that_cannot_be_inspected(playground: Playground) -> None:
    for name, message in (("", "no name"), ("?!", "no name"), ("a" * 61, "the most is 60")):
        with pytest.raises(ValueError, match=message):
            inspect_name(playground.model(), name, GOBLINS)


# ---------------------------------------------------------------------------------------------------------- the pieces


EVIL = '<script>alert("x")</script>${1+1}{{1}}'


def test_all_text_is_escaped(playground: Playground) -> None:
    row = Row(GeneratedName(EVIL, -1.0, EVIL, 0.5), GOBLINS, EVIL)
    table = rendering.names_table([row], EVIL)
    inspected = rendering.inspection(inspect_name(playground.model(), EVIL, GOBLINS), EVIL, 0, 1)
    panel = rendering.panel(row, GOBLINS.attributes(), inspected)
    for piece in (table, panel, rendering.failure(EVIL), rendering.note(EVIL)):
        assert "<script" not in piece and "&lt;" in piece


def test_a_request_that_nobody_wants_ends_at_the_next_decoding_step(playground: Playground) -> None:
    """Also one that would search for long before its first name."""
    asked: list[bool] = []

    def is_wanted() -> bool:
        asked.append(len(asked) < 7)
        return asked[-1]

    never = Settings(count=1, regex="(qxz){9}|Zzyzx")
    assert list(playground.names(never, is_wanted=is_wanted)) == [] and len(asked) == 8


def test_keeping_and_likeness(playground: Playground) -> None:
    handlers = Handlers(playground)
    values, table = _values(), Session()
    *_, shown = handlers.make(values, table)
    (failed,) = handlers.more_like(values, table)
    assert "keep a name first" in failed.status
    rows = table.press(shown.rows[1].name.text)
    assert [row.locked for row in rows].count(True) == 1 and rows[1].locked
    for nonsense in (None, "x", 1, {}, "1" * 5000):
        assert table.press(nonsense) == rows
    *_, refined = handlers.more_like(values, table)
    assert refined.rows[0] == rows[1] and len(refined.rows) == 1 + 4
    assert refined.rows[1].settings.like == (rows[1].name.text,)


def test_stars_that_are_pressed_while_names_come(playground: Playground) -> None:
    handlers = Handlers(playground)
    values, table = _values(), Session()
    *_, shown = handlers.make(values, table)
    kept, passed, *_ = (row.name.text for row in shown.rows)
    table.press(kept)
    other = deepcopy(table)
    stream = handlers.make({**values, "seed": "2"}, table)
    first = next(stream).rows[-1].name.text
    assert passed not in [row.name.text for row in table.rows]
    table.press(first)
    table.press(kept)
    *_, last = stream
    assert [row.name.text for row in table.kept] == [first]
    assert last.rows == table.rows and len(last.rows) == 4 and last.table.count('aria-pressed="true"') == 1
    assert [row.name.text for row in other.kept] == [kept] and len(other.rows) == 4, "of another session"
    late = Session(shown.rows)
    late.press(kept)  # after the request was sent, and before its first name
    assert [row.name.text for row in late.put(late.begin(), last.rows[:1], GOBLINS) or ()] == [kept, first]


def test_the_number_of_kept_names_is_limited(playground: Playground) -> None:
    name = next(playground.names(GOBLINS)).rows[0]
    rows = tuple(replace(name, name=replace(name.name, text=str(number))) for number in range(MOST_KEPT + 1))
    table = Session(rows)
    for row in rows:
        table.press(row.name.text)
    assert table.kept == tuple(replace(row, locked=True) for row in rows[:MOST_KEPT])


def test_an_inspection_of_no_block_is_an_error(playground: Playground) -> None:
    handlers = Handlers(playground)
    *_, shown = handlers.make(_values(), Session())
    assert "Attention weights in percent" in handlers.inspect(shown.rows[0], "2", "1")
    for block, head in (("9", "0"), ("0", "9"), ("x", "0"), (None, {}), ("-1", "0"), ("0", "-2")):
        assert "fe-failure" in handlers.inspect(shown.rows[0], block, head)


def _values() -> dict[str, object]:
    from flash_experts.app import form

    return form.values_of(Settings(count=4, seed=1)) | {"model": "dense"}
