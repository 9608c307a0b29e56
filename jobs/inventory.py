"""Catalogue the installed distributions: every file of each, hashed, and the totals."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass
from importlib.metadata import Distribution as Installed
from importlib.metadata import DistributionFinder, distributions
from pathlib import Path
from uuid import UUID

from sqlalchemy import BigInteger, ForeignKey, func, insert, literal, select
from sqlalchemy.ext.asyncio import AsyncAttrs, AsyncConnection, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship, selectinload

from worker import Fail, JobContext, enqueue_many, job


class Base(AsyncAttrs, DeclarativeBase):
    """The base of the inventory's tables."""


class Distribution(Base):
    """One distribution as one job found it; `job_id` is not unique, so that an effect that came twice would show."""

    __tablename__ = "distribution"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    job_id: Mapped[UUID] = mapped_column(index=True)
    name: Mapped[str]
    version: Mapped[str]
    location: Mapped[str]

    files: Mapped[list[DistributedFile]] = relationship(back_populates="distribution")


class DistributedFile(Base):
    """One file that a distribution says it has; size and hash are NULL where it has vanished."""

    __tablename__ = "distributed_file"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    distribution_id: Mapped[int] = mapped_column(ForeignKey(Distribution.id), index=True)
    path: Mapped[str]
    size: Mapped[int | None] = mapped_column(BigInteger)
    sha256: Mapped[str | None]

    distribution: Mapped[Distribution] = relationship(back_populates="files")


class InventoryTotal(Base):
    """What the files of one distribution add up to."""

    __tablename__ = "inventory_total"

    id: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    job_id: Mapped[UUID]
    distribution_id: Mapped[int] = mapped_column(ForeignKey(Distribution.id), index=True)
    files: Mapped[int]
    missing: Mapped[int]
    bytes: Mapped[int] = mapped_column(BigInteger)


async def create_tables(connection: AsyncConnection) -> None:
    """Create the tables that are not there yet; a real project has migrations for this."""
    await connection.run_sync(Base.metadata.create_all)


@dataclass(frozen=True, slots=True)
class Catalogued:
    """What one job has stored."""

    distribution_id: int
    files: int
    missing: int


@dataclass(frozen=True, slots=True)
class Contents:
    """What a distribution holds."""

    version: str
    files: int
    bytes: int


def plan(path: str | None = None) -> list[str]:
    """The names of all distributions installed here, or under `path`."""
    found = distributions() if path is None else distributions(path=[path])
    names = {_normalized(name): name for installed in found if (name := installed.metadata["Name"])}
    return sorted(names.values(), key=_normalized)


@job(cron="0 3 * * *", timezone="Europe/Berlin", overlap="skip")
async def nightly(session: AsyncSession, path: str | None = None) -> int:
    """Have every distribution catalogued, each by a job of its own; returns how many there are."""
    names = await asyncio.to_thread(plan, path)
    await enqueue_many(session, [catalogue.call(name, path) for name in names])
    return len(names)


@job
async def catalogue(ctx: JobContext, name: str, path: str | None = None) -> Catalogued:
    """Store one distribution with all its files, and have the totals written by a job of the same transaction."""
    found = await asyncio.to_thread(_read, name, path)  # no connection is held while files are hashed

    found.job_id = ctx.job_id
    ctx.session.add(found)
    await ctx.session.flush()
    await summarise.enqueue(ctx.session, found.id)

    missing = sum(file.sha256 is None for file in found.files)
    return Catalogued(found.id, len(found.files), missing)


@job
async def summarise(ctx: JobContext, distribution_id: int) -> None:
    """Write the totals of one distribution."""
    file = DistributedFile
    totals = select(
        literal(ctx.job_id),
        literal(distribution_id),
        func.count(),
        func.count().filter(file.sha256.is_(None)),
        func.coalesce(func.sum(file.size), 0),
    ).where(file.distribution_id == distribution_id)
    columns = ["job_id", "distribution_id", "files", "missing", "bytes"]
    await ctx.session.execute(insert(InventoryTotal).from_select(columns, totals))


@job(read_only=True)
async def largest(session: AsyncSession, distribution_id: int, most: int = 10) -> list[str]:
    """The paths of the largest files of one distribution."""
    distribution = await session.get_one(Distribution, distribution_id)
    files = await distribution.awaitable_attrs.files  # a plain `.files` would be I/O that nobody awaits
    by_size = sorted(files, key=lambda file: (-(file.size or 0), file.path))
    return [file.path for file in by_size[:most]]


@job(read_only=True)
async def report(session: AsyncSession, names: list[str]) -> dict[str, Contents]:
    """What each of these distributions holds, as last catalogued: two statements, however many they are."""
    last = select(func.max(Distribution.id)).where(Distribution.name.in_(names)).group_by(Distribution.name)
    query = select(Distribution).where(Distribution.id.in_(last)).options(selectinload(Distribution.files))
    return {
        found.name: Contents(found.version, len(found.files), sum(file.size or 0 for file in found.files))
        for found in await session.scalars(query)
    }


def _read(name: str, path: str | None) -> Distribution:
    installed = _find(name, path)
    return Distribution(
        name=installed.metadata["Name"],
        version=installed.version,
        location=str(installed.locate_file("")),
        files=[_hashed(str(file), Path(str(file.locate()))) for file in installed.files or ()],
    )


def _find(name: str, path: str | None) -> Installed:
    context = DistributionFinder.Context(name=name) if path is None else _context(name, path)
    for installed in Installed.discover(context=context):
        return installed
    raise Fail(f"no distribution {name!r} is installed {'here' if path is None else f'under {path}'}")


def _context(name: str, path: str) -> DistributionFinder.Context:
    return DistributionFinder.Context(name=name, path=[path])


def _hashed(name: str, file: Path) -> DistributedFile:
    try:
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256")
            return DistributedFile(path=name, size=content.tell(), sha256=digest.hexdigest())
    except OSError:  # uninstalled since, or never unpacked: noted, and the rest goes on
        return DistributedFile(path=name)


def _normalized(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")
