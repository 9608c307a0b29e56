"""Find the systems and have each one's environment made; one that does not install is reported."""

from __future__ import annotations

import asyncio
import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.bench.peer import About
from tests.bench.processes import environment

_INLINE: Final = "# /// script"
_ORDER: Final = ("exarq", "limit", "arq")
_LIMIT: Final = 300.0  # an empty package cache and a slow registry


@dataclass(frozen=True)
class Installed:
    """A system that can be measured."""

    about: About
    versions: dict[str, str]
    python: str
    path: Path

    @property
    def name(self) -> str:
        """As the table has it."""
        return self.about.name

    @property
    def version(self) -> str:
        """The system's own."""
        return next(iter(self.versions.values()))


@dataclass(frozen=True)
class Missing:
    """A system that cannot be measured here, and why."""

    name: str
    why: str


def known(folder: Path) -> list[str]:
    """The names of all systems that have a script here; Exarq and what it is compared with most come first."""
    names = [path.stem for path in folder.glob("*.py") if path.stem != "__init__"]
    return sorted(names, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))


async def install(name: str, folder: Path) -> Installed | Missing:
    """Make the system's environment, and ask it who it is."""
    path = folder / f"{name}.py"
    command = [sys.executable, str(path), "about"]
    if _INLINE in path.read_text():
        uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
        command = [uv, "run", "--quiet", "--no-project", "--python", sys.executable, "--script", str(path), "about"]
    try:
        process = await asyncio.create_subprocess_exec(
            *command, env=environment(), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
        )
    except OSError as error:
        return Missing(name, f"{command[0]}: {error.strerror}")
    try:
        said, complained = await asyncio.wait_for(process.communicate(), _LIMIT)
    except TimeoutError:
        process.kill()
        await process.wait()
        return Missing(name, f"not installed within {_LIMIT:g} s")
    if process.returncode != 0:
        lines = complained.decode(errors="replace").strip().splitlines()
        return Missing(name, lines[-1][-300:] if lines else f"ended with {process.returncode}")
    return _understood(json.loads(said.splitlines()[-1]), path)


def _understood(said: dict[str, Any], path: Path) -> Installed:
    versions, python = said.pop("versions"), said.pop("python")
    said["workloads"] = tuple(said["workloads"])
    said["packages"] = tuple(said["packages"])
    return Installed(About(**said), versions, python, path)
