"""`exarq run --processes` as a person starts it: what is wrong ends it, what dies is started again."""

from __future__ import annotations

import json
import signal
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cli.conftest import Command
from tests.support import state

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine


async def test_a_process_that_dies_at_once_is_restarted_after_growing_waits(exarq: Command) -> None:
    exarq.write("shop.py", "import os; os._exit(13)")

    with exarq.started("run", "--processes", "2") as parent:
        assert parent.stderr is not None
        died: list[dict[str, Any]] = []
        while len([one for one in died if one["process"] == 1]) < 2:
            said = json.loads(parent.stderr.readline())
            died += [said] if "died" in said["event"] else []
        parent.send_signal(signal.SIGTERM)
        assert parent.wait(60) == 0

    assert {one["how"] for one in died} == {"exit code 13"}
    assert [one["restart_in"] for one in died if one["process"] == 1] == [0.5, 1.0]


def test_a_process_that_refuses_its_settings_ends_them_all_with_one_line(exarq: Command) -> None:
    exarq.write("shop.py", "")

    done = exarq("run", "--processes", "3")

    lines = [line for line in done.err.splitlines() if not line.startswith("{")]
    assert done.code == 2
    assert len(lines) == 1, lines
    assert "shop registers no jobs" in lines[0]


def test_processes_that_find_no_database_at_their_start_end_with_2(exarq: Command, closed_port: int) -> None:
    done = exarq("run", "--processes", "2", EXARQ_DATABASE_URL=f"postgresql://u@127.0.0.1:{closed_port}/d")

    assert done.code == 2
    assert "PostgreSQL does not answer" in done.err


async def test_a_burst_ends_with_its_processes(exarq: Command, engine: AsyncEngine) -> None:
    job_id = UUID(exarq("enqueue", "shop.charge", '{"invoice_id": 7}').out.strip())

    done = exarq("run", "--burst", "--processes", "2")

    assert done.code == 0
    assert await state(engine, job_id) == "succeeded"
    assert {json.loads(line).get("process") for line in done.err.splitlines()} >= {1, 2}
