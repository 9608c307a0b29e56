"""The tables, in a schema of their own."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any, ClassVar
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ColumnElement,
    DateTime,
    Index,
    MetaData,
    SmallInteger,
    Text,
    literal_column,
    text,
)
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncAttrs
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

from worker.core.states import FINAL, JobState

SCHEMA = "exarq"


class Base(AsyncAttrs, DeclarativeBase):
    """The base of Exarq's own tables."""

    metadata = MetaData(
        schema=SCHEMA,
        naming_convention={
            "pk": "%(table_name)s_pkey",
            "ck": "%(table_name)s_%(constraint_name)s_check",
        },
    )
    type_annotation_map: ClassVar = {str: Text, datetime: DateTime(timezone=True)}


def _one_of(column: str, values: list[str]) -> str:
    return f"{column} IN ({', '.join(repr(str(value)) for value in values)})"


def constant(state: JobState) -> ColumnElement[str]:
    """The state as a constant of the statement's text: a plan made for any parameters uses no partial index."""
    return literal_column(f"'{state}'", Text)


def stands_in(state: JobState) -> ColumnElement[bool]:
    """Whether a job that is named by its id is in this state.

    Written so that no partial index of the state can serve it: with statistics of another hour the planner believes
    that index empty, takes it instead of the primary key, and walks every job in it.
    """
    return Job.state.is_not_distinct_from(constant(state))


_WAITING = f"state = '{JobState.QUEUED}'"
_RUNNING = f"state = '{JobState.RUNNING}'"
_FINAL = _one_of("state", sorted(FINAL))
_NOT_STARTED = f"{_WAITING} AND attempt = 0"
_NOT_DONE = f"unique_for = 'until_done' AND ({_WAITING} OR {_RUNNING})"
UNIQUE_WHILE = f"unique_key IS NOT NULL AND (unique_until IS NOT NULL OR {_NOT_STARTED} OR {_NOT_DONE})"
"""While this holds of a job, no other of its name may have its key."""

ADOPTED = "arq_id IS NOT NULL"
"""This holds of a job that plain ARQ code enqueued; no other has both its ARQ id and its enqueue time."""


class Job(Base):
    """One row of intended work, and what became of it.

    The token and the worker of the last claim stay on the row: together with the state they are the fence, and
    they answer the worker whose COMMIT was interrupted.
    """

    __tablename__ = "job"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    name: Mapped[str]
    queue: Mapped[str]
    args: Mapped[dict[str, Any]] = mapped_column(JSONB)
    state: Mapped[str] = mapped_column(server_default=JobState.QUEUED)
    enqueued_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    first_due_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    run_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    attempt: Mapped[int] = mapped_column(server_default="0")
    failures: Mapped[int] = mapped_column(server_default="0")
    crashes: Mapped[int] = mapped_column(SmallInteger, server_default="0")
    contended: Mapped[int] = mapped_column(server_default="0")
    cancel_requested: Mapped[bool] = mapped_column(server_default=text("false"))
    priority: Mapped[int] = mapped_column(SmallInteger, server_default="5")
    expires_at: Mapped[datetime | None]
    unique_key: Mapped[str | None]
    unique_for: Mapped[str | None]
    unique_until: Mapped[datetime | None]
    token: Mapped[UUID | None]
    worker_id: Mapped[UUID | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSONB(none_as_null=True))
    result: Mapped[Any | None] = mapped_column(JSONB(none_as_null=True))
    error: Mapped[str | None]
    # Of a job that plain ARQ code enqueued: its id there, and when that was, in milliseconds by that client's clock.
    arq_id: Mapped[str | None]
    arq_enqueued: Mapped[int | None] = mapped_column(BigInteger)

    # No foreign key: its KEY SHARE locks would hide a row from the rescue.
    attempts: Mapped[list[Attempt]] = relationship(
        primaryjoin="Job.id == foreign(Attempt.job_id)", order_by="Attempt.number", viewonly=True
    )

    __table_args__ = (
        CheckConstraint(_one_of("state", sorted(JobState)), name="state"),
        CheckConstraint("priority BETWEEN 0 AND 9", name="priority"),
        Index("job_waiting", "run_at", "id", postgresql_where=text(_WAITING)),
        Index("job_running", "worker_id", postgresql_where=text(_RUNNING)),
        Index("job_final", "state", "finished_at", postgresql_where=text(_FINAL)),
        Index("job_unique", "name", "unique_key", unique=True, postgresql_where=text(UNIQUE_WHILE)),
        Index("job_adopted", "arq_id", "arq_enqueued", unique=True, postgresql_where=text(ADOPTED)),
        # Every job is updated twice and then left alone: vacuum by numbers of rows, not by a share of history.
        {
            "postgresql_with": {
                "fillfactor": 85,
                "autovacuum_vacuum_scale_factor": 0,
                "autovacuum_vacuum_threshold": 5000,
                "autovacuum_analyze_scale_factor": 0,
                "autovacuum_analyze_threshold": 10000,
                "autovacuum_vacuum_insert_scale_factor": 0,
                "autovacuum_vacuum_insert_threshold": 50000,
            }
        },
    )


