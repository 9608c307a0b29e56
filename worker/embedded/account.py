"""Who runs the servers, and below which temporary folder they live."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path
from typing import NamedTuple, TypedDict

from worker.core.errors import EmbeddedServerError

# A socket's path may have 107 bytes on Linux and 103 on macOS; this is what we add to the temporary folder.
_LONGEST_SOCKET = 100 - len("/exarq-12345678/.s.PGSQL.5432")
# ARQ reads the path in a unix:// address as it stands, redis-py unquotes it: only these mean the same to both.
_PLAIN = re.compile(r"[\w./+-]+", re.ASCII)


class Drop(TypedDict, total=False):
    """The arguments of `subprocess` that give up root's rights; empty when there are none to give up."""

    user: int
    group: int
    extra_groups: list[int]


class Account(NamedTuple):
    """The user that the servers run as when root starts them: PostgreSQL refuses to run as root."""

    uid: int
    gid: int

    @property
    def drop(self) -> Drop:
        """The arguments of `subprocess` that run a program as this user, in no further group."""
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def server_account() -> Account | None:
    """`nobody` when we are root, otherwise None: the servers run as ourselves."""
    import pwd  # not on Windows, where this package must still be importable

    if os.geteuid() != 0:
        return None
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedServerError(
            "PostgreSQL refuses to run as root and there is no user 'nobody' to run it; start as an ordinary user"
        ) from None
    return Account(nobody.pw_uid, nobody.pw_gid)


def temporary_base(account: Account | None) -> Path:
    """The temporary folder when sockets can live there and the servers can reach it, otherwise /tmp."""
    chosen = Path(tempfile.gettempdir()).absolute()
    short = len(os.fsencode(chosen)) <= _LONGEST_SOCKET
    if short and _PLAIN.fullmatch(str(chosen)) and (account is None or open_to_all(chosen)):
        return chosen
    return Path("/tmp")  # noqa: S108 - the folder made below it has a random name and is its owner's alone


def open_to_all(folder: Path) -> bool:
    """Whether every user can enter this folder."""
    real = folder.resolve()
    return all(parent.stat().st_mode & 0o001 for parent in (real, *real.parents))
