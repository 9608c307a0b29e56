"""What an error may show, and what is said where PostgreSQL takes no writes."""

from __future__ import annotations

from datetime import timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from worker.core.errors import DatabaseUnreachable
from worker.db.engine import processor_engine
from worker.db.unreachable import database_errors

SECOND = timedelta(seconds=5)


async def test_an_error_of_exarqs_own_statements_shows_no_values(database_url: str) -> None:
    engine = processor_engine(
        database_url,
        application_name=lambda: "test",
        connections=1,
        connect_timeout=SECOND,
        statement_timeout=SECOND,
    )

    with pytest.raises(DBAPIError) as caught:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1/0, CAST(:args AS text)"), {"args": '{"card": "4111"}'})

    await engine.dispose()
    assert "division by zero" in str(caught.value)
    assert "4111" not in str(caught.value)


async def test_a_database_that_takes_no_writes_is_one_line_with_advice(database_url: str) -> None:
    engine = processor_engine(
        database_url,
        application_name=lambda: "test",
        connections=1,
        connect_timeout=SECOND,
        statement_timeout=SECOND,
    )

    async def write() -> None:
        with database_errors(database_url):
            async with engine.connect() as connection:
                await connection.execute(text("SET TRANSACTION READ ONLY"))
                await connection.execute(text("DELETE FROM exarq.job"))

    with pytest.raises(DatabaseUnreachable, match=r"takes no writes .*; give the address of the primary"):
        await write()

    await engine.dispose()
