"""What the doctor has found of one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at.

    Args:
        what: its name.
        level: `ok`; `warning`: it works, and may hurt; `error`: Exarq does not work, or cannot keep its promise.
        found: how it is.
        advice: what to do about it; nothing where it is ok.

    """

    what: str
    level: Literal["ok", "warning", "error"]
    found: str
    advice: str = ""


def ok(what: str, found: str) -> Finding:
    """As it should be."""
    return Finding(what, "ok", found)


def warning(what: str, found: str, advice: str) -> Finding:
    """Works, and may hurt."""
    return Finding(what, "warning", found, advice)


def error(what: str, found: str, advice: str) -> Finding:
    """Does not work, or breaks the promise."""
    return Finding(what, "error", found, advice)
