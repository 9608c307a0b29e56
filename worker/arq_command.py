"""ARQ's own command, `arq worker.process.WorkerSettings`: its loop picks an id, and the job runs with Exarq's guards.

A convenience: it polls, takes from one queue and its ordinary lane, ends with its Redis, and says of a claim that was
refused that the job has succeeded. `exarq run` does none of that.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import AsyncExitStack, aclosing
from datetime import timedelta
from functools import partial
from typing import Any, Final
from uuid import UUID, uuid4

from arq.connections import RedisSettings
from arq.constants import in_progress_key_prefix
from arq.worker import Retry, func

from worker.addresses import database_url, redis_url
from worker.alive import Upkeep, make_heartbeat
from worker.broker.connection import connect
from worker.broker.hints import Owner, owner_of, parse_id
from worker.broker.keys import PAYLOAD_PREFIX, queue_key
from worker.broker.payloads import Enqueued
from worker.broker.stock import RESULT_KEPT
from worker.core.errors import SettingsError
from worker.core.registry import default_registry, load_modules
from worker.core.states import FINAL, JobState
from worker.db import adopted, reads, transitions
from worker.db.ids import is_adopted
from worker.db.send import once
from worker.flow.adopt import adopt
from worker.flow.after_commit import HORIZON
from worker.flow.availability import Availability
from worker.flow.holdings import Because, Run
from worker.flow.run import run as run_attempt
from worker.flow.work import Work
from worker.hooks import Hooks
from worker.observe.events import HintLeftAlone, StepFailed, WorkerStarted, emit
from worker.observe.logs import configure
from worker.resources import open_work, payloads_of
from worker.settings import Settings, load_settings
from worker.upkeep.heartbeat import Heartbeat

_UNKNOWN: Final = "exarq"
"""What ARQ's loop calls a job whose function is not registered here."""

_NEVER: Final = 365 * 86_400  # ARQ's own limits: the definition's are kept where the job runs
_AFTER_CANCEL: Final = timedelta(seconds=2)
_LOOK_AGAIN: Final = timedelta(seconds=2)
_LEAVE_ALONE: Final = timedelta(minutes=1)


def worker_settings() -> dict[str, Any]:
    """What ARQ's command takes, made from our settings.

    Raises: `SettingsError`, also for more than one queue; `ModuleNotLoaded`.
    """
    settings = load_settings()
    if len(settings.worker.queues) > 1:
        raise SettingsError(
            f"ARQ's own command takes from one queue, and worker.queues names {', '.join(settings.worker.queues)};"
            " set EXARQ_WORKER_QUEUES to one of them, or use `exarq run`"
        )
    load_modules(settings.jobs.modules)
    one = OneByOne(settings)
    return {
        "functions": [func(one.run, name=name) for name in (*default_registry.names(), _UNKNOWN)],
        "queue_name": queue_key(settings.worker.queues[0]),
        "redis_settings": RedisSettings.from_dsn(redis_url(settings)),
        "on_startup": one.startup,
        "on_shutdown": one.shutdown,
        "job_deserializer": one.read,
        "max_jobs": settings.worker.concurrency,
        "job_timeout": settings.jobs.timeout.total_seconds() + _longest_timeout(),
        "job_completion_wait": max(1, round(settings.worker.grace.total_seconds())),
        "max_tries": _NEVER,
        "keep_result": 0,
    }


def _longest_timeout() -> float:
    limits = [default_registry.get(name).rules.timeout for name in default_registry.names()]
    return max((limit.total_seconds() for limit in limits if limit is not None), default=0.0) + 60


