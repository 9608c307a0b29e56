"""A program: runs the job that its arguments name, and prints how much memory that took at its height, in bytes."""

from __future__ import annotations

import asyncio
import csv
import re
import resource
import sys
from pathlib import Path

from sqlalchemy import select

from jobs.export import export_csv
from jobs.inventory import DistributedFile
from tests.flow.helpers import run_job
from tests.support import a_job, a_work, row
from worker import JobContext, load_settings
from worker.core.registry import Registry
from worker.flow.job import JobFunction
from worker.flow.work import Work


async def all_at_once(ctx: JobContext, path: str) -> int:
    """The same export as it is often written."""
    file = DistributedFile
    rows = (await ctx.session.execute(select(file.id, file.distribution_id, file.path, file.size, file.sha256))).all()
    with Path(path).open("w", newline="") as out:  # noqa: ASYNC230 — it is about memory
        csv.writer(out).writerows(rows)
    return len(rows)


def height() -> int:
    """The most memory that this process has had so far, in bytes."""
    status = Path("/proc/self/status")  # on Linux the other one remembers the process that started this one
    if status.exists():
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        assert found is not None
        return int(found[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


async def exported(work: Work, name: str, path: str, rows: int) -> None:
    """Run the job on a catalogue of so many files, none of which is stored anywhere."""
    async with work.jobs_engine.begin() as connection:
        await connection.exec_driver_sql(
            "CREATE OR REPLACE VIEW distributed_file AS SELECT n AS id, 1 AS distribution_id, 'a/file/' || n AS path,"
            f" n AS size, md5(n::text) || md5(n::text) AS sha256 FROM generate_series(1, {rows}) n"
        )
    job_id = await a_job(work.jobs_engine, name=name, args={"path": path})
    await run_job(work, job_id)
    assert (await row(work.jobs_engine, job_id)).result == rows


async def main(name: str, path: str, rows: str) -> None:
    registry = Registry()
    registry.register(export_csv)
    registry.register(JobFunction(all_at_once, name="all_at_once"))
    async with a_work(load_settings(), registry) as work:
        await exported(work, name, path, 1_000)  # so that what every job needs is there
        before = height()
        await exported(work, name, path, int(rows))
        print(height() - before)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
