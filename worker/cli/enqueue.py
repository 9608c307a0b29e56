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
from worker.cli.output import complain, note, print_json, print_line
from worker.cli.wait import NOT_IN_TIME, result_shown
from worker.core.errors import (
    ArgumentsInvalid,
    DatabaseUnreachable,
    JobCancelled,
    JobFailed,
    ResultTimeout,
    nearest_name,
)
from worker.core.options import Rules
from worker.core.registry import default_registry
from worker.db.failures import is_away
from worker.flow.call import EnqueueOptions, template
from worker.flow.enqueue import enqueue
from worker.flow.handle import Handle
from worker.flow.publish import Publisher
from worker.observe.events import Event, PublishFailed, listen
from worker.settings import Settings, load_settings


def enqueue_one(name: str, text: str, options: EnqueueOptions, *, as_json: bool, wait: float | None = None) -> int:
    """Enqueue a job, publish its hint and print its id; without Redis the job is stored all the same.

    Given seconds to wait, print its result instead. Returns the exit code.
    """
    if wait is not None and not 0 <= wait < float("inf"):
        raise ArgumentsInvalid(f"--wait takes 0 or more seconds, not {wait:g}")
    settings = load_settings()
    load_jobs(settings)
    args = arguments(text)
    template(name, Rules(), options)  # refused before anything is asked of a server
    try:
        handle, result = asyncio.run(_enqueue(settings, name, args, options, wait))
    except ResultTimeout as late:
        complain(str(late))
        return NOT_IN_TIME
    except (JobFailed, JobCancelled) as ended:
        complain(str(ended))
        return 1
    if as_json:
        said = {} if wait is None else {"result": result}
        print_json({"id": handle.id, "name": handle.name, "happened": handle.happened, **said})
    elif wait is None:
        print_line(str(handle.id))
    else:
        print_json(result)
    return 0


def _note_on(handle: Handle, options: EnqueueOptions) -> None:
    name = handle.name
    if name not in default_registry:
        note(
            f"no job named {name!r} is registered here, so its arguments are not checked and it waits for a worker that"
            f" knows it{nearest_name(name, default_registry.names())}"
        )
    if handle.happened == "exists":
        note(f"{name} with the key {options.get('key')!r} is enqueued already; this is its job")


def _plain(name: str, result: Any) -> Any:
    """The result as it is stored, whether its type is known here or not."""
    return from_json(default_registry.get(name).signature.encode_result(result)) if name in default_registry else result


async def _enqueue(
    settings: Settings, name: str, args: Mapping[str, Any], options: EnqueueOptions, wait: float | None
) -> tuple[Handle, Any]:
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
            _note_on(handle, options)
            return handle, None if wait is None else _plain(name, await result_shown(engine, handle, wait))
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


def arguments(text: str) -> dict[str, Any]:
    """The arguments that somebody typed as a JSON object, or has on stdin.

    Raises: `ArgumentsInvalid`.
    """
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
