"""`exarq jobs cancel`: one line that says what came of it, and an exit code that agrees."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.broker.listeners import listening
from tests.cancelling import installation_of
from tests.cli.conftest import Command
from tests.support import a_job, row, state, until
from worker.broker.messages import CancelAsked
from worker.db.ids import uuid7

pytestmark = pytest.mark.leaves_running


async def test_a_job_that_waits_is_cancelled(exarq: Command, engine: AsyncEngine) -> None:
    job = await a_job(engine)

    done = exarq.cold("jobs", "cancel", str(job))

    assert (done.code, done.out, done.err) == (0, f"job {job} is cancelled and will not run\n", "")
    assert await state(engine, job) == "cancelled"


async def test_the_worker_of_a_job_that_runs_is_told(exarq: Command, engine: AsyncEngine, redis: ArqRedis) -> None:
    worker = uuid7()
    job = await a_job(engine, state="running", worker_id=worker)
    installation = await installation_of(engine)

    async with listening(redis, installation) as told:
        done = exarq("jobs", "cancel", str(job))
        await until(lambda: told, "the worker is told")

    assert (done.code, done.out, done.err) == (0, f"job {job} runs; its worker was asked to cancel it\n", "")
    assert told == [CancelAsked(job, worker, installation)]
    assert (await row(engine, job)).cancel_requested


@pytest.mark.parametrize(
    ("columns", "answer"),
    [
        ({}, {"outcome": "cancelled", "state": "cancelled"}),
        ({"state": "running"}, {"outcome": "requested", "state": "running"}),
        ({"state": "cancelled"}, {"outcome": "final", "state": "cancelled"}),
    ],
)
async def test_a_program_is_answered_in_json(
    exarq: Command, engine: AsyncEngine, columns: Mapping[str, Any], answer: Mapping[str, str]
) -> None:
    job = await a_job(engine, **columns)

    done = exarq("jobs", "cancel", str(job), "--json")

    assert (done.code, done.err) == (0, "")
    assert done.json == {"job_id": str(job), **answer}


async def test_cancelling_twice_is_no_error(exarq: Command, engine: AsyncEngine) -> None:
    job = await a_job(engine)

    exarq("jobs", "cancel", str(job))
    again = exarq("jobs", "cancel", str(job))

    assert (again.code, again.out, again.err) == (0, f"job {job} was cancelled before\n", "")


@pytest.mark.parametrize("ended", ["succeeded", "failed"])
async def test_a_job_that_has_ended_ends_with_1_and_one_line(exarq: Command, engine: AsyncEngine, ended: str) -> None:
    job = await a_job(engine, state=ended)

    done = exarq("jobs", "cancel", str(job), "--json")

    assert (done.code, done.out) == (1, "")
    assert done.err == f"exarq: job {job} has {ended} already, so there is nothing to cancel\n"


def test_a_job_that_is_not_there_ends_with_1_and_one_line(exarq: Command) -> None:
    done = exarq("jobs", "cancel", "0199c0de-0000-7000-8000-000000000000")

    (line,) = done.err.splitlines()
    assert (done.code, done.out) == (1, "")
    assert "no job 0199c0de-0000-7000-8000-000000000000" in line


def test_what_is_no_id_is_wrong_input(exarq: Command) -> None:
    assert "'seven' is not a job's id" in exarq("jobs", "cancel", "seven").error


async def test_without_redis_the_request_stands_and_a_note_says_when_it_is_seen(
    exarq: Command, engine: AsyncEngine, closed_port: int
) -> None:
    job = await a_job(engine, state="running")

    done = exarq("jobs", "cancel", str(job), EXARQ_REDIS_URL=f"redis://127.0.0.1:{closed_port}")

    (line,) = done.err.splitlines()
    assert done.code == 0
    assert line.startswith("note: Redis does not answer")
    assert line.endswith("the job's worker sees the request with its next beat")
    assert (await row(engine, job)).cancel_requested


async def test_a_job_that_another_transaction_keeps_locked_is_not_waited_for_for_ever(
    exarq: Command, engine: AsyncEngine
) -> None:
    job = await a_job(engine)

    async with engine.begin() as connection:
        await connection.execute(text("SELECT 1 FROM exarq.job WHERE id = :id FOR UPDATE"), {"id": job})
        done = exarq("jobs", "cancel", str(job), EXARQ_DATABASE_STATEMENT_TIMEOUT="1")

    assert done.error == f"exarq: another transaction keeps job {job} locked; try again when it has ended"
    assert await state(engine, job) == "queued"
