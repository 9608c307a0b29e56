"""How other commands of the same user find servers that are already running."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

from worker.core.errors import EmbeddedServerError
from worker.embedded.account import server_account
from worker.embedded.servers import RunningServers, Server, Servers


def announce(running: RunningServers, key: str) -> None:
    """Let `find(key)` return these servers until they are stopped; a later announcement replaces an earlier one."""
    folder = _folder()
    folder.mkdir(mode=0o700, exist_ok=True)
    _check(folder)
    path, text = folder / _name(key), json.dumps(dataclasses.asdict(running.urls), default=str)
    draft, name = tempfile.mkstemp(dir=folder)
    with os.fdopen(draft, "w") as file:
        file.write(text)
    os.replace(name, path)  # noqa: PTH105 - a Path would only be made to be used here
    running.before_stop(lambda: _remove(path, text))


def find(key: str) -> Servers | None:
    """The running servers announced under this key; None when there are none, or none that answer."""
    folder = _folder()
    if not os.path.lexists(folder):
        return None
    _check(folder)
    path = folder / _name(key)
    try:
        text = path.read_text()
    except FileNotFoundError:
        return None
    servers = _parse(text)
    if servers is None or not all(_is_private(server) and server.answers() for server in servers.all):
        _remove(path, text)
        return None
    return servers


def _is_private(server: Server) -> bool:
    """Whether nobody else can have put this socket there since the servers that made its folder have gone."""
    account = server_account()
    try:
        found = server.socket.parent.lstat()
    except OSError:
        return False
    owners = {os.geteuid(), account.uid if account else os.geteuid()}
    return stat.S_ISDIR(found.st_mode) and found.st_uid in owners and not found.st_mode & 0o077


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"exarq-{os.geteuid()}"


def _name(key: str) -> str:
    return f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def _check(folder: Path) -> None:
    """Refuse a folder that another user could have prepared: what it holds decides where jobs go."""
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o077:
        raise EmbeddedServerError(
            f"{folder} must be a folder that you own and nobody else may enter (mode 0700); remove it and try again"
        )


def _parse(text: str) -> Servers | None:
    try:
        said = json.loads(text)
        return Servers(Path(said["folder"]), _server(said["postgres"]), _server(said["redis"]))
    except (ValueError, KeyError, TypeError):  # written by another version, or cut off by a full disk
        return None


def _server(said: dict[str, Any] | None) -> Server | None:
    return Server(said["url"], Path(said["socket"]), said["pid"]) if said else None


def _remove(path: Path, text: str) -> None:
    # Only what was read or written here: servers that started since may have replaced it.
    try:
        if path.read_text() == text:
            path.unlink()
    except FileNotFoundError:
        pass
