"""Each short example, run as a program of its own beside a worker."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from uuid import UUID, uuid4

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from tests import warm
from tests.cli.conftest import Command
from tests.docs.helpers import EXAMPLES, environment, started
from tests.support import state, until

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine


@pytest.fixture
def shell(database_url: str, redis_url: str) -> dict[str, str]:
    return {**environment(database_url, redis_url, "orders, sync_service"), "PYTHONPATH": str(EXAMPLES)}


async def run(shell: dict[str, str], *command: str) -> str:
    done = await asyncio.to_thread(
        subprocess.run, command, cwd=EXAMPLES, env=shell, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return str(done.stdout.strip())


async def python(shell: dict[str, str], *script: str) -> str:
    done = await asyncio.to_thread(Command(EXAMPLES, shell).forked, warm.script, *script)
    assert done.code == 0, done.err
    return done.out.strip()


async def an_order(engine: AsyncEngine) -> int:
    """One that waits to be confirmed, in the table of the FastAPI service."""
    table = (
        "CREATE TABLE IF NOT EXISTS orders (id serial, item text, quantity integer, confirmed boolean DEFAULT false)"
    )
    async with engine.begin() as connection:
        await connection.execute(text(table))
        order = text("INSERT INTO orders (item, quantity) VALUES ('tea', 3) RETURNING id")
        return int((await connection.execute(order)).scalar_one())


async def is_confirmed(engine: AsyncEngine, order_id: int) -> bool:
    async with engine.connect() as connection:
        query = text("SELECT confirmed FROM orders WHERE id = :id")
        return bool((await connection.execute(query, {"id": order_id})).scalar_one())


async def test_each_service_has_its_job_run(
    engine: AsyncEngine, shell: dict[str, str], tmp_path: Path, database_url: str
) -> None:
    by_name, without, by_sql = [await an_order(engine) for _ in range(3)]
    async with started(["exarq", "run"], tmp_path / "worker.log", shell, ready="worker started"):
        parcel = await python(shell, "sync_service.py")
        named = await python(shell, "by_name.py", f"{by_name}")
        unaware = await python(shell, "without_sqlalchemy.py", f"{without}")
        await enqueued_by_sql(engine, shell, database_url, by_sql)

        async def all_have_run() -> bool:
            done = [await is_confirmed(engine, order) for order in (by_name, without, by_sql)]
            return all(done) and await state(engine, UUID(parcel)) == "succeeded"

        await until(all_have_run, "all jobs have run")

    assert (named, unaware) == ("3 x tea", "3 x tea")
    async with engine.connect() as connection:
        assert (await connection.execute(text("SELECT sent FROM parcel"))).scalars().all() == [True]


async def enqueued_by_sql(engine: AsyncEngine, shell: dict[str, str], database_url: str, order_id: int) -> None:
    """By psql where there is one, under a role that may do nothing else."""
    role = f"exarq_test_billing_{uuid4().hex[:12]}"
    async with engine.begin() as connection:
        await connection.execute(text(f"CREATE ROLE {role} LOGIN PASSWORD 'p' IN ROLE exarq_enqueue"))
    url = make_url(database_url).set(drivername="postgresql", username=role, password="p")
    address = url.render_as_string(hide_password=False)
    if shutil.which("psql"):
        script = ("-v", "ON_ERROR_STOP=1", "-v", f"order_id={order_id}", "-f", "any_language.sql")
        await run(shell, "psql", "-X", address, *script)
    else:
        service = await asyncpg.connect(address)
        await service.execute((EXAMPLES / "any_language.sql").read_text().replace(":order_id", str(order_id)))
        await service.close()
    async with engine.begin() as connection:
        await connection.execute(text(f"DROP ROLE {role}"))


def test_the_short_examples_are_short() -> None:
    programs = [path for path in EXAMPLES.iterdir() if path.is_file()]

    lengths = {path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in programs}

    assert {"sync_service.py", "by_name.py", "without_sqlalchemy.py", "any_language.sql"} == set(lengths)
    assert max(lengths.values()) < 30, lengths


@pytest.mark.parametrize("command", ["python by_name.py 1", "python without_sqlalchemy.py 1", "python sync_service.py"])
def test_an_example_looks_for_the_servers_of_exarq_dev(tmp_path: Path, command: str) -> None:
    (tmp_path / "settings.toml").write_text('[database]\nurl = "embedded"\n[redis]\nurl = "embedded"\n')
    shell = {"EXARQ_SETTINGS": str(tmp_path / "settings.toml"), "PATH": os.environ["PATH"]}

    done = Command(EXAMPLES, shell).forked(warm.script, *command.split()[1:])

    assert "no embedded servers are running here; start them with" in done.err
