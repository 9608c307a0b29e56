"""The proof: what the business tables hold, against what the producers wrote down outside the database."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from worker.demo import notebook


@dataclass(frozen=True, slots=True)
class Findings:
    """What SQL says after the story; the promise holds when the four below `distributions` are zero."""

    enqueued: int
    rolled_back: int
    succeeded: int
    follow_ups: int
    done: int
    files: int
    distributions: int
    lost: int
    repeated_effects: int
    phantoms: int
    out_of_step: int

    @property
    def placed(self) -> int:
        """What the producers offered, whichever way their transactions ended."""
        return self.enqueued + self.rolled_back

    @property
    def promise_held(self) -> bool:
        """Nothing lost, nothing twice, nothing that nobody asked for, no result without its effect."""
        return not (self.lost or self.repeated_effects or self.phantoms or self.out_of_step)


_TOLD: Final = text("CREATE TEMPORARY TABLE told (kind text, job_id uuid, order_id uuid, committed boolean)")
_TELL: Final = text(
    "INSERT INTO told SELECT * FROM unnest("
    "CAST(:kinds AS text[]), CAST(:jobs AS uuid[]), CAST(:orders AS uuid[]), CAST(:committed AS boolean[]))"
)

# Committed by its producer, and yet what it asked for is not there.
_LOST: Final = """
SELECT count(*) FROM told
WHERE committed AND kind = 'posting' AND NOT EXISTS (SELECT FROM posting WHERE posting.order_id = told.order_id)
   OR committed AND kind = 'catalogue' AND NOT EXISTS (
        SELECT FROM distribution JOIN inventory_total ON inventory_total.distribution_id = distribution.id
        WHERE distribution.job_id = told.job_id)
"""

# An order has two postings, a catalogue job one distribution, a distribution one row of totals.
_REPEATED: Final = """
SELECT (SELECT count(*) FROM (SELECT FROM posting GROUP BY order_id HAVING count(*) <> 2) AS orders)
     + (SELECT count(*) FROM (SELECT FROM distribution GROUP BY job_id HAVING count(*) <> 1) AS jobs)
     + (SELECT count(*) FROM (SELECT FROM inventory_total GROUP BY distribution_id HAVING count(*) <> 1) AS totals)
"""

# There, although its transaction rolled back or nobody enqueued it.
_PHANTOMS: Final = """
WITH wanted AS (SELECT job_id, order_id FROM told WHERE committed)
SELECT (SELECT count(*) FROM payment_order WHERE id NOT IN (SELECT order_id FROM wanted WHERE order_id IS NOT NULL))
     + (SELECT count(DISTINCT order_id) FROM posting
        WHERE order_id NOT IN (SELECT order_id FROM wanted WHERE order_id IS NOT NULL))
     + (SELECT count(*) FROM distribution WHERE job_id NOT IN (SELECT job_id FROM wanted))
     + (SELECT count(*) FROM inventory_total WHERE distribution_id NOT IN (SELECT id FROM distribution))
     + (SELECT count(*) FROM exarq.job
        WHERE name IN ('ledger.post', 'inventory.catalogue') AND id NOT IN (SELECT job_id FROM wanted))
"""

# One statement sees one moment: a result is visible in it if, and only if, its effect is.
_OUT_OF_STEP: Final = text("""
SELECT count(*) FROM exarq.job
WHERE (CAST(:worker AS uuid) IS NULL OR worker_id = :worker) AND (state = 'succeeded') <> CASE name
    WHEN 'ledger.post' THEN EXISTS (SELECT FROM posting WHERE order_id = CAST(job.args ->> 'order_id' AS uuid))
    WHEN 'inventory.catalogue' THEN EXISTS (SELECT FROM distribution WHERE job_id = job.id)
    WHEN 'inventory.summarise' THEN EXISTS (SELECT FROM inventory_total WHERE job_id = job.id)
END
""")


async def out_of_step(connection: AsyncConnection, worker_id: UUID | None = None) -> int:
    """How many jobs (of this worker) show at this moment a result without its effect, or the reverse."""
    return int((await connection.execute(_OUT_OF_STEP, {"worker": worker_id})).scalar_one())


async def prove(engine: AsyncEngine, enqueues: Path) -> Findings:
    """Compare the business tables with the producers' own file."""
    told = list(notebook.read(enqueues))
    async with engine.begin() as connection:

        async def count(query: str) -> Any:
            return (await connection.execute(text(query))).scalar_one()

        await connection.execute(_TOLD)
        await connection.execute(
            _TELL,
            {
                "kinds": [one.kind for one in told],
                "jobs": [one.job_id for one in told],
                "orders": [one.order_id for one in told],
                "committed": [one.committed for one in told],
            },
        )
        return Findings(
            enqueued=await count("SELECT count(*) FROM told WHERE committed"),
            rolled_back=await count("SELECT count(*) FROM told WHERE NOT committed"),
            succeeded=await count(
                "SELECT count(*) FROM exarq.job JOIN told ON job_id = job.id WHERE committed AND state = 'succeeded'"
            ),
            follow_ups=await count("SELECT count(*) FROM exarq.job WHERE name = 'inventory.summarise'"),
            done=await count("SELECT count(*) FROM exarq.job WHERE state IN ('succeeded', 'failed', 'cancelled')"),
            files=await count("SELECT count(*) FROM distributed_file"),
            distributions=await count("SELECT count(*) FROM distribution"),
            lost=await count(_LOST),
            repeated_effects=await count(_REPEATED),
            phantoms=await count(_PHANTOMS),
            out_of_step=await out_of_step(connection),
        )