class Attempt(Base):
    """One attempt that did not succeed, or a success with something to tell: when, where and why."""

    __tablename__ = "attempt"

    job_id: Mapped[UUID] = mapped_column(primary_key=True)
    token: Mapped[UUID] = mapped_column(primary_key=True)
    number: Mapped[int]
    worker_id: Mapped[UUID | None]
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    ending: Mapped[str]
    error: Mapped[str | None]
    traceback: Mapped[str | None]
    blocked: Mapped[timedelta | None]
    lazy_loads: Mapped[dict[str, int] | None] = mapped_column(JSONB(none_as_null=True))


class Worker(Base):
    """One worker process that is alive, or was until somebody notices."""

    __tablename__ = "worker"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    host: Mapped[str]
    pid: Mapped[int]
    version: Mapped[str]
    queues: Mapped[list[str]] = mapped_column(ARRAY(Text))
    concurrency: Mapped[int]
    started_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    beat: Mapped[int] = mapped_column(BigInteger, server_default="0")
    beat_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    stopping_at: Mapped[datetime | None]

    __table_args__ = (
        {
            "postgresql_with": {
                "fillfactor": 50,
                "autovacuum_vacuum_scale_factor": 0,
                "autovacuum_vacuum_threshold": 500,
            }
        },
    )


class Upkeep(Base):
    """When a step of upkeep is next due, and how far it came: all workers share the steps, none leads."""

    __tablename__ = "upkeep"

    step: Mapped[str] = mapped_column(primary_key=True)
    due_at: Mapped[datetime] = mapped_column(server_default=text("clock_timestamp()"))
    after_run_at: Mapped[datetime | None]
    after_id: Mapped[UUID | None]

    __table_args__ = (
        {
            "postgresql_with": {
                "fillfactor": 50,
                "autovacuum_vacuum_scale_factor": 0,
                "autovacuum_vacuum_threshold": 500,
            }
        },
    )


class ScheduleRow(Base):
    """When jobs are enqueued without anybody who does it, and the next tick that has had none."""

    __tablename__ = "schedule"

    name: Mapped[str] = mapped_column(primary_key=True)
    job: Mapped[str]
    args: Mapped[dict[str, Any]] = mapped_column(JSONB, server_default="{}")
    queue: Mapped[str | None]
    priority: Mapped[int | None] = mapped_column(SmallInteger)
    declared: Mapped[bool]
    cron: Mapped[str | None]
    timezone: Mapped[str] = mapped_column(server_default="UTC")
    every: Mapped[timedelta | None]
    catch_up: Mapped[str] = mapped_column(server_default="last")
    overlap: Mapped[str] = mapped_column(server_default="allow")
    since: Mapped[datetime]
    next_at: Mapped[datetime]
    paused_at: Mapped[datetime | None]
    last_at: Mapped[datetime | None]
    last_job_id: Mapped[UUID | None]

    __table_args__ = (
        CheckConstraint("(cron IS NULL) <> (every IS NULL)", name="rhythm"),
        Index("schedule_next", "next_at", postgresql_where=text("paused_at IS NULL")),
        {
            "postgresql_with": {
                "fillfactor": 50,
                "autovacuum_vacuum_scale_factor": 0,
                "autovacuum_vacuum_threshold": 500,
            }
        },
    )


class Installation(Base):
    """One row: the id that marks this database's hints in a Redis that others may use too."""

    __tablename__ = "installation"

    id: Mapped[UUID] = mapped_column(primary_key=True)
