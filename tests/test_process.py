"""What a worker says at its start of settings that cannot be meant."""

from __future__ import annotations

import os
import re
import threading

import pytest

from tests.flow.helpers import registry_of
from tests.support import heard, run_all
from worker.core.context import JobContext
from worker.core.errors import SettingsError
from worker.observe.events import QueuesUnused, ThreadsLeft
from worker.process import leave_threads_behind
from worker.settings import Settings


async def job(ctx: JobContext) -> None: ...


async def test_a_queue_that_no_definition_uses_is_warned_of_and_worked_on(settings: Settings) -> None:
    served = settings.model_copy(
        update={"worker": settings.worker.model_copy(update={"queues": ("billing", "nosuch", "default")})}
    )

    async with heard() as events:
        await run_all(served, registry_of(job, queue="billing"))
        await run_all(settings, registry_of(job))

    assert [event.queues for event in events if isinstance(event, QueuesUnused)] == [("nosuch", "default")]


async def test_a_number_of_a_database_that_redis_does_not_have_is_refused_at_the_start(settings: Settings) -> None:
    address = re.sub(r"\d+$", "999999", str(settings.redis.url))
    elsewhere = settings.model_copy(update={"redis": settings.redis.model_copy(update={"url": address})})

    with pytest.raises(SettingsError, match=r"^redis\.url, .*999999, names a database that this Redis does not"):
        await run_all(elsewhere, registry_of(job))


class EndsOnceWaitedFor(threading.Thread):
    """A thread that has nothing to do any more, and has not had its turn to end."""

    def __init__(self) -> None:
        self._waited_for = threading.Event()
        super().__init__(target=self._waited_for.wait, name="about to end")

    def join(self, timeout: float | None = None) -> None:
        self._waited_for.set()
        super().join(timeout)


async def test_a_thread_that_is_about_to_end_is_not_one_that_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "_exit", lambda _code: None)
    thread = EndsOnceWaitedFor()
    thread.start()

    async with heard() as told:
        leave_threads_behind()

    thread.join()
    assert thread.name not in {name for event in told if isinstance(event, ThreadsLeft) for name in event.threads}
