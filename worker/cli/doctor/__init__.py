"""`exarq doctor`: look at everything an installation stands on, and say of each what to do."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Final

from rich.text import Text

from worker.addresses import database_url, redis_url
from worker.cli.doctor import of_jobs, of_postgres, of_redis
from worker.cli.doctor.finding import Finding, error
from worker.cli.output import Column, print_json, print_table
from worker.core.errors import DatabaseUnreachable, ExarqError
from worker.settings import Settings, load_settings

_STYLES: Final = {"ok": "green", "warning": "yellow", "error": "bold red"}


def examine(*, as_json: bool) -> int:
    """Print every finding; returns 1 when one is an error, else 0."""
    findings = asyncio.run(_examine(load_settings()))
    if as_json:
        print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        rows: list[list[str | Text]] = [
            [
                Text(finding.level, style=_STYLES[finding.level]),
                finding.what,
                f"{finding.found}; {finding.advice}" if finding.advice else finding.found,
            ]
            for finding in findings
        ]
        print_table([Column("is"), Column("what"), Column("found, and what to do", folds=True)], rows)
    return int(any(finding.level == "error" for finding in findings))


async def _examine(settings: Settings) -> list[Finding]:
    findings = of_jobs.modules(settings)
    try:
        url = database_url(settings)
        findings += await of_postgres.look(settings, url)
        findings += await of_jobs.look(settings, url)
    except DatabaseUnreachable as away:
        findings.append(error("PostgreSQL", *_parts(away)))
    except ExarqError as wrong:
        findings.append(error("database", *_parts(wrong)))
    try:
        findings += await of_redis.look(settings, redis_url(settings))
    except ExarqError as wrong:
        findings.append(error("Redis", *_parts(wrong)))
    return findings


def _parts(wrong: ExarqError) -> tuple[str, str]:
    """What is wrong, and the advice that each of our errors ends with."""
    found, _, advice = str(wrong).partition("; ")
    return found, advice
