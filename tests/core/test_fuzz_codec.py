"""Whatever is passed, returned or stored: JSON that PostgreSQL keeps, or an error of our own that says why not."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from decimal import Decimal
from enum import Enum
from fractions import Fraction
from pathlib import PurePosixPath
from typing import Annotated, Any

import asyncpg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import AfterValidator, BaseModel, ConfigDict

from tests.servers import TestServers, _dsn
from worker.core.codec import Codec, encode_plain, storable
from worker.core.context import JobContext
from worker.core.errors import ArgumentsInvalid, ExarqError, NotStorable, ResultInvalid
from worker.core.signature import Signature

repeatable = settings(derandomize=True, max_examples=250)


class Colour(Enum):
    RED = "red"
    PAIR = (1, 2)


class Money(BaseModel):
    model_config = ConfigDict(arbitrary_types_allowed=True)

    amount: Any = 0


@dataclass
class Point:
    x: Any
    y: Any = None


class Hostile:
    """Raises whatever it is asked."""

    def __str__(self) -> str:
        raise RuntimeError("no\nname \0 \ud800")

    __repr__ = __str__

    def __iter__(self) -> Iterator[Any]:
        raise ZeroDivisionError

    def __eq__(self, other: object) -> bool:
        raise ZeroDivisionError

    __hash__ = None  # type: ignore[assignment]  # as for any class with an __eq__ of its own


class HostileText(str):
    """A text whose methods raise."""

    __slots__ = ()

    def __str__(self) -> str:
        raise RuntimeError("no text")

    def encode(self, *_: Any) -> bytes:
        raise RuntimeError("no bytes")


class HostileMapping(dict[str, Any]):
    """A mapping that cannot be walked."""

    def items(self) -> Any:
        raise ZeroDivisionError

    def __iter__(self) -> Iterator[str]:
        raise ZeroDivisionError


def _itself() -> list[Any]:
    endless: list[Any] = []
    endless.append({"again": endless})
    return endless


def _deep(levels: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(levels):
        value = [value]
    return value


any_text = st.text(st.characters(codec=None, exclude_categories=[]), max_size=30)  # with NUL and lone surrogates
numbers = (
    st.integers()
    | st.integers(-3, 3).map(lambda sign: sign * 10**4_400)
    | st.floats()
    | st.decimals()
    | st.fractions().map(lambda value: Fraction(value))
    | st.complex_numbers()
)
MAKERS: dict[str, Callable[[], Any]] = {
    "hostile": Hostile,
    "hostile text": lambda: HostileText("x"),
    "hostile mapping": lambda: HostileMapping(a=1),
    "itself": _itself,
    "object": object,
    "enum": lambda: Colour.RED,
    "enum of a tuple": lambda: Colour.PAIR,
    "function": lambda: len,
    "generator": lambda: (number for number in range(3)),
    "error": lambda: ValueError("x"),
    "path": lambda: PurePosixPath("/a"),
    "memoryview": lambda: memoryview(b"\xff"),
    "bytearray": lambda: bytearray(b"\x00"),
    "signalling nan": lambda: Decimal("sNaN"),
    "longest duration": lambda: timedelta.max,
    "last moment": lambda: datetime.max,
    "deep": lambda: _deep(1_000),
}
oddities: st.SearchStrategy[Any] = st.sampled_from(sorted(MAKERS)).map(lambda name: MAKERS[name]())
scalars = (
    st.none()
    | st.booleans()
    | numbers
    | any_text
    | st.binary(max_size=30)
    | st.datetimes()
    | st.timedeltas()
    | st.uuids()
)
values: st.SearchStrategy[Any] = st.recursive(
    scalars | oddities,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.tuples(inner, inner)
        | st.dictionaries(any_text | st.integers() | st.none() | st.floats() | st.binary(max_size=3), inner, max_size=3)
        | st.builds(Money, amount=inner)
        | st.builds(Point, inner, inner)
        | st.frozensets(st.integers() | any_text | st.binary(max_size=3), max_size=3)
    ),
    max_leaves=8,
)
json_like = (
    any_text
    | values.map(lambda value: _or_empty(value))
    | st.text('[]{},:"\\u0dEe+-. \n1NaInfity', max_size=40)
    | st.integers(0, 5_000).map(lambda deep: "[" * deep + "]" * deep)
    | st.integers(4_000, 20_000).map(lambda digits: f"[1e{digits}]" if digits % 2 else "9" * digits)
)


def _or_empty(value: Any) -> str:
    try:
        return encode_plain({"value": value})
    except NotStorable:
        return ""


def refused(error: ExarqError) -> None:
    """What every message keeps: one line that can be written anywhere."""
    message = str(error)
    assert message
    assert len(message.splitlines()) == 1
    assert "\0" not in message
    message.encode()


@pytest.fixture(scope="module")
def jsonb(servers: TestServers) -> Iterator[Callable[[str], str]]:
    """PostgreSQL's own reading of a JSON text."""
    loop = asyncio.new_event_loop()
    connection = loop.run_until_complete(asyncpg.connect(_dsn(servers.admin_url)))
    try:
        yield lambda text: str(loop.run_until_complete(connection.fetchval("SELECT $1::text::jsonb::text", text)))
    finally:
        loop.run_until_complete(connection.close())
        loop.close()


