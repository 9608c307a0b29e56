"""The parent's view of one worker process: started, told what to do, and known to be dead when the kernel says so."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import time
from asyncio.subprocess import Process
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Self
from uuid import UUID

from worker.supervise.lifeline import AWAY, Order, Place

OPTION: Final = "--supervised"
_ERROR: Final = 2


@dataclass(frozen=True, slots=True)
class Ended:
    """How a process ended: its exit code (negative: the signal), its age in seconds, and the ids it worked under."""

    code: int
    lived: float
    workers: tuple[UUID, ...]
    away: bool

    @property
    def how(self) -> str:
        """The signal's name, or the exit code."""
        if self.code >= 0:
            return f"exit code {self.code}"
        with contextlib.suppress(ValueError):
            return signal.Signals(-self.code).name
        return f"signal {-self.code}"

    @property
    def refused(self) -> bool:
        """Whether it ended at its start, and by what is wrong with the settings or the code."""
        return self.code == _ERROR and not self.workers and not self.away


class Child:
    """One process; made by `start`."""

    def __init__(self, process: Process, line: socket.socket, begun: Callable[[], None]) -> None:
        self._process = process
        self._line = line
        self._begun = begun
        self._started = time.monotonic()
        self._heard = b""
        self._workers: list[UUID] = []
        self._away = False
        asyncio.get_running_loop().add_reader(line, self._hear)

    @classmethod
    async def start(cls, command: Sequence[str], number: int, of: int, begun: Callable[[], None]) -> Self:
        """Start a process with a line to it.

        Args:
            command: what it runs; which place it has is added.
            number: its number, from 1.
            of: how many there are.
            begun: called when its worker works.

        Raises: `OSError`, `RuntimeError` when the machine has no room for another process, or for a thread to watch it.

        """
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    OPTION,
                    str(Place(number, of, theirs.fileno())),
                    stdin=asyncio.subprocess.DEVNULL,
                    pass_fds=[theirs.fileno()],
                    process_group=0,  # Ctrl-C in a terminal reaches the parent, who decides
                )
        except BaseException:
            ours.close()  # which also ends a process that nobody would watch
            raise
        return cls(process, ours, begun)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def order(self, order: Order) -> None:
        """Tell it; one that has ended hears nothing."""
        with contextlib.suppress(OSError):
            self._line.send(f"{order}\n".encode())

    def kill(self) -> None:
        """End it by force."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    async def ended(self) -> Ended:
        """Wait until it is dead."""
        code = await self._process.wait()
        asyncio.get_running_loop().remove_reader(self._line)
        self._hear()  # its last words
        self._line.close()
        return Ended(code, time.monotonic() - self._started, tuple(self._workers), self._away)

    def _hear(self) -> None:
        with contextlib.suppress(OSError):  # BlockingIOError: that was all
            while said := self._line.recv(4096):
                self._heard += said
            asyncio.get_running_loop().remove_reader(self._line)
        *words, self._heard = self._heard.split(b"\n")
        for word in words:
            if word.decode() == AWAY:
                self._away = True
                continue
            self._workers.append(UUID(word.decode()))
            self._begun()
