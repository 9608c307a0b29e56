"""The user's own hooks, as in ARQ: called once when a worker's resources are open, and once before they are closed."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable
from datetime import timedelta
from typing import Any, Final

from worker.core.errors import ExarqError
from worker.core.objects import load_callable
from worker.core.outcome import ErrorText
from worker.observe.events import HookFailed, emit
from worker.settings import JobsSettings

_SHUTDOWN_LIMIT: Final = timedelta(seconds=5)


class StartupFailed(ExarqError):
    """Raised when the user's startup hook raised: the worker ends before its first claim."""


class Hooks:
    """The hooks that the settings name; without names they do nothing.

    Raises: `ModuleNotLoaded`, `SettingsError` where a name leads nowhere.
    """

    def __init__(self, settings: JobsSettings) -> None:
        self._names = settings.on_startup, settings.on_shutdown
        self._startup = load_callable("jobs.on_startup", settings.on_startup)
        self._shutdown = load_callable("jobs.on_shutdown", settings.on_shutdown)
        self._started = False

    async def start(self, context: dict[Any, Any], stop: asyncio.Event) -> None:
        """Call the startup hook; a `stop` meanwhile cancels it.

        Raises: `StartupFailed` with what the hook raised.
        """
        if self._startup is not None:
            call = asyncio.ensure_future(_call(self._startup, context))
            stopping = asyncio.ensure_future(stop.wait())
            try:
                await asyncio.wait([call, stopping], return_when=asyncio.FIRST_COMPLETED)
            finally:
                stopping.cancel()
                call.cancel()
            await asyncio.wait([call])
            if call.cancelled():
                if stop.is_set():
                    return
                raise StartupFailed(f"the startup hook {self._names[0]} was cancelled; correct it, or jobs.on_startup")
            if error := call.exception():
                said = ErrorText.of(error)
                raise StartupFailed(
                    f"the startup hook {self._names[0]} raised {said.type}: {' '.join(said.message.split())}"
                ) from error
        self._started = True

    async def finish(self, context: dict[Any, Any]) -> None:
        """Call the shutdown hook, if the startup hook had returned; one that raises or hangs is reported."""
        if self._shutdown is None or not self._started:
            return
        self._started = False
        call = asyncio.ensure_future(_call(self._shutdown, context))
        _, late = await asyncio.wait([call], timeout=_SHUTDOWN_LIMIT.total_seconds())
        if late:
            call.cancel()
            await asyncio.wait([call], timeout=1)
            emit(HookFailed(str(self._names[1]), f"did not return within {_SHUTDOWN_LIMIT.total_seconds():g} s"))
        elif call.cancelled():
            emit(HookFailed(str(self._names[1]), "was cancelled"))
        elif error := call.exception():
            emit(HookFailed(str(self._names[1]), f"{type(error).__name__}: {error}"))


async def _call(hook: Callable[..., Any], context: dict[Any, Any]) -> None:
    answer = hook(context)
    if inspect.isawaitable(answer):
        await answer
