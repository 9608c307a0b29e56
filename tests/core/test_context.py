from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from worker.core.context import JobContext

JOB = UUID("0199aa00-0000-7000-8000-000000000001")
THEN = datetime(2026, 10, 1, tzinfo=UTC)


class Sessions:
    """Counts the sessions it makes."""

    def __init__(self) -> None:
        self.made: list[AsyncSession] = []

    def __call__(self) -> AsyncSession:
        self.made.append(AsyncSession())
        return self.made[-1]


def a_context(sessions: Sessions | None = None, attempt: int = 1, **resources: Any) -> JobContext:
    return JobContext(
        job_id=JOB,
        name="billing.charge",
        attempt=attempt,
        enqueued_at=THEN,
        open_session=sessions or Sessions(),
        resources=resources,
    )


def test_a_context_says_which_attempt_of_which_job_it_is() -> None:
    context = a_context(attempt=2)

    assert (context.job_id, context.name, context.attempt, context.enqueued_at) == (JOB, "billing.charge", 2, THEN)
    assert repr(context) == f"<JobContext billing.charge {JOB} attempt 2>"


def test_the_idempotency_key_is_the_same_in_every_attempt() -> None:
    assert a_context(attempt=1).idempotency_key == a_context(attempt=2).idempotency_key == str(JOB)


def test_a_job_that_takes_no_session_makes_none() -> None:
    sessions = Sessions()
    context = a_context(sessions, redis="r")

    _ = (context["redis"], context.get("redis"), "redis" in context, list(context), repr(context), context.attempt)

    assert sessions.made == []


def test_the_session_is_made_once() -> None:
    sessions = Sessions()
    context = a_context(sessions)

    assert context.session is context.session
    assert sessions.made == [context.session]


def test_resources_are_read_as_in_arq() -> None:
    context = a_context(redis="r", engine=None)

    assert context["redis"] == "r"
    assert context.get("redis") == "r"
    assert context.get("engine", "other") is None
    assert context.get("absent") is None
    assert context.get("absent", 3) == 3
    assert "redis" in context
    assert "absent" not in context
    assert list(context) == ["redis", "engine"]


@pytest.mark.parametrize(("resources", "known"), [({"sqs": 1, "engine": 2}, "engine, sqs"), ({}, "none")])
def test_a_missing_resource_says_which_there_are(resources: dict[str, Any], known: str) -> None:
    with pytest.raises(KeyError, match=f"no 'redis'; it has: {known}"):
        a_context(**resources)["redis"]


def test_a_context_without_resources_is_still_true() -> None:
    assert a_context()


@pytest.mark.parametrize("attribute", ["session", "attempt", "job_id", "idempotency_key", "else_where"])
def test_a_context_cannot_be_written_to(attribute: str) -> None:
    with pytest.raises(AttributeError):
        setattr(a_context(), attribute, 1)
    with pytest.raises(TypeError):
        a_context()["redis"] = 1  # type: ignore[index]
