"""What mypy says to users of the front door, in strict mode: each marked line is refused for its reason, no other is."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from pathlib import Path
from typing import cast

import pytest
from sqlalchemy.orm import Session

from worker import JobContext
from worker.flow.job import JobFunction, SyncJobFunction

REPOSITORY = Path(__file__).parents[2]
SAID = re.compile(r"^.*uses\.py:(?P<line>\d+): error: (?P<text>.+)$")

USES = """
from collections.abc import Coroutine
from typing import Any, assert_type
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, scoped_session
from worker import Cancellation, Handle, JobContext, cancel, enqueue, enqueue_many, handle_of, job
from worker import Scheduled, add_schedule, list_schedules, run_schedule
from worker import enqeue  # refused: has no attribute "enqeue"

@job
async def charge(session: AsyncSession, invoice_id: int, memo: str = "") -> list[str]:
    return [memo]

@job(queue="mail", max_attempts=3, timeout=60, isolation="SERIALIZABLE", read_only=True, commits=None)
async def deliver(ctx: JobContext, url: str, *, tries: int) -> float:
    return 1.0

@job
def close_month(session: Session, month: str, *, force: bool = False) -> dict[str, int]:
    return {month: 1}

@job(queue="cpu")
def add_up(session: Session, numbers: list[int]) -> int:
    return sum(numbers)

@job  # refused: has incompatible type
def not_async(session: AsyncSession) -> int:
    return 1

@job(isolation="AUTOCOMMIT")  # refused: No overload variant of "job" matches argument type "str"
async def loose(ctx: JobContext) -> None: ...

@job(cron="0 3 * * *", timezone="Europe/Berlin", catch_up="all", overlap="skip")
async def nightly(ctx: JobContext) -> None: ...

@job(cron=3)  # refused: No overload variant of "job" matches argument type "int"
async def daily(ctx: JobContext) -> None: ...

@job(queue=7)  # refused: No overload variant of "job" matches argument type "int"
async def odd(ctx: JobContext) -> None: ...

async def wanted(session: AsyncSession, ctx: JobContext) -> None:
    assert_type(await charge.enqueue(session, 7), Handle[list[str]])
    assert_type(await charge.enqueue(session, invoice_id=7, memo="x"), Handle[list[str]])
    assert_type(await deliver.enqueue(session, "u", tries=1), Handle[float])
    assert_type(await charge.options(delay=60, queue="q").enqueue(session, 7, "x"), Handle[list[str]])
    assert_type(await enqueue_many(session, [charge.call(7), deliver.options(delay=1).call("u", tries=1)]), list[Handle[Any]])
    assert_type(await enqueue(session, "shop.charge", {"invoice_id": 7}), Handle[Any])
    assert_type(await cancel(session, (await charge.enqueue(session, 7)).id), Cancellation)
    handle = await charge.enqueue(session, 7)
    assert_type(await handle.result(timeout=30), list[str])
    assert_type(handle_of(session, handle.id, charge), Handle[list[str]])
    assert_type(handle_of(session, handle.id), Handle[Any])
    bare: Handle = handle
    assert_type(await charge(session, 7), list[str])
    assert_type(await deliver(ctx, "u", tries=2), float)
    coroutine: Coroutine[Any, Any, list[str]] = charge(session, 7)
    await coroutine
    assert_type(await close_month.enqueue(session, month="2026-10"), Handle[dict[str, int]])
    assert_type(await add_schedule(session, charge, {"invoice_id": 7}, every=60, name="x"), Scheduled)
    assert_type(await list_schedules(session), list[Scheduled])
    assert_type(await add_up.options(delay=60).enqueue(session, [7]), Handle[int])
    assert_type(await enqueue_many(session, [close_month.call("2026-10", force=True)]), list[Handle[Any]])

def plain_script(session: Session, scoped: scoped_session[Session]) -> None:
    assert_type(charge.enqueue(session, 7), Handle[list[str]])
    assert_type(charge.options(delay=1).enqueue(scoped, 7), Handle[list[str]])
    assert_type(enqueue_many(session, [charge.call(7)]), list[Handle[Any]])
    assert_type(enqueue(session, "shop.charge"), Handle[Any])
    assert_type(cancel(session, charge.enqueue(session, 7).id), Cancellation)
    charge.enqueue(session, "7")  # refused: No overload variant of "enqueue" of "JobFunction" matches argument types "Session", "str"
    assert_type(add_schedule(session, "shop.charge", cron="0 3 * * *", timezone="UTC"), Scheduled)
    assert_type(run_schedule(scoped, "x"), Handle[Any])
    assert_type(close_month(session, "2026-10"), dict[str, int])
    assert_type(add_up(session, [7]), int)

