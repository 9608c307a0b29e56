"""The line to the parent: however that ends, the process learns of it."""

from __future__ import annotations

import select
import socket
import subprocess
import sys

import pytest

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine

_PROCESS = """
import os, sys, threading
from worker.supervise.lifeline import Lifeline
lifeline = Lifeline(int(sys.argv[1]))
lifeline.obey(lambda hurry: os._exit(4 if hurry else 3))
if sys.argv[2]:
    lifeline.say(sys.argv[2])
print("ready", flush=True)
threading.Event().wait(60)
"""


@pytest.mark.parametrize("unread", ["", "away"])
def test_a_parent_that_is_gone_stops_the_process_whether_it_had_read_all_or_not(unread: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", _PROCESS, str(theirs.fileno()), unread],
            pass_fds=[theirs.fileno()],
            stdout=subprocess.PIPE,
        )
    with process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        assert bool(select.select([ours], [], [], 0)[0]) == bool(unread)

        ours.close()  # as the kernel does when a parent is killed

        assert process.wait() == 3
