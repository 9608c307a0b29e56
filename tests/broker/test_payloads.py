"""Payloads of plain ARQ: read without trusting them; results in the format in which the payload came."""

from __future__ import annotations

import json
import os
import pickle
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from arq.jobs import deserialize_result, serialize_job
from hypothesis import given
from hypothesis import strategies as st

from worker.broker.payloads import Enqueued, Payloads, Unreadable

AT = 1_700_000_000_000
PLAIN: tuple[Any, ...] = (
    None, True, 7, -1.5, "text", b"bytes", [1, [2]], {"a": {"b": 1}}, {1, 2}, frozenset({3}), (4, 5), 1j,
    datetime(2026, 1, 2, tzinfo=UTC), date(2026, 1, 2), timedelta(seconds=3), Decimal("1.10"), UUID(int=5),
)  # fmt: skip


class OfAClient:
    """A class that is no plain data."""


class Calls:
    """Calls something when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


def ended(result: object, *, success: bool = True) -> dict[str, Any]:
    return {
        "function": "f", "args": (), "kwargs": {}, "job_try": 1, "enqueue_time_ms": AT, "success": success,
        "result": result, "start_ms": AT, "finished_ms": AT, "ref": "f", "queue_name": "arq:queue", "job_id": "1",
    }  # fmt: skip


def test_plain_data_is_read_as_arq_has_pickled_it() -> None:
    payload = serialize_job("billing.charge", PLAIN, {"by name": PLAIN}, 3, AT)

    assert Payloads().read(payload) == Enqueued("billing.charge", PLAIN, {"by name": PLAIN}, 3, AT)


@pytest.mark.parametrize(
    "value",
    [OfAClient(), OfAClient, Calls(os.getpid), Calls(eval, "1"), Calls(getattr, date, "today"), os.system],
    ids=["an object", "a class", "a call", "eval", "getattr", "a function"],
)
def test_a_pickle_that_holds_more_is_refused_with_what_to_do_and_calls_nothing(value: object) -> None:
    read = Payloads().read(serialize_job("f", (value,), {}, None, AT))

    assert isinstance(read, Unreadable)
    assert "only plain data is read" in read.why.message
    assert "jobs.arq_pickles" in read.why.message


def test_any_pickle_is_read_where_the_setting_says_so_and_that_is_told_once() -> None:
    warned: list[int] = []
    payloads = Payloads(pickles="any", warn=lambda: warned.append(1))

    found = [payloads.read(serialize_job("f", (Calls(int, "7"),), {}, None, AT)) for _ in range(3)]

    assert found == [Enqueued("f", (7,), {}, 1, AT)] * 3
    assert warned == [1]


@pytest.mark.parametrize(
    "fields",
    [
        7,
        {},
        {"f": "", "a": [], "k": {}, "t": None, "et": AT},
        {"f": "f", "a": "text", "k": {}, "t": None, "et": AT},
        {"f": "f", "a": [], "k": [], "t": None, "et": AT},
        {"f": "f", "a": [], "k": {}, "t": -1, "et": AT},
        {"f": "f", "a": [], "k": {}, "t": True, "et": AT},
        {"f": "f", "a": [], "k": {}, "t": None, "et": -1},
        {"f": "f", "a": [], "k": {}, "t": None, "et": 2**60},
        {"f": "f", "a": [], "k": {}, "t": None, "et": "now"},
    ],
)
def test_what_is_no_job_is_unreadable_in_json_and_in_a_pickle(fields: Any) -> None:
    for payload in (json.dumps(fields).encode(), pickle.dumps(fields)):
        assert isinstance(Payloads().read(payload), Unreadable)


@given(st.binary(max_size=200))
def test_no_bytes_at_all_raise_and_the_same_bytes_have_the_same_negative_number(payload: bytes) -> None:
    first, second = Payloads().read(payload), Payloads().read(payload)

    assert isinstance(first, Unreadable)
    assert isinstance(second, Unreadable)
    assert first.at == second.at < 0


def test_a_result_comes_in_the_format_of_its_payload() -> None:
    as_json = Payloads().result(b"{", **ended({"a": 1}))
    as_pickle = Payloads().result(b"\x80", **ended({"a": 1}))
    of_nobody_knows = Payloads().result(b"", **ended({"a": 1}))

    assert as_json is not None
    assert as_pickle is not None
    assert of_nobody_knows == as_pickle
    assert deserialize_result(as_json, deserializer=json.loads).result == {"a": 1}
    assert deserialize_result(as_pickle).result == {"a": 1}


def test_an_exception_is_text_in_json() -> None:
    result = Payloads().result(b"{", **ended(ValueError("no"), success=False))

    assert result is not None
    assert deserialize_result(result, deserializer=json.loads).result == "ValueError: no"


def test_a_serializer_and_a_deserializer_of_the_users_own_are_asked_first() -> None:
    payloads = Payloads(lambda fields: b"!" + json.dumps(fields).encode(), lambda payload: json.loads(payload[1:]))
    payload = serialize_job("f", (1,), {}, None, AT, serializer=lambda fields: b"!" + json.dumps(fields).encode())

    assert payloads.read(payload) == Enqueued("f", (1,), {}, 1, AT)
    assert (payloads.result(b"{", **ended(1)) or b"").startswith(b"!{")
