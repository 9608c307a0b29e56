"""How a system is measured: the one protocol between the harness and the script of each system.

A script describes itself (`about`), does what a service does (`control`: a long-lived process that obeys one JSON object
a line) and runs a worker (`work`: a process of its own, measured from outside). Standard library only.
"""

from __future__ import annotations

import asyncio
import ctypes
import dataclasses
import json
import os
import random
import signal
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, ClassVar, Final, TextIO

DATABASE_URL: Final = "BENCH_DATABASE_URL"
REDIS_URL: Final = "BENCH_REDIS_URL"

WAITING: Final = 0.02
"""How long the job `wait` waits, seconds."""

_BLOCK: Final = 50


@dataclass(frozen=True)
class About:
    """What the table's notes say of a system.

    Args:
        name: as the table has it.
        packages: distributions whose versions are shown; the first is the system's own.
        setting: its documented best setting for one process, as this script has it.
        source: where that is documented.
        published: the speed it publishes itself, with the page; "none" where it publishes none.
        keeps: what is durable once a job has ended: "state and result", "nothing" …
        keeps_in: where jobs live: "postgresql", "redis", "both" or "nowhere".
        workloads: those it takes part in; see `tests/bench/workloads.py`.
        concurrency: jobs at once in a process, for the workloads where it is not 20 (and 500 in `wait`).
        processes: the most worker processes it is measured with; the targets need more than one of Exarq only.

    """

    name: str
    packages: tuple[str, ...]
    setting: str
    source: str
    published: str
    keeps: str
    keeps_in: str
    workloads: tuple[str, ...] = ("noop", "orm", "legacy", "latency", "enqueue", "enqueue_many", "wait")
    concurrency: dict[str, int] = field(default_factory=dict)
    processes: int = 1


class System(ABC):
    """One system; its jobs are called `noop`, `orm`, `legacy`, `latency` and `wait` and take one whole number."""

    about: ClassVar[About]

    async def open(self) -> None:  # noqa: B027 — not every system has clients
        """Open the clients of the controlling process."""

    async def close(self) -> None:  # noqa: B027
        """Close them."""

    @abstractmethod
    async def install(self) -> None:
        """Make what the system needs in an empty database; called once."""

    @abstractmethod
    async def reset(self) -> None:
        """Forget all jobs and results; called before each run, while no worker runs."""

    @abstractmethod
    async def enqueue(self, workload: str, number: int) -> None:
        """Enqueue one job in a transaction of its own, as durable as it will be when this returns."""

    @abstractmethod
    async def enqueue_many(self, workload: str, numbers: Sequence[int]) -> None:
        """Enqueue all of these, in the fastest way that is documented."""

    @abstractmethod
    async def left(self) -> int:
        """How many jobs are not at their stored end: 0 once every state, result and acknowledgement is where it stays."""

    @abstractmethod
    def work(self, workload: str, concurrency: int) -> None:
        """Run one worker process until SIGTERM."""

    by_hand: Callable[[int], Awaitable[None]] | None = None
    """The INSERT of `enqueue` written by hand, in the same kind of session; Exarq has it, to be compared with."""


def serve(system: type[System]) -> None:
    """The whole script: `about`, `control`, or `work WORKLOAD CONCURRENCY`."""
    match sys.argv[1:]:
        case ["about"]:
            about = dataclasses.asdict(system.about)
            versions = {name: version(name) for name in system.about.packages}
            print(json.dumps({**about, "versions": versions, "python": sys.executable}))
        case ["control"]:
            answers = os.fdopen(os.dup(1), "w", buffering=1)
            os.dup2(2, 1)  # what a library prints is no answer
            asyncio.run(_control(system(), answers))
        case ["work", workload, concurrency]:
            _die_with_parent()
            system().work(workload, int(concurrency))
        case _:
            sys.exit(f"usage: {sys.argv[0]} about | control | work WORKLOAD CONCURRENCY")


def _die_with_parent() -> None:
    """No worker outlives the harness, however that ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL), 0, 0, 0)  # PR_SET_PDEATHSIG


async def _control(system: System, answers: TextIO) -> None:
    await system.open()
    try:
        while line := await asyncio.to_thread(sys.stdin.readline):
            try:
                answer = await _obey(system, **json.loads(line))
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {error}"}
            print(json.dumps(answer), file=answers)
    finally:
        await system.close()


async def _obey(system: System, do: str, workload: str = "", jobs: int = 0) -> dict[str, Any]:
    match do:
        case "install":
            await system.install()
            return {}
        case "reset":
            await system.reset()
            return {}
        case "reopen":  # PostgreSQL learns what a connection has committed when it ends
            await system.close()
            await system.open()
            return {}
        case "left":
            return {"left": await system.left()}
        case "enqueue_many":
            return await _timed(system.enqueue_many(workload, range(jobs)))
        case "enqueue":
            return await _one_by_one(system, workload, jobs)
        case "latency":
            await _spaced(system, jobs)
            return {}
        case _:
            raise ValueError(f"no command {do!r}")


async def _timed(what: Awaitable[None]) -> dict[str, float]:
    begun, cpu = time.monotonic(), time.process_time()
    await what
    return {"seconds": time.monotonic() - begun, "cpu": time.process_time() - cpu}


async def _one_by_one(system: System, workload: str, jobs: int) -> dict[str, float]:
    """Enqueue one after the other; where there is a way by hand, block by block in turn with it."""

    async def block(one: Callable[[int], Awaitable[None]], numbers: Sequence[int]) -> None:
        for number in numbers:
            await one(number)

    async def enqueue(number: int) -> None:
        await system.enqueue(workload, number)

    took = {"seconds": 0.0, "cpu": 0.0}
    if system.by_hand:
        took["by_hand_seconds"] = took["by_hand_cpu"] = 0.0
    for first in range(0, jobs, _BLOCK):
        numbers = range(first, min(first + _BLOCK, jobs))
        for name, value in (await _timed(block(enqueue, numbers))).items():
            took[name] += value
        if system.by_hand:
            for name, value in (await _timed(block(system.by_hand, numbers))).items():
                took[f"by_hand_{name}"] += value
    return took


async def _spaced(system: System, jobs: int) -> None:
    """Enqueue jobs to an idle worker, at moments that no poll is in step with."""
    rng = random.Random(jobs)
    for _ in range(jobs):
        await asyncio.sleep(rng.uniform(0.02, 0.06))
        await system.enqueue("latency", time.monotonic_ns())
