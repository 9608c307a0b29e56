"""Whatever stands in Redis under our names: the worker neither dies nor hangs, and the next job runs."""

from __future__ import annotations

import pickle
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from tests.life import jobs_for_tests as jobs
from tests.support import a_worker, state, until
from worker.broker.hints import Owner, owner_of, parse_id, payload_of
from worker.broker.keys import PAYLOAD_PREFIX, queue_key, wake_key, workers_channel
from worker.process import Worker
from worker.settings import Settings

Sessions = async_sessionmaker[AsyncSession]

QUEUE, WAKE = queue_key("default"), wake_key("default")
HERE = UUID("11111111-1111-1111-1111-111111111111")

pytestmark = pytest.mark.leaves_hints

# ── the decoder ─────────────────────────────────────────────────────────────────────────────────────────────────────

ids = st.uuids().map(lambda found: str(found).encode())
like_ids = ids | ids.map(bytes.upper) | st.uuids().map(lambda found: found.hex.encode()) | st.binary(max_size=40)
payloads = st.one_of(
    st.binary(max_size=60),
    st.builds(
        lambda name, at: payload_of(name, at, HERE).encode(),
        st.text(),
        st.integers(),
    ),
    st.builds(lambda mark: b'{"x": ' + mark + b"}", st.sampled_from([b"null", b"[]", b"1e999", b'"x"', b"9" * 5_000])),
    st.sampled_from([b"[" * 100_000, b'{"x":' * 20_000, b"\xff" * 1_000, b"null", b"NaN", b"\x80\x04K\x01."]),
    st.builds(pickle.dumps, st.dictionaries(st.text(), st.integers())),
)


@settings(derandomize=True, max_examples=300)
@given(raw=like_ids, payload=st.none() | payloads, here=st.uuids() | st.just(HERE))
def test_whatever_stands_in_redis_has_an_owner_and_is_ours_only_with_our_mark(
    raw: bytes, payload: bytes | None, here: UUID
) -> None:
    owner = owner_of(raw, payload, here)

    if owner is Owner.US:
        assert parse_id(raw) is not None if payload is None else str(here).encode() in payload


# ── a worker among garbage ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
async def worker(settings: Settings, engine: AsyncEngine) -> AsyncIterator[Worker]:
    await jobs.make_effects(engine)
    async with a_worker(settings, jobs.registry()) as worker:
        yield worker


async def the_next_job_runs(engine: AsyncEngine, sessions: Sessions, worker: Worker) -> None:
    (job,) = await jobs.enqueue_all(sessions, jobs.note.call("after"))

    async def has_succeeded() -> bool:
        return await state(engine, job) == "succeeded"

    await until(has_succeeded, "the job among garbage runs")
    async with engine.connect() as connection:
        count = text("SELECT count(*) FROM exarq.attempt")
        assert (await connection.execute(count)).scalar() == 0


members = like_ids | st.builds(lambda size: b"\xff" * size, st.sampled_from([0, 1, 100_000]))
scores = st.floats(allow_nan=False) | st.sampled_from(
    [0.0, -1.0, 0.5, 1.7e12, 4e12, 1e300, float("inf"), float("-inf")]
)
entries = st.tuples(members, scores, st.none() | payloads, st.sampled_from(["string", "list", "hash"]))


async def put(redis: ArqRedis, member: bytes, score: float, payload: bytes | None, kind: str) -> None:
    """One member of the queue, with something beside it that may be no payload at all."""
    key: Any = PAYLOAD_PREFIX.encode() + member
    await redis.zadd(QUEUE, {member: score})
    await redis.delete(key)
    if payload is not None:
        match kind:
            case "list":
                await redis.rpush(key, payload)  # type: ignore[misc]  # redis-py 5 types it as sync or async
            case "hash":
                await redis.hset(key, "f", payload)  # type: ignore[arg-type, misc]  # likewise
            case _:
                await redis.set(key, payload)


@settings(derandomize=True, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(found=st.lists(entries, min_size=1, max_size=12), said=st.lists(st.binary(max_size=90), max_size=3))
@example(found=[(b"far", 9e16, None, "string")], said=[b"x y", b"\xff" * 1_000, (f"cancel {HERE} {HERE}").encode()])
@example(found=[(str(number).encode(), number, None, "string") for number in range(300)], said=[])
@example(found=[(str(HERE).encode(), 0.0, pickle.dumps({"x": str(HERE)}), "string")], said=[])
async def test_garbage_in_the_queue_and_beside_it_and_on_the_channel_costs_the_next_job_nothing(
    found: list[tuple[bytes, float, bytes | None, str]],
    said: list[bytes],
    worker: Worker,
    redis: ArqRedis,
    engine: AsyncEngine,
    sessions: Sessions,
) -> None:
    async with engine.connect() as connection:
        installation = (await connection.execute(text("SELECT id FROM exarq.installation"))).scalar_one()
    for entry in found:
        await put(redis, *entry)
    for message in said:
        await redis.publish(workers_channel(installation), message)

    await the_next_job_runs(engine, sessions, worker)


@pytest.mark.parametrize(
    ("key", "kind"), [(QUEUE, "string"), (QUEUE, "stream"), (WAKE, "string"), (WAKE, "sorted set")]
)
async def test_a_key_of_ours_that_holds_something_else_costs_speed_only(
    key: str, kind: str, worker: Worker, redis: ArqRedis, engine: AsyncEngine, sessions: Sessions
) -> None:
    async with redis.pipeline(transaction=True) as at_once:
        at_once.delete(key)
        match kind:
            case "string":
                at_once.set(key, "x" * 1_000)
            case "stream":
                at_once.xadd(key, {"a": "b"})
            case _:
                at_once.zadd(key, {"x": 1})
        await at_once.execute()

    for _ in range(2):
        await the_next_job_runs(engine, sessions, worker)

    await redis.delete(key)
    await the_next_job_runs(engine, sessions, worker)
