"""What producers enqueue: the mix, and keys that others are after too."""

from __future__ import annotations

import random
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

from tests.chaos import jobs
from worker.flow.call import Call

KEYS: Final = 8
PLAIN: Final = "plain"
"""The kind that only plain ARQ code enqueues."""


def a_call(rng: random.Random, mix: Mapping[str, float]) -> Call:
    """One job of the mix, some later than at once, some more urgent than others."""
    ours = {kind: share for kind, share in mix.items() if kind != PLAIN} or {"noop": 1.0}
    kind = rng.choices(list(ours), list(ours.values()))[0]
    options: dict[str, Any] = {}
    if rng.random() < 0.05:
        options["delay"] = rng.uniform(0.2, 2)
    if rng.random() < 0.15:
        options["priority"] = rng.randint(0, 9)
    definition: Any = getattr(jobs, kind.split(":")[0])
    function = definition.options(**options)
    match kind.split(":"):
        case ["slow" | "late" | "naps" | "steps", seconds]:
            return function.call(float(seconds) * rng.uniform(0.2, 1))  # type: ignore[no-any-return]
        case ["flaky"]:
            return function.call(rng.randint(1, 3))  # type: ignore[no-any-return]
        case ["blocks", how, seconds]:
            return function.call(how, float(seconds))  # type: ignore[no-any-return]
        case _:
            return function.call()  # type: ignore[no-any-return]


def keyed_calls(rng: random.Random) -> list[Call]:
    """Jobs whose keys other transactions are after too."""
    unique: list[Any] = ["until_started", "until_done", timedelta(seconds=1)]
    return [
        jobs.one.options(key=str(rng.randint(1, KEYS)), unique=rng.choice(unique), delay=rng.choice([0, 0.5])).call()
        for _ in range(rng.randint(1, 3))
    ]
