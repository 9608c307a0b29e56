"""`exarq check`: whether the worker here lives, by its heartbeat files; imports little, for it is asked often."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from worker.core.errors import ExarqError, SettingsError
from worker.heartbeats import Heartbeat, folder_of_heartbeats, is_private, read_heartbeats
from worker.place import settings_file, settings_key

_VARIABLE = "EXARQ_WORKER_HEARTBEAT_FOLDER"


def check(*, as_json: bool) -> int:
    """Say whether every process of the worker here lives; the exit code: 0 yes, 1 no, 2 error.

    While PostgreSQL is away a worker waits for it, and lives: nothing is won by starting it anew.
    """
    try:
        file = settings_file()
        named = os.environ.get(_VARIABLE) or _named_in(file)
        key = settings_key(file)
    except ExarqError as error:
        _say(str(error))
        return 2
    folder = folder_of_heartbeats(named)
    beats = list(read_heartbeats(folder, key)) if named or is_private(folder) else []
    live = [beat for beat in beats if beat.is_fresh or beat.leader_lives]
    wrong = _wrong(live)
    if not live:
        wrong = (
            f"no worker with the settings {key} beats in {folder}; start one with `exarq run`, or check in its folder,"
            f" as its user and with its EXARQ_SETTINGS and {_VARIABLE}"
        )
    if as_json:
        print(json.dumps({"alive": not wrong, "processes": [_shown(beat) for beat in live]}, indent=2))  # noqa: T201
    if wrong:
        _say(wrong)
    return 1 if wrong else 0


def _wrong(live: list[Heartbeat]) -> str:
    """The first thing that is wrong: each leader has as many processes as it should, and all of them beat."""
    for beat in live:
        which = f"process {beat.number} of {beat.of} (pid {beat.pid})"
        if not beat.is_fresh:
            return (
                f"{which} last beat {beat.age:.0f} s ago, its lease is {beat.lease:g} s; look at its log, or restart it"
            )
    for leader in {beat.leader: beat for beat in live if beat.leader_lives}.values():
        present = sum(beat.leader == leader.leader for beat in live)
        if present < leader.of:
            return f"{present} of {leader.of} processes beat below pid {leader.leader}; look at its log, or restart it"
    return ""


def _named_in(file: Path | None) -> str | None:
    try:
        text = file.read_text() if file else ""
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read: {error.strerror}") from None
    if "heartbeat_folder" not in text:
        return None
    import tomllib  # takes a tenth of what a check may take

    try:
        named = tomllib.loads(text).get("worker", {}).get("heartbeat_folder")
    except (tomllib.TOMLDecodeError, AttributeError) as error:
        raise SettingsError(f"{file}: not TOML: {error}; correct it") from None
    return str(named) if named else None


def _shown(beat: Heartbeat) -> dict[str, Any]:
    return {
        "pid": beat.pid,
        "number": beat.number,
        "age": round(beat.age, 3),
        "lease": beat.lease,
        "fresh": beat.is_fresh,
    }


def _say(what: str) -> None:
    print(f"exarq: {what}", file=sys.stderr)  # noqa: T201 — rich would take a third of the time
