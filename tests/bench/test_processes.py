"""What is counted of another process, against what that process says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench import tally
from tests.bench.processes import children_of, cpu_of, environment, peak_memory_of

BUSY = """
import time
held = b"x" * 100_000_000
sum(range(2_000_000))
print(time.process_time(), flush=True)
input()
"""


def test_the_cpu_and_the_memory_of_another_process_are_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", BUSY], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        cpu = float(process.stdout.readline())

        seen_cpu, seen_memory = cpu_of(process.pid), peak_memory_of(process.pid)

        if sys.platform == "linux":
            assert seen_cpu == pytest.approx(cpu, abs=0.05)
            assert seen_memory is not None
            assert 95 < seen_memory < 150  # what it holds, and an interpreter
            assert process.pid in children_of(os.getpid())
        process.kill()

    assert cpu_of(process.pid) is None


def test_a_job_that_begins_is_counted_and_the_first_one_tells_when(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tally.FOLDER, str(tmp_path))
    monkeypatch.setattr(tally, "_notes", None)
    before = time.monotonic_ns()

    tally.began()
    first = time.monotonic_ns()
    tally.arrived(time.monotonic_ns() - 5_000_000)

    (begun,) = tally.read(tmp_path)
    assert (begun.pid, begun.jobs) == (os.getpid(), 2)
    assert before <= begun.first_at <= first
    (took,) = tally.read_latencies(tmp_path)
    assert 5 <= took < 5_000
    assert tally._notes is not None
    tally._notes.latencies.close()


def test_what_is_configured_for_exarq_here_reaches_no_system(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXARQ_WORKER_CONCURRENCY", "1")

    assert not [name for name in environment() if name.startswith("EXARQ_")]
