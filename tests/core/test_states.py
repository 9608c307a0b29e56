from __future__ import annotations

import pytest

from worker.core.states import FINAL, Ending, JobState


def test_states_are_stored_under_the_words_of_the_design() -> None:
    assert [str(state) for state in JobState] == ["queued", "running", "succeeded", "failed", "cancelled"]
    endings = ["succeeded", "retried", "failed", "cancelled", "snoozed", "released", "crashed"]
    assert [str(end) for end in Ending] == endings


@pytest.mark.parametrize("state", JobState)
def test_a_state_is_final_when_nothing_moves_the_job_any_more(state: JobState) -> None:
    assert (state in FINAL) == (state not in {JobState.QUEUED, JobState.RUNNING})
