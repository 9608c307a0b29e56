"""The tables of the file that settings are read from; whatever is wrong with it is one line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic_settings import BaseSettings, TomlConfigSettingsSource

from worker.core.errors import SettingsError


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
