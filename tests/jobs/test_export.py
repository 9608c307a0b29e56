"""The export: a million rows in little memory, and a file that is there as a whole or not at all."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from jobs import inventory
from jobs.export import export_csv
from tests.support import row, run_all
from worker import Settings
from worker.core.registry import Registry

Sessions = async_sessionmaker[AsyncSession]

MB = 1024 * 1024


@pytest.fixture
async def registry(engine: AsyncEngine) -> Registry:
    registry = Registry()
    registry.register(export_csv)
    async with engine.begin() as connection:
        await inventory.create_tables(connection)
    return registry


async def catalogued(engine: AsyncEngine, path: str) -> None:
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "WITH found AS (INSERT INTO distribution (job_id, name, version, location)"
                " VALUES (gen_random_uuid(), 'tiny', '1', '/') RETURNING id)"
                " INSERT INTO distributed_file (distribution_id, path, size) SELECT id, :path, 5 FROM found"
            ),
            {"path": path},
        )


async def enqueued(sessions: Sessions, path: Path) -> object:
    async with sessions.begin() as session:
        return (await export_csv.enqueue(session, str(path))).id


def in_folder(folder: Path) -> list[Path]:
    return list(folder.iterdir())


async def test_an_export_that_runs_again_takes_the_place_of_the_first(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry, tmp_path: Path
) -> None:
    out = tmp_path / "files.csv"
    await catalogued(engine, "one, or two")
    for rows in (1, 2):
        job_id = await enqueued(sessions, out)
        await run_all(settings, registry)
        assert (await row(engine, job_id)).result == rows  # type: ignore[arg-type]
        await catalogued(engine, "another")

    assert out.read_text().splitlines() == [
        "id,distribution_id,path,size,sha256",
        '1,1,"one, or two",5,',
        "2,2,another,5,",
    ]
    assert in_folder(tmp_path) == [out]


async def test_an_export_that_fails_leaves_the_file_as_it_was(
    engine: AsyncEngine,
    sessions: Sessions,
    settings: Settings,
    registry: Registry,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "files.csv"
    out.write_text("as it was")
    await catalogued(engine, "one")

    def full(_file: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    settings = settings.model_copy(update={"jobs": settings.jobs.model_copy(update={"max_attempts": 1})})
    job_id = await enqueued(sessions, out)
    await run_all(settings, registry)

    assert "no space left" in (await row(engine, job_id)).error  # type: ignore[arg-type]
    assert out.read_text() == "as it was"
    assert in_folder(tmp_path) == [out]


@pytest.mark.timeout(900)  # a loaded machine needs minutes for so many
async def test_a_million_rows_take_little_memory_where_a_fifth_of_them_at_once_takes_much(
    settings: Settings, tmp_path: Path
) -> None:
    streamed = await memory_of(settings, "export.export_csv", tmp_path / "streamed.csv", 1_000_000)
    at_once = await memory_of(settings, "all_at_once", tmp_path / "at_once.csv", 200_000)

    assert streamed <= 20 * MB
    assert at_once >= 3 * 20 * MB
    with (tmp_path / "streamed.csv").open() as file:
        assert sum(1 for _ in file) == 1_000_001


async def memory_of(settings: Settings, name: str, path: Path, rows: int) -> int:
    addresses = {"EXARQ_DATABASE_URL": str(settings.database.url), "EXARQ_REDIS_URL": str(settings.redis.url)}
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.jobs.memory", name, str(path), str(rows)),
        env={**os.environ, **addresses},
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return int(out)
