"""What a run counts between its steps."""

from __future__ import annotations

from flash_experts.training.run_state import TrainerState


def test_only_a_lower_validation_is_a_new_best() -> None:
    """A plateau must not reset the patience."""
    state = TrainerState(step=3)
    assert state.validated(2.0) and (state.best_bits_per_char, state.best_step) == (2.0, 3)
    state.step = 4
    assert not state.validated(2.0) and not state.validated(2.5)
    assert (state.best_bits_per_char, state.best_step, state.bad_evaluations) == (2.0, 3, 2)
    assert state.validated(1.9) and (state.best_step, state.bad_evaluations) == (4, 0)


def test_skipped_steps_are_in_a_row_only_without_a_step_between() -> None:
    state = TrainerState()
    assert [state.skip(step) for step in (1, 2, 5, 6, 7, 9)] == [1, 2, 1, 2, 3, 1]
    assert state.skipped_steps == 6
