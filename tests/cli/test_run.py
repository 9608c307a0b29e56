"""`exarq run` with one process."""

from __future__ import annotations

import json

import pytest

from tests.cli.conftest import JOBS, Command

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine

HOOK = """
import threading

def startup(ctx):
    threading.Thread(target=threading.Event().wait, args=(600,), name="left").start()
    raise ConnectionError("the vault does not answer")
"""


def test_a_thread_that_a_failed_startup_hook_has_left_does_not_hold_up_the_end(exarq: Command) -> None:
    exarq.write("shop.py", JOBS + HOOK)

    done = exarq("run", EXARQ_JOBS_ON_STARTUP="shop:startup")

    said = [json.loads(line)["event"] for line in done.err.splitlines() if line.startswith("{")]
    assert done.code == 2
    assert done.err.count("exarq: the startup hook shop:startup raised ConnectionError: the vault does not answer") == 1
    assert [text for text in said if "threads" in text]
