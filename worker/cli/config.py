"""`exarq config`: the settings in force and where each was set."""

from __future__ import annotations

from datetime import timedelta

from rich.text import Text

from worker.cli.output import Column, duration, print_json, print_table, readable
from worker.settings import Settings, load_settings


def print_settings(*, as_json: bool) -> None:
    """Print every setting, its value and its origin; passwords are masked."""
    settings = load_settings()
    values = {f"{section}.{name}": value for section, keys in settings.shown().items() for name, value in keys.items()}
    if as_json:
        print_json({key: {"value": value, "origin": settings.origin(key)} for key, value in values.items()})
        return
    columns = [Column("setting"), Column("value", folds=True), Column("set by", folds=True)]
    print_table(columns, [_row(settings, key, value) for key, value in values.items()], last="meaning")


def _row(settings: Settings, key: str, value: object) -> list[str | Text]:
    origin = settings.origin(key)
    section, _, name = key.partition(".")
    values = getattr(settings, section)
    meaning = type(values).model_fields[name].description or ""
    if isinstance(given := getattr(values, name), timedelta):
        value, meaning = duration(given), meaning.removesuffix(", seconds")
    quiet = "dim" if origin == "default" else ""
    return [key, Text(readable(_shown(value)), style=quiet), Text(origin, style=quiet), Text(meaning, style="dim")]


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    return str(value).replace("postgresql+asyncpg://", "postgresql://", 1)  # as it is written in the settings
