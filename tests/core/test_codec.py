from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from enum import IntEnum
from typing import Annotated, Any
from uuid import UUID

import pytest
from asyncpg.pgproto import pgproto
from hypothesis import given
from hypothesis import strategies as st
from pydantic import (
    AfterValidator,
    BaseModel,
    Field,
    Json,
    ValidationError,
    WrapValidator,
    computed_field,
    field_serializer,
)
from typing_extensions import TypedDict

from worker.core.codec import LIMIT, WHOLE_DIGITS, Codec, storable
from worker.core.errors import NotStorable, TooLarge

ANY: Codec[Any] = Codec(Any, "results of billing.charge")


class Money(BaseModel):
    amount: Decimal = Field(alias="sum")
    note: str = Field("", serialization_alias="remark", validation_alias="comment")
    raw: Json[list[int]] = []

    @computed_field  # type: ignore[prop-decorator]
    @property
    def cents(self) -> int:
        return int(self.amount * 100)


class Strict(BaseModel, extra="forbid"):
    whole: int = 1

    @computed_field  # type: ignore[prop-decorator]
    @property
    def double(self) -> int:
        return 2 * self.whole


@dataclass
class Blob:
    data: bytes


@dataclass
class Other:
    data: bytes = b""


class Shape(TypedDict):
    data: bytes


class Small(IntEnum):
    ONE = 1


class Word(str): ...


class Moment(datetime): ...


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"k": value}
    return value


# --- what comes back


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, 10**4299),
        (float, 1e300),
        (float, -math.inf),
        (float, 5e-324),
        (bytes, bytes(range(256))),
        (Blob, Blob(b"\xff\xfe")),
        (Shape, {"data": b"\xff"}),
        (timedelta, timedelta(days=-3, microseconds=1)),
        (datetime, datetime(2026, 10, 1, tzinfo=UTC)),
        (UUID, UUID(int=7)),
        (Decimal, Decimal("1.10")),
        (tuple[int, str], (1, "ü😀")),
        (set[int], {1, 2}),
        (dict[int, str | None], {1: None}),
        (Money, Money(sum=Decimal("1.5"), comment="hi", raw="[1]")),
        (Strict, Strict(whole=3)),
        (None, None),
        (Any, {"a": [1, 2.5, None, True, "\\u0000", "\\ud800", "NaN"]}),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_value_comes_back_as_it_was(annotation: Any, value: Any) -> None:
    codec: Codec[Any] = Codec(annotation)
    text = codec.encode(value)

    assert codec.decode(text) == value
    assert storable(text) == text


def test_not_a_number_comes_back_too() -> None:
    codec: Codec[float] = Codec(float)

    assert codec.encode(math.nan) == '"NaN"'
    assert math.isnan(codec.decode('"NaN"'))


def test_bytes_are_base64_and_durations_iso_8601() -> None:
    assert ANY.encode([b"\x00\xff", timedelta(seconds=90)]) == '["AP8=","PT1M30S"]'


def test_what_is_written_has_the_names_of_python() -> None:
    money = Money(sum=Decimal(1), comment="hi")

    assert json.loads(Codec[Money](Money).encode(money)) == {"amount": "1", "note": "hi", "raw": "[]"}


@pytest.mark.parametrize("text", ['{"sum": "1", "comment": "x"}', '{"amount": "1", "note": "x"}'])
def test_names_and_aliases_are_read(text: str) -> None:
    codec: Codec[Money] = Codec(Money)

    assert (
        codec.decode(text) == codec.decode(codec.encode_input(json.loads(text))) == Money(sum=Decimal(1), comment="x")
    )


def test_what_does_not_fit_is_pydantics_own_error() -> None:
    codec: Codec[int] = Codec(int)

    with pytest.raises(ValidationError):
        codec.decode('"x"')
    with pytest.raises(ValidationError):
        codec.encode_input("x")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
)


@given(JSON)
def test_plain_data_comes_back_equal(value: Any) -> None:
    try:
        text = ANY.encode(value)
    except NotStorable:
        assert "\\u0000" in json.dumps(value)
    else:
        assert ANY.decode(text) == value
        assert storable(text) == text


@given(st.lists(st.sampled_from(["\0", "\ud800", "\udc00", "\\", "u0000", "\\ud800", "a", "😀", "NaN"])).map("".join))
def test_text_is_refused_exactly_when_it_has_a_nul_or_lone_surrogate(text: str) -> None:
    bad = any(character == "\0" or "\ud800" <= character <= "\udfff" for character in text)

    for value in (text, [text], {text: 1}):
        if bad:
            with pytest.raises(NotStorable):
                ANY.encode(value)
        else:
            assert ANY.decode(ANY.encode(value)) == value


def test_input_is_written_as_what_it_stands_for() -> None:
    assert Codec[list[int]](list[int]).encode_input(("7", 8.0)) == "[7,8]"


