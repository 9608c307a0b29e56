"""What Exarq sends again and again, the index that must serve each of it, and tables large enough to tell."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, TypeAlias
from uuid import UUID, uuid4

from sqlalchemy import Connection, event, text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.core.outcome import ErrorText
from worker.core.states import JobState
from worker.db import ends, overview, people, reads, transitions, workers
from worker.db.ids import uuid7
from worker.db.statements.again import FREE_FOR
from worker.db.statements.claim import CLAIM_BEHIND
from worker.db.statements.unique import FIND
from worker.db.transitions import Held
from worker.db.turns import Position
from worker.flow import unique
from worker.flow.after_commit import Outbox
from worker.flow.call import Call, Unique
from worker.flow.handle import Origin

Mode: TypeAlias = Literal["custom", "generic"]
MODES: Final[tuple[Mode, ...]] = ("custom", "generic")
Send: TypeAlias = Callable[[AsyncConnection], Awaitable[Any]]

WORKERS: Final = 20
MOST_SORTED: Final = 1_000
"""The most rows a statement may sort: what it was given, or the scan's window; never what the table holds."""

_RUNNING_FROM: Final = 1 << 40
_FINAL_FROM: Final = 2 << 40


class Rows(NamedTuple):
    """How many jobs a table holds: due now, due later, running, and ended within the last week."""

    due: int = 0
    later: int = 0
    running: int = 0
    final: int = 0


_FILL = f"""
INSERT INTO exarq.job (id, name, queue, args, state, enqueued_at, first_due_at, run_at, attempt, unique_key, unique_for,
                       token, worker_id, started_at, finished_at, result)
SELECT lpad(to_hex(n + at), 32, '0')::uuid, 'tests.noop', 'default', jsonb_build_object('number', n), state, t, t, t,
       attempt, CASE WHEN state <> 'succeeded' AND n % 20 = 0 THEN 'key ' || n + at END,
       CASE WHEN state <> 'succeeded' AND n % 20 = 0 THEN 'until_done' END,
       CASE WHEN attempt > 0 THEN lpad(to_hex(n + at), 32, '0')::uuid END,
       CASE WHEN attempt > 0 THEN lpad(to_hex(n % {WORKERS} + 1), 32, '0')::uuid END,
       CASE WHEN attempt > 0 THEN t END, CASE WHEN final THEN t END, CASE WHEN state = 'succeeded' THEN 'null'::jsonb END
FROM (
    SELECT n, CAST(:after AS bigint) AS at, 'queued' AS state, now() - interval '1 hour' + n * interval '1 hour' / :due AS t,
           0 AS attempt, false AS final FROM generate_series(1, :due) n
    UNION ALL
    SELECT n, :due + :after, 'queued', now() + interval '1 hour' + n * interval '1 hour' / :later, 0, false
    FROM generate_series(1, :later) n
    UNION ALL
    SELECT n, {_RUNNING_FROM} + :after, 'running', now(), 1, false FROM generate_series(1, :running) n
    UNION ALL
    SELECT n, {_FINAL_FROM} + :after,
           CASE WHEN n % 50 = 0 THEN 'failed' WHEN n % 50 = 1 THEN 'cancelled' ELSE 'succeeded' END,
           now() - (:final - n) * interval '6 days' / :final, 1, true FROM generate_series(1, :final) n
) AS wanted
"""


_ATTEMPTS = f"""
INSERT INTO exarq.attempt (job_id, token, number, ending)
SELECT lpad(to_hex(n + {_FINAL_FROM} + :after), 32, '0')::uuid, gen_random_uuid(), 1, 'retried'
FROM generate_series(1, :final) n
"""


async def fill(connection: AsyncConnection, rows: Rows, *, after: int = 0) -> None:
    """Write this many jobs, made by the server, numbered `after` so many; those that have ended were retried once."""
    await connection.execute(text(_FILL), {"after": after, **rows._asdict()})
    await connection.execute(text(_ATTEMPTS), {"after": after, "final": rows.final})


def waiting_id(number: int) -> UUID:
    """The id of one of the jobs that wait, those that are due first."""
    return UUID(int=number)


# ── what is sent ────────────────────────────────────────────────────────────────────────────────────────────────────

