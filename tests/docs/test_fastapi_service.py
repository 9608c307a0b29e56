"""The FastAPI example over real HTTP: a uvicorn process, a worker process, and this client."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.docs.helpers import environment, started
from tests.support import until

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine


@pytest.fixture
def shell(database_url: str, redis_url: str) -> dict[str, str]:
    return environment(database_url, redis_url, "orders")


@pytest.fixture
async def service(
    shell: dict[str, str], tmp_path: Path, request: pytest.FixtureRequest
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service, which was started by its one command."""
    command, log, cold = ["uvicorn", "service:app", "--port", "0"], tmp_path / "service.log", hasattr(request, "param")
    async with started(command, log, shell, ready="Uvicorn running on", cold=cold) as process:
        found = re.search(r"running on (http://[\d.:]+)", process.output)
        assert found is not None
        # An idle connection may be closed by the service while the next request is on its way.
        limits = httpx.Limits(max_connections=200, max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=found[1], timeout=120, limits=limits, trust_env=False) as client:
            yield client


async def count(engine: AsyncEngine, query: str) -> Any:
    async with engine.connect() as connection:
        return (await connection.execute(text(query))).scalar_one()


@pytest.mark.parametrize("service", ["as by a shell"], indirect=True)
async def test_an_order_is_stored_with_its_job_and_confirmed_by_it(
    engine: AsyncEngine, service: httpx.AsyncClient, shell: dict[str, str], tmp_path: Path
) -> None:
    async with started(["exarq", "run"], tmp_path / "worker.log", shell, ready="worker started"):
        placed = await service.post("/orders", json={"item": "tea", "quantity": 3})
        result = await service.get(f"/jobs/{placed.json()['job_id']}/result")
        order = await service.get(f"/orders/{placed.json()['order_id']}")

    assert placed.status_code == 201
    assert (result.status_code, result.json()) == (200, {"result": "3 x tea"})
    assert order.json() == {"confirmed": True}
    assert await count(engine, "SELECT state FROM exarq.job") == "succeeded"


async def test_a_route_that_fails_leaves_neither_row_nor_job(engine: AsyncEngine, service: httpx.AsyncClient) -> None:
    refused = await service.post("/orders", json={"item": "tea", "quantity": 1_000})
    placed = await service.post("/orders", json={"item": "tea"})

    assert refused.status_code == 409
    assert placed.status_code == 201
    assert placed.json()["order_id"] == 2  # the first was written, and rolled back
    assert await count(engine, "SELECT count(*) FROM orders") == 1
    assert await count(engine, "SELECT count(*) FROM exarq.job") == 1


async def test_two_hundred_requests_at_once_are_as_many_orders_and_jobs(
    engine: AsyncEngine, service: httpx.AsyncClient, shell: dict[str, str], tmp_path: Path
) -> None:
    async with started(["exarq", "run"], tmp_path / "worker.log", shell, ready="worker started"):
        wanted = [{"item": f"{n}", "quantity": 1_000 if n % 10 == 0 else 1} for n in range(200)]
        answers = await asyncio.gather(*(service.post("/orders", json=one) for one in wanted))
        placed = [answer.json() for answer in answers if answer.status_code == 201]
        results = await asyncio.gather(*(service.get(f"/jobs/{one['job_id']}/result") for one in placed[::10]))

        async def all_have_run() -> bool:
            found = await count(engine, "SELECT count(*) FROM exarq.job WHERE state = 'succeeded'")
            return bool(found == len(placed))

        await until(all_have_run, "all jobs have run")

    assert Counter(answer.status_code for answer in answers) == {201: 180, 409: 20}
    assert {result.status_code for result in results} == {200}
    assert await count(engine, "SELECT count(*) FROM orders WHERE confirmed") == 180
    assert await count(engine, "SELECT count(*) FROM orders") == 180
    assert await count(engine, "SELECT count(*) FROM exarq.job") == 180


async def test_who_asks_for_what_is_not_there_is_told(service: httpx.AsyncClient) -> None:
    order = await service.get("/orders/7")
    job = await service.get(f"/jobs/{uuid4()}/result?timeout=0")

    assert order.status_code == 404
    assert job.status_code == 504
    assert "there is no such job" in job.json()["detail"]
