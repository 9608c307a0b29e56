"""`exarq jobs list` and `show`: what people read is short and whole where it matters; programs get everything."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cli.conftest import Command
from tests.support import a_job
from worker.cli.errors import explanation, reduced, shortened
from worker.db.models import Attempt

pytestmark = [pytest.mark.leaves_running, pytest.mark.timeout(300)]

NOW = datetime.now(UTC)

TRACEBACK = """Traceback (most recent call last):
  File "/usr/lib/python3.11/site-packages/sqlalchemy/engine/base.py", line 1, in execute
    self._execute()
    ^^^^^^^^^^^^^^^
  File "/srv/app/shop.py", line 7, in charge
    await pay(invoice_id)
  File "/srv/app/pay.py", line 3, in pay
    raise CardRefused("no\\nmoney")
app.pay.CardRefused: no
money
"""


async def an_attempt(engine: AsyncEngine, job: UUID, **columns: Any) -> None:
    values = {"job_id": job, "token": uuid4(), "number": 1, "ending": "failed", "finished_at": NOW, **columns}
    async with engine.begin() as connection:
        await connection.execute(insert(Attempt).values(**values))


async def test_a_list_says_when_in_words_and_pads_nothing(exarq: Command, engine: AsyncEngine) -> None:
    await a_job(engine, run_at=NOW + timedelta(hours=3))
    await a_job(engine, run_at=NOW - timedelta(hours=3), failures=1, attempt=1)
    await a_job(engine, state="running", started_at=NOW - timedelta(hours=4))
    await a_job(engine, state="failed", finished_at=NOW - timedelta(days=5), error="app.errors.NoMoney: no\nmore")

    people, retrying = exarq("jobs", "list"), exarq("jobs", "list", "--state", "retrying", "--json")

    header, failed, running, again, scheduled = people.out.splitlines()
    assert header.split() == ["id", "state", "attempts", "when", "name", "error"]
    assert "5 d ago" in failed
    assert failed.endswith("NoMoney: no more")
    assert "for 4 h" in running
    assert "retrying" in again
    assert "due 3 h ago" in again
    assert "in 3 h" in scheduled
    assert all(line == line.rstrip() for line in people.out.splitlines())
    assert [line["state"] for line in retrying.json] == ["retrying"], "also one that is due again"


async def test_a_running_job_is_shown_with_what_is_set_and_nothing_else(exarq: Command, engine: AsyncEngine) -> None:
    bare = await a_job(engine)
    job = await a_job(
        engine,
        state="running",
        cancel_requested=True,
        progress={"done": 1_500, "total": 6_000, "text": "rows", "at": NOW.isoformat()},
        priority=9,
        expires_at=NOW + timedelta(hours=2),
        unique_key="invoice 7",
        unique_for="until_done",
        token=UUID(int=7),
    )

    shown, program, other = (
        exarq("jobs", "show", str(job)[-8:]),
        exarq("jobs", "show", str(job), "--json"),
        exarq("jobs", "show", str(bare)),
    )

    facts = dict(line.split(maxsplit=1) for line in shown.out.splitlines() if line.count("  "))
    assert facts["state"] == "running, cancel requested"
    assert facts["progress"] == "█████░░░░░░░░░░░░░░░ 25% (1,500 of 6,000), rows"
    assert facts["priority"] == "9"
    assert "invoice 7 (until_done)" in shown.out
    assert "must start by" in shown.out
    assert str(UUID(int=7)) not in shown.out
    assert program.json["token"] == str(UUID(int=7))
    assert program.json["progress"]["done"] == 1_500
    for word in ("cancel requested", "progress", "priority", "unique key", "must start by", "token"):
        assert word not in other.out


async def test_an_attempt_is_shown_by_the_frames_of_the_users_code(exarq: Command, engine: AsyncEngine) -> None:
    job = await a_job(engine, state="failed", error="app.pay.CardRefused: no\nmoney", finished_at=NOW)
    await an_attempt(engine, job, error="app.pay.CardRefused: no\nmoney", traceback=TRACEBACK)
    await an_attempt(
        engine,
        job,
        number=2,
        ending="succeeded",
        blocked=timedelta(milliseconds=2500),
        lazy_loads={"Invoice.lines": 120, "Line.item": 1},
    )

    shown, whole, program = (exarq("jobs", "show", str(job), *more) for more in ((), ("--traceback",), ("--json",)))

    lines = shown.out.splitlines()
    error = next(number for number, line in enumerate(lines) if line.startswith("error"))
    assert lines[error].split(maxsplit=1)[1] == "CardRefused: no"
    assert lines[error + 1] == " " * lines[error].index("CardRefused") + "money"
    assert '  File "/srv/app/pay.py", line 3, in pay' in lines
    assert "CardRefused: no" in lines
    assert "site-packages" not in shown.out
    assert "Traceback (most recent call last; 1 frame of libraries left out, see --traceback):" in lines
    assert lines[-3:] == [
        "held the event loop for 2.5 s",
        "loaded Invoice.lines lazily 120 times",
        "loaded Line.item lazily 1 time",
    ]
    assert "site-packages" in whole.out
    assert program.json["attempts"][0]["traceback"] == TRACEBACK
    assert program.json["attempts"][0]["error"].startswith("app.pay.CardRefused")
    assert program.json["attempts"][1]["blocked"] == 2.5


def test_what_a_job_raised_on_purpose_needs_no_traceback_unless_it_has_a_cause() -> None:
    error, trace = "worker.core.outcome.Fail: no such invoice", "Traceback …\nworker.core.outcome.Fail: no such invoice"
    caused = f"{TRACEBACK}\nThe above exception was the direct cause of the following exception:\n\n{trace}"

    assert explanation(error, trace, whole=False) == "Fail: no such invoice"
    assert "CardRefused" in explanation(error, caused, whole=False)
    assert explanation(error, trace, whole=True) == trace


@pytest.mark.parametrize(
    ("error", "short"),
    [
        ("sqlalchemy.exc.IntegrityError: x", "IntegrityError: x"),
        ("tests.job.<locals>.Odd: x", "Odd: x"),
        ("ValueError: a.b.C: x", "ValueError: a.b.C: x"),
        ("builtins", "builtins"),
        (
            (
                "sqlalchemy.exc.IntegrityError: (sqlalchemy.dialects.postgresql.asyncpg.IntegrityError)"
                " <class 'asyncpg.exceptions.UniqueViolationError'>: duplicate key"
            ),
            "IntegrityError: UniqueViolationError: duplicate key",
        ),
    ],
)
def test_classes_are_named_without_their_path(error: str, short: str) -> None:
    assert shortened(error) == short


def test_a_traceback_without_a_frame_of_the_user_stays_whole() -> None:
    trace = 'Traceback (most recent call last):\n  File "/x/site-packages/a.py", line 1, in b\n    c()\nValueError: d'

    assert reduced(trace) == trace