_NOW: Final = datetime.now(UTC)
_IDS: Final = [waiting_id(number) for number in range(1, 11)]
_RUNNING: Final = [UUID(int=_RUNNING_FROM + number) for number in range(1, 11)]
_ENDED: Final = [UUID(int=_FINAL_FROM + number) for number in range(1, 11)]
_HELD: Final = [Held(id_, id_) for id_ in _RUNNING]
_WORKER: Final = UUID(int=3)
_SOON: Final = timedelta(seconds=30)
_ERROR: Final = ErrorText("ValueError", "no", "Traceback")
_CLAIM: Final[dict[str, Any]] = {"token": uuid4(), "worker_id": uuid7(), "may_take_suspect": True}
_SCAN: Final[dict[str, Any]] = {"queues": ["default"], "room": 10, "new_token": uuid4(), "me": uuid7()}
_FIND: Final[dict[str, Any]] = {
    "wanted_names": ["tests.noop"] * 2,
    "wanted_keys": ["key 20", "key 40"],
    "to_replaces": [True, False],
}


async def later_page(connection: AsyncConnection) -> None:
    """A page somewhere in the walk."""
    after = Position(_NOW - timedelta(minutes=30), _IDS[0])
    await reads.waiting(connection, after=after, horizon=_SOON, limit=1_000)


def enqueue_keyed(connection: Connection, on_conflict: Any) -> None:
    """Enqueue where another job has the key."""
    call = Call("tests.noop", "{}", unique=Unique("key 20", "until_done", None, on_conflict))
    unique.insert(connection, [call], Origin(connection.engine, Outbox()))


@dataclass(frozen=True)
class Hot:
    """One thing that is sent, by name, the index that its statement must use, and over whose connection it goes."""

    name: str
    send: Send
    index: str
    by: Literal["worker", "session", "person"] = "worker"


def _sync(function: Callable[..., Any], *args: Any) -> Send:
    return lambda connection: connection.run_sync(function, *args)


HOT: Final = [
    Hot("claim", lambda c: transitions.claim(c, _IDS, **_CLAIM), "job_pkey"),
    Hot("why not claimed", lambda c: reads.standings(c, _IDS), "job_pkey"),
    Hot("claim by scan", lambda c: transitions.claim_by_scan(c, ["default"], room=10, **_CLAIM), "job_waiting"),
    Hot("claim behind", lambda c: c.execute(CLAIM_BEHIND, _SCAN | {"may_take_suspect": True}), "job_waiting"),
    Hot("something is due", lambda c: reads.something_is_due(c, ["default"]), "job_waiting"),
    Hot("reconcile's first page", lambda c: reads.waiting(c, after=None, horizon=_SOON, limit=1_000), "job_waiting"),
    Hot("reconcile's later page", later_page, "job_waiting"),
    Hot("coming due", lambda c: reads.coming_due(c, timedelta(seconds=2), limit=1_000), "job_waiting"),
    Hot("what was told by SQL", lambda c: reads.waiting_among(c, _IDS, horizon=_SOON), "job_pkey"),
    Hot("succeed", _sync(transitions.succeed, _HELD[0], "1"), "job_pkey", "session"),
    Hot("hold", _sync(transitions.hold, _HELD[0]), "job_pkey", "session"),
    Hot("has it succeeded", lambda c: reads.has_succeeded_with(c, _HELD[0]), "job_pkey"),
    Hot("flush", lambda c: transitions.succeed_many(c, dict.fromkeys(_HELD, "1")), "job_pkey"),
    Hot("states under tokens", lambda c: reads.states_under(c, _HELD), "job_pkey"),
    Hot("progress", lambda c: transitions.note_progress(c, dict.fromkeys(_HELD, "{}")), "job_pkey"),
    Hot("retry", lambda c: transitions.retry(c, _HELD[0], _ERROR, wait=_SOON, counts=True), "job_pkey"),
    Hot("release", lambda c: transitions.release_many(c, _HELD, "stopped"), "job_pkey"),
    Hot("what runs here", lambda c: reads.running_under(c, _WORKER), "job_running"),
    Hot("beat", lambda c: workers.beat(c, _WORKER), "job_running"),
    Hot("beat without a look", lambda c: workers.beat(c, _WORKER, looks=False), "worker_pkey"),
    Hot("sweep", lambda c: reads.sweep(c, horizon=_SOON, soon=_SOON), "job_running"),
    Hot(
        "rescue",
        lambda c: transitions.rescue(c, _WORKER, had_announced_its_stop=False, max_crashes=3, reason="x"),
        "job_running",
    ),
    Hot("prune", lambda c: transitions.prune(c, JobState.FAILED, keep=timedelta(days=5), batch=1_000), "job_final"),
    Hot("find keys", lambda c: c.execute(FIND, _FIND), "job_unique", "session"),
    Hot("free a key", _sync(transitions.free, "tests.noop", "key 20"), "job_unique", "session"),
    Hot("enqueue with a key", _sync(enqueue_keyed, "skip"), "job_unique", "session"),
    Hot("replace", _sync(enqueue_keyed, "replace"), "job_pkey", "session"),
    Hot("ends", lambda c: ends.stands(c, _IDS), "job_pkey", "session"),
    Hot("cancel", _sync(transitions.request_cancel, _IDS[0], "x"), "job_pkey", "person"),
    Hot("cancel many", lambda c: people.request_cancel_many(c, _IDS, "x"), "job_pkey", "person"),
    Hot("retry by hand", _sync(people.retry, _ENDED[0]), "job_unique", "person"),
    Hot("free for many", lambda c: c.execute(FREE_FOR, {"ids": _ENDED}), "job_unique", "person"),
    Hot("retry many", lambda c: people.retry_many(c, _ENDED), "job_pkey", "person"),
    Hot("delete many", lambda c: people.delete_many(c, _ENDED), "job_pkey", "person"),
    Hot("queues: what waits", lambda c: c.execute(overview.WAITING), "job_waiting", "person"),
    Hot("queues: what runs", lambda c: c.execute(overview.RUNNING), "job_running", "person"),
    Hot("queues: what has ended", lambda c: c.execute(overview.DONE), "job_final", "person"),
    Hot("workers", overview.workers, "job_running", "person"),
    Hot("names that wait", lambda c: overview.waiting_names(c, most=10), "job_waiting", "person"),
]


