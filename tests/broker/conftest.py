"""Each script runs on a real server and on the in-process one that users' own tests may have."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from arq.connections import ArqRedis
from fakeredis import FakeAsyncRedis


@pytest.fixture(params=["server", "fakeredis"])
async def broker(request: pytest.FixtureRequest, redis: ArqRedis) -> AsyncIterator[ArqRedis]:
    """A client of an empty Redis."""
    if request.param == "server":
        yield redis
        return
    pool: Any = FakeAsyncRedis().connection_pool
    client = ArqRedis(pool_or_conn=pool, job_deserializer=json.loads)
    yield client
    await client.aclose()
    await pool.disconnect()
