"""A sync producer process: a classic `Session` on psycopg that enqueues and notes outside what it committed."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Final
from uuid import UUID

from sqlalchemy import create_engine, make_url
from sqlalchemy.exc import OperationalError
from sqlalchemy.orm import Session, sessionmaker

from tests.chaos.calls import a_call, keyed_calls
from tests.chaos.evidence import Evidence
from tests.chaos.looks import PLACE
from tests.chaos.producer import CONTROL, DATABASE, REDIS, SEED
from tests.chaos.worker import FILE, die_with_parent, install_twin
from worker.broker.connection import connect_now
from worker.db.failures import is_transient
from worker.flow.enqueue import enqueue, enqueue_many
from worker.flow.publish_now import SyncPublisher

_LIMIT: Final = 8
"""So many seconds a transaction may take in all, as a server of requests has it."""
_OPTIONS: Final = "-c statement_timeout=5000 -c idle_in_transaction_session_timeout=5000"


class SyncProducer:
    """Enqueues one transaction after the other, at the rate and in the mix that the control file says."""

    def __init__(self, sessions: sessionmaker[Session], evidence: Evidence, control: Path, seed: str) -> None:
        self._sessions = sessions
        self._evidence = evidence
        self._control = control
        self._rng = random.Random(seed)
        self._stopped = False

    def run(self) -> None:
        """Place jobs until told to stop."""
        signal.signal(signal.SIGTERM, self._stop)
        told: dict[str, Any] = {"rate": 0, "mix": {}}
        while not self._stopped:
            with suppress(ValueError, OSError):
                told = json.loads(self._control.read_text())
            if not told["rate"]:
                time.sleep(0.05)
                continue
            begun = time.monotonic()
            placed = self._place(told["mix"])
            self._evidence.note("enqueue took", seconds=round(time.monotonic() - begun, 4))
            wait = self._rng.uniform(0.5, 1.5) * placed / told["rate"] - (time.monotonic() - begun)
            time.sleep(max(0.001, wait))

    def _stop(self, *_: object) -> None:
        self._stopped = True

    def _place(self, mix: dict[str, float]) -> int:
        try:
            with _limited(), self._sessions() as session:
                return self._place_some(session, mix)
        except Exception as error:
            if not (is_transient(error) or isinstance(error, OperationalError)):
                raise
            self._evidence.note("not enqueued", error=f"{type(error).__name__}: {error}"[:200])
            return 1

    def _place_some(self, session: Session, mix: dict[str, float]) -> int:
        """One transaction: usually one job, sometimes many, sometimes keyed, sometimes rolled back, whole or in part."""
        dice, rng = self._rng.random(), self._rng
        if dice < 0.06:
            handles = enqueue_many(session, [a_call(rng, mix) for _ in range(rng.randint(5, 20))])
        elif dice < 0.10:
            handles = [enqueue(session, "chaos.one")]
        elif dice < 0.18:
            handles = enqueue_many(session, keyed_calls(rng))
        else:
            handles = enqueue_many(session, [a_call(rng, mix)])
        kept = [handle.id for handle in handles if handle.happened == "created"]
        undone = self._undone_in_a_savepoint(session, mix) if dice > 0.9 else []
        session.execute(PLACE, {"jobs": kept})
        if rng.random() < 0.1:
            session.rollback()
            self._evidence.note("rolled back", jobs=[*kept, *undone])
            return len(kept)
        self._commit(session, kept)
        if undone:
            self._evidence.note("rolled back", jobs=undone)
        return max(1, len(kept))

    def _undone_in_a_savepoint(self, session: Session, mix: dict[str, float]) -> list[UUID]:
        savepoint = session.begin_nested()
        undone = [handle.id for handle in enqueue_many(session, [a_call(self._rng, mix)])]
        session.execute(PLACE, {"jobs": undone})
        savepoint.rollback()
        return undone

    def _commit(self, session: Session, kept: list[UUID]) -> None:
        self._evidence.note("intent", jobs=kept)
        try:
            session.commit()
        except BaseException:
            self._evidence.note("unknown", jobs=kept)
            raise
        self._evidence.note("committed", jobs=kept)


@contextmanager
def _limited() -> Iterator[None]:
    """Raise `TimeoutError` in the block when it takes too long, as where a server is silent."""
    signal.setitimer(signal.ITIMER_REAL, _LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _too_long(*_: object) -> None:
    raise TimeoutError(f"took more than {_LIMIT} s")


def main() -> None:
    """Produce until told to stop."""
    die_with_parent()
    install_twin()
    signal.signal(signal.SIGALRM, _too_long)
    engine = create_engine(
        make_url(os.environ[DATABASE]).set(drivername="postgresql+psycopg", query={"sslmode": "disable"}),
        pool_pre_ping=True,
        connect_args={"connect_timeout": 5, "options": _OPTIONS},
    )
    redis = connect_now(os.environ[REDIS], timeout=timedelta(milliseconds=50))
    sessions = sessionmaker(engine, info=SyncPublisher(redis, lease=timedelta(seconds=10)).info)
    SyncProducer(sessions, Evidence.of_this_process(FILE), Path(os.environ[CONTROL]), os.environ[SEED]).run()
    engine.dispose()
