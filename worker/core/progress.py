"""How far a job has come, as it is stored."""

from __future__ import annotations

from typing import Final, TypeAlias

from worker.core.outcome import storable_text

Progress: TypeAlias = "dict[str, int | float | str | None]"

_LONGEST_TEXT: Final = 500


def as_progress(done: float, total: float | None = None, text: str | None = None) -> Progress:
    """What is kept of these, the text cut; raises `ValueError` or `TypeError` for numbers that count nothing."""
    for name, number in (("done", done), ("total", total)):
        if number is None and name == "total":
            continue
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            raise TypeError(f"{name} must be a number, not {type(number).__name__}")
        if not 0 <= number <= 1e15:  # nor NaN
            raise ValueError(f"{name} must be from 0 to 1e15, not {number!r}")
    return {"done": done, "total": total, "text": None if text is None else storable_text(str(text), _LONGEST_TEXT)}
