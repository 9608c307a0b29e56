"""The inventory: real distributions, files that are there and files that are not."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from jobs import inventory
from jobs.inventory import DistributedFile, Distribution, InventoryTotal, catalogue, plan
from tests.support import attempts, run_all, state
from worker import Handle, Settings, enqueue_many
from worker.core.registry import Registry

Sessions = async_sessionmaker[AsyncSession]


@pytest.fixture
async def registry(engine: AsyncEngine) -> Registry:
    registry = Registry()
    registry.register(inventory.catalogue)
    registry.register(inventory.summarise)
    async with engine.begin() as connection:
        await inventory.create_tables(connection)
    return registry


def installed(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """What an installer leaves of a distribution."""
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file, content in files.items():
        (folder / file).write_bytes(content)


async def enqueued(sessions: Sessions, names: Sequence[str], path: Path | None = None) -> list[Handle]:
    async with sessions.begin() as session:
        return await enqueue_many(session, [catalogue.call(name, str(path) if path else None) for name in names])


async def rows(engine: AsyncEngine, query: Any) -> list[tuple[Any, ...]]:
    async with engine.connect() as connection:
        return [tuple(row) for row in await connection.execute(query)]


async def test_every_file_is_stored_with_its_size_and_hash_and_the_totals_follow(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry, tmp_path: Path
) -> None:
    installed(tmp_path, "tiny", {"tiny.py": b"pass\n", "empty.py": b""})

    (handle,) = await enqueued(sessions, plan(str(tmp_path)), tmp_path)
    await run_all(settings, registry)

    assert await state(engine, handle.id) == "succeeded"
    assert await rows(engine, select(Distribution.job_id, Distribution.name, Distribution.version)) == [
        (handle.id, "tiny", "1.0")
    ]
    file = DistributedFile
    assert await rows(engine, select(file.path, file.size, file.sha256).order_by(file.path)) == [
        ("empty.py", 0, hashlib.sha256(b"").hexdigest()),
        ("tiny.py", 5, hashlib.sha256(b"pass\n").hexdigest()),
    ]
    total = InventoryTotal
    assert await rows(engine, select(total.files, total.missing, total.bytes)) == [(2, 0, 5)]


async def test_a_file_that_vanished_is_noted_and_the_others_are_stored(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry, tmp_path: Path
) -> None:
    installed(tmp_path, "tiny", {"gone.py": b"gone", "here.py": b"here"})
    (tmp_path / "gone.py").unlink()

    (handle,) = await enqueued(sessions, ["tiny"], tmp_path)
    await run_all(settings, registry)

    assert await state(engine, handle.id) == "succeeded"
    file, total = DistributedFile, InventoryTotal
    assert await rows(engine, select(file.path, file.size).order_by(file.path)) == [("gone.py", None), ("here.py", 4)]
    assert await rows(engine, select(total.files, total.missing, total.bytes)) == [(2, 1, 4)]


async def test_a_second_run_stores_a_catalogue_of_its_own(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry, tmp_path: Path
) -> None:
    installed(tmp_path, "tiny", {"tiny.py": b"pass\n"})

    handles = await enqueued(sessions, ["tiny"], tmp_path)
    await run_all(settings, registry)
    handles += await enqueued(sessions, ["tiny"], tmp_path)
    await run_all(settings, registry)

    per_job = select(Distribution.job_id, func.count()).group_by(Distribution.job_id)
    assert sorted(await rows(engine, per_job)) == sorted((handle.id, 1) for handle in handles)
    assert await rows(engine, select(func.count()).select_from(InventoryTotal)) == [(2,)]


async def test_a_distribution_that_is_not_installed_fails_at_once(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry, tmp_path: Path
) -> None:
    (handle,) = await enqueued(sessions, ["nothing"], tmp_path)

    await run_all(settings, registry)

    assert await state(engine, handle.id) == "failed"
    (attempt,) = await attempts(engine, handle.id)
    assert "no distribution 'nothing' is installed under" in attempt.error
    assert await rows(engine, select(func.count()).select_from(Distribution)) == [(0,)]


async def test_the_plan_of_a_transaction_that_rolls_back_leaves_nothing(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry, tmp_path: Path
) -> None:
    installed(tmp_path, "tiny", {"tiny.py": b"pass\n"})

    async with sessions() as session:
        (handle,) = await enqueue_many(session, [catalogue.call("tiny", str(tmp_path))])
        await session.rollback()
    await run_all(settings, registry)

    assert await state(engine, handle.id) is None
    assert await rows(engine, select(func.count()).select_from(Distribution)) == [(0,)]


async def test_the_plan_covers_this_environment_and_a_job_stores_all_files_of_its_distribution(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry
) -> None:
    names = {found.metadata["Name"].lower() for found in metadata.distributions()}

    await enqueued(sessions, ["SQLAlchemy"])
    await run_all(settings, registry)

    assert {name.lower() for name in plan()} == names
    stored = await rows(engine, select(DistributedFile.path).order_by(DistributedFile.path))
    assert sorted(path for (path,) in stored) == sorted(map(str, metadata.files("sqlalchemy") or ()))
