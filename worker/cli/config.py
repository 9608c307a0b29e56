"""`exarq config`: the settings in force and where each was set."""

from __future__ import annotations

from rich.text import Text

from worker.cli.output import Column, print_json, print_table, readable
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
    meaning = type(getattr(settings, section)).model_fields[name].description or ""
    quiet = "dim" if origin == "default" else ""
    return [key, Text(readable(_shown(value)), style=quiet), Text(origin, style=quiet), Text(meaning, style="dim")]


def _shown(value: object) -> str:
    if value is None:
        return "not set"
    return ", ".join(map(str, value)) or "none" if isinstance(value, list) else str(value)
