"""Enqueue with more to say than most: a key, a priority, a deadline. A key that is taken never ends the transaction."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

from sqlalchemy import Connection, Executable

from worker.broker.hints import Hint, due_at
from worker.core.errors import AlreadyEnqueued, ExarqError
from worker.core.states import JobState
from worker.db import transitions
from worker.db.ids import uuid7s
from worker.db.statements.enqueue import ENQUEUE_FULL, ENQUEUE_UNLESS_THERE
from worker.db.statements.unique import FIND
from worker.flow.call import Call, Unique
from worker.flow.handle import Handle, Happened, Origin

_TRIES: Final = 100


def insert(connection: Connection, calls: Sequence[Call], origin: Origin) -> tuple[list[Handle[Any]], list[Hint]]:
    """Write the jobs whose keys are free; for each other call, do as its `on_conflict` says.

    Waits for a transaction that enqueues the same key. A job that is replaced starts only after the caller's commit, so
    it sees what the caller wrote; one that is skipped may have started before.

    Raises: `AlreadyEnqueued` where a call says so, or cannot replace what it found; then none of these is written.
    """
    return _Insert(connection, calls, origin).run()


@dataclass(frozen=True, slots=True)
class _Found:
    """A job that has a key."""

    state: JobState
    replaceable: bool
    over: bool
    hint: Hint


class _Insert:
    """One enqueue of some calls, each known by its number."""

    def __init__(self, connection: Connection, calls: Sequence[Call], origin: Origin) -> None:
        self._connection = connection
        self._calls = calls
        self._origin = origin
        # One order for all: else two producers could each hold a key that the other waits for.
        keyed = [number for number, call in enumerate(calls) if call.unique]
        self._keyed = sorted(keyed, key=self._name_and_key)
        self._handles: dict[int, Handle[Any]] = {}
        self._hints: dict[UUID, Hint] = {}
        self._over: set[tuple[str, str]] = set()

    def run(self) -> tuple[list[Handle[Any]], list[Hint]]:
        if self._keyed:
            self._write_keyed()
        self._write(ENQUEUE_FULL, [number for number, call in enumerate(self._calls) if not call.unique])
        return [self._handles[number] for number in range(len(self._calls))], list(self._hints.values())

    def _write_keyed(self) -> None:
        for _ in range(_TRIES):
            if self._once():
                return
        raise ExarqError(f"jobs with these keys came and went {_TRIES} times during one enqueue; enqueue again")

    def _once(self) -> bool:
        """Write or settle each; False where a key is free after all: then nothing is written and none held."""
        self._handles, self._hints = {}, {}
        alone = len(self._keyed) == 1 and not self._over
        left = self._create() if alone else self._keyed
        if alone and (not left or not self._replaces(left[0])):
            return self._settle(left)  # without a savepoint, for that is the usual case
        # From here on an attempt that is given up must give up its locks too: a job that was claimed while it was to be
        # replaced is held by us all the same, and could not be completed; and keys are to be taken in one order only.
        with self._connection.begin_nested() as savepoint:
            if self._settle(left if alone else self._create()):
                return True
            savepoint.rollback()
            return False

    def _create(self) -> list[int]:
        """Write those whose keys are free; returns the others."""
        if not self._over:
            return self._write(ENQUEUE_UNLESS_THERE, self._keyed)
        left = []
        for number in self._keyed:  # one by one, for to free a key is to take it, and they have one order
            if self._name_and_key(number) in self._over:
                transitions.free(self._connection, *self._name_and_key(number))
            left += self._write(ENQUEUE_UNLESS_THERE, [number])
        return left

    def _write(self, statement: Executable, numbers: Sequence[int]) -> list[int]:
        """Write these; returns those that the statement has left out."""
        left = dict(zip(uuid7s(len(numbers)), numbers, strict=True))
        rows = [_row(id_, self._calls[number]) for id_, number in left.items()]
        for id_, *told in self._connection.execute(statement, _arrays(rows)) if rows else ():
            number = left.pop(id_)
            call = self._calls[number]
            self._note(number, "created", _hint(call.name, call.queue, call.priority, id_, *told))
        return list(left.values())

    def _settle(self, numbers: Sequence[int]) -> bool:
        """Do as `on_conflict` says where a job has the key; False where one of the keys is free by now."""
        if not numbers:
            return True
        found = self._find(numbers)
        over = {name_and_key for name_and_key, job in found.items() if job.over}
        self._over |= over
        if over or any(self._name_and_key(number) not in found for number in numbers):
            return False
        replacing = {}
        for number in numbers:
            job = found[self._name_and_key(number)]
            match self._unique(number).on_conflict:
                case "skip":
                    self._tell(number, "exists", job.hint)
                case "replace" if job.replaceable:
                    replacing[job.hint.job_id] = number  # of several, the last
                    self._note(number, "replaced", job.hint)
                case _:
                    raise AlreadyEnqueued(*self._name_and_key(number), job.hint.job_id, job.state)
        self._replace(replacing)
        return True

    def _find(self, numbers: Iterable[int]) -> dict[tuple[str, str], _Found]:
        wanted: dict[tuple[str, str], bool] = {}
        for number in numbers:
            wanted[self._name_and_key(number)] = wanted.get(self._name_and_key(number), False) or self._replaces(number)
        arrays = _arrays(
            [{"wanted_name": name, "wanted_key": key, "to_replace": replace} for (name, key), replace in wanted.items()]
        )
        return {
            (name, key): _Found(JobState(state), replaceable, over, _hint(name, queue, priority, *told))
            for name, key, state, queue, priority, replaceable, over, *told in self._connection.execute(FIND, arrays)
        }

    def _replace(self, replacing: Mapping[UUID, int]) -> None:
        """Queued → queued, with what the call says; the row keeps its queue."""
        rows = [_row(id_, self._calls[number]) for id_, number in replacing.items()]
        for id_, *told in transitions.replace(self._connection, _arrays(rows)) if rows else ():
            call = self._calls[replacing[id_]]
            self._hints[id_] = _hint(call.name, self._hints[id_].queue, call.priority, id_, *told)

    def _note(self, number: int, happened: Happened, hint: Hint) -> None:
        self._tell(number, happened, hint)
        self._hints[hint.job_id] = hint

    def _tell(self, number: int, happened: Happened, hint: Hint) -> None:
        signature = self._calls[number].signature
        self._handles[number] = Handle(hint.job_id, hint.name, happened, self._origin, signature)

    def _replaces(self, number: int) -> bool:
        return self._unique(number).on_conflict == "replace"

    def _unique(self, number: int) -> Unique:
        unique = self._calls[number].unique
        assert unique is not None, "a job without a key is always written"
        return unique

    def _name_and_key(self, number: int) -> tuple[str, str]:
        call = self._calls[number]
        return call.name, "" if call.unique is None else call.unique.key


def _row(id_: UUID, call: Call) -> dict[str, Any]:
    unique = call.unique
    return {
        "id": id_,
        "name": call.name,
        "queue": call.queue,
        "args": call.args,
        "delay": call.delay,
        "at": call.run_at,
        "priority": call.priority,
        "expires_in": call.expires if isinstance(call.expires, timedelta) else None,
        "expires_at": call.expires if isinstance(call.expires, datetime) else None,
        "key": unique.key if unique else None,
        "scope": unique.scope if unique else None,
        "lasts": unique.lasts if unique else None,
        "longest": unique.longest_delay if unique else None,
    }


def _arrays(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The rows as their columns; extra ones of `_row` do not hurt a statement that has no use for them."""
    return {f"{name}s": [row[name] for row in rows] for name in rows[0]}


def _hint(
    name: str, queue: str, priority: int, id_: UUID, due_in: float, enqueued_ms: float, installation: UUID
) -> Hint:
    return Hint(id_, name, queue, due_at(due_in), int(enqueued_ms), installation, priority)
