"""What a job may say of how far it is."""

from __future__ import annotations

from typing import Any

import pytest

from worker.core.progress import as_progress


def test_numbers_and_a_text_are_kept_as_they_are_and_a_long_text_is_cut() -> None:
    assert as_progress(3, 7.5, "copying") == {"done": 3, "total": 7.5, "text": "copying"}
    assert as_progress(0) == {"done": 0, "total": None, "text": None}
    assert as_progress(1, text="a\0b\ud800")["text"] == "a\\x00b\\ud800"
    assert len(str(as_progress(1, text="x" * 10_000)["text"])) <= 500


@pytest.mark.parametrize("number", [-1, float("nan"), float("inf"), 10**400, "3", None, True], ids=repr)
def test_what_counts_nothing_is_refused(number: Any) -> None:
    with pytest.raises((ValueError, TypeError), match="done must be"):
        as_progress(number)
    if number is not None:
        with pytest.raises((ValueError, TypeError), match="total must be"):
            as_progress(1, number)
