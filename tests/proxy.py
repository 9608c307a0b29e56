"""A TCP proxy before a server: it can refuse, cut, delay, go silent, and lose an answer whose question has arrived."""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeAlias

from sqlalchemy.engine import make_url

from tests.link import Counters, Cut, Link, Matches, Rules, Trap, no_lag

Target: TypeAlias = str | tuple[str, int]
"""Where a server listens: the path of its unix socket, or host and port."""

# A simple query, as asyncpg's Transaction.commit() sends it, with what our connections send along.
_COMMIT = re.compile(rb"Q.{4}(?:SELECT exarq\.succeed\('[^']*', '[^']*', E'(?:[^'\\]|''|\\.)*'\);)?COMMIT;", re.DOTALL)


def is_commit(asked: bytes) -> bool:
    """Whether these bytes ask PostgreSQL for a COMMIT, as SQLAlchemy on asyncpg does."""
    return _COMMIT.search(asked) is not None


class Proxy:
    """Passes connections on to one server until told otherwise, and then at once; made by `proxy_to`."""

    def __init__(self, target: Target) -> None:
        self.target = target  # who connects from now on reaches this one
        self.port = 0
        self.is_refusing = False
        self._rules = Rules()
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._speaks = asyncio.Event()
        self._speaks.set()
        self._listener = self._bound()
        self.port = self._listener.getsockname()[1]
        self._listen()

    @property
    def counters(self) -> Counters:
        """What happened here so far."""
        return self._rules.counters

    @property
    def lost(self) -> asyncio.Event:
        """Set as soon as an answer, or a question, is lost for good."""
        return self._rules.lost

    @property
    def is_silent(self) -> bool:
        """Whether nothing passes."""
        return self._rules.is_silent

    @property
    def connected(self) -> int:
        """How many connections there are, the half-open ones too."""
        return len(self._links)

    def cut(self) -> None:
        """End every connection with RST, on both sides; new ones work."""
        for link in list(self._links):
            link.cut()

    def refuse(self) -> None:
        """End every connection and refuse new ones, as a machine does on which nothing listens."""
        if not self.is_refusing:
            self.is_refusing = True
            self._stop_listening()
            # Bound without listening it refuses, and the port stays ours: otherwise another program may be given it,
            # even a client that tries to connect to it, which then talks to itself.
            self._listener = self._bound()
        self.cut()

    def silence(self) -> None:
        """Accept whoever comes and pass nothing on, not even that one side hung up, as if the network were gone."""
        self._rules.is_silent = True
        self._speaks.clear()
        self._go_on()

    def half_open(self) -> None:
        """Make the present connections silent for ever, also after `restore`; new ones work."""
        for link in list(self._links):
            link.mute()

    def end_half_open(self) -> None:
        """End what `half_open` has silenced with RST: both kernels find out some seconds later that nobody answers."""
        for link in list(self._links):
            if link.is_mute:
                link.cut()

    def delay(self, seconds: float, jitter: float = 0.0, rng: random.Random | None = None) -> None:
        """Pass everything on that much later, each way, and up to `jitter` more, drawn from `rng`; the order stays."""
        assert rng is not None or jitter == 0, "a jitter needs a seeded rng"
        self._rules.lag = (lambda: seconds + rng.uniform(0, jitter)) if rng else (lambda: seconds)

    def lose_the_answer_to(
        self,
        matches: Matches,
        *,
        cut: Cut = "answered",
        times: int | None = 1,
        probability: float = 1.0,
        rng: random.Random | None = None,
    ) -> None:
        """Let the server have the next questions that match, so many times (None: always), and lose its answers.

        The connection ends when the server has `answered`, or `at once` when it has the question and may still be at
        work, or `never`: then no answer returns on it any more. `matches` sees all bytes since the last answer.
        """
        self._set(Trap(matches, False, cut, times, probability, rng))

    def keep_from_the_server(
        self,
        matches: Matches,
        *,
        times: int | None = 1,
        probability: float = 1.0,
        rng: random.Random | None = None,
    ) -> None:
        """Cut the connection of the next questions that match before the server has the (whole) question."""
        self._set(Trap(matches, True, "at once", times, probability, rng))

    def restore(self) -> None:
        """End silence, refusal, delay and all waiting losses; what was kept in silence passes now."""
        self._rules.traps.clear()
        self._rules.lag = no_lag
        self._rules.is_silent = False
        self._speaks.set()
        if self.is_refusing:
            self.is_refusing = False
            self._listen()
        self._go_on()

    async def close(self) -> None:
        """End every connection and give the port back; again is harmless."""
        self._stop_listening()
        await asyncio.sleep(0)  # what was just accepted has to begin before it can end
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        ends = [end for link in self._links for end in (link.client, link.server) if end.is_open]
        for end in ends:
            end.reset()
        await asyncio.gather(*(end.gone for end in ends))

    def _set(self, trap: Trap) -> None:
        assert trap.rng is not None or trap.probability == 1, "a probability needs a seeded rng"
        self._rules.traps.append(trap)

    def _go_on(self) -> None:
        for link in list(self._links):
            link.go_on()

    def _bound(self) -> socket.socket:
        bound = socket.socket()
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.setblocking(False)
        bound.bind(("127.0.0.1", self.port))
        return bound

    def _listen(self) -> None:
        self._listener.listen(1024)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _stop_listening(self) -> None:
        if self._listener.fileno() != -1:
            asyncio.get_running_loop().remove_reader(self._listener)
            self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(BlockingIOError, ConnectionAbortedError):
            while True:
                accepted, _ = self._listener.accept()
                self.counters.connections += 1
                task = asyncio.create_task(self._connect(accepted))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _connect(self, accepted: socket.socket) -> None:
        loop, link = asyncio.get_running_loop(), Link(self._rules, self._links.discard)
        self._links.add(link)
        try:
            await loop.connect_accepted_socket(lambda: link.client, accepted)
            await self._speaks.wait()  # a server that cannot be reached learns of nobody
            if not link.is_cut:
                await self._open(link)
            link.join()
        except OSError:  # the server is away: its clients are told so in the only way that is left
            link.reset()
        except asyncio.CancelledError:
            link.reset()
            raise
        finally:
            link.forget_if_over()

    async def _open(self, link: Link) -> None:
        loop = asyncio.get_running_loop()
        if isinstance(self.target, str):
            await loop.create_unix_connection(lambda: link.server, self.target)
        else:
            await loop.create_connection(lambda: link.server, *self.target)


