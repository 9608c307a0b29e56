"""The user's own hooks around a worker: what they put in the context, when they run, and what happens when they fail."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.flow.helpers import NAME, registry_of
from tests.support import a_job, a_worker, heard, row, run_all, state, until
from worker import hooks
from worker.core.context import JobContext
from worker.core.errors import ModuleNotLoaded, SettingsError
from worker.core.registry import Registry
from worker.hooks import StartupFailed
from worker.observe.events import HookFailed, WorkerStarted
from worker.process import Worker
from worker.settings import Settings

_told: list[str] = []


@pytest.fixture(autouse=True)
def _nothing_told() -> Iterator[None]:
    _told.clear()
    yield
    _told.clear()


async def startup(ctx: dict[Any, Any]) -> None:
    ctx["rate"] = 7
    _told.append(f"started with {', '.join(sorted(key for key in ctx if not key.startswith('exarq')))}")


async def shutdown(ctx: dict[Any, Any]) -> None:
    async with ctx["sessions"]() as session:
        await session.connection()  # what we opened is still open
    _told.append(f"stopped with {ctx['rate']}")


async def raising(ctx: dict[Any, Any]) -> None:
    _told.append("raised")
    raise ValueError("no\nsuch host")


async def hanging(ctx: dict[Any, Any]) -> None:
    _told.append("hangs")
    await asyncio.Event().wait()


async def reads_the_rate(ctx: JobContext) -> int:
    _told.append("ran")
    return int(ctx["rate"])


def hooked(settings: Settings, **names: str) -> Settings:
    """The settings with hooks of this module."""
    named = {key: f"{__name__}:{name}" for key, name in names.items()}
    return settings.model_copy(update={"jobs": settings.jobs.model_copy(update=named)})


def a_registry() -> Registry:
    return registry_of(reads_the_rate)


async def test_what_the_startup_hook_puts_in_the_context_is_seen_by_jobs(
    engine: AsyncEngine, settings: Settings
) -> None:
    job_id = await a_job(engine, name=NAME)

    await run_all(hooked(settings, on_startup="startup", on_shutdown="shutdown"), a_registry())

    assert (await row(engine, job_id)).result == 7
    assert _told == ["started with engine, rate, redis, sessions", "ran", "stopped with 7"]


async def test_a_startup_hook_that_raises_ends_the_worker_before_its_first_claim(
    engine: AsyncEngine, settings: Settings
) -> None:
    job_id = await a_job(engine, name=NAME)

    with pytest.raises(
        StartupFailed, match=r"^the startup hook tests.test_hooks:raising raised ValueError: no such ho"
    ):
        await run_all(hooked(settings, on_startup="raising", on_shutdown="shutdown"), a_registry())

    assert await state(engine, job_id) == "queued"
    assert _told == ["raised"]  # there is nothing that a shutdown hook could close


async def test_a_worker_that_is_stopped_meanwhile_does_not_wait_for_its_startup_hook(
    engine: AsyncEngine, settings: Settings
) -> None:
    job_id = await a_job(engine, name=NAME)

    async with a_worker(hooked(settings, on_startup="hanging"), a_registry()):
        await until(lambda: _told, "the hook has begun")

    assert await state(engine, job_id) == "queued"


async def test_a_worker_beats_while_its_startup_hook_takes_longer_than_a_lease(
    engine: AsyncEngine, settings: Settings
) -> None:
    async with a_worker(hooked(settings, on_startup="hanging"), a_registry()), heard() as told:
        await until(lambda: _beats(engine), "it beats")

        assert not [event for event in told if isinstance(event, WorkerStarted)]


async def _beats(engine: AsyncEngine) -> bool:
    async with engine.connect() as connection:
        return bool((await connection.exec_driver_sql("SELECT max(beat) > 2 FROM exarq.worker")).scalar())


@pytest.mark.parametrize(
    ("hook", "error"), [("raising", "ValueError: no\nsuch host"), ("hanging", "did not return within 0.05 s")]
)
async def test_a_shutdown_hook_that_fails_is_reported_and_the_worker_stops(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, hook: str, error: str
) -> None:
    monkeypatch.setattr(hooks, "_SHUTDOWN_LIMIT", timedelta(seconds=0.05))

    async with heard() as told:
        await run_all(hooked(settings, on_shutdown=hook), a_registry())

    assert [event for event in told if isinstance(event, HookFailed)] == [HookFailed(f"{__name__}:{hook}", error)]


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        (
            "tests.test_hooks:startupp",
            SettingsError,
            r"jobs.on_startup: tests.test_hooks has no 'startupp'; did you mean",
        ),
        (
            "tests.test_hooks:_told",
            SettingsError,
            r"jobs.on_startup: tests.test_hooks:_told is a list; name a function",
        ),
        ("tests.nowhere:startup", ModuleNotLoaded, r"^jobs.on_startup: cannot import 'tests.nowhere'"),
    ],
)
async def test_a_name_that_leads_nowhere_is_refused_before_anything_is_opened(
    settings: Settings, name: str, error: type[Exception], message: str
) -> None:
    named = settings.jobs.model_copy(update={"on_startup": name})

    with pytest.raises(error, match=message):
        Worker(settings.model_copy(update={"jobs": named}), registry=a_registry())
