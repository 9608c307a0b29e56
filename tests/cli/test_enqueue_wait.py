"""`exarq enqueue --wait`: the result on stdout, and an exit code that says how the job ended."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import Command


def test_a_result_is_printed_and_a_failure_ends_with_1_and_its_error(exarq: Command) -> None:
    with exarq.started("run"):
        paid = exarq("enqueue", "shop.charge", '{"invoice_id": 7}', "--wait", "60")
        whole = exarq("enqueue", "shop.charge", '{"invoice_id": 8}', "--wait", "60", "--json")
        broken = exarq("enqueue", "shop.broken", '{"word": "door"}', "--wait", "60")

    assert (paid.code, json.loads(paid.out)) == (0, {"paid": 7})
    assert (whole.code, json.loads(whole.out)["result"]) == (0, {"paid": 8})
    assert (broken.code, broken.out) == (1, "")
    assert broken.err.rstrip().endswith("has failed: ValueError: cannot [red]door[/red]")


def test_a_job_that_is_not_in_time_ends_with_3_and_says_where_it_stands(exarq: Command) -> None:
    done = exarq("enqueue", "shop.charge", '{"invoice_id": 7}', "--wait", "0.1")

    assert (done.code, done.out) == (3, "")
    assert "no result within 0.1 s; it is queued" in done.err


@pytest.mark.parametrize("seconds", ["-1", "inf", "nan"])
def test_a_wait_that_is_none_is_refused(exarq: Command, seconds: str) -> None:
    done = exarq("enqueue", "shop.charge", '{"invoice_id": 7}', "--wait", seconds)

    assert (done.code, done.out) == (2, "")
    assert "--wait takes 0 or more seconds" in done.err