# --- what is refused


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"items": [{"name": "a\0b"}]}, "the value at ['items'][0]['name'] has a NUL character"),
        ({"a": 1, "b": {"c\0": 1}}, r"the value at ['b']['c\x00'] has a NUL character"),
        ("\0", "the value has a NUL character, which jsonb cannot keep; remove it"),
        ("\\\0", "the value has a NUL character"),
        (["a", ("b", "\ud800")], "the value at [1][1] has a lone surrogate"),
        ({"\udfff": 1}, r"the value at ['\udfff'] has a lone surrogate"),
        (iter(["\udfff"]), "has a lone surrogate"),
        ([1, 10**WHOLE_DIGITS], "the value at [1] is a number of more than 4,300 digits; pass it as text"),
        (-(10**WHOLE_DIGITS), "the value is a number of more than 4,300 digits"),
        (nested(202), "the value is nested deeper than 200 levels; flatten it"),
        (nested(5_000), "the value is nested deeper than 200 levels"),
        (object(), "no JSON form: Unable to serialize unknown type: <class 'object'>; pass plain data"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, str) and value.isascii() and value.isprintable() else "",
)
def test_a_refusal_says_where_and_why(value: Any, message: str) -> None:
    with pytest.raises(NotStorable) as refusal:
        ANY.encode(value)

    assert message in str(refusal.value)
    assert str(refusal.value).startswith("results of billing.charge: ")
    assert "\n" not in str(refusal.value)
    str(refusal.value).encode()


def test_a_value_that_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)

    with pytest.raises(NotStorable, match="Circular reference"):
        ANY.encode(loop)


@pytest.mark.parametrize("levels", [1, 100, 200])
def test_nesting_up_to_the_limit_is_kept(levels: int) -> None:
    assert ANY.decode(ANY.encode(nested(levels))) == nested(levels)


def test_many_shallow_values_are_not_deep() -> None:
    many: list[Any] = [{"a": []}] * 1_000

    assert ANY.decode(ANY.encode(many)) == many


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (int, "1"),
        (None, 1),
        (list[int], [1, "a\nb"]),
        (Money, {"sum": 1}),
        (str, 1),
        (Strict, Money(sum=Decimal(1))),
        (list[Strict], [Money(sum=Decimal(1))]),
        (Blob, Other()),
        (bool, "yes"),
        (Annotated[int, Field(gt=0)], 0),
    ],
)
def test_a_value_that_does_not_fit_its_annotation_is_refused_not_warned_of(annotation: Any, value: Any) -> None:
    with pytest.raises(NotStorable, match=r"^results: a value does not fit its annotation: ") as refusal:
        Codec(annotation, "results").encode(value)

    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "annotation",
    [
        Annotated[int, AfterValidator(lambda number: f"{number}")],
        Annotated[int, AfterValidator(lambda number: f"{number}")] | None,
        Annotated[int, WrapValidator(lambda number, _: f"{number}")],
    ],
)
def test_what_a_validator_makes_of_an_input_is_refused_where_it_does_not_fit(annotation: Any) -> None:
    for shape, value in ((annotation, 7), (list[annotation], [7])):
        with pytest.raises(NotStorable, match=r"^results: a value does not fit its annotation: "):
            Codec(shape, "results").encode_input(value)


@pytest.mark.parametrize(
    ("annotation", "value", "text"),
    [
        (int | None, Small.ONE, "1"),
        (str, Word("x"), '"x"'),
        (float, 1, "1.0"),
        (float, math.inf, '"Infinity"'),
        (UUID, pgproto.UUID(bytes(16)), '"00000000-0000-0000-0000-000000000000"'),
        (date, datetime(2040, 1, 2), '"2040-01-02"'),
        (list[datetime], [Moment(2040, 1, 2, tzinfo=UTC)], '["2040-01-02T00:00:00Z"]'),
    ],
)
def test_an_input_of_a_derived_type_is_written_as_its_base(annotation: Any, value: Any, text: str) -> None:
    assert Codec(annotation).encode_input(value) == text


@pytest.mark.filterwarnings("ignore")
def test_an_attribute_that_no_longer_fits_is_refused_where_warnings_are_not_errors() -> None:
    changed = Strict()
    changed.whole = "many"  # type: ignore[assignment]

    with pytest.raises(NotStorable, match="a value does not fit its annotation"):
        ANY.encode(changed)


def test_a_serializer_that_raises_makes_the_value_not_storable() -> None:
    class Broken(BaseModel):
        a: int = 1

        @field_serializer("a")
        def breaks(self, value: int) -> int:
            raise RuntimeError("out\nof order")

    with pytest.raises(NotStorable, match="out of order"):
        ANY.encode(Broken())


def test_a_model_that_writes_nan_as_a_constant_is_refused() -> None:
    class Loose(BaseModel, ser_json_inf_nan="constants"):
        ratio: float

    for ratio, word in [(math.nan, "NaN"), (-math.inf, "-Infinity")]:
        with pytest.raises(NotStorable, match=rf"the value at \['ratio'\] is {word}, which JSON does not have"):
            ANY.encode(Loose(ratio=ratio))


@pytest.mark.parametrize(("length", "fits"), [(LIMIT - 2, True), (LIMIT - 1, False)])
def test_the_limit_is_counted_with_the_quotes(length: int, fits: bool) -> None:
    if fits:
        assert len(ANY.encode("x" * length)) == LIMIT == 1_048_576
    else:
        with pytest.raises(TooLarge, match=r"results of billing.charge take 1,048,577 bytes"):
            ANY.encode("x" * length)


def test_the_limit_counts_bytes_not_characters() -> None:
    with pytest.raises(TooLarge):
        ANY.encode("ü" * (LIMIT // 2))
    with pytest.raises(TooLarge):
        storable('"' + "ü" * (LIMIT // 2) + '"')