async def refused(session: AsyncSession, ctx: JobContext) -> None:
    await charge.enqueue(session, "7")  # refused: No overload variant of "enqueue" of "JobFunction" matches argument types "AsyncSession", "str"
    await charge.enqueue(session)  # refused: No overload variant of "enqueue" of "JobFunction" matches argument type "AsyncSession"
    await charge.enqueue(session, 7, "x", 1)  # refused: No overload variant of "enqueue" of "JobFunction" matches argument types "AsyncSession", "int", "str", "int"
    await charge.enqueue(session, 7, surplus=1)  # refused: Unexpected keyword argument "surplus"
    await charge.enqueue(7)  # refused: No overload variant of "enqueue" of "JobFunction" matches argument type "int"
    await deliver.enqueue(ctx, "u", tries=1)  # refused: No overload variant of "enqueue" of "JobFunction" matches argument types "JobContext", "str", "int"
    await cancel(session, "0199c0de")  # refused: No overload variant of "cancel" matches argument types "AsyncSession", "str"
    await deliver.enqueue(session, "u")  # refused: No overload variant of "enqueue" of "JobFunction" matches argument types "AsyncSession", "str"
    await deliver.enqueue(session, "u", 1)  # refused: No overload variant of "enqueue" of "JobFunction" matches argument types "AsyncSession", "str", "int"
    await charge.options(delay=1).enqueue(session, "7")  # refused: No overload variant of "enqueue" of "Options" matches argument types "AsyncSession", "str"
    await charge.options(delay=1).enqueue(session)  # refused: No overload variant of "enqueue" of "Options" matches argument type "AsyncSession"
    await charge.options(delay=1).enqueue(session, 7, surplus=1)  # refused: Unexpected keyword argument "surplus"
    await add_schedule(session, "shop.charge", overlap="never")  # refused: No overload variant of "__call__" of "ForBoth" matches argument types
    charge.options(dealy=1)  # refused: Unexpected keyword argument "dealy"
    charge.call("7")  # refused: incompatible type "str"; expected "int"
    charge.call()  # refused: invoice_id
    charge.call(7, surplus=1)  # refused: Unexpected keyword argument "surplus"
    charge.options(delay=1).call("7")  # refused: incompatible type "str"; expected "int"
    await charge(session, "7")  # refused: incompatible type "str"; expected "int"
    await charge(session)  # refused: invoice_id
    await charge(session, 7, surplus=1)  # refused: Unexpected keyword argument "surplus"
    await charge(ctx, 7)  # refused: expected "AsyncSession"
    await deliver(session, "u", tries=1)  # refused: expected "JobContext"
    number: int = await (await charge.enqueue(session, 7)).result()  # refused: expression has type "list[str]"
    text: str = await charge(session, 7)  # refused: expression has type "list[str]"
    await close_month.enqueue(session, 7)  # refused: No overload variant of "enqueue" of "JobFunction" matches argument types "AsyncSession", "int"
    await close_month.enqueue(session)  # refused: No overload variant of "enqueue" of "JobFunction" matches argument type "AsyncSession"
    await close_month.enqueue(session, "2026-10", True)  # refused: No overload variant of "enqueue" of "JobFunction" matches argument types "AsyncSession", "str", "bool"
    await add_up.options(delay=1).enqueue(session, ["7"])  # refused: "str"; expected "int"
    close_month(session, "2026-10")  # refused: expected "Session"
"""


@pytest.fixture
def said(tmp_path: Path) -> dict[int, str]:
    """What a strict run says about `USES`, by line; with the configuration of `make check`, and so from its cache."""
    file = tmp_path / "uses.py"
    file.write_text(USES)
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--no-error-summary", "--hide-error-codes", str(file)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stderr == ""
    found: dict[int, str] = {}
    for line in done.stdout.splitlines():
        if match := SAID.match(line):
            number = int(match["line"])
            found[number] = f"{found.get(number, '')}{match['text']}\n"
        else:
            assert ": error: " not in line, line
    return found


def marked() -> dict[int, str]:
    lines = enumerate(USES.splitlines(), 1)
    return {number: line.partition("# refused: ")[2] for number, line in lines if "# refused: " in line}


# One test, for the run takes long and each process that shares the suite would repeat it.
@pytest.mark.timeout(600)
def test_right_uses_are_accepted_with_their_types_and_wrong_ones_refused_for_their_reason(said: dict[int, str]) -> None:
    reasons = marked()

    assert sorted(said) == sorted(reasons)
    assert {line: reason for line, reason in reasons.items() if reason not in said[line]} == {}


async def test_a_decorated_function_stays_awaitable_as_it_was() -> None:
    async def double(ctx: JobContext, number: int) -> int:
        """Twice the number."""
        return 2 * number

    doubled = JobFunction(double)

    assert inspect.iscoroutinefunction(doubled)
    assert inspect.signature(doubled) == inspect.signature(double)
    assert inspect.getdoc(doubled) == "Twice the number."
    assert await doubled(cast("JobContext", None), 4) == 8


def test_a_decorated_def_stays_the_sync_function_it_was() -> None:
    def double(session: Session, number: int) -> int:
        """Twice the number."""
        return 2 * number

    doubled = SyncJobFunction(double)

    assert not inspect.iscoroutinefunction(doubled)
    assert inspect.signature(doubled) == inspect.signature(double)
    assert inspect.getdoc(doubled) == "Twice the number."
    assert doubled(cast("Session", None), 4) == 8
