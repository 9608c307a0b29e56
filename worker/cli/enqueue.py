"""`exarq enqueue`: one job, in a transaction of its own."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Mapping
from typing import Any, Final

from pydantic_core import from_json
from sqlalchemy.ext.asyncio import AsyncSession

from worker.addresses import redis_url
from worker.broker.connection import connect
from worker.cli.database import migrated_database
from worker.cli.modules import load_jobs
from worker.cli.output import note, print_json, print_line
from worker.core.errors import ArgumentsInvalid, DatabaseUnreachable, nearest_name
from worker.core.options import Rules
from worker.core.registry import default_registry
from worker.db.failures import is_away
from worker.flow.call import EnqueueOptions, template
from worker.flow.enqueue import enqueue
from worker.flow.handle import Handle
from worker.flow.publish import Publisher
from worker.observe.events import Event, PublishFailed, listen
from worker.settings import Settings, load_settings


def enqueue_one(name: str, text: str, options: EnqueueOptions, *, as_json: bool) -> None:
    """Enqueue a job, publish its hint and print its id; without Redis the job is stored all the same."""
    settings = load_settings()
    load_jobs(settings)
    args = _arguments(text)
    template(name, Rules(), options)  # refused before anything is asked of a server
    handle = asyncio.run(_enqueue(settings, name, args, options))
    if name not in default_registry:
        note(
            f"no job named {name!r} is registered here, so its arguments are not checked and it waits for a worker that"
            f" knows it{nearest_name(name, default_registry.names())}"
        )
    if handle.happened == "exists":
        note(f"{name} with the key {options.get('key')!r} is enqueued already; this is its job")
    if as_json:
        print_json({"id": handle.id, "name": handle.name, "happened": handle.happened})
    else:
        print_line(str(handle.id))


async def _enqueue(settings: Settings, name: str, args: Mapping[str, Any], options: EnqueueOptions) -> Handle:
    redis = connect(redis_url(settings), timeout=settings.redis.timeout)
    publisher = Publisher(redis, lease=settings.worker.lease, closes_redis=True)
    end = listen(_tell)
    try:
        async with (
            migrated_database(settings) as engine,
            AsyncSession(engine, info=publisher.info) as session,
        ):
            handle = await enqueue(session, name, args, **options)
            await _commit(session, handle)
        return handle
    finally:
        await publisher.close()
        end()


async def _commit(session: AsyncSession, handle: Handle) -> None:
    try:
        await session.commit()
    except Exception as error:
        if is_away(error):
            raise DatabaseUnreachable(
                f"PostgreSQL went away during the COMMIT; `exarq jobs show {handle.id}` says whether the job exists"
            ) from error
        raise


def _tell(event: Event) -> None:
    if isinstance(event, PublishFailed):
        note(f"the job is stored, but Redis does not answer ({event.error}); a worker finds the job without it")


_EXAMPLE: Final = "an object of names and values, such as '{\"invoice_id\": 7}'"


def _arguments(text: str) -> dict[str, Any]:
    given = _stdin() if text == "-" else text
    try:
        value = from_json(given, allow_inf_nan=False)
    except ValueError as error:
        raise ArgumentsInvalid(f"the arguments are not JSON: {error}; give {_EXAMPLE}") from None
    if not isinstance(value, dict):
        raise ArgumentsInvalid(f"the arguments are not a JSON object; give {_EXAMPLE}")
    return value


def _stdin() -> bytes:
    if sys.stdin is None:
        raise ArgumentsInvalid("- reads the arguments from stdin, which is closed")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise ArgumentsInvalid(f"- reads the arguments from stdin: {error.strerror}") from None
