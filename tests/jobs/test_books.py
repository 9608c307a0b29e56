"""The ledger's old code: run as the script it was and by a worker, it keeps the same books."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_OID, uuid5

import pytest
from sqlalchemy import Connection, create_engine, insert, select, text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

from jobs import ledger
from jobs.ledger import Account, PaymentOrder, Posting
from jobs.legacy import ledger as legacy
from tests.support import row, run_all
from worker import Settings
from worker.core.registry import Registry

Sessions = async_sessionmaker[AsyncSession]


@pytest.fixture
async def registry(engine: AsyncEngine) -> Registry:
    registry = Registry()
    for definition in (ledger.book, ledger.close_month):
        registry.register(definition)
    async with engine.begin() as connection:
        await ledger.create_tables(connection)
        await connection.execute(insert(Account), [{"name": "anna"}, {"name": "bert"}])
    return registry


DAYS = ["2026-09-30", "2026-10-01", "2026-10-17", "2026-10-31"]
NAMES = ["anna", "bert", "cora", "dora"]
PAYMENTS = [
    f"{uuid5(NAMESPACE_OID, str(n % 37))},{DAYS[n % 37 % 4]},{NAMES[n % 37 % 4]},{NAMES[(n % 37 + 1) % 4]},{n % 37 * 10 + 1}"
    for n in range(50)  # the bank sends the first thirteen twice
]


def books(connection: Connection) -> dict[str, list[tuple[Any, ...]]]:
    """Every row of the ledger, without the ids that a database draws."""
    tables: dict[str, Any] = {
        "accounts": select(legacy.Account.name),
        "orders": select(PaymentOrder.id, PaymentOrder.debit, PaymentOrder.credit, PaymentOrder.amount),
        "postings": select(Posting.order_id, Posting.account, Posting.amount, Posting.booked_on),
        "months": select(legacy.Month.name, legacy.Month.closed),
        "balances": select(legacy.Balance.month, legacy.Balance.account, legacy.Balance.amount),
    }
    return {name: sorted(tuple(found) for found in connection.execute(query)) for name, query in tables.items()}


def run_script(url: str, folder: Path) -> str:
    """What the old code says when it is run as it always was."""
    command = [sys.executable, "-W", "error", legacy.__file__, url, "2026-10"]
    given = "\n".join(PAYMENTS)
    done = subprocess.run(command, input=given, capture_output=True, text=True, cwd=folder, timeout=100)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_the_old_script_and_its_jobs_write_the_same_books(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}"
    said = await asyncio.to_thread(run_script, url, tmp_path)
    script = create_engine(url)
    with script.connect() as connection:
        expected = books(connection)
    script.dispose()

    async with sessions.begin() as session:
        booking = await ledger.book.enqueue(session, PAYMENTS)
    await run_all(settings, registry)
    async with sessions.begin() as session:
        closing = await ledger.close_month.enqueue(session, month="2026-10")
    await run_all(settings, registry)

    async with engine.connect() as connection:
        assert await connection.run_sync(books) == expected
    assert (await row(engine, booking.id)).result == 37
    balances = (await row(engine, closing.id)).result
    assert said.splitlines() == ["37 booked", *(f"{name} {balances[name]}" for name in NAMES)]
    assert sum(balances.values()) == sum(amount for *_, amount, _ in expected["postings"]) == 0
    assert expected["months"] == [("2026-10", True)]


async def test_a_close_that_fails_at_its_end_leaves_no_balance_although_it_committed_each(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry
) -> None:
    async with sessions.begin() as session:
        await ledger.book.enqueue(session, PAYMENTS)
    await run_all(settings, registry)
    async with engine.begin() as connection:
        await connection.execute(
            text("UPDATE posting SET amount = amount + 1 WHERE id = (SELECT min(id) FROM posting)")
        )
        await connection.execute(text("UPDATE posting SET booked_on = '2026-10-01'"))

    async with sessions.begin() as session:
        closing = await ledger.close_month.enqueue(session, month="2026-10")
    await run_all(settings, registry)

    assert "do not add up to nothing" in (await row(engine, closing.id)).error
    async with engine.connect() as connection:
        found = await connection.run_sync(books)
    assert found["months"] == found["balances"] == []


async def test_a_closed_month_takes_no_payment(
    engine: AsyncEngine, sessions: Sessions, settings: Settings, registry: Registry
) -> None:
    async with sessions.begin() as session:
        await ledger.close_month.enqueue(session, "2026-10")
    await run_all(settings, registry)
    async with sessions.begin() as session:
        late = await ledger.book.enqueue(session, PAYMENTS)
    await run_all(settings, registry)

    assert "2026-10 is closed" in (await row(engine, late.id)).error
    async with engine.connect() as connection:
        assert (await connection.run_sync(books))["postings"] == []
