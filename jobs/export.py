"""Export what was catalogued: as many rows as there are, in the memory of a thousand."""

from __future__ import annotations

import asyncio
import csv
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, TextIO

from sqlalchemy import select

from jobs.inventory import DistributedFile
from worker import JobContext, job

_COLUMNS: Final = ("id", "distribution_id", "path", "size", "sha256")
_AT_ONCE: Final = 1000


@job(read_only=True, timeout=3600)
async def export_csv(ctx: JobContext, path: str) -> int:
    """Write all catalogued files to a CSV file, which is there as a whole or not at all; returns how many.

    A file is an effect outside the database: an attempt that runs again writes it again.
    """
    query = select(*(getattr(DistributedFile, name) for name in _COLUMNS)).order_by(DistributedFile.id)
    rows = 0
    with _whole_file(path, f"{ctx.idempotency_key}.{ctx.attempt}") as file:
        lines = csv.writer(file)
        lines.writerow(_COLUMNS)
        found = await ctx.session.stream(query.execution_options(yield_per=_AT_ONCE))
        async for some in found.partitions():
            lines.writerows(some)
            rows += len(some)
        file.flush()
        await asyncio.to_thread(os.fsync, file.fileno())
    return rows


@contextmanager
def _whole_file(path: str, attempt: str) -> Iterator[TextIO]:
    """A file to write, which appears under its name when the block has ended without an error."""
    part = Path(f"{path}.{attempt}.part")
    try:
        with part.open("w", newline="", encoding="utf-8") as file:
            yield file
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
