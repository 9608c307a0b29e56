"""What can break, each fault a function that breaks one thing and mends it again."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from tests.chaos.stage import Stage

Measured = Mapping[str, float | int | list[float]] | None
"""What a fault has measured itself: names with their units, and numbers."""
Break = Callable[[Stage], Awaitable[Any]]


@dataclass(frozen=True, slots=True)
class Fault:
    """One way to break the system, and what it breaks: two at once never break the same, nor mend each other's.

    Without anything of its own it only makes sense alone.
    """

    name: str
    says: str
    run: Break
    breaks: frozenset[str]

    def goes_with(self, other: Fault) -> bool:
        """Whether both may be at work at once."""
        return bool(self.breaks and other.breaks) and not self.breaks & other.breaks


FAULTS: Final[dict[str, Fault]] = {}


def fault(*breaks: str) -> Callable[[Break], Break]:
    """Add a fault to the catalogue; its name is the function's, what it says its docstring."""

    def add(run: Break) -> Break:
        name = run.__name__
        FAULTS[name] = Fault(name, (run.__doc__ or "").strip().removesuffix("."), run, frozenset(breaks))
        return run

    return add


def catalogue() -> dict[str, Fault]:
    """All faults, by name."""
    from tests.chaos.faults import of_parents, of_postgres, of_redis, of_workers, targets  # noqa: F401 — each adds its own

    return FAULTS
