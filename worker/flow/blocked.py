"""For how long a job held the event loop, measured from one of its waits to the next."""

from __future__ import annotations

import time
import types
from collections.abc import Coroutine, Generator
from typing import Any, Final, TypeVar

from worker.flow.holdings import Run

T = TypeVar("T")

# What asyncio calls a slow callback: below it nobody else notices that he waited.
_NOTICED_FROM: Final = 0.1


@types.coroutine
def charged(run: Run, call: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Await the call, and note on the run each time it held the loop for long."""
    run.measured = True
    resume, with_what = call.send, None
    while True:
        began = time.monotonic()
        try:
            awaited = resume(with_what)
        except StopIteration as done:
            return done.value  # type: ignore[no-any-return]  # what the coroutine returned
        finally:
            held = time.monotonic() - began
            if held >= _NOTICED_FROM:
                run.charge(held)
        try:
            resume, with_what = call.send, (yield awaited)
        except GeneratorExit:
            call.close()
            raise
        except BaseException as error:  # a cancellation is the call's to see
            resume, with_what = call.throw, error
