"""Exarq: background jobs that commit with your data, exactly once."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from worker.addresses import database_url
    from worker.client import Client
    from worker.core.context import JobContext, current_job
    from worker.core.errors import (
        AlreadyEnqueued,
        ArgumentsInvalid,
        AutocommitRefused,
        DatabaseUnreachable,
        DefinitionError,
        DuplicateJob,
        EmbeddedServerError,
        ExarqError,
        JobCancelled,
        JobFailed,
        LazyLoadRefused,
        ModuleNotLoaded,
        NotCommitted,
        NotStorable,
        ReadOnlyJob,
        ResultInvalid,
        ResultTimeout,
        ScheduleRefused,
        SchemaNotMigrated,
        SessionLeftOpen,
        SessionShared,
        SettingsError,
        TooLarge,
        TransactionAborted,
        TransactionEscaped,
        UnknownJob,
        UnknownSchedule,
    )
    from worker.core.outcome import Cancel, Fail, Retry, Snooze
    from worker.db.schedules import Scheduled
    from worker.flow.call import Call
    from worker.flow.cancel import Cancellation, cancel
    from worker.flow.enqueue import enqueue, enqueue_many
    from worker.flow.handle import Handle, handle_of
    from worker.flow.job import job
    from worker.flow.publish import Publisher, flush_hints
    from worker.flow.publish_now import SyncPublisher
    from worker.flow.retry import Retrial, retry
    from worker.flow.schedules import (
        add_schedule,
        list_schedules,
        pause_schedule,
        remove_schedule,
        resume_schedule,
        run_schedule,
    )
    from worker.process import Worker
    from worker.settings import Settings, load_settings

__all__ = [
    "AlreadyEnqueued",
    "ArgumentsInvalid",
    "AutocommitRefused",
    "Call",
    "Cancel",
    "Cancellation",
    "Client",
    "DatabaseUnreachable",
    "DefinitionError",
    "DuplicateJob",
    "EmbeddedServerError",
    "ExarqError",
    "Fail",
    "Handle",
    "JobCancelled",
    "JobContext",
    "JobFailed",
    "LazyLoadRefused",
    "ModuleNotLoaded",
    "NotCommitted",
    "NotStorable",
    "Publisher",
    "ReadOnlyJob",
    "ResultInvalid",
    "ResultTimeout",
    "Retrial",
    "Retry",
    "ScheduleRefused",
    "Scheduled",
    "SchemaNotMigrated",
    "SessionLeftOpen",
    "SessionShared",
    "Settings",
    "SettingsError",
    "Snooze",
    "SyncPublisher",
    "TooLarge",
    "TransactionAborted",
    "TransactionEscaped",
    "UnknownJob",
    "UnknownSchedule",
    "Worker",
    "add_schedule",
    "cancel",
    "current_job",
    "database_url",
    "enqueue",
    "enqueue_many",
    "flush_hints",
    "handle_of",
    "job",
    "list_schedules",
    "load_settings",
    "pause_schedule",
    "remove_schedule",
    "resume_schedule",
    "retry",
    "run_schedule",
]

_HOMES = {
    "Client": "worker.client",
    "database_url": "worker.addresses",
    **dict.fromkeys(("JobContext", "current_job"), "worker.core.context"),
    **dict.fromkeys(("Cancel", "Fail", "Retry", "Snooze"), "worker.core.outcome"),
    "Scheduled": "worker.db.schedules",
    **dict.fromkeys(("Cancellation", "cancel"), "worker.flow.cancel"),
    "Call": "worker.flow.call",
    **dict.fromkeys(("enqueue", "enqueue_many"), "worker.flow.enqueue"),
    **dict.fromkeys(("Handle", "handle_of"), "worker.flow.handle"),
    "job": "worker.flow.job",
    **dict.fromkeys(("Publisher", "flush_hints"), "worker.flow.publish"),
    "SyncPublisher": "worker.flow.publish_now",
    **dict.fromkeys(("Retrial", "retry"), "worker.flow.retry"),
    **dict.fromkeys(
        (
            "add_schedule",
            "list_schedules",
            "pause_schedule",
            "remove_schedule",
            "resume_schedule",
            "run_schedule",
        ),
        "worker.flow.schedules",
    ),
    "Worker": "worker.process",
    **dict.fromkeys(("Settings", "load_settings"), "worker.settings"),
}


if not TYPE_CHECKING:  # a type checker would take any name for one of ours
    # SQLAlchemy takes a second to import: a name is fetched when it is first asked for.
    def __getattr__(name: str) -> object:
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(import_module(_HOMES.get(name, "worker.core.errors")), name)
        globals()[name] = value
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__})
