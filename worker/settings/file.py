"""The file that settings are read from: where it is, and its tables; whatever is wrong with it is one line."""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, TomlConfigSettingsSource

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


def _is_file(name: str) -> bool:
    try:
        return Path(name).is_file()
    except OSError:  # too long, or in a folder that may not be entered
        return False


def read(file: Path, settings: type[BaseSettings]) -> dict[str, Any]:
    """The tables in this file.

    Raises: `SettingsError` when it cannot be read or is no TOML.
    """
    try:
        return TomlConfigSettingsSource(settings, toml_file=file).toml_data
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from None
    except tomllib.TOMLDecodeError as error:
        last = f"line {len(file.read_bytes().splitlines())}, the end of the file"
        raise SettingsError(f"{file}: not TOML: {str(error).replace('end of document', last)}; correct it") from None
    except (ValueError, RecursionError):
        raise SettingsError(
            f"{file}: not TOML: it must be UTF-8 text with numbers and nesting of a sane length"
        ) from None
