"""What docker-compose.yml would have the images do, done by processes: the same command lines, environment and user."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from subprocess import DEVNULL, PIPE, run
from typing import Any

import httpx
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from jobs import ledger
from tests.deploy.compose import compose, duration, stage_of
from tests.deploy.dockerfile import Stage
from tests.deploy.image import Image
from tests.deploy.test_dockerfile import IMAGE_LOCK, SERVICE_LOCK, pins
from tests.pooler import free_port
from tests.proxy import postgres_proxy, redis_proxy
from tests.support import until
from worker.flow.publish import Publisher
from worker.settings import WorkerSettings

pytestmark = pytest.mark.timeout(600)  # processes start slowly on a loaded machine

_TO_START = 120.0


class Containers:
    """Starts what the services of the compose file run, on the servers of the test."""

    def __init__(self, images: dict[str, Image], addresses: dict[str, str]) -> None:
        self._images = images
        self.addresses = addresses
        self._files = self._now()
        self.started: list[Container] = []

    async def start(self, service: str, *command: str) -> Container:
        """Start a service, with another command if one is given."""
        said, stage = compose()["services"][service], stage_of(service)
        image = self._images[stage.name]
        tmpfs = a_tmpfs(image.root.parent)
        environment = {**image.environment, **said["environment"], "TMPDIR": str(tmpfs)}
        environment |= {name: here for name, here in self.addresses.items() if name in environment}
        words = [*image.entrypoint, *(command or said.get("command") or image.command)]
        container = Container(image, stage, environment, tmpfs.with_suffix(".log"))
        await container.begin(words)
        self.started.append(container)
        return container

    @property
    def have_left_their_roots(self) -> bool:
        """Whether there is every file that was there before they were started, and no other."""
        return self._now() == self._files

    def _now(self) -> list[set[str]]:
        return [image.files for image in self._images.values()]


class Container:
    """One process, and what Docker can do to it."""

    def __init__(self, image: Image, stage: Stage, environment: dict[str, str], log: Path) -> None:
        self._image = image
        self._stage = stage
        self._environment = environment
        self._log = log
        self._process: asyncio.subprocess.Process | None = None

    async def begin(self, words: list[str]) -> None:
        """Start it."""
        with self._log.open("wb") as log:
            self._process = await self._execute(words, log)

    async def healthy(self) -> bool:
        """What the health check of the image says: 0 or 1, for Docker reserves the rest."""
        _, command = self._stage.health_check
        code = await (await self._execute(command, DEVNULL)).wait()
        assert code in (0, 1)
        return code == 0

    def stop(self) -> None:
        """Ask it to stop, as Docker does."""
        self.send(self._stage.stop_signal)

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


def a_tmpfs(folder: Path) -> Path:
    """What stands for a container's own /tmp."""
    tmpfs = Path(tempfile.mkdtemp(prefix="tmp-", dir=folder))
    tmpfs.chmod(0o1777)
    return tmpfs


@pytest.fixture
async def containers(images: dict[str, Image], empty: AsyncEngine, redis_url: str) -> AsyncIterator[Containers]:
    url = empty.url.render_as_string(hide_password=False)
    async with postgres_proxy(url) as (_, database), redis_proxy(redis_url) as (_, hints):
        addresses = {"EXARQ_DATABASE_URL": database, "EXARQ_REDIS_URL": hints}
        assert addresses.keys() <= compose()["services"]["worker"]["environment"].keys()
        addresses |= {"UVICORN_HOST": "127.0.0.1", "UVICORN_PORT": str(free_port())}
        found = Containers(images, addresses)
        yield found
        for container in found.started:
            await container.reap()


@pytest.fixture
async def client(containers: Containers) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the service."""
    address = "http://{UVICORN_HOST}:{UVICORN_PORT}".format(**containers.addresses)
    async with httpx.AsyncClient(base_url=address, timeout=120, trust_env=False) as client:
        yield client


@pytest.mark.parametrize(("stage", "locks"), [("worker", [IMAGE_LOCK]), ("service", [IMAGE_LOCK, SERVICE_LOCK])])
def test_the_environment_of_an_image_is_its_locks_and_exarq(
    images: dict[str, Image], stage: str, locks: list[Path]
) -> None:
    image = images[stage]
    program = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
    done = run(["python", "-I", "-c", program], env=image.environment, stdout=PIPE, text=True, check=True, cwd="/")
    installed = {re.sub(r"[_.]", "-", name).lower(): version for name, version in json.loads(done.stdout).items()}

    locked = {name.lower(): pin.split()[0].removeprefix("==") for lock in locks for name, pin in pins(lock).items()}

    assert installed.pop("exarq")
    assert installed.items() <= locked.items()
    assert {"uvloop", "arq", "sqlalchemy", "asyncpg"} <= installed.keys()
    assert ("fastapi" in installed) == ("uvicorn" in installed) == (stage == "service")
    assert not list(image.root.glob("opt/*/bin/pip*"))  # and nothing to install more with


async def test_it_migrates_works_and_stops_under_load_in_a_root_that_cannot_be_written(
    containers: Containers, empty: AsyncEngine, publisher: Publisher
) -> None:
    worker = compose()["services"]["worker"]
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
            one.stop()
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
    assert containers.have_left_their_roots


async def test_the_service_enqueues_for_a_worker_and_ends_its_requests_before_it_stops(
    containers: Containers, empty: AsyncEngine, client: httpx.AsyncClient
) -> None:
    limit = duration(compose()["services"]["service"]["stop_grace_period"]).total_seconds()
    migrate = await containers.start("migrate")
    assert await migrate.ended(_TO_START) == 0, migrate.output
    service, worker = [await containers.start(name) for name in ("service", "worker")]
    for one in (service, worker):
        await until(one.healthy, "it is healthy", _TO_START)

    worker.send(signal.SIGSTOP)
    placed = await client.post("/orders", json={"item": "tea", "quantity": 3})
    assert placed.status_code == 201
    asked = asyncio.create_task(client.get(f"/jobs/{placed.json()['job_id']}/result"))
    await until(lambda: somebody_waits(empty), "the request waits for the job")
    service.stop()
    await until(lambda: "Waiting for connections to close" in service.output, "the service stops")
    worker.send(signal.SIGCONT)

    assert (await asked).json() == {"result": "3 x tea"}
    assert await service.ended(limit) == 0, service.output
    assert not await service.healthy()
    assert await states(empty) == {"succeeded": 1}
    assert await _counted(empty, "SELECT confirmed, count(*) FROM orders GROUP BY confirmed") == {True: 1}
    assert containers.have_left_their_roots


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


async def somebody_waits(engine: AsyncEngine) -> bool:
    """Whether a connection's last statement was the look at a job that is waited for."""
    looked = (
        "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'SELECT%JOIN exarq.attempt%'"
    )
    async with engine.connect() as connection:
        return (await connection.execute(text(f"{looked} AND pid <> pg_backend_pid()"))).first() is not None


async def states(engine: AsyncEngine) -> dict[str, int]:
    return await _counted(engine, "SELECT state::text, count(*) FROM exarq.job GROUP BY state")


async def postings(engine: AsyncEngine) -> dict[int, int]:
    """How many orders have how many postings."""
    each = "SELECT count(p.id) AS n FROM payment_order o LEFT JOIN posting p ON p.order_id = o.id GROUP BY o.id"
    return await _counted(engine, f"SELECT n, count(*) FROM ({each}) AS each GROUP BY n")


async def _counted(engine: AsyncEngine, query: str) -> dict[Any, int]:
    async with engine.connect() as connection:
        return {row[0]: row[1] for row in await connection.execute(text(query))}
