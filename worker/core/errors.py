"""Everything Exarq raises on purpose, in one tree; each message says what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from uuid import UUID


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint for a mistyped word: "; did you mean 'x'?", or nothing when no known word is like it."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def nearest_name(name: str, known: Iterable[str]) -> str:
    """As `nearest`, for the names of jobs: that two begin with the same module makes them no more alike."""
    module, _, function = name.rpartition(".")
    likeness = {one: _likeness(module, function, *one.rpartition(".")[::2]) for one in known}
    best = max(likeness, key=lambda one: (likeness[one], one), default="")
    return f"; did you mean {best!r}?" if best and likeness[best] >= _ALIKE else ""


_ALIKE = 0.6


def _likeness(module: str, function: str, known_module: str, known_function: str) -> float:
    modules = difflib.SequenceMatcher(None, module, known_module).ratio() if module else 1.0
    return min(modules, difflib.SequenceMatcher(None, function, known_function).ratio())


class ExarqError(Exception):
    """The root of every error that Exarq raises on purpose."""


class SettingsError(ExarqError):
    """Raised when a setting is missing, unknown or has a value that cannot be used."""


class DatabaseUnreachable(ExarqError):
    """Raised when PostgreSQL does not answer at the configured address."""


class SchemaNotMigrated(ExarqError):
    """Raised when the tables are missing or older or newer than this version needs."""


class EmbeddedServerError(ExarqError):
    """Raised when a private PostgreSQL or Redis cannot be found, started or attached to."""


class DefinitionError(ExarqError):
    """Raised by `@job` when a function cannot be a job; the message says how it must look."""


class DuplicateJob(DefinitionError):
    """Raised when two functions register under one name."""

    def __init__(self, name: str, first: str, second: str) -> None:
        super().__init__(
            f"two jobs are named {name!r}: {first} and {second}; give one of them another with @job(name=…)"
        )


class ModuleNotLoaded(ExarqError):
    """Raised when a module named in `jobs.modules` cannot be imported."""


class UnknownJob(ExarqError):
    """Raised when a row, or an enqueue by name that is `strict`, names a job that no loaded module registers."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        names = sorted(known)
        super().__init__(
            f"no job named {name!r}{nearest_name(name, names)}; registered: {', '.join(names) or 'none'};"
            " import its module, or add it to jobs.modules"
        )


class UnknownSchedule(ExarqError):
    """Raised when no schedule has the name."""

    def __init__(self, name: str, known: Iterable[str]) -> None:
        super().__init__(f"no schedule named {name!r}{nearest_name(name, known)}; `exarq schedules list` shows them")


class ScheduleRefused(ExarqError):
    """Raised when a schedule cannot be added because another has its name, or removed because code declares it."""


class ArgumentsInvalid(ExarqError):
    """Raised when arguments do not fit a job's signature, at the enqueue or again at the run."""


class AlreadyEnqueued(ExarqError):
    """Raised at an enqueue whose key another job has, where it may neither be skipped nor replace that job."""

    def __init__(self, name: str, key: str, job_id: UUID, state: str) -> None:
        super().__init__(
            f"{name} with the key {key!r} is enqueued already: job {job_id} is {state};"
            " enqueue again when it has ended, or with on_conflict='skip'"
        )
        self.job_id = job_id
        self.state = state


class NotStorable(ExarqError):
    """Raised when a value cannot be kept as jsonb: not JSON, a NUL, a lone surrogate, a number too large."""


class TooLarge(NotStorable):
    """Raised when the JSON of arguments or of a result is over the limit."""

    def __init__(self, what: str, size: int, limit: int) -> None:
        super().__init__(
            f"{what} take {size:,} bytes as JSON, the limit is {limit:,}; store the data in a table and pass its key"
        )


class AutocommitRefused(ExarqError):
    """Raised at an enqueue on a connection in AUTOCOMMIT, where no transaction could carry the job."""


class ReadOnlyJob(ExarqError):
    """Raised at an enqueue in the session of a job that is `read_only`."""


