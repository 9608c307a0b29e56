"""Our end of the pipe that the guard watches: when it closes, however we end, the servers go."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from worker.core.errors import EmbeddedServerError
from worker.embedded.account import Account
from worker.embedded.commands import Plan

_GUARD = Path(__file__).with_name("guard.py")
_STOP_LIMIT = 45.0  # longer than all of the guard's own limits


class Lifeline:
    """A running guard; cutting the line ends it and its servers.

    Args:
        base: the temporary folder.
        account: who runs the servers.
        lock: an open file whose lock the guard holds for as long as the servers run, if given.

    """

    def __init__(self, base: Path, account: Account | None, lock: int | None = None) -> None:
        ids = f"{account.uid}:{account.gid}" if account else ""
        # A new session: Ctrl-C in a terminal reaches us, and we decide.
        self._guard = subprocess.Popen(  # noqa: S603 - our own program, run by the interpreter that runs us
            [sys.executable, "-I", "-S", str(_GUARD), str(base), ids],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            cwd="/",
            pass_fds=() if lock is None else (lock,),
            encoding="utf-8",
            errors="replace",
        )
        assert self._guard.stdin is not None
        assert self._guard.stdout is not None
        self._to, self._from = self._guard.stdin, self._guard.stdout

    def folder(self) -> Path:
        """The folder that the guard made and will remove."""
        return Path(self._hear("folder"))

    def start(self, plan: Plan) -> dict[str, int | None]:
        """Have the servers started; their process ids."""
        with contextlib.suppress(BrokenPipeError):  # what the guard said before it ended tells more
            self._to.write(json.dumps(plan) + "\n")
            self._to.flush()
        pids: dict[str, int | None] = self._hear("ready")
        return pids

    def cut(self) -> bool:
        """End the guard; True when it ended in order, with all servers gone and the folder removed."""
        with contextlib.suppress(BrokenPipeError):
            self._to.close()
        try:
            code = self._guard.wait(_STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self._guard.kill()
            code = self._guard.wait()
        self._from.close()
        return code == 0

    def _hear(self, word: str) -> Any:
        line = self._from.readline()
        try:
            said = json.loads(line)
        except ValueError:  # the guard itself failed: a traceback, or nothing
            raise EmbeddedServerError(f"the guard of the embedded servers ended: {line}{self._from.read()}") from None
        if "error" in said:
            raise EmbeddedServerError(f"an embedded server did not start: {said['error']}")
        return said[word]
