"""The heartbeat files: each worker process writes one after each beat, and `exarq check` reads them.

Imports little: a check is made every few seconds, and an import of the libraries would cost more than the answer.
Times are of the monotonic clock, which all processes of a machine share and nobody sets.
"""

from __future__ import annotations

import contextlib
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

_SUFFIX = ".beat"


def folder_of_heartbeats(named: str | None) -> Path:
    """The folder that the settings name, else one of this user's own below the temporary folder."""
    return Path(named) if named else Path(os.environ.get("TMPDIR") or "/tmp", f"exarq-{os.geteuid()}")  # noqa: S108 — _prepare refuses a folder that is not ours


class HeartbeatFile:
    """The file of one worker process.

    Args:
        named: the folder that the settings name; None takes the default.
        key: what the worker shares with its check: the settings' file or folder.
        lease: seconds after which a beat is too old.
        number: which process this is.
        of: how many there should be.
        leader: the process that starts them; while it lives, all of them must beat.

    """

    def __init__(self, named: str | None, key: Path, lease: float, *, number: int, of: int, leader: int) -> None:
        self._folder = folder_of_heartbeats(named)
        self._own_folder = not named
        self._key = key
        self._path = self._folder / f"{leader}-{number}{_SUFFIX}"
        self._facts = {"key": str(key), "pid": os.getpid(), "number": number, "of": of, "lease": lease}
        self._facts |= {"leader": leader, "leader_born": _born(leader)}

    def prepare(self) -> None:
        """Make the folder, and remove what killed workers have left there.

        Raises: `OSError`.
        """
        self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self._own_folder and not is_private(self._folder):
            raise PermissionError(0, "it must be a folder that you own and nobody else may enter", str(self._folder))
        for left in read_heartbeats(self._folder, self._key):
            if not left.is_fresh and not left.leader_lives:
                left.path.unlink(missing_ok=True)

    def beat(self) -> None:
        """The worker lives.

        Raises: `OSError`.
        """
        draft = self._path.with_suffix(".new")
        file = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(file, "w") as text:
            json.dump({**self._facts, "beat": time.monotonic()}, text)
        os.replace(draft, self._path)  # noqa: PTH105 — a check never sees half of it

    def remove(self) -> None:
        """The worker ends in order."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)


class Heartbeat:
    """What one file says."""

    def __init__(self, path: Path, said: dict[str, object]) -> None:
        self.path = path
        self.pid = int(str(said["pid"]))
        self.number = int(str(said["number"]))
        self.of = int(str(said["of"]))
        self.lease = float(str(said["lease"]))
        self.leader = int(str(said["leader"]))
        self._leader_born = said["leader_born"]
        self.age = time.monotonic() - float(str(said["beat"]))

    @property
    def is_fresh(self) -> bool:
        """Whether the beat is younger than the lease; one of the future is of a time before the machine started."""
        return 0 <= self.age < self.lease

    @property
    def leader_lives(self) -> bool:
        """Whether the process that should keep the beats coming still runs; its number alone may be another's now."""
        return (born := _born(self.leader)) is not None and born == self._leader_born


def read_heartbeats(folder: Path, key: Path) -> Iterator[Heartbeat]:
    """The files in a folder of workers with this key."""
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        try:
            said = json.loads(path.read_text())
            if said["key"] == str(key):
                yield Heartbeat(path, said)
        except (OSError, ValueError, KeyError, TypeError):  # just removed, or of another version
            continue


def is_private(folder: Path) -> bool:
    """Whether nobody else can have put anything into this folder."""
    try:
        found = folder.lstat()
    except OSError:
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o077


def _born(pid: int) -> str | None:
    """When this process started, as its system counts; "" where that cannot be asked, None when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        if Path("/proc/self/stat").exists():
            return None
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        pass
    return ""
