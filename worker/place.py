"""Where this process works: its settings' file, and what commands that belong together share."""

from __future__ import annotations

import os
from pathlib import Path

from worker.core.errors import SettingsError

FILE_VARIABLE = "EXARQ_SETTINGS"
DEFAULT_FILE = "settings.toml"


def current_folder() -> Path:
    """Where this process works.

    Raises: `SettingsError` when somebody has deleted it.
    """
    try:
        return Path.cwd()
    except OSError as error:
        raise SettingsError(f"the current folder cannot be used: {error.strerror}; change to another") from None


def settings_file() -> Path | None:
    """The file that the variable names, else the one in the current folder, if there is one.

    Raises: `SettingsError` when the variable names none.
    """
    named = os.environ.get(FILE_VARIABLE)
    if named is None:
        return Path(DEFAULT_FILE) if _is_file(DEFAULT_FILE) else None
    if not _is_file(named):
        raise SettingsError(f"{FILE_VARIABLE}: no file {named!r}; name one that exists or unset the variable")
    return Path(named)


def settings_key(file: Path | None) -> Path:
    """What commands that belong together share: the settings file, or the folder when there is none."""
    return file.resolve() if file else current_folder()


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long, or in a folder that may not be entered
        return False