class LeaseLost(ExarqError):
    """Raised inside Exarq when an attempt no longer holds its job; everything it wrote is rolled back."""


class TransactionEscaped(ExarqError):
    """Raised when a job ends or replaces the attempt's transaction behind the session's back."""


class SessionShared(ExarqError):
    """Raised when a task other than the one that runs a job uses the job's session; nothing of it was done."""

    def __init__(self, job: str, owner: str, user: str, advice: str) -> None:
        super().__init__(f"{user} used the session of {job}, which belongs to {owner}; {advice}")


class SessionLeftOpen(ExarqError):
    """Raised when a job returns while a session or a connection that it opened itself is still open."""

    def __init__(self, count: int) -> None:
        what = "a connection was" if count == 1 else f"{count} connections were"
        super().__init__(
            f"the job returned while {what} still open that it had taken from the jobs' pool beside its own session, so"
            " what was not committed there is lost; open such sessions with"
            ' `async with ctx["sessions"].begin() as own:`,'
            " or use the job's session, whose writes commit together with the job's success"
        )


class LazyLoadRefused(ExarqError):
    """Raised when async code reads an attribute that is not loaded, so that reading it would have to wait."""

    def __init__(self, attribute: str, line: str, advice: str) -> None:
        super().__init__(
            f"{attribute} is not loaded, and async code cannot wait for PostgreSQL while it reads an attribute"
            f" ({line}); {advice}"
        )


class TransactionAborted(ExarqError):
    """Raised when a job returns although a statement failed and its transaction can only be rolled back."""


class ResultInvalid(ExarqError):
    """Raised when a stored result does not fit the job's return annotation, as after a change of its code."""


class NotCommitted(ExarqError):
    """Raised when a result is asked for that cannot come: inside the transaction that enqueued, or rolled back."""

    def __init__(self, job_id: UUID, name: str, *, rolled_back: bool = False) -> None:
        now = "was rolled back, so there is no such job" if rolled_back else "goes on; commit it before you ask"
        super().__init__(f"{name} {job_id}: the transaction that enqueued it {now}")


class JobFailed(ExarqError):
    """Raised when a result is asked for of a job that has failed.

    Args:
        job_id: the job's id.
        name: the name of its definition.
        kind: the type of its last error, kept as `type`; empty where it failed by none of its own, as when its
            workers died.
        message: what that error, or the worker, said.
        traceback: the traceback of its last attempt as text; empty where there is none.

    """

    def __init__(self, job_id: UUID, name: str, kind: str, message: str, traceback: str) -> None:
        super().__init__(job_id, name, kind, message, traceback)
        self.job_id, self.name, self.type, self.message, self.traceback = job_id, name, kind, message, traceback

    def __str__(self) -> str:
        said = ": ".join(part for part in (self.type, self.message) if part)
        return f"{self.name} {self.job_id} has failed: {said}"


class JobCancelled(ExarqError):
    """Raised when a result is asked for of a job that was cancelled, with the reason."""

    def __init__(self, job_id: UUID, name: str, reason: str) -> None:
        super().__init__(job_id, name, reason)
        self.job_id, self.name, self.reason = job_id, name, reason

    def __str__(self) -> str:
        return f"{self.name} {self.job_id} was cancelled" + (f": {self.reason}" if self.reason else "")


class ResultTimeout(ExarqError, TimeoutError):
    """Raised when a job has not ended within the time that its result was waited for; it goes on.

    Args:
        job_id: the job's id.
        name: the name of its definition; empty where only the id was known, and there is no such job.
        seconds: how long it was waited for.
        now: where the job stands now.

    """

    def __init__(self, job_id: UUID, name: str, seconds: float, now: str) -> None:
        super().__init__(job_id, name, seconds, now)
        self.job_id, self.name, self.seconds, self.now = job_id, name, seconds, now

    def __str__(self) -> str:
        return f"{f'{self.name} {self.job_id}'.strip()}: no result within {self.seconds:g} s; {self.now}"
