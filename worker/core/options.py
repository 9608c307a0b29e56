"""The options of a definition: what `@job(…)` takes, and the one place where each is checked."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal, TypeAlias, TypedDict, get_args

from worker.core.errors import DefinitionError, nearest
from worker.core.names import DEFAULT_QUEUE, LONGEST_NAME, RESERVED_QUEUES, is_name
from worker.core.outcome import ErrorText
from worker.core.priority import DEFAULT_PRIORITY, as_priority
from worker.core.retry import as_delay
from worker.core.schedule import CatchUp, Overlap, Schedule

Isolation: TypeAlias = Literal["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"]
Commits: TypeAlias = Literal["own"]
_LAZY_LOADS: Final = 50
_OF_SCHEDULES: Final = ("cron", "timezone", "every", "catch_up", "overlap")


class JobOptions(TypedDict, total=False):
    """What `@job(…)` takes; what is left out is as in `Rules`."""

    name: str | None
    queue: str
    timeout: float | timedelta | None
    max_attempts: int | None
    isolation: Isolation | None
    read_only: bool
    commits: Commits | None
    priority: int
    expires: float | timedelta | None
    lazy_loads: int | None
    cron: str | None
    timezone: str | None
    every: float | timedelta | None
    catch_up: CatchUp | None
    overlap: Overlap | None


@dataclass(frozen=True, slots=True)
class Rules:
    """The options of one definition.

    Args:
        queue: the queue its jobs go to.
        timeout: the longest run; None takes the setting.
        max_attempts: failures that end a job, at least 1; None takes the setting.
        isolation: of the attempt's transaction; None takes the engine's.
        read_only: whether that transaction may write nothing.
        commits: "own" where each commit of the job is a real one; None where all it writes commits with its success.
        priority: 0 to 9, 0 first.
        expires: how long after a job is first due an attempt may start; None for ever.
        lazy_loads: how many an attempt's sync code may make before a warning; None: it never warns.
        schedule: when the clock enqueues one, by `cron` and `timezone` or by `every`; None where it never does.

    """

    queue: str = DEFAULT_QUEUE
    timeout: timedelta | None = None
    max_attempts: int | None = None
    isolation: Isolation | None = None
    read_only: bool = False
    commits: Commits | None = None
    priority: int = DEFAULT_PRIORITY
    expires: timedelta | None = None
    lazy_loads: int | None = _LAZY_LOADS
    schedule: Schedule | None = None

    @classmethod
    def of(cls, options: JobOptions, label: str) -> Rules:
        """What was given, checked; `label` says in messages whose options they are.

        Raises:
            DefinitionError: there is no such option, or its value cannot be used; the message says what can.

        """
        given: dict[str, Any] = dict(options)
        if unknown := next((name for name in given if name not in JobOptions.__annotations__), None):
            known = sorted(JobOptions.__annotations__)
            raise DefinitionError(f"{label}: @job has no option {unknown!r}{nearest(unknown, known)}")
        read_only, commits = given.get("read_only", False), given.get("commits")
        if not isinstance(read_only, bool):
            raise DefinitionError(f"{label}: read_only must be True or False, not {read_only!r}")
        if read_only and commits is not None:
            raise DefinitionError(f"{label}: a job that is read_only has nothing to commit; leave commits out")
        return cls(
            queue=_checked_queue(given.get("queue", DEFAULT_QUEUE), label),
            timeout=_checked_duration("timeout", given.get("timeout"), "takes the setting", label),
            max_attempts=_checked_attempts(given.get("max_attempts"), label),
            isolation=_one_of(get_args(Isolation), given.get("isolation"), "isolation", label),
            read_only=read_only,
            commits=_one_of(get_args(Commits), commits, "commits", label),
            priority=_checked_priority(given.get("priority", DEFAULT_PRIORITY), label),
            expires=_checked_duration("expires", given.get("expires"), "sets no deadline", label),
            lazy_loads=_checked_lazy_loads(given.get("lazy_loads", _LAZY_LOADS), label),
            schedule=_checked_schedule({name: given.get(name) for name in _OF_SCHEDULES}, label),
        )


def checked_name(name: object, label: str, what: str = "name") -> str:
    """The name, if it can be one of a job or a queue.

    Raises:
        DefinitionError: it is no text, empty, too long or not printable.

    """
    if not is_name(name):
        shown = ErrorText.of(ValueError(name)).message[:LONGEST_NAME]
        raise DefinitionError(f"{label}: {what} must be 1 to {LONGEST_NAME} printable characters, not {shown!r}")
    return str(name)


def _checked_queue(queue: object, label: str) -> str:
    checked = checked_name(queue, label, "queue")
    if checked.startswith(RESERVED_QUEUES):
        raise DefinitionError(f"{label}: no queue's name begins with arq: or exarq:; ARQ's own is called 'default'")
    return checked


def _checked_duration(what: str, value: float | timedelta | None, none: str, label: str) -> timedelta | None:
    if value is None:
        return None
    try:
        checked = as_delay(value, what)
    except (TypeError, ValueError) as error:
        raise DefinitionError(f"{label}: {error}") from None
    if not checked:
        raise DefinitionError(f"{label}: {what} must be more than 0 seconds; None {none}")
    return checked


def _checked_priority(priority: object, label: str) -> int:
    try:
        return as_priority(priority)
    except ValueError as error:
        raise DefinitionError(f"{label}: {error}") from None


def _checked_attempts(attempts: object, label: str) -> int | None:
    if attempts is None:
        return None
    if not isinstance(attempts, int) or isinstance(attempts, bool) or attempts < 1:
        raise DefinitionError(f"{label}: max_attempts must be a whole number of at least 1, not {attempts!r}")
    return attempts


def _checked_schedule(given: dict[str, Any], label: str) -> Schedule | None:
    try:
        return Schedule.of(**given)
    except (TypeError, ValueError) as error:
        raise DefinitionError(f"{label}: {error}") from None


def _one_of(known: tuple[str, ...], value: object, what: str, label: str) -> Any:
    if value is None or value in known:
        return value
    shown = ", ".join(f'"{word}"' for word in known)
    raise DefinitionError(f"{label}: {what} must be None or one of {shown}, not {value!r}")


def _checked_lazy_loads(budget: object, label: str) -> int | None:
    if budget is None:
        return None
    if not isinstance(budget, int) or isinstance(budget, bool) or budget < 0:
        raise DefinitionError(f"{label}: lazy_loads must be a whole number of at least 0, or None, not {budget!r}")
    return budget
