"""The user's modules for a command, and one line that says why one cannot be imported."""

from __future__ import annotations

import linecache
import re
from pathlib import Path

from worker.core.errors import ModuleNotLoaded
from worker.core.registry import load_modules
from worker.settings import Settings


def load_jobs(settings: Settings) -> None:
    """Import what `jobs.modules` names.

    Raises: `ModuleNotLoaded`, which names the setting, the module, the line that failed, or where it was looked for.
    """
    try:
        load_modules(settings.jobs.modules)
    except ModuleNotLoaded as error:
        raise ModuleNotLoaded(f"jobs.modules (set by {settings.origin('jobs.modules')}): {_told(error)}") from error


def _told(error: ModuleNotLoaded) -> str:
    said = str(error)
    place = re.search(r"\((.+):(\d+)\)$", said)
    if place:
        line = linecache.getline(place[1], int(place[2])).strip()
        return f"{said}: {line}" if line else said
    if isinstance(error.__cause__, ModuleNotFoundError):
        return f"{said}; looked in {Path.cwd()} and on Python's path: start it where the module is, or set PYTHONPATH"
    return said
