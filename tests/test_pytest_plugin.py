"""The pytest plugin in a project of somebody else's: fixtures without a conftest, and nothing where nobody asks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sqlalchemy.ext.asyncio import create_async_engine

from tests.db.attempts import ask
from tests.servers import TestServers

pytestmark = pytest.mark.timeout(600)  # processes start slowly on a loaded machine

SHOP = """
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from worker import job

class Base(DeclarativeBase): ...

class Invoice(Base):
    __tablename__ = "invoice"
    id: Mapped[int] = mapped_column(primary_key=True)
    paid: Mapped[bool] = mapped_column(default=False)

@job
async def charge(session: AsyncSession, invoice_id: int) -> str:
    (await session.get_one(Invoice, invoice_id)).paid = True
    return f"invoice {invoice_id} is paid"

async def order(session: AsyncSession) -> Invoice:
    session.add(invoice := Invoice())
    await session.flush()
    await charge.options(delay=3600).enqueue(session, invoice.id)
    await session.commit()
    return invoice
"""

TESTS = """
import pytest
from sqlalchemy import func, select
from shop import Base, Invoice, charge, order
from worker.testing import assert_enqueued, assert_not_enqueued, drain, frozen_clock, run_inline

@pytest.fixture(scope="session")
def exarq_prepare():
    return Base.metadata.create_all

async def test_an_order_is_charged_after_an_hour(exarq_session):
    with frozen_clock() as clock:
        invoice = await order(exarq_session)
        await assert_enqueued(exarq_session, charge, invoice_id=invoice.id, delay=3600)
        assert await drain(exarq_session) == []
        clock.tick(3600)
        (ended,) = await drain(exarq_session)
    assert ended.outcome == "succeeded"
    assert invoice.paid

async def test_nothing_is_left_of_the_test_before(exarq_session):
    await assert_not_enqueued(exarq_session)
    assert await exarq_session.scalar(select(func.count()).select_from(Invoice)) == 0

async def test_the_function_alone(exarq_session):
    exarq_session.add(Invoice(id=7))
    assert await run_inline(charge, exarq_session, 7) == "invoice 7 is paid"

async def test_for_real(exarq_client):
    async with exarq_client.sessions() as session:
        invoice = await order(session)
    assert len(await drain(exarq_client, with_scheduled=True)) == 1
    async with exarq_client.sessions() as session:
        assert (await session.get_one(Invoice, invoice.id)).paid
"""

FAILS = """
from test_shop import exarq_prepare
from shop import charge, order
from worker.testing import assert_enqueued

async def test_of_another_invoice(exarq_session):
    print("made", exarq_session.bind.engine.url.database)
    invoice = await order(exarq_session)
    await assert_enqueued(exarq_session, charge, invoice_id=invoice.id + 1, queue="slow")
"""


def pytest_in(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What a user of that project sees."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("EXARQ_", "PYTEST_"))}
    options = ["-p", "no:cacheprovider", "-p", "no:valkey", "-W", "error"]
    options += ["-o", "asyncio_mode=auto", "-o", "asyncio_default_fixture_loop_scope=function"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", *options, *arguments],
        cwd=folder,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, content in {"shop.py": SHOP, "test_shop.py": TESTS, "test_fails.py": FAILS}.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    return tmp_path


def test_a_project_tests_its_jobs_without_a_conftest_or_a_server(project: Path) -> None:
    done = pytest_in(project, "test_shop.py")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "4 passed" in done.stdout


async def test_a_failing_assertion_says_what_was_enqueued_instead_and_the_configured_server_is_left_clean(
    project: Path, servers: TestServers
) -> None:
    url = servers.admin_url.render_as_string(hide_password=False)

    done = pytest_in(project, "test_fails.py", EXARQ_TEST_DATABASE_URL=url)

    assert done.returncode == 1, done.stdout + done.stderr
    assert "E       AssertionError: no job shop.charge(invoice_id=2) with queue 'slow' was enqueued" in done.stdout
    assert "E         shop.charge(invoice_id=1)  queue 'default', delay 1:00:00, queued" in done.stdout
    assert "test_fails.py:9: AssertionError" in done.stdout
    (database,) = re.findall("made (exarq_test_[0-9]+)_", done.stdout)
    engine = create_async_engine(servers.admin_url)
    assert await ask(engine, f"SELECT count(*) FROM pg_database WHERE datname ^@ '{database}_'") == 0
    await engine.dispose()


def test_a_run_that_asks_for_no_fixture_imports_nothing_heavy(tmp_path: Path) -> None:
    (tmp_path / "test_plain.py").write_text(
        "import sys\n"
        "def test_plain(request):\n"
        "    assert 'worker.pytest_plugin' in sys.modules\n"
        "    assert not {'sqlalchemy', 'pydantic', 'arq', 'redis', 'asyncpg'} & set(sys.modules)\n"
    )

    done = pytest_in(tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
