"""The learning rate over a run, and the time that is left."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_experts.training.optimizer import Schedule
from flash_experts.training.tracking import ProgressDisplay
from flash_experts.training.training_config import TrainingConfig

KINDS = ("cosine", "linear", "constant", "wsd")


@pytest.mark.parametrize(
    ("kind", "step", "expected"),
    [
        ("cosine", 0, 0.1),  # first of ten steps of warm-up
        ("cosine", 9, 1.0),
        ("cosine", 10, 1.0),
        ("cosine", 55, 0.55),  # half of the fall from 1 to 0.1
        ("cosine", 100, 0.1),
        ("linear", 55, 0.55),
        ("linear", 77, 0.1 + 0.9 * (1 - 67 / 90)),
        ("constant", 4, 0.5),
        ("constant", 77, 1.0),
        ("wsd", 4, 0.5),
        ("wsd", 80, 1.0),  # the last fifth falls
        ("wsd", 85, 0.1 + 0.9 * (1 - 0.5)),  # sqrt(1/4)
        ("wsd", 100, 0.1),
    ],
)
def test_worked_numbers(kind: str, step: int, expected: float) -> None:
    for warmup in (10, 0.1):
        schedule = Schedule(kind, warmup, 0.1, planned_steps=100, planned_seconds=None)
        assert schedule.factor(step, seconds=1e9) == pytest.approx(expected)


def test_the_clock_counts_where_it_ends_first() -> None:
    schedule = Schedule("linear", 0.1, 0.0, planned_steps=1000, planned_seconds=600)
    assert schedule.progress(100, 60) == 0.1 and schedule.progress(100, 300) == 0.5
    assert schedule.factor(5, 30) == pytest.approx(0.5)  # half of the warm-up
    assert schedule.factor(100, 330) == pytest.approx(0.5)
    assert schedule.factor(100, 700) == 0.0


def test_without_a_warmup_the_first_step_has_the_peak() -> None:
    for planned in ({"planned_steps": 9, "planned_seconds": None}, {"planned_steps": None, "planned_seconds": 60.0}):
        assert Schedule("linear", 0, 0.0, **planned).factor(0, 0.0) == 1.0  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    warmup=st.floats(0, 0.5),
    floor=st.floats(0, 1),
    share=st.floats(0.05, 0.5),
    by_clock=st.booleans(),
)
def test_it_rises_then_falls_without_a_jump_from_the_top_to_the_floor(
    kind: str, warmup: float, floor: float, share: float, by_clock: bool
) -> None:
    total = 800
    planned = {"planned_steps": None, "planned_seconds": total} if by_clock else {"planned_steps": total}
    schedule = Schedule(kind, warmup, floor, **{"planned_seconds": None, **planned}, decay_share=share)  # type: ignore[arg-type]
    factors = [schedule.factor(0 if by_clock else step, step) for step in range(total + 1)]
    assert all(0 <= factor <= 1 for factor in factors) and max(factors) > 0.99
    assert factors[-1] == pytest.approx(1.0 if kind == "constant" else floor)
    top = math.ceil(warmup * total)
    assert all(a <= b for a, b in pairwise(factors[:top])), "monotone in the warm-up"
    assert all(a >= b - 1e-12 for a, b in pairwise(factors[top:])), "and after it"
    # The steepest of all is the square root where wsd begins to fall: one step of share * total.
    steepest = 1.02 * max(math.sqrt(1 / (share * total)), 1 / max(1, warmup * total - 1), math.pi / total)
    if warmup == 0 or warmup * total > 50:
        assert all(abs(a - b) <= steepest for a, b in pairwise(factors)), "no jump"


@pytest.mark.parametrize(("max_steps", "epoch_steps", "expected"), [(None, 80, 80), (50, 80, 50), (50, None, 50)])
def test_what_ends_first_is_the_plan(max_steps: int | None, epoch_steps: int | None, expected: int) -> None:
    config = TrainingConfig(max_steps=max_steps, max_epochs=None, schedule="wsd", decay_share=0.5)
    schedule = Schedule.of(config, epoch_steps)
    assert schedule.planned_steps == expected and schedule.planned_seconds is None
    assert schedule.factor(expected // 2, 0) == 1.0 and schedule.factor(expected, 0) == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"schedule": "wds"}, "one of cosine, linear, constant, wsd"),
        ({"decay_share": 0.0}, "decay_share is 0.0, but it must be more than 0"),
        ({"schedule": "wsd", "warmup_steps": 0.9}, "warmup_steps 0.9 and decay_share 0.2 overlap"),
    ],
)
def test_nonsense_is_one_line(wrong: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match="wrong") as caught:
        TrainingConfig(**wrong).validate()  # type: ignore[arg-type]
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("share", "left"), [(0.5, "2:19 left"), (1.0, "2:19 for the last validation")])
def test_the_time_left_is_explained_where_training_is_done(
    share: float, left: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ProgressDisplay().update(share, {"step": 1, "lr": 0.0, "tokens_per_second": 72.0, "eta_seconds": 139.0})
    assert capsys.readouterr().err == f"{share:4.0%}  step 1  lr 0.0e+00  72 tokens/s  {left}\n"
