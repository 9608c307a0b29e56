"""What docker-compose.yml would have the image do, done by processes: the same command lines, environment and user."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, run
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from jobs import ledger
from tests.deploy.compose import compose, duration
from tests.deploy.image import Image
from tests.deploy.test_dockerfile import IMAGE_LOCK, pins
from tests.proxy import postgres_proxy, redis_proxy
from tests.support import until
from worker.flow.publish import Publisher
from worker.settings import WorkerSettings

pytestmark = pytest.mark.timeout(600)  # processes start slowly on a loaded machine

_TO_START = 120.0


class Containers:
    """Starts what the services of the compose file run, on the servers of the test."""

    def __init__(self, image: Image, addresses: dict[str, str]) -> None:
        self._image = image
        self._addresses = addresses
        self._folders: list[Path] = []
        self.started: list[Container] = []

    async def start(self, service: str, *command: str) -> Container:
        """Start a service, with another command if one is given."""
        image, said = self._image, compose()["services"][service]
        tmpfs = image.root.with_name(f"tmp-{len(self.started)}")
        tmpfs.mkdir()
        tmpfs.chmod(0o1777)
        environment = {**image.environment, **said["environment"], **self._addresses, "TMPDIR": str(tmpfs)}
        words = [*image.entrypoint, *(command or said.get("command") or image.command)]
        container = Container(image, environment, tmpfs.with_suffix(".log"))
        await container.begin(words)
        self.started.append(container)
        return container


class Container:
    """One process, and what Docker can do to it."""

    def __init__(self, image: Image, environment: dict[str, str], log: Path) -> None:
        self._image = image
        self._environment = environment
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def begin(self, words: list[str]) -> None:
        """Start it."""
        with self._log.open("wb") as log:
            self._process = await self._execute(words, log)

    async def healthy(self) -> bool:
        """What the health check of the image says: 0 or 1, for Docker reserves the rest."""
        code = await (await self._execute(self._image.health_check, DEVNULL)).wait()
        assert code in (0, 1)
        return code == 0

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        self._process.send_signal(number)

    async def ended(self, limit: float) -> int:
        """Its exit code."""
        assert self._process is not None
        async with asyncio.timeout(limit):
            return await self._process.wait()

    @property
    def output(self) -> str:
        """What it has written."""
        return self._log.read_text()

    async def reap(self) -> None:
        """End it in any case."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.kill()
            await self._process.wait()

    async def _execute(self, words: list[str], output: Any) -> asyncio.subprocess.Process:
        image = self._image
        return await asyncio.create_subprocess_exec(
            *words,
            cwd=image.place(""),
            env=self._environment,
            stdin=DEVNULL,
            stdout=output,
            stderr=output,
            **image.user,
        )


@pytest.fixture
async def containers(image: Image, empty: AsyncEngine, redis_url: str) -> AsyncIterator[Containers]:
    url = empty.url.render_as_string(hide_password=False)
    async with postgres_proxy(url) as (_, database), redis_proxy(redis_url) as (_, hints):
        addresses = {"EXARQ_DATABASE_URL": database, "EXARQ_REDIS_URL": hints}
        assert addresses.keys() <= compose()["services"]["worker"]["environment"].keys()
        found = Containers(image, addresses)
        yield found
        for container in found.started:
            await container.reap()


def test_the_environment_of_the_image_is_its_lock_and_exarq(image: Image) -> None:
    program = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    python = image.here("/opt/exarq/bin/python")
    done = run([python, "-I", "-c", program], env=image.environment, stdout=PIPE, text=True, check=True, cwd="/")
    installed = {re.sub(r"[_.]", "-", name).lower(): version for name, version in json.loads(done.stdout).items()}

    locked = {name.lower(): pin.split()[0].removeprefix("==") for name, pin in pins(IMAGE_LOCK).items()}

    assert installed.pop("exarq")
    assert installed.items() <= locked.items()
    assert {"uvloop", "arq", "sqlalchemy", "asyncpg"} <= installed.keys()
    assert not image.place("/opt/exarq/bin/pip").exists()  # and nothing to install more with


async def test_it_migrates_works_and_stops_under_load_in_a_root_that_cannot_be_written(
    image: Image, containers: Containers, empty: AsyncEngine, publisher: Publisher
) -> None:
    worker = compose()["services"]["worker"]
    before = image.files
    migrate = await containers.start("migrate")
    assert await migrate.ended(_TO_START) == 0, migrate.output
    await an_empty_ledger(empty)

    workers = [await containers.start("worker") for _ in range(worker["deploy"]["replicas"])]
    for one in workers:
        await until(one.healthy, "the worker is healthy", _TO_START)
    sessions = async_sessionmaker(empty, expire_on_commit=False, info=publisher.info)
    await place(sessions, count=20)
    await until(lambda: _are(empty, {"succeeded": 20}), "the workers work")

    slots = len(workers) * WorkerSettings().concurrency
    async with nothing_can_be_posted(empty):
        await place(sessions, count=slots + 100)
        loaded = {"succeeded": 20, "running": slots, "queued": 100}
        await until(lambda: _are(empty, loaded), "every slot is taken", _TO_START)
        for one in workers:
            one.send(signal.SIGTERM)
        asked = time.monotonic()
        await until(lambda: all("stopping" in one.output for one in workers), "they stop")
    limit = duration(worker["stop_grace_period"]).total_seconds()
    assert [await one.ended(limit) for one in workers] == [0, 0], [one.output[-2000:] for one in workers]
    assert time.monotonic() - asked < limit
    assert [await one.healthy() for one in workers] == [False, False]
    assert await states(empty) == {
        "succeeded": 20 + slots,
        "queued": 100,
    }  # what ran has ended, what waited still waits

    rest = await containers.start("worker", "run", "--burst")
    assert await rest.ended(_TO_START) == 0, rest.output
    assert await states(empty) == {"succeeded": slots + 120}
    assert await postings(empty) == {2: slots + 120}
    assert image.files == before


async def an_empty_ledger(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await ledger.create_tables(connection)
    async with AsyncSession(engine) as session, session.begin():
        session.add_all([ledger.Account(name=name) for name in ("bank", "rent")])


async def place(sessions: async_sessionmaker[AsyncSession], count: int) -> None:
    """Place orders, each with its job."""
    async with sessions.begin() as session:
        for _ in range(count):
            await ledger.place(session, "bank", "rent", 100)


@asynccontextmanager
async def nothing_can_be_posted(engine: AsyncEngine) -> AsyncIterator[None]:
    """What posts an order waits until the block ends."""
    async with engine.begin() as connection:
        await connection.execute(text("LOCK TABLE posting IN SHARE MODE"))
        yield


async def _are(engine: AsyncEngine, wanted: dict[str, int]) -> bool:
    return await states(engine) == wanted


async def states(engine: AsyncEngine) -> dict[str, int]:
    return await _counted(engine, "SELECT state::text, count(*) FROM exarq.job GROUP BY state")


async def postings(engine: AsyncEngine) -> dict[int, int]:
    """How many orders have how many postings."""
    each = "SELECT count(p.id) AS n FROM payment_order o LEFT JOIN posting p ON p.order_id = o.id GROUP BY o.id"
    return await _counted(engine, f"SELECT n, count(*) FROM ({each}) AS each GROUP BY n")


async def _counted(engine: AsyncEngine, query: str) -> dict[Any, int]:
    async with engine.connect() as connection:
        return {row[0]: row[1] for row in await connection.execute(text(query))}