class OneByOne:
    """Runs, with a worker's parts around it, the one job whose id ARQ's loop has picked."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._database_url, self._redis_url = database_url(settings), redis_url(settings)
        self._payloads = payloads_of(settings.jobs)
        self._hooks = Hooks(settings.jobs)
        self._opened = AsyncExitStack()
        self._queue = settings.worker.queues[0]
        self._work: Work | None = None

    def read(self, payload: bytes) -> dict[str, Any]:
        """ARQ's `job_deserializer`: what its loop needs to know of a job, which is its name; never raises."""
        name, at = _UNKNOWN, 0
        installation = self._work.installation if self._work else uuid4()
        if owner_of(b"", payload, installation) is Owner.PLAIN_ARQ:
            enqueued = self._payloads.read(payload)
            if isinstance(enqueued, Enqueued):
                name, at = enqueued.name, enqueued.at
        else:
            fields = json.loads(payload)
            name, at = str(fields.get("f")), int(fields.get("et", 0))
        return {"f": name if name in default_registry else _UNKNOWN, "a": (), "k": {}, "t": None, "et": at}

    async def startup(self, ctx: dict[Any, Any]) -> None:
        """Open a worker's parts; from here on it beats, and does its share of the upkeep."""
        settings, stack = self._settings, self._opened
        configure(settings.log.level, settings.log.format)
        redis = await stack.enter_async_context(aclosing(connect(self._redis_url, timeout=settings.redis.timeout)))
        opening = open_work(settings, self._database_url, redis, default_registry, ctx, self._payloads)
        self._work = work = await stack.enter_async_context(opening)
        ctx.update(engine=work.jobs_engine, sessions=work.sessions)
        availability = Availability(redis)
        stack.push_async_callback(availability.close)
        upkeep = Upkeep(work, redis, availability, self._database_url)
        heartbeat = make_heartbeat(work, self._database_url, upkeep, owns_process=False)
        heartbeat.start()
        stack.push_async_callback(self._stop_beating, heartbeat)
        await self._hooks.start(ctx, asyncio.Event())
        stack.push_async_callback(self._hooks.finish, ctx)
        await upkeep.start()
        stack.push_async_callback(upkeep.end)
        self._redis = redis
        emit(WorkerStarted(work.identity.id, (self._queue,), settings.worker.concurrency, work.registry.names()))

    async def shutdown(self, _ctx: dict[Any, Any]) -> None:
        """Close in reverse; what still runs is given back."""
        await self._opened.aclose()

    async def run(self, ctx: dict[Any, Any]) -> None:
        """Claim the job and run it; raises ARQ's `Retry` where its id has to stay in the queue."""
        assert self._work is not None
        arq_id = str(ctx["job_id"])
        try:
            job_id = await self._job_of(self._work, arq_id, float(ctx["score"]))
        except Retry:
            raise
        except Exception as error:
            # ARQ removes what raises anything else, and what plain ARQ code enqueued may have no row yet.
            emit(StepFailed(step=f"adopt {arq_id}", error=f"{type(error).__name__}: {error}"))
            raise Retry(defer=_LOOK_AGAIN) from error
        if job_id is None:
            return
        (run,) = await self._claim(self._work, job_id) or (None,)
        if run is not None:
            if not is_adopted(job_id):
                await self._leave_redis(arq_id)
            await self._run(self._work, run)
        await self._stay_if_it_waits(self._work, job_id)

    async def _job_of(self, work: Work, arq_id: str, score: float) -> UUID | None:
        """The job that an id in Redis means; None where it means none any more."""
        ours = parse_id(arq_id.encode())
        if ours is not None and await self._standing(work, ours) is not None:
            return ours
        payload = await self._redis.get(PAYLOAD_PREFIX + arq_id)
        match owner_of(arq_id.encode(), payload, work.installation):
            case Owner.US:
                return None
            case Owner.ANOTHER_INSTALLATION as owner:
                emit(HintLeftAlone(hint=arq_id, owner=owner.value))
                raise Retry(defer=_LEAVE_ALONE)
        await once(
            work.processor, lambda connection: adopt(work, self._redis, connection, self._queue, {arq_id: score})
        )
        at = self._payloads.read(payload).at if payload is not None else None
        found = await once(work.processor, partial(adopted.by_enqueue, enqueues=[(arq_id, at)], told_for=RESULT_KEPT))
        return found[arq_id].id if arq_id in found else None

    async def _claim(self, work: Work, job_id: UUID) -> list[Run]:
        token = uuid4()
        work.holdings.claiming(token)
        may = work.holdings.suspect_running is None
        send = partial(transitions.claim, ids=[job_id], token=token, worker_id=work.identity.id, may_take_suspect=may)
        try:
            return work.holdings.claimed(token, await once(work.processor, send))
        except BaseException:
            work.holdings.forget(token)
            raise

    async def _leave_redis(self, arq_id: str) -> None:
        """PostgreSQL knows who runs: no key of ARQ's keeps the job from others if this process dies."""
        async with self._redis.pipeline(transaction=False) as pipe:
            pipe.zrem(queue_key(self._queue), arq_id)
            pipe.delete(PAYLOAD_PREFIX + arq_id, in_progress_key_prefix + arq_id)
            await pipe.execute()

    async def _run(self, work: Work, run: Run) -> None:
        run.task = asyncio.create_task(run_attempt(work, run), name=f"exarq {run.claimed.name}")
        try:
            await asyncio.shield(run.task)
        except asyncio.CancelledError:
            run.cancel(Because.STOPPING)
            await asyncio.wait([run.task], timeout=_AFTER_CANCEL.total_seconds())
            raise
        finally:
            await work.flusher.drain()

    async def _stay_if_it_waits(self, work: Work, job_id: UUID) -> None:
        """After a return ARQ removes all that Redis has of an id, which what waits and is due soon still needs."""
        await work.mirror.flush()
        standing = await self._standing(work, job_id)
        if standing is None or standing.state in FINAL:
            return
        soon = standing.state is JobState.QUEUED and standing.wait <= HORIZON
        if is_adopted(job_id) or soon:
            await work.publisher.flush()
            await work.mirror.flush()
            raise Retry

    async def _standing(self, work: Work, job_id: UUID) -> reads.Standing | None:
        return (await once(work.processor, partial(reads.standings, ids=[job_id]))).get(job_id)

    async def _stop_beating(self, heartbeat: Heartbeat) -> None:
        heartbeat.announce_stop()
        await heartbeat.finish()
