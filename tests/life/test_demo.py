"""`exarq demo` as its audience runs it: real servers, real processes, a real SIGKILL and a real FLUSHALL."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from jobs import inventory, ledger
from tests.support import a_job, until
from worker.core.states import JobState
from worker.demo.notebook import CATALOGUE, POSTING, Notebook
from worker.demo.proof import prove

pytestmark = pytest.mark.timeout(900)  # processes start slowly on a loaded machine

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "worker", "demo"]
FEWER = ("--orders", "600")  # that many prove it too, at a third of the cost
KEYS = [
    "enqueued",
    "rolled_back",
    "succeeded",
    "lost",
    "repeated_effects",
    "phantoms",
    "workers_killed",
    "running_when_killed",
    "redis_wipes",
    "hints_when_wiped",
    "seconds",
]


def environment() -> dict[str, str]:
    """One in which whatever the demo took from its configuration would fail."""
    elsewhere = {"EXARQ_DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none", "EXARQ_REDIS_URL": "redis://127.0.0.1:1"}
    return {**os.environ, **elsewhere, "EXARQ_WORKER_CONCURRENCY": "1"}


def demo(*options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    ended = subprocess.run([*COMMAND, *options], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert ended.stdout, ended.stderr
    return ended, json.loads(ended.stdout.splitlines()[-1])


def test_a_killed_worker_and_a_wiped_redis_lose_nothing_and_repeat_nothing() -> None:
    distributions = len({found.metadata["Name"] for found in metadata.distributions()})

    ended, report = demo(*FEWER)

    assert ended.returncode == 0, ended.stderr
    assert list(report) == KEYS
    assert (report["lost"], report["repeated_effects"], report["phantoms"]) == (0, 0, 0)
    assert report["enqueued"] == report["succeeded"] == 540 + distributions
    assert report["rolled_back"] == 60
    assert report["workers_killed"] == report["redis_wipes"] == 1
    assert report["running_when_killed"] >= 10
    assert report["hints_when_wiped"] > 0
    files = sum(len(found.files or ()) for found in metadata.distributions())
    assert f"{files:,} files of {distributions} distributions" in ended.stderr
    assert_it_adds_up(ended, report)


def assert_it_adds_up(ended: subprocess.CompletedProcess[str], report: dict[str, Any]) -> None:
    """The table, the last progress and the JSON agree, and while the lease is awaited one line says so."""
    rows = {what: int(number.replace(",", "")) for what, number in re.findall(r"│ (.+?) +│ +([\d,]+) │", ended.stdout)}
    committed, rolled_back = rows["committed: orders and catalogue jobs"], rows["rolled back"]
    placed, done = rows["placed: committed + rolled back"], rows["done: committed + follow-ups"]
    assert (committed, rolled_back) == (report["enqueued"], report["rolled_back"])
    assert rows["succeeded, of those committed"] == report["succeeded"]
    assert placed == committed + rolled_back
    assert done == committed + rows["follow-ups enqueued by jobs"]
    assert f"All {done:,} jobs are done" in ended.stderr
    assert f"{placed:,} of {placed:,} placed" in ended.stderr
    assert "enqueued," not in ended.stderr
    _, waiting, after = ended.stderr.partition("waiting for the lease of the killed worker to end: 10 s without a beat")
    assert not waiting or " done" not in after.partition("run again")[0]


def test_outside_of_the_repository_one_line_says_where_the_demo_runs(tmp_path: Path) -> None:
    (tmp_path / "jobs.py").touch()  # somebody else's, before the repository's on the path

    ended = subprocess.run(COMMAND, cwd=tmp_path, env=environment(), capture_output=True, text=True)

    (line,) = ended.stderr.splitlines()
    assert (ended.returncode, ended.stdout) == (2, "")
    assert line.startswith("exarq: cannot import 'jobs.inventory'")
    assert "start it in a checkout" in line


def test_workers_that_complete_outside_the_transaction_are_found_out() -> None:
    ended, report = demo("--break", "--json", *FEWER)

    assert ended.returncode == 1
    assert ended.stdout.count("\n") == 1
    assert report["repeated_effects"] > 0
    assert report["lost"] == 0


def _hears_sigint() -> None:
    """A shell has what it starts in the background ignore SIGINT, and so its children; a person's terminal does not."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_an_interrupted_demo_leaves_no_process_and_no_folder(tmp_path: Path, number: signal.Signals) -> None:
    with (tmp_path / "story").open("w") as story:
        running = await asyncio.create_subprocess_exec(
            *COMMAND, cwd=ROOT, env=environment(), stdout=story, stderr=story, preexec_fn=_hears_sigint
        )
    await until(lambda: "Two workers start" in (tmp_path / "story").read_text(), "the workers have started", 150)
    started = descendants(running.pid)
    (folder,) = {found[1] for command in started.values() if (found := re.search(r"-D (\S+)/data", command))}
    assert exists(folder, "demo", "enqueues.jsonl")

    running.send_signal(number)
    code = await running.wait()

    assert code == 130
    assert len([command for command in started.values() if "-m worker run" in command]) == 2
    assert not exists(folder)
    await until(lambda: not started.keys() & processes().keys(), "all that it started is gone")


