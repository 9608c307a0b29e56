"""The statements that a large table must not slow down use their index, with any plan the server may choose."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.core.states import JobState
from worker.db import overview, people, reads, transitions
from worker.db.ids import uuid7
from worker.db.statements.again import FREE_FOR
from worker.db.statements.claim import CLAIM_BEHIND
from worker.db.statements.unique import FIND
from worker.db.transitions import Held
from worker.db.turns import Position

pytestmark = pytest.mark.leaves_running

NOW = datetime.now(UTC)
IDS = [UUID(int=number) for number in range(1, 11)]
WORKER = UUID(int=3)
SOON = timedelta(seconds=30)

_FILL = """
INSERT INTO exarq.job (id, name, queue, args, state, run_at, token, worker_id, finished_at)
SELECT lpad(to_hex(n), 32, '0')::uuid, 'tests.noop', 'default', '{}', s.state,
       now() - interval '1 hour' + n * interval '1 second', gen_random_uuid(),
       lpad(to_hex(n % 20), 32, '0')::uuid,
       CASE WHEN s.state IN ('succeeded', 'failed', 'cancelled') THEN now() - n * interval '1 minute' END
FROM generate_series(1, 25000) n, LATERAL (SELECT (CASE
    WHEN n % 4 = 0 THEN 'queued' WHEN n % 50 = 1 THEN 'running' WHEN n % 40 = 2 THEN 'failed' ELSE 'succeeded'
END) AS state) s
"""


async def claim(connection: AsyncConnection) -> None:
    await transitions.claim(connection, IDS, token=uuid4(), worker_id=uuid7(), may_take_suspect=True)


async def claim_by_scan(connection: AsyncConnection) -> None:
    await transitions.claim_by_scan(
        connection, ["default"], room=10, token=uuid4(), worker_id=uuid7(), may_take_suspect=True
    )


async def claim_behind(connection: AsyncConnection) -> None:
    nothing = {"queues": ["nothing"], "room": 10, "new_token": uuid4(), "me": uuid7(), "may_take_suspect": True}
    await connection.execute(CLAIM_BEHIND, nothing)


async def something_is_due(connection: AsyncConnection) -> None:
    await reads.something_is_due(connection, ["default"])


async def first_page(connection: AsyncConnection) -> None:
    await reads.waiting(connection, after=None, horizon=SOON, limit=100)


async def later_page(connection: AsyncConnection) -> None:
    after = Position(NOW - timedelta(minutes=30), IDS[0])
    await reads.waiting(connection, after=after, horizon=SOON, limit=100)


async def running_under(connection: AsyncConnection) -> None:
    await reads.running_under(connection, WORKER)


async def rescue(connection: AsyncConnection) -> None:
    await transitions.rescue(connection, WORKER, had_announced_its_stop=False, max_crashes=3, reason="x")


async def prune(connection: AsyncConnection) -> None:
    await transitions.prune(connection, JobState.FAILED, keep=timedelta(days=1), batch=100)


async def succeed_many(connection: AsyncConnection) -> None:
    await transitions.succeed_many(connection, {Held(job_id, uuid4()): "1" for job_id in IDS})


async def request_cancel(connection: AsyncConnection) -> None:
    await connection.run_sync(transitions.request_cancel, IDS[0], "x")


async def beats(connection: AsyncConnection) -> None:
    await reads.beats(connection)


async def retry_by_hand(connection: AsyncConnection) -> None:
    await connection.run_sync(people.retry, IDS[0])


async def free_for(connection: AsyncConnection) -> None:
    await connection.execute(FREE_FOR, {"ids": IDS})


async def retry_many(connection: AsyncConnection) -> None:
    await people.retry_many(connection, IDS)


async def delete_many(connection: AsyncConnection) -> None:
    await people.delete_many(connection, IDS)


async def request_cancel_many(connection: AsyncConnection) -> None:
    await people.request_cancel_many(connection, IDS, "x")


async def find_keys(connection: AsyncConnection) -> None:
    given = {"wanted_names": ["tests.noop"] * 2, "wanted_keys": ["a", "b"], "to_replaces": [True, False]}
    await connection.execute(FIND, given)


async def free_key(connection: AsyncConnection) -> None:
    await connection.run_sync(transitions.free, "tests.noop", "a")


async def queues_waiting(connection: AsyncConnection) -> None:
    await connection.execute(overview.WAITING)


async def queues_done(connection: AsyncConnection) -> None:
    await connection.execute(overview.DONE)


async def workers_running(connection: AsyncConnection) -> None:
    await overview.workers(connection)


STATEMENTS: list[tuple[Callable[[AsyncConnection], Awaitable[None]], str]] = [
    (claim, "job_pkey"),
    (claim_by_scan, "job_waiting"),
    (claim_behind, "job_waiting"),
    (something_is_due, "job_waiting"),
    (first_page, "job_waiting"),
    (later_page, "job_waiting"),
    (running_under, "job_running"),
    (rescue, "job_running"),
    (prune, "job_final"),
    (succeed_many, "job_pkey"),
    (request_cancel, "job_pkey"),
    (beats, "job_running"),
    (retry_by_hand, "job_unique"),
    (free_for, "job_unique"),
    (retry_many, "job_pkey"),
    (delete_many, "job_pkey"),
    (request_cancel_many, "job_pkey"),
    (find_keys, "job_unique"),
    (free_key, "job_unique"),
    (queues_waiting, "job_waiting"),
    (queues_done, "job_final"),
    (workers_running, "job_running"),
]


async def plan_of(engine: AsyncEngine, mode: str, call: Callable[[AsyncConnection], Awaitable[None]]) -> str:
    """The plan of the last statement that the call sends."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        sent.append((statement, parameters))

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    async with engine.connect() as connection:
        await call(connection)
        await connection.rollback()
        statement, parameters = sent[-1]
        raw = await connection.get_raw_connection()
        driver: Any = raw.driver_connection
        if mode == "custom":
            lines = await driver.fetch(f"EXPLAIN {statement}", *parameters)
        else:
            await driver.execute("SET plan_cache_mode = force_generic_plan")
            await driver.execute(f"PREPARE explained AS {statement}")
            nothing = f"({', '.join(['NULL'] * len(parameters))})" if parameters else ""
            lines = await driver.fetch(f"EXPLAIN EXECUTE explained{nothing}")
            await driver.execute("RESET ALL; DEALLOCATE explained")
    return "\n".join(line[0] for line in lines)


@pytest.fixture
async def full(engine: AsyncEngine) -> AsyncEngine:
    """A database with 25,000 jobs in every state, and statistics of them."""
    async with engine.begin() as connection:
        await connection.execute(text(_FILL))
    async with engine.connect() as plain:
        await (await plain.execution_options(isolation_level="AUTOCOMMIT")).execute(text("ANALYZE exarq.job"))
    return engine


@pytest.mark.parametrize("mode", ["custom", "generic"])
async def test_every_hot_statement_uses_its_index(full: AsyncEngine, mode: str) -> None:
    for call, index in STATEMENTS:
        plan = await plan_of(full, mode, call)

        assert index in plan, f"{call.__name__}:\n{plan}"
        assert "Seq Scan on job" not in plan, f"{call.__name__}:\n{plan}"
