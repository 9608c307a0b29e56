"""Errors that a job left, as people want to read them: short names, and of a traceback the frames that are theirs."""

from __future__ import annotations

import re
from typing import Final

from worker.core.registry import is_users_code

# `sqlalchemy.exc.IntegrityError: …` → `IntegrityError: …`, at the beginning of a line
_DOTTED: Final = re.compile(r"^(?:[A-Za-z_]\w*\.)+(?:<locals>\.)?([A-Z_]\w*)(?=:|$)", re.MULTILINE)
# what SQLAlchemy puts before the driver's message
_WRAPPED: Final = re.compile(r"\((?:\w+\.)+\w+\) <class '(?:\w+\.)*(\w+)'>: ")
_FRAME: Final = re.compile(r'^  File "([^"]*)", line \d+, in ')
_HEADER: Final = "Traceback (most recent call last):"
_ON_PURPOSE: Final = re.compile(r"(?:worker\.core\.outcome\.)?(?:Fail|Retry)(?::|$)")
_CHAINED: Final = ("The above exception was the direct cause", "During handling of the above exception")


def shortened(error: str) -> str:
    """The error with the names of its classes instead of their paths."""
    return _WRAPPED.sub(r"\1: ", _DOTTED.sub(r"\1", error))


def explanation(error: str | None, traceback: str | None, *, whole: bool) -> str:
    """What an attempt leaves to read: its traceback, or its error where that says it all.

    Args:
        error: the error's class and message.
        traceback: the traceback as Python prints it.
        whole: the traceback as it is, instead of the frames of the user's own code.

    """
    if traceback and whole:
        return traceback.rstrip()
    if traceback and not _says_it_all(error or "", traceback):
        return reduced(traceback.rstrip())
    return shortened(error or "")


def _says_it_all(error: str, traceback: str) -> bool:
    return _ON_PURPOSE.match(error) is not None and not any(said in traceback for said in _CHAINED)


def reduced(traceback: str) -> str:
    """The traceback without the frames of libraries, of Python and of Exarq; the last frame of all is kept."""
    if "Exception Group Traceback" in traceback:
        return traceback
    kept, left_out = [], 0
    for part in _parts(traceback):
        frame = _FRAME.match(part[0])
        if frame is None or is_users_code(frame[1]):
            kept += part
        else:
            left_out += 1
    if not any(_FRAME.match(line) for line in kept):
        return shortened(traceback)
    told = f"Traceback (most recent call last; {_frames(left_out)} of libraries left out, see --traceback):"
    return shortened("\n".join(kept).replace(_HEADER, told if left_out else _HEADER, 1))


def _frames(count: int) -> str:
    return f"{count} frame{'' if count == 1 else 's'}"


def _parts(traceback: str) -> list[list[str]]:
    """The lines in groups: each frame with its source lines, everything else line by line."""
    parts: list[list[str]] = []
    in_frame = False
    for line in traceback.splitlines():
        if _FRAME.match(line):
            in_frame = True
            parts.append([line])
        elif in_frame and line.startswith("    "):
            parts[-1].append(line)
        else:
            in_frame = False
            parts.append([line])
    return parts
