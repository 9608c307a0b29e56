"""Which successes have something to tell."""

from __future__ import annotations

from datetime import timedelta

import pytest

from worker.core.remarks import NOTABLE_BLOCK, NOTHING, Remarks


@pytest.mark.parametrize(
    ("remarks", "notable"),
    [
        (NOTHING, False),
        (Remarks(blocked=NOTABLE_BLOCK - timedelta(milliseconds=1), lazy_loads={"Order.lines": 2}), False),
        (Remarks(blocked=NOTABLE_BLOCK), True),
        (Remarks(lazy_loads={"Order.lines": 51}, over_budget=True), True),
    ],
)
def test_a_success_is_noted_for_a_long_block_or_too_many_lazy_loads(remarks: Remarks, notable: bool) -> None:
    assert remarks.notable is notable
