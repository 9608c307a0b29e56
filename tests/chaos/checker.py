"""The checker: business tables, job tables and the files outside, against one another; each invariant names its offenders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from tests.chaos import evidence
from tests.chaos.jobs import KINDS, PREFIX
from worker.flow.holdings import Because


@dataclass(frozen=True, slots=True)
class Offence:
    """One job, or thing, that breaks an invariant."""

    invariant: str
    subject: str
    why: str


@dataclass(slots=True)
class Excuse:
    """A worker whose silence was our doing, in seconds since the epoch; for ever unless it was set free again."""

    worker_id: UUID
    since: float
    until: float = float("inf")


@dataclass(slots=True)
class Findings:
    """What the checker found."""

    offences: list[Offence] = field(default_factory=list)
    jobs: int = 0
    ran_again: int = 0
    stale_refused: int = 0

    def count(self, invariant: str) -> int:
        """How many offend against this invariant."""
        return sum(offence.invariant == invariant for offence in self.offences)

    @property
    def broken(self) -> set[str]:
        """The invariants that do not hold."""
        return {offence.invariant for offence in self.offences}


# Every query returns who offends and why. `told` is what the producers noted, `ran` what the workers noted.
INVARIANTS: Final[Mapping[str, str]] = {
    "lost": """
        SELECT told.job_id, 'its producer saw the commit, and there is no row' FROM told
        WHERE said = 'committed' AND NOT EXISTS (SELECT FROM exarq.job WHERE id = told.job_id)
        UNION ALL SELECT job_id, 'its business row is there, and no job' FROM placed
        WHERE NOT EXISTS (SELECT FROM exarq.job WHERE id = placed.job_id)
        UNION ALL SELECT child, 'a follow-up whose parent committed, and there is no row' FROM effect
        WHERE child IS NOT NULL AND NOT EXISTS (SELECT FROM exarq.job WHERE id = effect.child)
        UNION ALL SELECT mark, 'plain ARQ code saw its enqueue, Redis has lost nothing since, and there is no job' FROM plain
        WHERE enqueued AND NOT EXISTS (SELECT FROM marked WHERE marked.mark = plain.mark)
        AND NOT EXISTS (SELECT FROM wiped WHERE wiped.at >= plain.at)
        UNION ALL SELECT id, 'has not ended: ' || state FROM exarq.job WHERE state IN ('queued', 'running')
        UNION ALL SELECT id, 'cancelled, and nobody asked' FROM ours WHERE state = 'cancelled' AND ends <> 'cancelled'
        AND NOT EXISTS (SELECT FROM asked WHERE job_id = id)
        UNION ALL SELECT id, 'succeeded without all its effects' FROM ours
        WHERE state = 'succeeded' AND effects < parts
        UNION ALL SELECT id, 'succeeded, and no worker has run that attempt' FROM ours
        WHERE state = 'succeeded' AND NOT EXISTS (SELECT FROM ran WHERE job_id = id AND ran.attempt = ours.attempt)
    """,
    "phantoms": """
        SELECT id, 'nobody placed it' FROM exarq.job
        WHERE NOT EXISTS (SELECT FROM placed WHERE job_id = id) AND NOT EXISTS (SELECT FROM effect WHERE child = id)
        AND NOT EXISTS (SELECT FROM exarq.schedule WHERE schedule.job = job.name)
        AND NOT EXISTS (SELECT FROM marked JOIN plain USING (mark) WHERE marked.job_id = id)
        UNION ALL SELECT mark, 'one enqueue by plain ARQ code, ' || count(*) || ' jobs' FROM marked
        GROUP BY mark HAVING count(*) > 1
        UNION ALL SELECT job_id, 'its transaction was rolled back' FROM told
        WHERE said = 'rolled back' AND EXISTS (SELECT FROM exarq.job WHERE id = told.job_id)
        UNION ALL SELECT job_id, 'an effect of no job' FROM effect
        WHERE NOT EXISTS (SELECT FROM exarq.job WHERE id = effect.job_id)
        UNION ALL SELECT job_id, 'its hint was in Redis before its commit' FROM early
    """,
    "repeated_effects": """
        SELECT job_id, 'part ' || part || ' took effect ' || count(*) || ' times' FROM effect
        GROUP BY job_id, part HAVING count(*) > 1
        UNION ALL SELECT id, 'more effects than it has parts' FROM ours WHERE effects > parts AND parts > 0
    """,
    "out_of_step": """
        SELECT id, state || ', and ' || effects || ' effects are visible' FROM ours
        WHERE state <> 'succeeded' AND effects > 0 AND NOT own
        UNION ALL SELECT id, 'succeeded without a result' FROM exarq.job WHERE state = 'succeeded' AND result IS NULL
        UNION ALL SELECT id, state || ', and has a result' FROM exarq.job WHERE state <> 'succeeded' AND result IS NOT NULL
        UNION ALL SELECT id, 'succeeded, and its function never returns' FROM ours
        WHERE state = 'succeeded' AND ends <> 'succeeded'
        UNION ALL SELECT ours.id, 'part ' || part || ' is visible, which it had undone' FROM ours
        JOIN effect ON effect.job_id = ours.id WHERE part >= parts
        UNION ALL SELECT job_id, why FROM seen_out_of_step
    """,
    "told_otherwise": """
        SELECT heard.job_id, 'its result was told as of attempt ' || heard.attempt || ', and it is '
            || coalesce(job.state, 'gone') || ', attempt ' || coalesce(job.attempt, 0)
        FROM heard LEFT JOIN exarq.job ON id = job_id
        WHERE state IS DISTINCT FROM 'succeeded' OR CAST(result ->> 'attempt' AS integer) <> heard.attempt
    """,
    "stale_accepted": """
        SELECT id, 'row of attempt ' || attempt || ', result ' || coalesce(CAST(result AS text), 'none') FROM ours
        WHERE state = 'succeeded' AND (CAST(result ->> 'attempt' AS integer) IS DISTINCT FROM attempt
            OR result ->> 'job' IS DISTINCT FROM CAST(id AS text))
        UNION ALL SELECT ours.id, 'effect of attempt ' || effect.attempt || ', row of attempt ' || ours.attempt
        FROM ours JOIN effect ON effect.job_id = ours.id WHERE state = 'succeeded' AND effect.attempt <> ours.attempt AND NOT own
        UNION ALL SELECT job_id, 'attempt ' || early.attempt || ' committed part ' || early.part || ', attempt '
            || late.attempt || ' had gone on from part ' || late.part || ' before'
        FROM effect AS late JOIN effect AS early USING (job_id)
        WHERE late.part < early.part AND late.attempt > early.attempt
        UNION ALL SELECT history.job_id, was || ' → ' || became || ' by ' || writer || ', held by ' || worker_id
        FROM history WHERE was = 'running' AND NOT EXISTS (  -- by the process that held it, maybe under a later id
            SELECT FROM id AS holder JOIN id AS author USING (process)
            WHERE holder.worker_id = history.worker_id AND 'exarq ' || author.worker_id = writer)
        AND NOT EXISTS (  -- nor given back in the name of a worker that is no more
            SELECT FROM exarq.attempt WHERE attempt.job_id = history.job_id AND attempt.token = history.old_token
            AND (attempt.error LIKE 'worker % stopped beating%' OR attempt.error LIKE 'its process % died %'))
    """,
    "illegal_moves": """
        SELECT job_id, coalesce(was, 'nothing') || ' → ' || coalesce(became, 'nothing') FROM history
        WHERE (coalesce(was, '-'), coalesce(became, '-')) NOT IN (
            ('-', 'queued'), ('queued', 'running'), ('queued', 'cancelled'), ('running', 'queued'),
            ('running', 'succeeded'), ('running', 'failed'), ('running', 'cancelled'))
        AND NOT (was = 'cancelled' AND became = 'queued'
            AND EXISTS (SELECT FROM wanted_again WHERE wanted_again.job_id = history.job_id))
        UNION ALL SELECT job_id, 'claimed twice as attempt ' || attempt FROM history
        WHERE was = 'queued' AND became = 'running' GROUP BY job_id, attempt HAVING count(*) > 1
        UNION ALL SELECT job_id, 'a token was used for two attempts' FROM history
        WHERE was = 'queued' AND became = 'running' GROUP BY job_id, token HAVING count(*) > 1
        UNION ALL SELECT job_id, 'attempt ' || attempt || ' ran twice' FROM ran
        GROUP BY job_id, attempt HAVING count(*) > 1
        UNION ALL SELECT job.id, 'its attempts are not numbered 1, 2, 3 …' FROM exarq.job
        LEFT JOIN history ON job_id = id AND was = 'queued' AND became = 'running'
        GROUP BY job.id HAVING max(job.attempt) <> count(history.n)
    """,
    "two_live": """
        SELECT later.id, 'came while ' || live.id || ' had its key and was not done' FROM keyed AS live
        JOIN keyed AS later USING (name, unique_key) CROSS JOIN LATERAL (
            SELECT became FROM history WHERE job_id = live.id AND at < later.came ORDER BY n DESC LIMIT 1) AS stood
        WHERE live.id <> later.id AND stood.became IN ('queued', 'running')
    """,
    "ticks": """
        SELECT CAST(first_due_at AS text), 'this tick has ' || count(*) || ' jobs'
        FROM exarq.job JOIN exarq.schedule ON schedule.job = job.name GROUP BY first_due_at HAVING count(*) > 1
        UNION ALL SELECT CAST(tick AS text), 'this tick has no job'
        FROM exarq.schedule CROSS JOIN generate_series(since + every, next_at - every, every) AS tick
        WHERE NOT EXISTS (SELECT FROM exarq.job WHERE job.name = schedule.job AND first_due_at = tick)
        UNION ALL SELECT CAST(first_due_at AS text), 'has a job, and the schedule has not moved on'
        FROM exarq.job JOIN exarq.schedule ON schedule.job = job.name WHERE first_due_at >= next_at
        UNION ALL SELECT 'the clock', 'has not ticked' WHERE NOT EXISTS (
            SELECT FROM exarq.schedule WHERE last_at IS NOT NULL)
    """,
    "innocents_failed": """
        SELECT id, 'failed after ' || failures || ' failures and ' || crashes || ' crashes: ' || coalesce(error, '')
        FROM ours CROSS JOIN LATERAL (
            SELECT count(*) AS kills FROM exarq.attempt JOIN killed USING (worker_id)
            WHERE job_id = id AND ending = 'crashed') AS of_ours
        WHERE state = 'failed' AND ends <> 'failed' AND NOT (  -- a poison job costs its neighbours two crashes at most
            coalesce(error LIKE 'worker % stopped beating%' OR error LIKE 'its process % died %', false) AND kills > 0 AND crashes - kills <= 2)
    """,
    "false_rescues": """
        SELECT worker_id, 'was rescued and had not been silent' FROM id JOIN (
            SELECT worker_id, at FROM rescued  -- or, where the rescuer died before it could say so:
            UNION SELECT worker_id, finished_at FROM exarq.attempt WHERE error LIKE 'worker % stopped beating%'
        ) AS rescue USING (worker_id)
        WHERE NOT EXISTS (
            SELECT FROM excused WHERE excused.worker_id = rescue.worker_id AND rescue.at BETWEEN since AND until)
        GROUP BY worker_id
    """,
}

_TABLES: Final = """
CREATE TEMPORARY TABLE told (job_id uuid PRIMARY KEY, said text) ON COMMIT DROP;
CREATE TEMPORARY TABLE ran (job_id uuid, attempt integer) ON COMMIT DROP;
CREATE TEMPORARY TABLE asked (job_id uuid) ON COMMIT DROP;
CREATE TEMPORARY TABLE wanted_again (job_id uuid) ON COMMIT DROP;
CREATE TEMPORARY TABLE early (job_id uuid) ON COMMIT DROP;
CREATE TEMPORARY TABLE heard (job_id uuid, attempt integer) ON COMMIT DROP;
CREATE TEMPORARY TABLE rescued (worker_id uuid, at timestamptz) ON COMMIT DROP;
CREATE TEMPORARY TABLE id (worker_id uuid PRIMARY KEY, process text) ON COMMIT DROP;
CREATE TEMPORARY TABLE excused (worker_id uuid, since timestamptz, until timestamptz) ON COMMIT DROP;
CREATE TEMPORARY TABLE killed (worker_id uuid) ON COMMIT DROP;
CREATE TEMPORARY TABLE seen_out_of_step (job_id uuid, why text) ON COMMIT DROP;
CREATE TEMPORARY TABLE plain (mark uuid PRIMARY KEY, at timestamptz, enqueued boolean) ON COMMIT DROP;
CREATE TEMPORARY TABLE wiped (at timestamptz) ON COMMIT DROP;
CREATE TEMPORARY TABLE kind (name text PRIMARY KEY, parts integer, ends text, own boolean) ON COMMIT DROP;
"""
_LATEST: Final = 4_000_000_000.0
_NAMES: Final = ("WorkerStarted", "WorkerRenewed")
_OURS: Final = """
CREATE TEMPORARY TABLE ours ON COMMIT DROP AS
SELECT job.*, kind.parts, kind.ends, kind.own, coalesce(written.effects, 0) AS effects FROM exarq.job JOIN kind USING (name)
LEFT JOIN (SELECT job_id, count(*) AS effects FROM effect GROUP BY job_id) AS written ON written.job_id = job.id
"""

_MARKED: Final = """
CREATE TEMPORARY TABLE marked ON COMMIT DROP AS
SELECT id AS job_id, CAST(args ->> 'mark' AS uuid) AS mark FROM exarq.job WHERE name = 'chaos.plain' AND args ? 'mark'
"""

_KEYED: Final = """
CREATE TEMPORARY TABLE keyed ON COMMIT DROP AS
SELECT job.id, name, unique_key, min(at) AS came FROM exarq.job JOIN history ON job_id = job.id
WHERE unique_for = 'until_done' AND unique_key IS NOT NULL GROUP BY job.id
"""


async def check(
    engine: AsyncEngine,
    folder: Path,
    *,
    excuses: Iterable[Excuse],
    poisoned: Set[UUID],
    out_of_step: Iterable[Any],
    wipes: Iterable[float] = (),
) -> Findings:
    """Look for offenders against every invariant that the tables and files can tell.

    Args:
        engine: the database, past all proxies.
        folder: where the processes' files are.
        excuses: when workers were killed, stopped, cut off or given no time, so that their rescue was right.
        poisoned: those that died of a job.
        out_of_step: (job, why) of what a look at the running system has found.
        wipes: when Redis had lost something, in which alone a plain ARQ job lives until it is adopted.

    """
    lines = list(evidence.read(folder))
    async with engine.begin() as connection:
        for statement in _TABLES.strip().split(";\n"):
            await connection.execute(text(statement.rstrip(";")))
        await _load(connection, lines, list(excuses), poisoned, list(out_of_step))
        await _copy(connection, "wiped", ((_moment(wiped),) for wiped in wipes))
        await connection.execute(text(_OURS))
        await connection.execute(text(_KEYED))
        await connection.execute(text(_MARKED))
        for table in ("told", "ran", "ours"):
            await connection.execute(text(f"ANALYZE {table}"))
        await connection.execute(text("CREATE INDEX ON ran (job_id)"))
        findings = Findings(stale_refused=stale_refused(lines))
        for invariant, query in INVARIANTS.items():
            rows = await connection.execute(text(query))
            findings.offences += [Offence(invariant, str(subject), str(why)) for subject, why in rows]
        findings.jobs = int((await connection.execute(text("SELECT count(*) FROM exarq.job"))).scalar_one())
        again = text("SELECT count(*) FROM (SELECT FROM ran GROUP BY job_id HAVING count(*) > 1) AS jobs")
        findings.ran_again = int((await connection.execute(again)).scalar_one())
    findings.offences += _pools(lines)
    return findings


async def _load(
    connection: AsyncConnection,
    lines: list[dict[str, Any]],
    excuses: list[Excuse],
    poisoned: Set[UUID],
    out_of_step: list[Any],
) -> None:
    said: dict[str, str] = {}
    for line in lines:
        if line["what"] in ("intent", "committed", "rolled back", "unknown"):
            said.update(dict.fromkeys(line["jobs"], line["what"]))
    await _copy(connection, "told", said.items())
    await _copy(connection, "ran", ((line["job"], line["attempt"]) for line in lines if line["what"] == "began"))
    await _copy(connection, "heard", ((line["job"], line["attempt"]) for line in lines if line["what"] == "result"))
    await _copy(connection, "early", ((job,) for line in lines if line["what"] == "early" for job in line["jobs"]))
    again = ((job,) for line in lines if line["what"] == "wanted again" for job in line["jobs"])
    await _copy(connection, "wanted_again", again)
    await _copy(connection, "asked", ((job,) for line in lines if line["what"] == "asked" for job in line["jobs"]))
    ids = ((line.get("new") or line["worker"], line["by"]) for line in lines if line["what"] in _NAMES)
    await _copy(connection, "id", ids)
    rescued = ((line["worker"], _moment(line["at"])) for line in lines if line["what"] == "WorkerRescued")
    await _copy(connection, "rescued", rescued)
    excused = ((excuse.worker_id, _moment(excuse.since), _moment(excuse.until)) for excuse in excuses)
    await _copy(connection, "excused", excused)
    await _copy(connection, "killed", ((worker,) for worker in {excuse.worker_id for excuse in excuses} - poisoned))
    enqueued = {line["mark"] for line in lines if line["what"] == "plain enqueued"}
    intents = [(line["mark"], _moment(line["at"])) for line in lines if line["what"] == "plain intent"]
    await _copy(connection, "plain", ((mark, at, mark in enqueued) for mark, at in intents))
    await _copy(connection, "seen_out_of_step", out_of_step)
    await _copy(connection, "kind", ((PREFIX + name, kind.parts, kind.ends, kind.own) for name, kind in KINDS.items()))


async def _copy(connection: AsyncConnection, table: str, rows: Iterable[Any]) -> None:
    raw = await connection.get_raw_connection()
    assert raw.driver_connection is not None
    await raw.driver_connection.copy_records_to_table(table, records=[tuple(row) for row in rows])


def stale_refused(lines: Iterable[dict[str, Any]]) -> int:
    """How many writes were refused; where a beat had cancelled the run before, it tried none."""
    refused = {"StaleWriteRefused": 1, "RunCancelled": -1}
    return sum(
        refused.get(line["what"], 0) for line in lines if line.get("reason", Because.LEASE_LOST) == Because.LEASE_LOST
    )


def _pools(lines: list[dict[str, Any]]) -> list[Offence]:
    """A worker that stopped in order had every connection back in its pools, and has said so."""
    told = {line["by"] for line in lines if line["what"] == "pools"}
    return [
        *(Offence("pools_not_full", line["by"], "said nothing of its pools when it stopped")
          for line in lines if line["what"] == "WorkerStopped" and line["by"] not in told),
        *(Offence("pools_not_full", line["by"], f"{line['jobs']} of its jobs' connections and {line['processor']} of"
                  " its own were still out at its stop")
          for line in lines if line["what"] == "pools" and (line["jobs"] or line["processor"])),
    ]  # fmt: skip


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(min(seconds, _LATEST), UTC)
