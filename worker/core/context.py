"""What a job receives that asks for more than a session."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from worker.core.progress import Progress, as_progress


class JobContext:
    """One attempt as its function sees it: the session, who it is, and the worker's resources as in ARQ.

    Args:
        job_id: the job's id.
        name: the name of its definition.
        attempt: the number of this run, from 1.
        enqueued_at: when the job was enqueued.
        open_session: makes the attempt's session; called at the first use of `session`, never twice.
        resources: what `ctx[…]` reads: "redis", "engine", "sessions" and what start-up hooks put there.
        report: stores how far the job is, soon; without one, nobody is told.

    """

    __slots__ = ("_attempt", "_enqueued_at", "_job_id", "_name", "_open_session", "_report", "_resources", "_session")

    def __init__(
        self,
        *,
        job_id: UUID,
        name: str,
        attempt: int,
        enqueued_at: datetime,
        open_session: Callable[[], AsyncSession],
        resources: Mapping[str, Any],
        report: Callable[[Progress], None] | None = None,
    ) -> None:
        self._job_id = job_id
        self._name = name
        self._attempt = attempt
        self._enqueued_at = enqueued_at
        self._open_session = open_session
        self._resources = resources
        self._report = report
        self._session: AsyncSession | None = None

    @property
    def session(self) -> AsyncSession:
        """The attempt's own session; what it writes commits together with the job's success."""
        if self._session is None:
            self._session = self._open_session()
        return self._session

    @property
    def job_id(self) -> UUID:
        """The job's id."""
        return self._job_id

    @property
    def name(self) -> str:
        """The name of the job's definition."""
        return self._name

    @property
    def attempt(self) -> int:
        """The number of this run, from 1; it never falls."""
        return self._attempt

    @property
    def idempotency_key(self) -> str:
        """A key for outside services that is the same in every attempt of this job."""
        return str(self._job_id)

    @property
    def enqueued_at(self) -> datetime:
        """When the job was enqueued."""
        return self._enqueued_at

    def progress(self, done: float, total: float | None = None, text: str | None = None) -> None:
        """Say how far the job is, for people who look on; stored within a second, outside of the job's transaction.

        Call it as often as you like, also from a thread: of many words within a second, the last is stored. It is
        never waited for, and a word said just before the end may be lost.

        Args:
            done: how much is done, in units of the job's own, from 0.
            total: how much there is to do, in the same units.
            text: what is being done; cut to 500 characters.

        Raises:
            ValueError: a number is negative, infinite or none.
            TypeError: it is no number.
            DefinitionError: the job's isolation, or else its engine's, is "REPEATABLE READ" or "SERIALIZABLE".

        """
        said = as_progress(done, total, text)
        if self._report is not None:
            self._report(said)

    def __getitem__(self, key: str) -> Any:
        try:
            return self._resources[key]
        except KeyError:
            known = ", ".join(sorted(map(str, self._resources))) or "none"
            raise KeyError(f"the context has no {key!r}; it has: {known}") from None

    def get(self, key: str, default: Any = None) -> Any:
        """The resource under `key`, or `default` when there is none."""
        return self._resources.get(key, default)

    def __contains__(self, key: object) -> bool:
        return key in self._resources

    def __iter__(self) -> Iterator[str]:
        return iter(self._resources)

    def __repr__(self) -> str:
        return f"<JobContext {self._name} {self._job_id} attempt {self._attempt}>"


_current: Final[ContextVar[JobContext | None]] = ContextVar("exarq_current_job", default=None)


@contextmanager
def be_current(context: JobContext) -> Iterator[None]:
    """Make this what `current_job()` returns, for what is called within the block."""
    token = _current.set(context)
    try:
        yield
    finally:
        _current.reset(token)


def current_job() -> JobContext | None:
    """The attempt that calls this from inside a `def` job; None elsewhere.

    For legacy code, whose functions have no parameter for it, and which also runs outside of a worker: its attempt
    number, its idempotency key for outside services. An async job takes `ctx: JobContext` instead.
    """
    return _current.get()
