"""PostgreSQL that crashes, is away, ends connections, loses answers, or falls silent."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Final

from sqlalchemy import text

from tests.chaos.faults import fault
from tests.chaos.fleet import AWAY
from tests.chaos.stage import OBSERVER, Stage
from tests.proxy import is_commit

_TERMINATE: Final = text(
    f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name <> '{OBSERVER}'"
    " AND (application_name LIKE 'exarq %' OR :producers)"
    " AND backend_type = 'client backend' ORDER BY random() LIMIT 1"
)


@fault("postgres")
async def postgres_restart(stage: Stage) -> None:
    """An immediate restart of PostgreSQL: every connection dies and the server recovers from its log."""
    seconds = await stage.postgres.restart()
    stage.back()
    stage.say(f"  it accepts connections again after {seconds:.1f} s")
    await asyncio.sleep(stage.pace.lease / 2)


@fault("postgres")
async def postgres_away(stage: Stage) -> None:
    """PostgreSQL refuses connections for six leases."""
    stage.to_postgres.refuse()
    await asyncio.sleep(6 * stage.pace.lease)
    stage.to_postgres.restore()
    stage.back()
    await asyncio.sleep(stage.pace.lease)


@fault("postgres")
async def postgres_silent(stage: Stage) -> None:
    """PostgreSQL accepts connections and says nothing for two leases."""
    stage.excuse_all()  # a beat that got through before the others' may come back later than theirs
    stage.to_postgres.silence()
    await asyncio.sleep(2 * stage.pace.lease)
    stage.to_postgres.restore()
    stage.back()
    await asyncio.sleep(stage.pace.lease)


@fault("postgres")
async def terminated_backends(stage: Stage) -> None:
    """Five of the connections to PostgreSQL are ended each second, for two leases."""
    for _ in range(round(10 * stage.pace.lease)):
        with suppress(*AWAY):
            async with stage.engine.connect() as connection:
                await connection.execute(_TERMINATE, {"producers": stage.rng.random() < 0.3})
        await asyncio.sleep(0.2)


@fault("postgres")
async def lost_commits(stage: Stage) -> None:
    """One COMMIT in five is delivered and its answer is lost, for two leases."""
    stage.to_postgres.lose_the_answer_to(is_commit, times=None, probability=0.2, rng=stage.rng)
    await asyncio.sleep(2 * stage.pace.lease)
    stage.to_postgres.restore()


@fault("postgres")
async def lost_answers(stage: Stage) -> None:
    """One question to PostgreSQL in two hundred is delivered and its answer is lost, for two leases: claims, beats too."""
    stage.to_postgres.lose_the_answer_to(lambda _: True, times=None, probability=0.005, rng=stage.rng)
    await asyncio.sleep(2 * stage.pace.lease)
    stage.to_postgres.restore()


@fault("postgres")
async def postgres_half_open(stage: Stage) -> None:
    """Every connection to PostgreSQL falls silent, and only a lease later do the kernels notice; new ones work."""
    stage.excuse_all()  # whoever notices first may convict who notices last
    stage.to_postgres.half_open()
    await asyncio.sleep(stage.pace.lease)
    stage.to_postgres.end_half_open()
    await asyncio.sleep(stage.pace.lease)


@fault("postgres", "redis")
async def slow_network(stage: Stage) -> None:
    """Everything takes 20 to 60 ms longer each way, for a lease."""
    stage.to_postgres.delay(0.02, 0.04, stage.rng)
    stage.to_redis.delay(0.02, 0.04, stage.rng)
    await asyncio.sleep(stage.pace.lease)
    stage.to_postgres.restore()
    stage.to_redis.restore()