@pytest.mark.parametrize(
    ("committed", "damage", "found"),
    [
        (True, "SELECT 1", {}),
        (True, "DELETE FROM posting", {"lost": 1, "out_of_step": 1}),
        (True, "DELETE FROM posting WHERE amount < 0", {"repeated_effects": 1}),
        (True, "INSERT INTO posting (order_id, account, amount) SELECT order_id, account, amount FROM posting", {"repeated_effects": 1}),
        (True, "UPDATE exarq.job SET state = 'queued' WHERE name = 'ledger.post'", {"out_of_step": 1}),
        (True, "DELETE FROM inventory_total", {"lost": 1, "out_of_step": 1}),
        (True, "INSERT INTO inventory_total (job_id, distribution_id, files, missing, bytes) SELECT job_id, distribution_id, 0, 0, 0 FROM inventory_total", {"repeated_effects": 1}),
        (True, "INSERT INTO distribution (job_id, name, version, location) SELECT job_id, name, version, location FROM distribution", {"repeated_effects": 1}),
        (False, "SELECT 1", {"phantoms": 5}),  # an order, its postings, a distribution, and both jobs
        (False, "DELETE FROM payment_order; DELETE FROM posting; DELETE FROM exarq.job; DELETE FROM inventory_total", {"phantoms": 1}),
    ],
)  # fmt: skip
async def test_the_proof_finds_each_kind_of_damage(
    engine: AsyncEngine, tmp_path: Path, committed: bool, damage: str, found: dict[str, int]
) -> None:
    notebook = Notebook(tmp_path / "enqueues.jsonl")
    await an_order_and_a_catalogue(engine, notebook, committed=committed)
    notebook.close()

    async with engine.begin() as connection:
        for statement in damage.split("; "):
            await connection.execute(text(statement))
    findings = await prove(engine, notebook.path)

    clean = {"lost": 0, "repeated_effects": 0, "phantoms": 0, "out_of_step": 0}
    assert {name: getattr(findings, name) for name in clean} == clean | found
    assert findings.promise_held is not bool(found)
    assert (findings.enqueued, findings.rolled_back) == ((2, 0) if committed else (0, 2))


async def an_order_and_a_catalogue(engine: AsyncEngine, notebook: Notebook, *, committed: bool) -> None:
    """One job of each kind, done, and what its producer wrote down."""
    order_id = uuid4()
    done = {"state": JobState.SUCCEEDED, "result": {}}
    post = await a_job(engine, name="ledger.post", args={"order_id": str(order_id)}, **done)
    catalogue = await a_job(engine, name="inventory.catalogue", **done)
    total = await a_job(engine, name="inventory.summarise", **done)
    async with AsyncSession(engine) as session, session.begin():
        await inventory.create_tables(await session.connection())
        await ledger.create_tables(await session.connection())
        session.add_all([ledger.Account(name="anna"), ledger.Account(name="bert")])
        await session.flush()
        session.add(ledger.PaymentOrder(id=order_id, debit="anna", credit="bert", amount=5))
        session.add(ledger.Posting(order_id=order_id, account="anna", amount=-5))
        session.add(ledger.Posting(order_id=order_id, account="bert", amount=5))
        session.add(found := inventory.Distribution(job_id=catalogue, name="tiny", version="1", location="/"))
        await session.flush()
        session.add(inventory.InventoryTotal(job_id=total, distribution_id=found.id, files=0, missing=0, bytes=0))
    for kind, job_id, order in ((POSTING, post, order_id), (CATALOGUE, catalogue, None)):
        notebook.intend(kind, job_id, order)
        notebook.ended_with(job_id, committed=committed)


def exists(*parts: str) -> bool:
    return Path(*parts).exists()


def processes() -> dict[int, tuple[int, str]]:
    """Every process: its parent and its command."""
    columns = ["ps", "-A", "-ww", "-o", "pid=,ppid=,args="]
    listed = subprocess.run(columns, capture_output=True, text=True, check=True).stdout.splitlines()
    return {int(pid): (int(parent), command) for pid, parent, command in (line.split(None, 2) for line in listed)}


def descendants(ancestor: int) -> dict[int, str]:
    """The commands of the processes that descend from this one."""
    everybody, found = processes(), {ancestor}
    while more := {pid for pid, (parent, _) in everybody.items() if parent in found} - found:
        found |= more
    return {pid: everybody[pid][1] for pid in found - {ancestor}}
