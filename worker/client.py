"""A client: what a program needs that enqueues jobs and has no engine of its own yet."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AsyncExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn, Self, Unpack
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from worker.addresses import database_url
from worker.db.engine import through
from worker.flow.call import EnqueueOptions
from worker.flow.cancel import Cancellation, cancel
from worker.flow.enqueue import enqueue
from worker.flow.handle import Handle, handle_of
from worker.flow.publish import Publisher
from worker.flow.retry import Retrial, retry
from worker.settings import Settings, load_settings


class Client:
    """An engine and a session factory whose hints go out after each commit, and are flushed at the end.

    A service that has an engine binds a publisher to its own factory instead:
    `async_sessionmaker(engine, info=publisher.info)`.

    Args:
        settings: where PostgreSQL and Redis are; without them, `load_settings()`.
        publisher: where its hints go; without one, to the settings' Redis.

    Raises:
        SettingsError: no address is set.
        EmbeddedServerError: the settings say `embedded` and no embedded servers run here.

    """

    if TYPE_CHECKING:
        engine: AsyncEngine
        sessions: async_sessionmaker[AsyncSession]
        publisher: Publisher
    else:

        def __getattr__(self, name: str) -> NoReturn:
            if name in ("engine", "sessions", "publisher"):
                raise RuntimeError(f"this client is not open, so it has no {name}: `async with Client() as client:`")
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __init__(self, settings: Settings | None = None, *, publisher: Publisher | None = None) -> None:
        self._settings = settings or load_settings()
        self._publisher = publisher
        self._opened = AsyncExitStack()

    async def __aenter__(self) -> Self:
        settings = self._settings
        self.engine = create_async_engine(
            database_url(settings),
            connect_args=through(settings.database.pooler),
            hide_parameters=settings.database.hide_parameters,
        )
        self._opened.push_async_callback(self.engine.dispose)
        self.publisher = self._publisher or Publisher.from_settings(settings)
        self._opened.push_async_callback(self.publisher.close)
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False, info=self.publisher.info)
        return self

    async def enqueue(
        self,
        name: str,
        args: Mapping[str, Any] | None = None,
        *,
        strict: bool = False,
        **options: Unpack[EnqueueOptions],
    ) -> Handle[Any]:
        """Enqueue by name, in a transaction of its own: for a program that writes nothing else.

        Args:
            name: the definition's name.
            args: the job's arguments by name, plain JSON.
            strict: refuse a name that is not registered in this process.
            options: as in `EnqueueOptions`.

        Raises: as `worker.enqueue`.

        """
        async with self.sessions.begin() as session:
            return await enqueue(session, name, args, strict=strict, **options)

    async def cancel(self, job: UUID | Handle[Any]) -> Cancellation:
        """Cancel a job, in a transaction of its own: what waits will not run, what runs is ended by its worker.

        Args:
            job: the job's id, or its handle.

        Raises: as `worker.cancel`.

        """
        async with self.sessions.begin() as session:
            return await cancel(session, job)

    async def retry(self, job: UUID | Handle[Any]) -> Retrial:
        """Queue a job that has ended, in a transaction of its own: it runs once more, due at once.

        Args:
            job: the job's id, or its handle.

        Raises: as `worker.retry`.

        """
        async with self.sessions.begin() as session:
            return await retry(session, job)

    def handle(self, job_id: UUID) -> Handle[Any]:
        """The handle of a job that is known by its id only: `await client.handle(id).result(timeout=30)`.

        Args:
            job_id: the job's id, as the `Handle` of whoever enqueued it has it.

        """
        return handle_of(self.sessions(), job_id)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._opened.aclose()
