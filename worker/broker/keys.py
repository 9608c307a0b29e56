"""The names of everything Exarq keeps in Redis; the layout is ARQ's own."""

from __future__ import annotations

from typing import Final
from uuid import UUID

from arq.constants import default_queue_name, job_key_prefix

from worker.core.names import DEFAULT_QUEUE
from worker.core.priority import DEFAULT_PRIORITY

PAYLOAD_PREFIX: Final = job_key_prefix
"""`arq:job:<id>`: the small payload beside a hint."""


def queue_key(queue: str) -> str:
    """The sorted set of a queue: the queue's name is the key, as in ARQ, and `default` is ARQ's default queue."""
    return default_queue_name if queue == DEFAULT_QUEUE else queue


LANE_PREFIX: Final = "exarq:lane:"


def lane_key(queue: str, priority: int) -> str:
    """The sorted set of a queue's hints of one priority; the ordinary ones are in ARQ's own."""
    return queue_key(queue) if priority == DEFAULT_PRIORITY else f"{LANE_PREFIX}{priority}:{queue}"


def wake_key(queue: str) -> str:
    """The list on which an idle worker of a queue waits."""
    return f"exarq:wake:{queue}"


def workers_channel(installation: UUID) -> str:
    """The channel on which the workers of an installation are told who is to be cancelled, and who is waited for."""
    return f"exarq:workers:{installation}"


def ended_channel(waiter_id: UUID) -> str:
    """The channel on which one waiter is told which of its jobs have ended."""
    return f"exarq:ended:{waiter_id}"
