"""Whose an id is: pure, and never in doubt to our favour."""

from __future__ import annotations

import json
import pickle
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.broker.hints import Owner, owner_of, parse_id, payload_of

HERE = UUID("11111111-1111-1111-1111-111111111111")
# Fixed, for a test's parameters must be the same in each of the processes that share the suite.
SEVEN = UUID("01a20739-bf8e-7746-b87c-03a96f84966d")
FOUR = UUID("9f1c8c1e-3a52-4d0b-8a3f-6a1d2b7c4e5f")
OURS = str(SEVEN).encode()


@pytest.mark.parametrize("job_id", [SEVEN, FOUR])
def test_an_id_we_wrote_is_read_back(job_id: UUID) -> None:
    assert parse_id(str(job_id).encode()) == job_id


@pytest.mark.parametrize(
    "raw",
    [
        FOUR.hex.encode(),  # as plain ARQ draws them
        str(FOUR).upper().replace("1", "A").encode() + b"",
        f"{{{FOUR}}}".encode(),
        f"urn:uuid:{FOUR}".encode(),
        f" {FOUR}".encode(),
        str(FOUR)[:-1].encode(),
        b"",
        b"charge-7",
        b"cron:nightly:1700000000000",
        "j\u00f6b".encode(),
        b"\xff\x00\xfe",
    ],
)
def test_an_id_we_never_write_is_not_ours(raw: bytes) -> None:
    assert parse_id(raw) is None


@pytest.mark.parametrize(
    ("raw", "payload", "owner"),
    [
        (OURS, payload_of("a.b", 1, HERE).encode(), Owner.US),
        (
            OURS,
            payload_of("a.b", 1, FOUR).encode(),
            Owner.ANOTHER_INSTALLATION,
        ),
        (OURS, None, Owner.US),
        (b"charge-7", None, Owner.PLAIN_ARQ),
        (FOUR.hex.encode(), None, Owner.PLAIN_ARQ),
        # a dashed id that a user of plain ARQ chose
        (OURS, json.dumps({"t": None, "f": "f", "a": [], "k": {}, "et": 1}).encode(), Owner.PLAIN_ARQ),
        (OURS, pickle.dumps({"t": None, "f": "f", "a": (), "k": {}, "et": 1}), Owner.PLAIN_ARQ),
        (OURS, b"", Owner.PLAIN_ARQ),
        (OURS, b"[1]", Owner.PLAIN_ARQ),
        (OURS, b"null", Owner.PLAIN_ARQ),
        (OURS, b'{"x": 7}', Owner.ANOTHER_INSTALLATION),
        (OURS, b'{"x": [[]]}', Owner.ANOTHER_INSTALLATION),
        (OURS, b"\xff\xfe", Owner.PLAIN_ARQ),
        (OURS, b"[" * 200_000, Owner.PLAIN_ARQ),
        (OURS, b"9" * 10_000, Owner.PLAIN_ARQ),
    ],
)
def test_only_what_is_surely_ours_is_called_ours(raw: bytes, payload: bytes | None, owner: Owner) -> None:
    assert owner_of(raw, payload, HERE) is owner


@given(st.binary(max_size=80))
def test_whatever_stands_in_a_queue_parse_id_answers(raw: bytes) -> None:
    parsed = parse_id(raw)

    assert parsed is None or str(parsed).encode() == raw


_json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(
    st.binary()
    | _json.map(lambda value: json.dumps(value).encode())
    | _json.map(lambda x: json.dumps({"x": x}).encode())
)
def test_whatever_stands_beside_an_id_it_is_not_ours_without_our_mark(payload: bytes) -> None:
    assert owner_of(OURS, payload, HERE) is not Owner.US


@given(st.text(), st.integers(0, 2**53), st.uuids())
def test_a_payload_is_json_for_any_name(name: str, enqueued_ms: int, installation: UUID) -> None:
    payload = payload_of(name, enqueued_ms, installation)

    assert json.loads(payload) == {"t": None, "f": name, "a": [], "k": {}, "et": enqueued_ms, "x": str(installation)}
    assert owner_of(OURS, payload.encode("utf-8"), installation) is Owner.US
