"""The inventory: real distributions, files that are there and files that are not."""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from jobs.inventory import (
    Catalogued,
    Contents,
    DistributedFile,
    Distribution,
    InventoryTotal,
    catalogue,
    largest,
    nightly,
    plan,
    report,
    summarise,
)
from tests.life import jobs_for_tests
from tests.support import a_work
from worker import Client, Fail, Settings, enqueue_many
from worker.core.registry import Registry
from worker.testing import assert_enqueued, assert_not_enqueued, drain, frozen_clock, run_inline
from worker.upkeep.schedule import Ticker

FILES = select(DistributedFile.path, DistributedFile.size, DistributedFile.sha256).order_by(DistributedFile.path)
TOTALS = select(InventoryTotal.files, InventoryTotal.missing, InventoryTotal.bytes)


@pytest.fixture
def session(exarq_session: AsyncSession) -> AsyncSession:
    return exarq_session


def installed(folder: Path, name: str, files: dict[str, bytes]) -> str:
    """What an installer leaves of a distribution; returns the path to look under."""
    information = folder / f"{name}-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (information / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file, content in files.items():
        (folder / file).write_bytes(content)
    return str(folder)


async def rows(session: AsyncSession, query: Any) -> list[tuple[Any, ...]]:
    return [tuple(row) for row in await session.execute(query)]


async def test_every_file_is_stored_with_its_size_and_hash_and_the_totals_follow(
    session: AsyncSession, tmp_path: Path
) -> None:
    path = installed(tmp_path, "tiny", {"tiny.py": b"pass\n", "empty.py": b""})

    (handle,) = await enqueue_many(session, [catalogue.call(name, path) for name in plan(path)])
    ended = await drain(session)

    assert [one.name for one in ended] == ["inventory.catalogue", "inventory.summarise"]
    assert await rows(session, select(Distribution.job_id, Distribution.name, Distribution.version)) == [
        (handle.id, "tiny", "1.0")
    ]
    assert await rows(session, FILES) == [
        ("empty.py", 0, hashlib.sha256(b"").hexdigest()),
        ("tiny.py", 5, hashlib.sha256(b"pass\n").hexdigest()),
    ]
    assert await rows(session, TOTALS) == [(2, 0, 5)]


async def test_a_file_that_vanished_is_noted_and_the_others_are_stored(session: AsyncSession, tmp_path: Path) -> None:
    path = installed(tmp_path, "tiny", {"gone.py": b"gone", "here.py": b"here"})
    (tmp_path / "gone.py").unlink()

    found = await run_inline(catalogue, session, "tiny", path)
    await assert_enqueued(session, summarise, distribution_id=found.distribution_id, count=1)
    await drain(session)

    assert found == Catalogued(found.distribution_id, files=2, missing=1)
    assert [(name, size) for name, size, _ in await rows(session, FILES)] == [("gone.py", None), ("here.py", 4)]
    assert await rows(session, TOTALS) == [(2, 1, 4)]


async def test_a_night_has_every_distribution_catalogued(session: AsyncSession, tmp_path: Path) -> None:
    path = installed(tmp_path, "small", {"small.py": b"1"})
    installed(tmp_path, "tiny", {"tiny.py": b"22"})

    count = await run_inline(nightly, session, path)
    await drain(session)

    assert count == 2
    assert sorted(await rows(session, select(Distribution.name))) == [("small",), ("tiny",)]
    assert await rows(session, TOTALS) == [(1, 0, 1), (1, 0, 2)]


async def test_the_clock_enqueues_it_each_night(engine: AsyncEngine, settings: Settings) -> None:
    registry = Registry()
    registry.register(nightly)

    with frozen_clock(datetime(2027, 1, 1, 12, tzinfo=UTC)) as clock:
        async with a_work(settings, registry) as work:
            ticker = Ticker(work)
            for _ in range(24):
                await ticker.tick()
                clock.tick(3600)

    found = await jobs_for_tests.rows(engine, "name, first_due_at")
    assert [tuple(one) for one in found] == [("inventory.nightly", datetime(2027, 1, 2, 2, tzinfo=UTC))]


async def test_a_second_run_stores_a_catalogue_of_its_own(session: AsyncSession, tmp_path: Path) -> None:
    path = installed(tmp_path, "tiny", {"tiny.py": b"pass\n"})

    handles = [await catalogue.enqueue(session, "tiny", path)]
    await drain(session)
    handles += [await catalogue.enqueue(session, "tiny", path)]
    await drain(session)

    per_job = select(Distribution.job_id, func.count()).group_by(Distribution.job_id)
    assert sorted(await rows(session, per_job)) == sorted((handle.id, 1) for handle in handles)
    assert len(await rows(session, TOTALS)) == 2


async def test_attributes_are_loaded_where_they_are_awaited_and_collections_all_at_once(
    session: AsyncSession, tmp_path: Path
) -> None:
    path = installed(tmp_path, "small", {"b.py": b"1", "c.py": b"22", "a.py": b"1"})
    installed(tmp_path, "tiny", {"tiny.py": b"pass\n"})
    small = await run_inline(catalogue, session, "small", path)
    await run_inline(catalogue, session, "tiny", path)

    assert await run_inline(largest, session, small.distribution_id, most=2) == ["c.py", "a.py"]
    assert await run_inline(report, session, ["small", "tiny", "unknown"]) == {
        "small": Contents("1.0", files=3, bytes=4),
        "tiny": Contents("1.0", files=1, bytes=5),
    }


async def test_a_distribution_that_is_not_installed_fails_at_once(session: AsyncSession, tmp_path: Path) -> None:
    await catalogue.enqueue(session, "nothing", str(tmp_path))

    (ended,) = await drain(session, raises=False)

    assert ended.outcome == "failed"
    assert isinstance(ended.error, Fail)
    assert "no distribution 'nothing' is installed under" in str(ended.error)
    assert await rows(session, select(Distribution.id)) == []


async def test_the_plan_of_a_transaction_that_rolls_back_leaves_nothing(exarq_client: Client, tmp_path: Path) -> None:
    path = installed(tmp_path, "tiny", {"tiny.py": b"pass\n"})

    async with exarq_client.sessions() as session:
        await enqueue_many(session, [catalogue.call("tiny", path)])
        await session.rollback()

    assert await drain(exarq_client) == []
    await assert_not_enqueued(exarq_client)


async def test_the_plan_covers_this_environment_and_a_job_stores_all_files_of_its_distribution(
    session: AsyncSession,
) -> None:
    names = {found.metadata["Name"].lower() for found in metadata.distributions()}

    await run_inline(catalogue, session, "SQLAlchemy")

    assert {name.lower() for name in plan()} == names
    stored = await rows(session, select(DistributedFile.path).order_by(DistributedFile.path))
    assert sorted(path for (path,) in stored) == sorted(map(str, metadata.files("sqlalchemy") or ()))
