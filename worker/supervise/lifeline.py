"""The line between a parent and a worker process of its own: orders go down, the worker's ids come up.

It closes with the parent, however that ends, and then the process stops in order. Orders are no signals: where a
service manager signals every process of a group, the parent's would be the second, which hurries.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from worker.observe.events import Event, WorkerRenewed, WorkerStarted, listen

Stop = Callable[[bool], None]
"""Stops the worker; True: and gives back at once what runs. May be called from any thread, and again."""


class Order(StrEnum):
    """What the parent tells a process."""

    STOP = "stop"
    HURRY = "hurry"


AWAY = "away"
"""The word of a process that ends because a server is away."""


@dataclass(frozen=True, slots=True)
class Place:
    """Which process this is of how many, and the open file that is its line."""

    number: int
    of: int
    file: int

    def __str__(self) -> str:
        return f"{self.number}/{self.of}:{self.file}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `str` made.

        Raises: `ValueError`.
        """
        number, _, rest = text.partition("/")
        of, _, file = rest.partition(":")
        return cls(int(number), int(of), int(file))


class Lifeline:
    """The process's end of the line, watched by a thread.

    Args:
        file: the open file, which nothing that this process starts will have.

    """

    def __init__(self, file: int) -> None:
        self._socket = socket.socket(fileno=file)
        self._socket.set_inheritable(False)
        self._stop: Stop = _end_by_signal
        self._told = False
        listen(self._report)
        threading.Thread(target=self._watch, name="exarq lifeline", daemon=True).start()

    def obey(self, stop: Stop) -> None:
        """From now on, orders are given to `stop`; before, an order ends the process, in which nothing runs yet."""
        self._stop = stop

    def say(self, word: str) -> None:
        """Tell the parent, if there still is one."""
        with contextlib.suppress(OSError):
            self._socket.sendall(f"{word}\n".encode())

    def _report(self, event: Event) -> None:
        match event:
            case WorkerStarted():
                self.say(str(event.worker))
            case WorkerRenewed():
                self.say(str(event.new))

    def _watch(self) -> None:
        with contextlib.suppress(OSError), self._socket.makefile() as orders:  # reset, if words of ours were not read
            for order in orders:
                self._do(Order(order.strip()))
        self._do(Order.HURRY if self._told else Order.STOP)  # the parent is gone

    def _do(self, order: Order) -> None:
        self._told = True
        self._stop(order is Order.HURRY)


def _end_by_signal(_hurry: bool) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
