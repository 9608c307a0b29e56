"""What is measured, how long, and how often."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Kind = Literal["throughput", "latency", "enqueue"]


@dataclass(frozen=True)
class Workload:
    """One row of each system.

    Args:
        name: as the table has it.
        kind: how it is measured.
        job: the job that is enqueued.
        processes: workers at once.
        concurrency: jobs at once in each, unless the system says otherwise.
        jobs: how many; in a throughput workload the most, see `jobs_for`.
        pilot: jobs of the run that comes first and is not counted: it warms caches and shows how many jobs a run needs.

    """

    name: str
    kind: Kind
    job: str
    processes: int = 1
    concurrency: int = 20
    jobs: int = 20_000
    pilot: int = 1_000

    @property
    def key(self) -> str:
        """The name and the processes: what makes it one of its kind."""
        return self.name if self.processes == 1 else f"{self.name} x{self.processes}"


WORKLOADS: Final = (
    Workload("noop", "throughput", "noop"),
    Workload("orm", "throughput", "orm", pilot=300),
    Workload("legacy", "throughput", "legacy", pilot=200),
    Workload("wait", "throughput", "wait", concurrency=500),
    Workload("latency", "latency", "latency", jobs=100),
    Workload("enqueue", "enqueue", "noop", jobs=1_000),
    Workload("enqueue_many", "enqueue", "noop", jobs=10_000),
    Workload("noop", "throughput", "noop", processes=2),
    Workload("orm", "throughput", "orm", processes=2, pilot=300),
)

SYSTEMS: Final = Path(__file__).with_name("systems")
LIMIT: Final = "limit"
EXARQ: Final = "exarq"
QUICK: Final = (EXARQ, "arq", "pgqueuer", LIMIT)


@dataclass(frozen=True)
class Plan:
    """One run of the whole bench.

    Args:
        systems: in this order, in each round.
        workloads: what is measured.
        rounds: how often each system runs each workload.
        pairs: how often Exarq and the limit run `orm`, for their ratio is asked for to a twentieth.
        seconds: how long a throughput run shall take about.
        jobs: exactly so many jobs, whatever the speed.
        folder: where the scripts of the systems are.
        quick: rather be done soon than have runs of the full length.
        whole: whether everything is measured, so that the docs may show it.

    """

    systems: tuple[str, ...]
    workloads: tuple[Workload, ...]
    rounds: int
    pairs: int
    seconds: float
    jobs: int | None = None
    folder: Path = SYSTEMS
    quick: bool = False
    whole: bool = False

    def rounds_of(self, system: str, key: str) -> int:
        """How often this system runs the workload of this key."""
        compared = key == "orm" and system in (EXARQ, LIMIT)
        return max(self.pairs, self.rounds) if compared else self.rounds

    @property
    def last(self) -> int:
        """How many rounds there are."""
        return max(self.pairs, self.rounds)


def jobs_for(workload: Workload, rate: float, seconds: float) -> int:
    """As many jobs as last about so long at this rate: 1, 2 or 5 of a power of ten, so that systems share the number."""
    wanted = min(rate * seconds, workload.jobs)
    steps = [step * scale for scale in (100, 1_000, 10_000, 100_000) for step in (1, 2, 5)]
    return max([step for step in steps if step <= wanted], default=steps[0])
