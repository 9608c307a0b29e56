"""What is counted of another process, against what that process says of itself."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.bench import tally
from tests.bench.processes import Workers, children_of, cpu_of, cpu_of_all, environment, peak_memory_of

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


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_the_cpu_of_what_a_process_has_started_is_counted_also_when_that_has_ended() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {BUSY!r}]); input()"
    command = [sys.executable, "-c", parent]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        child = float(process.stdout.readline())

        while_it_runs = cpu_of_all(process.pid)
        process.stdin.write("\n")
        process.stdin.flush()
        while children_of(process.pid):
            time.sleep(0.01)
        when_it_has_ended = cpu_of_all(process.pid)
        process.kill()

    assert while_it_runs is not None
    assert when_it_has_ended is not None
    assert child <= while_it_runs <= when_it_has_ended + 0.03  # a tick of the kernel's clock each


def test_workers_that_are_held_stand_still_and_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "import time\nwhile True: time.sleep(0.001)"]
    with subprocess.Popen(command, start_new_session=True) as process:
        workers = Workers([process], tmp_path, lambda: "")

        with workers.held():
            _, held = os.waitpid(process.pid, os.WUNTRACED)
        _, going = os.waitpid(process.pid, os.WCONTINUED)
        process.kill()

    assert os.WIFSTOPPED(held)
    assert os.WIFCONTINUED(going)


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
