"""`exarq jobs retry | cancel | delete`: one or many, asked before many, told what came of each."""

from __future__ import annotations

import os
import pty
import subprocess
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cli.conftest import Command, Ended
from tests.support import a_job, a_locked_row, hints, row, state
from worker.db.ids import uuid7

pytestmark = [pytest.mark.leaves_running, pytest.mark.timeout(300)]

NOW = datetime.now(UTC)
FAILED = {"state": "failed", "finished_at": NOW, "failures": 3, "error": "ValueError: no", "name": "shop.charge"}


async def states(engine: AsyncEngine, *jobs: UUID) -> list[str | None]:
    return [await state(engine, job) for job in jobs]


def typed(exarq: Command, answer: str, *args: str) -> Ended:
    """The command on a terminal, at which somebody answers."""
    leader, follower = pty.openpty()
    os.write(leader, answer.encode())
    done = subprocess.run(
        exarq._line(args), cwd=exarq.folder, env=exarq._environment({}), stdin=follower, capture_output=True, text=True
    )
    os.close(leader)
    os.close(follower)
    return Ended(done.returncode, done.stdout, done.stderr)


# ── one ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_failed_job_waits_again_and_its_hint_is_in_redis(
    exarq: Command, engine: AsyncEngine, redis: ArqRedis
) -> None:
    job = await a_job(engine, **FAILED)

    done = exarq.cold("jobs", "retry", str(job))

    assert (done.code, done.out, done.err) == (0, f"job {job} waits again and is due now\n", "")
    assert (await row(engine, job)).failures == 0
    assert list(await hints(redis)) == [str(job)]


async def test_a_job_is_named_by_the_end_or_the_beginning_of_its_id(exarq: Command, engine: AsyncEngine) -> None:
    ours, other = await a_job(engine, **FAILED), await a_job(engine, **FAILED)
    beginning = await a_job(engine, **{**FAILED, "id": UUID("0123456789abcdef0000000000000000")})

    by_end = exarq("jobs", "delete", str(ours)[-8:], "--json")
    by_beginning = exarq("jobs", "delete", "01234567-89")
    several = exarq("jobs", "delete", str(other)[:9])
    none = exarq("jobs", "show", "ffff0000")

    assert by_end.json == {"job_id": str(ours), "outcome": "deleted", "state": None}
    assert by_beginning.out == f"job {beginning} is deleted, with its attempts\n"
    assert several.code == 0, "only one is left that begins so"
    assert (none.code, none.out) == (1, "")
    assert "no job whose id begins or ends with ffff0000" in none.err


async def test_a_part_that_several_ids_have_is_refused(exarq: Command, engine: AsyncEngine) -> None:
    twins = [await a_job(engine, **FAILED, id=UUID(f"{n}0000000-0000-7000-8000-00000000beef")) for n in (1, 2)]

    line = exarq("jobs", "delete", "0000beef").error

    assert f"'0000beef' may mean {twins[0]}" in line
    assert "give more of the id" in line
    assert await states(engine, *twins) == ["failed", "failed"]


@pytest.mark.parametrize(
    ("verb", "columns", "said"),
    [
        ("retry", {"state": "queued"}, "is queued, so there is nothing to retry; to have it run now, cancel it first"),
        ("retry", {"state": "running"}, "is running, so there is nothing to retry"),
        ("retry", {"state": "succeeded"}, "--state succeeded runs it once more"),
        ("delete", {"state": "running"}, "is running; cancel it first"),
        ("delete", {"state": "queued"}, "is queued; cancel it first"),
    ],
)
async def test_what_cannot_be_done_is_one_line_and_ends_with_1(
    exarq: Command, engine: AsyncEngine, verb: str, columns: Any, said: str
) -> None:
    job = await a_job(engine, name="shop.charge", **columns)

    done = exarq("jobs", verb, str(job))

    (line,) = done.err.splitlines()
    assert (done.code, done.out) == (1, "")
    assert line.startswith(f"exarq: job {job} ")
    assert said in line
    assert await state(engine, job) == columns["state"]