# ── how it is planned ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Plan:
    """What the server would do for one statement."""

    statement: str
    nodes: list[dict[str, Any]]

    @property
    def indexes(self) -> set[str]:
        """The indexes it uses."""
        return {node["Index Name"] for node in self.nodes if "Index Name" in node}

    @property
    def scanned(self) -> set[str]:
        """The tables that grow and that it reads from end to end, as they lie or through all of their primary key."""
        found = {node["Relation Name"] for node in self.nodes if node["Node Type"] == "Seq Scan"}
        walked = {node["Index Name"] for node in self.nodes if "Index Name" in node and "Index Cond" not in node}
        return {table for table in ("job", "attempt") if table in found or f"{table}_pkey" in walked}

    @property
    def sorted(self) -> int:
        """The most rows that it sorts."""
        return max((node["Plan Rows"] for node in self.nodes if "Sort" in node["Node Type"]), default=0)

    def __str__(self) -> str:
        shown = (
            f"  {node['Node Type']} {node.get('Relation Name', '')} {node.get('Index Name', '')} rows={node['Plan Rows']}"
            for node in self.nodes
        )
        return "\n".join([self.statement, *shown])


async def plans_of(engine: AsyncEngine, mode: Mode, send: Send) -> list[Plan]:
    """The plans of the statements that are sent, made for their parameters or for any; nothing is changed."""
    sent: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if not statement.startswith(("SAVEPOINT", "RELEASE", "ROLLBACK")):
            sent.append((statement, parameters))

    async with engine.connect() as connection:
        event.listen(engine.sync_engine, "before_cursor_execute", note)
        try:
            await send(connection)
        finally:
            event.remove(engine.sync_engine, "before_cursor_execute", note)
        await connection.rollback()
        driver: Any = (await connection.get_raw_connection()).driver_connection
        return [Plan(statement, await _explain(driver, mode, statement, given)) for statement, given in sent]


async def _explain(driver: Any, mode: Mode, statement: str, parameters: Any) -> list[dict[str, Any]]:
    if mode == "custom":
        found = await driver.fetchval(f"EXPLAIN (FORMAT JSON) {statement}", *parameters)
    else:
        await driver.execute("SET plan_cache_mode = force_generic_plan")
        await driver.execute(f"PREPARE explained AS {statement}")
        nothing = f"({', '.join(['NULL'] * len(parameters))})" if parameters else ""
        found = await driver.fetchval(f"EXPLAIN (FORMAT JSON) EXECUTE explained{nothing}")
        await driver.execute("RESET ALL; DEALLOCATE explained")
    return list(_flat(found[0]["Plan"]))  # read as JSON by SQLAlchemy's codec


def _flat(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for part in node.get("Plans", ()):
        yield from _flat(part)