@asynccontextmanager
async def proxy_to(target: Target) -> AsyncIterator[Proxy]:
    """A proxy on a port of this machine, while the block lasts."""
    proxy = Proxy(target)
    try:
        yield proxy
    finally:
        await proxy.close()


@asynccontextmanager
async def postgres_proxy(database_url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy before this database, and the address by which it is reached."""
    url = make_url(database_url)
    port = int(str(url.query.get("port") or url.port or 5432))
    host = str(url.query.get("host") or url.host)
    async with proxy_to(f"{host}/.s.PGSQL.{port}" if host.startswith("/") else (host, port)) as proxy:
        near = url.set(host="127.0.0.1", port=proxy.port, query={"ssl": "disable"})
        yield proxy, near.render_as_string(hide_password=False)


@asynccontextmanager
async def redis_proxy(redis_url: str) -> AsyncIterator[tuple[Proxy, str]]:
    """A proxy before this Redis, and the address by which it is reached."""
    target: Target
    if redis_url.startswith("unix"):
        target, _, query = redis_url.removeprefix("unix://").partition("?")
        database = query.removeprefix("db=") or "0"
    else:
        url = make_url(redis_url)
        target, database = (url.host or "127.0.0.1", url.port or 6379), url.database or "0"
    async with proxy_to(target) as proxy:
        yield proxy, f"redis://127.0.0.1:{proxy.port}/{database}"
