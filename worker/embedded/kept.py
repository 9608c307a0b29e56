"""Data that servers keep: a folder of a project's own, of one command at a time, and unknown to git."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from worker.core.errors import EmbeddedServerError
from worker.embedded.account import Account, open_to_all

NAME: Final = ".exarq"
_ELSEWHERE: Final = Path("/var/lib/exarq")
_A_STOP: Final = 3.0  # the servers of a command that has just ended may still stop


class Kept:
    """The folder, while this process holds it; made by `keep`."""

    def __init__(self, folder: Path, lock: int) -> None:
        self._folder = folder
        self.lock = lock

    def prepare(self, account: Account | None) -> Path:
        """Make the places of the servers' data, which the account can reach, and return their folder."""
        data = self.place(account)
        data.mkdir(parents=True, exist_ok=True)
        if account:  # who must enter it, whatever the umask says
            for folder in (data, _ELSEWHERE) if _ELSEWHERE in data.parents else (data,):
                folder.chmod(0o711)
        shutil.rmtree(data / "postgres.new", ignore_errors=True)
        for name in ("postgres.new", "redis"):
            place = data / name
            place.mkdir(mode=0o700, exist_ok=True)
            if account:
                os.chown(place, account.uid, account.gid)
        return data

    def place(self, account: Account | None) -> Path:
        """Below the folder, or where the account can enter when it cannot enter the project."""
        if account is None or open_to_all(self._folder):
            return self._folder
        return _ELSEWHERE / hashlib.sha256(os.fsencode(self._folder)).hexdigest()[:16]


@contextmanager
def keep(project: Path) -> Iterator[Kept]:
    """Hold the project's folder for data, making it if need be.

    Raises: `EmbeddedServerError` when another command holds it, or it cannot be made.
    """
    folder = project / NAME
    try:
        folder.mkdir(mode=0o755, exist_ok=True)
        (folder / ".gitignore").write_text("*\n")
        lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise EmbeddedServerError(f"{error.filename} cannot be written: {error.strerror}; whose is it?") from None
    try:
        _take(lock, folder)
        yield Kept(folder, lock)
    finally:
        os.close(lock)


def _take(lock: int, folder: Path) -> None:
    ends = time.monotonic() + _A_STOP
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > ends:
                raise EmbeddedServerError(
                    f"another `exarq dev` runs here and holds {folder}; use that one, or stop it first"
                ) from None
            time.sleep(0.05)