ANY: Codec[Any] = Codec(Any, "results of billing.charge")


@repeatable
@given(value=values)
@example(value={"a": {"b": [b"\xff", 1e300, -0.0]}})
def test_any_value_becomes_json_that_postgresql_keeps_or_is_refused(value: Any, jsonb: Callable[[str], str]) -> None:
    for write in (ANY.encode, ANY.encode_input, lambda value: encode_plain({"value": value})):
        try:
            text = write(value)
        except NotStorable as error:
            refused(error)
        else:
            ANY.decode(jsonb(text))


@repeatable
@given(text=json_like)
def test_any_text_is_kept_as_it_is_or_refused(text: str, jsonb: Callable[[str], str]) -> None:
    try:
        kept = storable(text)
    except NotStorable as error:
        refused(error)
    else:
        assert kept == text
        ANY.decode(jsonb(text))


def _positive(value: int) -> int:
    if value <= 0:
        raise RuntimeError("not\npositive \ud800")
    return value


async def charge(
    ctx: JobContext,
    amount: Annotated[int, AfterValidator(_positive)],
    to: Money | Point | None = None,
    *,
    note: str = "",
) -> dict[str, Decimal | bytes]:
    return {}


SIGNATURE = Signature(charge, "billing.charge")


@repeatable
@given(
    args=st.lists(values, max_size=3),
    kwargs=st.dictionaries(st.sampled_from(["amount", "to", "note"]) | any_text, values),
)
@example(args=[-1], kwargs={})
def test_any_call_is_bound_or_refused(args: list[Any], kwargs: dict[str, Any], jsonb: Callable[[str], str]) -> None:
    try:
        text = SIGNATURE.bind(*args, **kwargs)
    except (ArgumentsInvalid, NotStorable) as error:
        refused(error)
    else:
        assert SIGNATURE.call_arguments(jsonb(text))


@repeatable
@given(arguments=values)
def test_any_arguments_by_name_are_bound_or_refused(arguments: Any) -> None:
    try:
        SIGNATURE.bind_mapping(arguments)
    except (ArgumentsInvalid, NotStorable) as error:
        refused(error)


@repeatable
@given(text=json_like)
def test_any_stored_text_is_read_or_refused(text: str) -> None:
    for read, error_class in ((SIGNATURE.call_arguments, ArgumentsInvalid), (SIGNATURE.decode_result, ResultInvalid)):
        try:
            read(text)
        except error_class as error:
            refused(error)


@repeatable
@given(value=values)
def test_any_result_is_written_or_refused(value: Any) -> None:
    try:
        SIGNATURE.encode_result(value)
    except NotStorable as error:
        refused(error)
