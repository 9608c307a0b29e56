"""What a proxy makes of one connection: two ends that pass on what they read, as the proxy's rules allow."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Matches: TypeAlias = Callable[[bytes], bool]
Cut: TypeAlias = Literal["answered", "at once", "never"]

_REMEMBERED = 4096  # of a question that came in several reads, so that a match across them is found
_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing sends RST, as a host does that has lost the connection


def no_lag() -> float:
    """Bytes take no time."""
    return 0.0


@dataclass
class Counters:
    """What happened at a proxy so far."""

    connections: int = 0
    cuts: int = 0
    answers_lost: int = 0
    questions_kept: int = 0


@dataclass(eq=False)
class Trap:
    """What waits for a question, to lose it or its answer."""

    matches: Matches
    keeps_question: bool
    cut: Cut
    times: int | None
    probability: float
    rng: random.Random | None

    def springs(self) -> bool:
        """Whether it takes this question, which matches."""
        if self.rng is not None and self.rng.random() >= self.probability:
            return False
        if self.times is not None:
            self.times -= 1
        return True


@dataclass
class Rules:
    """What all links of a proxy obey, and what became of them."""

    is_silent: bool = False
    lag: Callable[[], float] = no_lag  # how many seconds the next bytes take
    traps: list[Trap] = field(default_factory=list)
    counters: Counters = field(default_factory=Counters)
    lost: asyncio.Event = field(default_factory=asyncio.Event)


class _End(asyncio.Protocol):
    """One end of a link: hands over what it reads (None: it hung up) and writes what it is given, in order."""

    other: _End

    def __init__(self, link: Link, hand_over: Callable[[bytes | None], None]) -> None:
        self._link = link
        self._hand_over = hand_over
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[float, bytes | None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._is_full = False
        self.transport: asyncio.Transport | None = None
        self.gone: asyncio.Future[None] = self._loop.create_future()

    @property
    def is_open(self) -> bool:
        """Whether its connection was made and is not yet gone."""
        return self.transport is not None and not self.gone.done()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.pause_reading()

    def data_received(self, data: bytes) -> None:
        self._hand_over(data)

    def connection_lost(self, error: Exception | None) -> None:
        self.gone.set_result(None)
        self._hand_over(None)
        self._link.forget_if_over()

    def pause_writing(self) -> None:
        self._is_full = True
        self.other.go_on()

    def resume_writing(self) -> None:
        self._is_full = False
        self.other.go_on()

    def give(self, data: bytes | None) -> None:
        """Write this, or hang up for None, when its delay has passed and all that was given before is written."""
        lag = self._link.rules.lag()
        if lag == 0 and not self._waiting and self._link.flows:
            self._write(data)
            return
        self._waiting.append((self._loop.time() + lag, data))
        self._deliver()

    def go_on(self) -> None:
        """Read and write, or stop doing so, as the link and the other end now allow."""
        if self.transport is not None:
            if self._link.flows and not self.other._is_full:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()  # the kernel keeps what comes, and nobody learns that this end hung up
        self._deliver()

    def reset(self) -> None:
        """End the connection with RST, without what was not yet written."""
        if self.transport is not None and self.is_open:
            if not self.transport.is_closing():
                connection = self.transport.get_extra_info("socket")
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self.transport.abort()

    def _deliver(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._waiting and self._link.flows:
            due, data = self._waiting[0]
            if due > self._loop.time():
                self._timer = self._loop.call_at(due, self._deliver)
                return
            self._waiting.popleft()
            self._write(data)

    def _write(self, data: bytes | None) -> None:
        if self.transport is None or self.transport.is_closing():
            return
        if data is None:
            self.transport.close()
        else:
            self.transport.write(data)


class Link:
    """A client's connection and the one to the server that belongs to it."""

    def __init__(self, rules: Rules, forget: Callable[[Link], None]) -> None:
        self.rules = rules
        self._forget = forget
        self._trap: Trap | None = None  # the one that caught a question of this link
        self._unanswered = b""
        self._has_lost = False
        self._is_joined = False
        self.is_mute = False
        self.is_cut = False
        self.client = _End(self, self._ask)
        self.server = _End(self, self._answer)
        self.client.other, self.server.other = self.server, self.client

    @property
    def flows(self) -> bool:
        """Whether bytes pass now."""
        return self._is_joined and not self.is_mute and not self.rules.is_silent

    def join(self) -> None:
        """Begin to pass bytes: both ends are there."""
        self._is_joined = True
        if self.is_cut:
            self.reset()
        self.go_on()

    def mute(self) -> None:
        """Pass nothing any more, for ever."""
        self.is_mute = True
        self.go_on()

    def go_on(self) -> None:
        """Act on a change of the rules."""
        self.client.go_on()
        self.server.go_on()

    def cut(self) -> None:
        """End both connections with RST, and count it."""
        self._count_cut()
        self.reset()

    def reset(self) -> None:
        """End both connections with RST."""
        self.client.reset()
        self.server.reset()

    def forget_if_over(self) -> None:
        """Leave the proxy if neither end is open."""
        if not self.client.is_open and not self.server.is_open:
            self._forget(self)

    def _ask(self, data: bytes | None) -> None:
        sprung = self._caught(data) if data is not None and self.rules.traps and self._trap is None else None
        if sprung is None:
            self.server.give(data)
            return
        self._trap = sprung
        if sprung.keeps_question:
            self._tell_of_a_loss()
            self.cut()
            return
        self.server.give(data)
        if sprung.cut == "at once":
            self._tell_of_a_loss()
            self.server.give(None)  # after the question, whatever delays it
            self._count_cut()
            self.client.reset()

    def _answer(self, data: bytes | None) -> None:
        self._unanswered = b""
        if self._trap is None:
            self.client.give(data)
            return
        if data is not None:
            self._tell_of_a_loss()
        if self._trap.cut == "answered":
            self.cut()

    def _caught(self, data: bytes) -> Trap | None:
        asked = self._unanswered + data
        found = [trap for trap in self.rules.traps if trap.matches(asked)]
        # What matched once must not match again together with the next bytes.
        self._unanswered = b"" if found else asked[-_REMEMBERED:]
        sprung = next((trap for trap in found if trap.springs()), None)
        if sprung is not None and sprung.times == 0:
            self.rules.traps.remove(sprung)
        return sprung

    def _count_cut(self) -> None:
        if not self.is_cut:
            self.is_cut = True
            self.rules.counters.cuts += 1

    def _tell_of_a_loss(self) -> None:
        if self._has_lost or self._trap is None:
            return
        self._has_lost = True
        if self._trap.keeps_question:
            self.rules.counters.questions_kept += 1
        else:
            self.rules.counters.answers_lost += 1
        self.rules.lost.set()
