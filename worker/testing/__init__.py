"""For tests of your own jobs: what was enqueued, running it in the test's transaction, and a clock that stands still.

The fixtures of the pytest plugin, `exarq_session` and others, are in `worker.pytest_plugin`.
"""

from __future__ import annotations

from worker.testing.clock import FrozenClock, frozen_clock
from worker.testing.drain import NeverDrained, NotATestDatabase, drain
from worker.testing.enqueued import Enqueued, assert_enqueued, assert_not_enqueued, enqueued
from worker.testing.inline import run_inline
from worker.testing.sessions import NoHints, rolled_back
from worker.testing.work import Ended

__all__ = [
    "Ended",
    "Enqueued",
    "FrozenClock",
    "NeverDrained",
    "NoHints",
    "NotATestDatabase",
    "assert_enqueued",
    "assert_not_enqueued",
    "drain",
    "enqueued",
    "frozen_clock",
    "rolled_back",
    "run_inline",
]