async def test_a_success_runs_again_when_that_is_said(exarq: Command, engine: AsyncEngine) -> None:
    job = await a_job(engine, name="shop.charge", state="succeeded", finished_at=NOW, result=1)

    done = exarq("jobs", "retry", str(job), "--state", "succeeded")

    assert done.code == 0
    assert await state(engine, job) == "queued"


async def test_a_young_success_of_a_living_worker_is_not_deleted(exarq: Command, engine: AsyncEngine) -> None:
    worker = uuid7()
    job = await a_job(engine, state="succeeded", finished_at=datetime.now(UTC), worker_id=worker)
    async with engine.begin() as connection:
        columns = "(id, host, pid, version, queues, concurrency) VALUES (:id, 'h', 1, 'v', '{a}', 1)"
        await connection.execute(text(f"INSERT INTO exarq.worker {columns}"), {"id": worker})

    done = exarq("jobs", "delete", str(job))

    assert (done.code, done.out) == (1, "")
    assert "succeeded less than a minute ago, and its worker may still have to ask" in done.err
    assert await state(engine, job) == "succeeded"


async def test_a_unique_key_that_is_taken_is_one_line(exarq: Command, engine: AsyncEngine) -> None:
    job = await a_job(engine, **FAILED, unique_key="k")
    await a_job(engine, name="shop.charge", unique_key="k")

    done = exarq("jobs", "retry", str(job))

    (line,) = done.err.splitlines()
    assert (done.code, done.out) == (1, "")
    assert "another job holds its unique key" in line


async def test_a_job_whose_function_is_gone_is_warned_of_and_needs_a_yes(exarq: Command, engine: AsyncEngine) -> None:
    job = await a_job(engine, **{**FAILED, "name": "shop.gone"})

    refused = exarq("jobs", "retry", str(job))
    done = exarq("jobs", "retry", str(job), "--yes")

    warning, line = refused.err.splitlines()
    assert (refused.code, refused.out) == (2, "")
    assert warning.startswith("note: 1 of these jobs have no function here (shop.gone)")
    assert line.endswith("say --yes")
    assert done.code == 0
    assert done.err == warning + "\n"
    assert await state(engine, job) == "queued"


# ── many ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_jobs_that_match_are_moved_and_counted_and_no_others(
    exarq: Command, engine: AsyncEngine, redis: ArqRedis
) -> None:
    ours = [await a_job(engine, **{**FAILED, "finished_at": NOW - timedelta(hours=3)}) for _ in range(3)]
    young = await a_job(engine, **FAILED)
    other_name = await a_job(engine, **{**FAILED, "name": "shop.broken", "finished_at": NOW - timedelta(hours=3)})

    done = exarq("jobs", "retry", "--name", "shop.charge", "--older-than", "2h", "--yes")

    assert (done.code, done.out, done.err) == (0, "3 queued again\n", "")
    assert await states(engine, *ours) == ["queued"] * 3
    assert await states(engine, young, other_name) == ["failed", "failed"]
    assert set(await hints(redis)) == {str(job) for job in ours}


async def test_all_that_waits_or_runs_is_cancelled_and_a_program_gets_counts(
    exarq: Command, engine: AsyncEngine
) -> None:
    waits = [await a_job(engine, queue="night") for _ in range(2)]
    runs = await a_job(engine, state="running", queue="night")
    elsewhere = await a_job(engine)

    done = exarq("jobs", "cancel", "--queue", "night", "--yes", "--json")
    nothing = exarq("jobs", "cancel", "--queue", "nowhere", "--yes")

    assert done.json == {"jobs": 3, "outcomes": {"cancelled": 2, "requested": 1}, "others": []}
    assert await states(engine, *waits, elsewhere) == ["cancelled", "cancelled", "queued"]
    assert (await row(engine, runs)).cancel_requested
    assert (nothing.code, nothing.out, nothing.err) == (0, "", "note: no jobs match\n")


