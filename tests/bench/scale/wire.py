"""Counts the statements that reach PostgreSQL, on the wire: transaction commands too, whoever sends them."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Final
from urllib.parse import parse_qs, quote, urlsplit

_LENGTH: Final = struct.Struct("!I")
_NOT_YET: Final = {80877103, 80877104}  # may we encrypt? TLS, GSSAPI
_CHUNK: Final = 1 << 16


class Wire:
    """What has passed; `statements` counts each simple query and each execution of a prepared one."""

    def __init__(self, target: str) -> None:
        self._target = target
        self._seen: Counter[bytes] = Counter()

    @property
    def statements(self) -> int:
        """How many statements have passed so far."""
        return self._seen[b"Q"] + self._seen[b"E"]

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Pass one connection on."""
        to_reader, to_writer = await self._connect()
        back = asyncio.create_task(_copy(to_reader, writer))
        try:
            with suppress(asyncio.IncompleteReadError, ConnectionError):
                await self._pass_on(reader, to_writer)
        finally:
            back.cancel()
            to_writer.close()
            writer.close()

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        parts = urlsplit(self._target)
        query = parse_qs(parts.query)
        host, port = query.get("host", [parts.hostname or "localhost"])[0], query.get("port", [str(parts.port or 5432)])
        if host.startswith("/"):
            return await asyncio.open_unix_connection(f"{host}/.s.PGSQL.{port[0]}")
        return await asyncio.open_connection(host, int(port[0]))

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        starting = True
        while True:
            kind = b"" if starting else await reader.readexactly(1)
            head = await reader.readexactly(_LENGTH.size)
            body = await reader.readexactly(_LENGTH.unpack(head)[0] - _LENGTH.size)
            starting = starting and _LENGTH.unpack(body[: _LENGTH.size])[0] in _NOT_YET
            self._seen[kind] += 1
            writer.write(kind + head + body)
            await writer.drain()


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while some := await reader.read(_CHUNK):
            writer.write(some)
            await writer.drain()
    writer.close()


@asynccontextmanager
async def counted(url: str) -> AsyncIterator[tuple[Wire, str]]:
    """The wire, and the address at which it passes everything on to the server at `url`."""
    wire = Wire(url)
    server = await asyncio.start_server(wire.serve, "127.0.0.1", 0)
    parts = urlsplit(url)
    port = server.sockets[0].getsockname()[1]
    user = quote(parts.username or "postgres")
    secret = f":{quote(parts.password)}" if parts.password else ""
    try:
        yield wire, f"postgresql://{user}{secret}@127.0.0.1:{port}{parts.path}"
    finally:
        server.close()
