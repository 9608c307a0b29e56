"""What a worker process tells of its jobs, read from outside: how many have begun, and when the first one did.

Standard library only, for it runs in each system's own environment. It costs a job about a microsecond.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
import time
from pathlib import Path
from typing import Final, NamedTuple

FOLDER: Final = "BENCH_TALLY"
"""The variable that names the folder, empty at each run, where every process of a worker has a file of its own."""

_LAYOUT: Final = struct.Struct("=qqq")
_COUNT: Final = struct.Struct("=q")
_NANOSECONDS: Final = struct.Struct("=q")
_LATENCIES: Final = ".latencies"


class Begun(NamedTuple):
    """What one process has noted: jobs begun, and the monotonic and the process' own CPU clock at the first, ns."""

    pid: int
    jobs: int
    first_at: int
    first_cpu: int


class _Notes:
    """The file of this process."""

    def __init__(self) -> None:
        path = Path(os.environ[FOLDER], str(os.getpid()))
        draft = path.with_suffix(".draft")
        with draft.open("w+b") as file:
            file.write(_LAYOUT.pack(0, time.monotonic_ns(), time.process_time_ns()))
            file.flush()
            self.shared = mmap.mmap(file.fileno(), _LAYOUT.size)
        draft.rename(path)
        self.jobs = 0
        self.latencies = path.with_suffix(_LATENCIES).open("ab", buffering=0)


_lock = threading.Lock()
_notes: _Notes | None = None


def began() -> None:
    """The first line of every job."""
    global _notes
    with _lock:
        if _notes is None:
            _notes = _Notes()
        _notes.jobs += 1
        _COUNT.pack_into(_notes.shared, 0, _notes.jobs)


def arrived(sent: int) -> None:
    """The first line of the job `latency`; `sent` is the monotonic clock from before it was enqueued, ns."""
    took = time.monotonic_ns() - sent
    began()
    assert _notes is not None
    _notes.latencies.write(_NANOSECONDS.pack(took))


def read(folder: Path) -> list[Begun]:
    """What the processes of the worker have noted so far."""
    files = [path for path in folder.iterdir() if path.name.isdigit()]
    return [Begun(int(path.name), *_LAYOUT.unpack(path.read_bytes())) for path in files]


def read_latencies(folder: Path) -> list[float]:
    """The latencies of all jobs so far, ms."""
    noted = b"".join(path.read_bytes() for path in folder.glob(f"*{_LATENCIES}"))
    return [took / 1e6 for (took,) in _NANOSECONDS.iter_unpack(noted)]
