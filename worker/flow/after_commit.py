"""Hints leave after the outermost commit: not at a savepoint's release, not while an outer transaction goes on.

An attempt's session has an outbox instead: the worker publishes it after its own COMMIT.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final, TypeAlias
from weakref import WeakSet

from sqlalchemy import Connection, event
from sqlalchemy.engine import Transaction
from sqlalchemy.orm import Session, SessionTransaction

from worker.broker.hints import Hint
from worker.core.errors import ReadOnlyJob
from worker.flow.publish import PUBLISHER, Publishable, Publisher, default_publisher, report_unsent
from worker.flow.publish_now import SyncPublisher, default_sync_publisher

OUTBOX: Final = "exarq.outbox"
"""The key of a session's `info` under which an attempt collects its hints for the worker's own COMMIT."""

_PENDING: Final = "exarq.pending"

# Due later than this: reconcile brings the hint to Redis when the time has come.
HORIZON: Final = timedelta(seconds=30)


class Outbox:
    """The hints of what an attempt's session calls committed, until the worker's own COMMIT.

    Args:
        refusal: why this attempt may enqueue nothing; None where it may.

    """

    def __init__(self, refusal: str | None = None) -> None:
        self.refusal = refusal
        self.hints: list[Publishable] = []

    def publish(self, hints: Iterable[Publishable]) -> None:
        """Keep these."""
        self.hints += hints


Destination: TypeAlias = Publisher | SyncPublisher | Outbox


@dataclass(slots=True)
class _Pending:
    """What a session enqueued in its transaction, each hint with the (savepoint's) transaction it was written in."""

    destination: Destination
    loop: asyncio.AbstractEventLoop | None = None
    connection: Connection | None = None
    transaction: Transaction | None = None
    committing: bool = False
    written: list[tuple[Sequence[Publishable], SessionTransaction | None]] = field(default_factory=list)

    def add(self, hints: Sequence[Publishable], written_in: SessionTransaction | None) -> None:
        self.written.append((hints, written_in))

    def forget(self, rolled_back: SessionTransaction) -> None:
        self.written = [entry for entry in self.written if not _within(entry[1], rolled_back)]

    def take(self) -> list[Publishable]:
        taken, self.written = self.written, []
        return [hint for hints, _ in taken for hint in hints]


def destination_of(session: Session) -> Destination:
    """Where this session's hints go: an attempt's outbox, the publisher bound to it, else the event loop's own.

    A sync session outside of an event loop has a publisher that needs none: one of its own, else the process's.

    Raises: `ReadOnlyJob` when this is the session of a job that may enqueue nothing.
    """
    outbox = session.info.get(OUTBOX)
    if outbox is not None:
        assert isinstance(outbox, Outbox)
        if outbox.refusal is not None:
            raise ReadOnlyJob(outbox.refusal)
        return outbox
    bound = session.info.get(PUBLISHER)
    if isinstance(bound, SyncPublisher):
        return bound
    if _running_loop() is None:
        return default_sync_publisher()
    return bound if isinstance(bound, Publisher) else default_publisher()


def _running_loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


def publish_after_commit(
    session: Session, connection: Connection, destination: Destination, hints: Sequence[Publishable]
) -> None:
    """Publish these once the outermost transaction on `connection` has committed; forget them where it rolls back."""
    horizon = time.monotonic() + HORIZON.total_seconds()
    hints = [hint for hint in hints if not isinstance(hint, Hint) or hint.due_at <= horizon]
    pending = session.info.get(_PENDING)
    if pending is None:
        pending = session.info[_PENDING] = _Pending(destination)
    pending.destination = destination
    pending.loop = _running_loop()
    pending.connection = connection
    pending.transaction = connection.get_transaction()
    pending.add(hints, session.get_nested_transaction() or session.get_transaction())


def was_rolled_back(transaction: Transaction) -> bool:
    """Whether it is known that this transaction, in which something was enqueued, was rolled back."""
    return transaction in _undone


_undone: WeakSet[Transaction] = WeakSet()


# For all sessions: adding these to each that enqueues took a tenth of an enqueue.


@event.listens_for(Session, "before_commit")
def _committing(session: Session) -> None:
    if (pending := session.info.get(_PENDING)) is not None:
        pending.committing = not session.in_nested_transaction()


@event.listens_for(Session, "after_commit")
def _committed(session: Session) -> None:
    pending: _Pending | None = session.info.get(_PENDING)
    if pending is None or session.in_nested_transaction():
        return  # enqueues nothing, or a savepoint's release
    hints = pending.take()
    joined = pending.connection is not None and pending.connection.in_transaction()
    # Joined: an outer transaction goes on and may still roll back; reconcile publishes what it commits.
    if hints and (not joined or isinstance(pending.destination, Outbox)):
        _publish(pending, hints)


def _publish(pending: _Pending, hints: list[Publishable]) -> None:
    """Publish what is committed; never raises, for the commit has taken place."""
    try:
        destination, here = pending.destination, _running_loop()
        # Enqueued in an event loop, committed in a thread: a web framework's way with sync sessions.
        if isinstance(destination, Publisher) and here is not pending.loop:
            if pending.loop is not None and pending.loop.is_running():
                pending.loop.call_soon_threadsafe(destination.publish, hints)
                return
            if here is None:
                destination = default_sync_publisher()
        destination.publish(hints)
    except Exception as error:
        report_unsent(hints, f"{type(error).__name__}: {error}")


@event.listens_for(Session, "after_soft_rollback")
def _rolled_back(session: Session, previous: SessionTransaction) -> None:
    if (pending := session.info.get(_PENDING)) is not None:
        pending.forget(previous)


@event.listens_for(Session, "after_transaction_end")
def _ended(session: Session, transaction: SessionTransaction) -> None:
    pending: _Pending | None = session.info.get(_PENDING)
    if pending is None or transaction.parent is not None:
        return
    pending.written = []
    begun, pending.transaction = pending.transaction, None
    # A joined one goes on; one whose COMMIT was sent may have committed, whatever was answered.
    if begun is not None and not begun.is_active and not pending.committing:
        _undone.add(begun)
    pending.committing = False


def _within(inner: SessionTransaction | None, outer: SessionTransaction) -> bool:
    while inner is not None:
        if inner is outer:
            return True
        inner = inner.parent
    return False