async def test_without_a_terminal_many_need_a_yes(exarq: Command, engine: AsyncEngine) -> None:
    jobs = [await a_job(engine) for _ in range(2)]

    line = exarq("jobs", "cancel", "--all").error

    assert line == "exarq: cancel 2 jobs? Nobody can answer without a terminal; say --yes"
    assert await states(engine, *jobs) == ["queued", "queued"]


@pytest.mark.parametrize(("answer", "code", "left"), [("y\n", 0, None), ("\n", 1, "failed")])
async def test_on_a_terminal_many_are_asked_for(
    exarq: Command, engine: AsyncEngine, answer: str, code: int, left: str | None
) -> None:
    jobs = [await a_job(engine, **FAILED) for _ in range(2)]

    done = typed(exarq, answer, "jobs", "delete", "--state", "failed")

    assert done.code == code
    assert done.err.startswith("delete 2 jobs? [y/N] ")
    assert await states(engine, *jobs) == [left, left]


async def test_what_others_hold_is_passed_by_and_told(exarq: Command, engine: AsyncEngine) -> None:
    held, free = await a_job(engine), await a_job(engine)

    async with a_locked_row(engine, held):
        done = exarq("jobs", "cancel", "--all", "--yes")

    told, line = done.err.splitlines()
    assert (done.code, done.out) == (1, "1 cancelled\n")
    assert told == "note: 1 are locked by other transactions; try again when those have ended"
    assert line == "exarq: 1 of 2 jobs were not moved; the notes say why"
    assert await states(engine, held, free) == ["queued", "cancelled"]


async def test_of_several_ids_those_that_stay_are_named(exarq: Command, engine: AsyncEngine) -> None:
    failed, waits, missing = await a_job(engine, **FAILED), await a_job(engine), uuid7()

    done = exarq("jobs", "delete", str(failed), str(waits), str(missing), str(failed))
    program = exarq("jobs", "delete", str(waits), str(missing), "--json")

    assert (done.code, done.out) == (1, "1 deleted\n")
    assert f"note: 1 have not ended, so there is nothing to delete ({waits})" in done.err
    assert f"({missing})" in done.err
    assert program.code == 1
    assert program.json["outcomes"] == {"not final": 1, "unknown": 1}


async def test_keys_that_are_taken_are_passed_by_and_counted(exarq: Command, engine: AsyncEngine) -> None:
    rivals = [await a_job(engine, **FAILED, unique_key="k", id=UUID(int=number)) for number in (1, 2)]
    free = await a_job(engine, **FAILED)

    done = exarq("jobs", "retry", "--all", "--yes")

    assert (done.code, done.out) == (1, "2 queued again\n")
    assert "note: 1 were passed by: other jobs hold their unique keys" in done.err
    assert await states(engine, *rivals, free) == ["failed", "queued", "queued"]


# ── what is wrong with it ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("cancel",), "say which jobs to cancel"),
        (("delete", "0199c0de-0000-7000-8000-000000000000", "--name", "a.b"), "either ids or filters, not both"),
        (("retry", "--older-than", "soon"), "'soon' is not an age; write a number and a unit, such as 90s"),
        (("cancel", "--state", "failed"), "no job that is failed can be cancelled, only one that is queued or running"),
        (("delete", "--state", "queued"), "no job that is queued can be deleted"),
        (("retry", "--state", "retrying"), "; to have it run now, cancel it first"),
        (("delete", "--state", "faild"), "did you mean 'failed'?"),
        (("retry", "short"), "'short' is not a job's id"),
    ],
)
def test_what_cannot_be_meant_is_refused(exarq: Command, args: tuple[str, ...], said: str) -> None:
    assert said in exarq("jobs", *args).error
