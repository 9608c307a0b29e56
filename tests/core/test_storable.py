from __future__ import annotations

import json
from collections import UserDict
from typing import Any

import pytest

from worker.core.codec import FRACTION_DIGITS, LIMIT, WHOLE_DIGITS, Codec, encode_plain, storable
from worker.core.errors import NotStorable, TooLarge

ANY: Codec[Any] = Codec(Any, "results of billing.charge")


def nested(levels: int) -> Any:
    value: Any = 1
    for level in range(levels):
        value = [value] if level % 2 else {"k": value}
    return value


# --- JSON that somebody else wrote


@pytest.mark.parametrize(
    "text",
    [
        r'"\\u0000"',
        r'"\\\\u0000"',
        r'"\ud83d\ude00"',
        '"NaN, Infinity"',
        "9" * WHOLE_DIGITS,
        "-" + "9" * WHOLE_DIGITS,
        "1e4299",
        f"1e-{FRACTION_DIGITS}",
        "0." + "0" * 4_000 + "1",
        "-0.0",
        ' { "a" : [ ] } ',
    ],
    ids=lambda text: text[:20],
)
def test_json_that_jsonb_keeps_is_accepted(text: str) -> None:
    assert storable(text) == text
    ANY.decode(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (r'"\u0000"', "NUL"),
        (r'"\\\u0000"', "NUL"),
        (r'{"\u0000": 1}', "NUL"),
        (r'"\ud83d"', "lone surrogate"),
        (r'"\ude00\ud83d"', "lone surrogate"),
        ('"\ud83d"', "lone surrogate"),
        ("[NaN]", r"at \[0\] is NaN"),
        ('{"a": -Infinity}', r"at \['a'\] is -Infinity"),
        ("9" * (WHOLE_DIGITS + 1), "more than 4,300 digits"),
        ("1" * (WHOLE_DIGITS + 1) + ".5", "too many digits"),
        ("1e4300", "exponent too large"),
        ("1e131072", "exponent too large"),
        ("0e99999", "exponent too large"),
        ("[1.5e99999999999999999999]", r"at \[0\] is a number with an exponent too large"),
        (f"1e-{FRACTION_DIGITS + 1}", "exponent too large"),
        ("0." + "0" * FRACTION_DIGITS + "1", "too many digits"),
        ('{"a": "\\u0000", "a": 1}', "has a key twice"),
        ('{"a": {"b": 1, "b": 1}}', r"at \['a'\] has a key twice"),
        ("[" * 202 + "]" * 202, "deeper than 200"),
        ("[" * 100_000, "deeper than 200"),
        ('{"a"', "not JSON"),
        ("", "not JSON"),
        ("\ufeff1", "not JSON"),
        ('"a\0"', "not JSON"),
    ],
    ids=lambda text: ascii(text)[:20],
)
def test_json_that_jsonb_refuses_or_python_cannot_read_is_refused(text: str, message: str) -> None:
    with pytest.raises(NotStorable, match=message):
        storable(text)


# --- arguments by name


@pytest.mark.parametrize("value", [{}, {"invoice_id": 7}, {"at": {"deep": [1]}, "ü": None}])
def test_arguments_by_name_are_a_json_object(value: dict[str, Any]) -> None:
    assert json.loads(encode_plain(value)) == value
    assert encode_plain(UserDict(value)) == encode_plain(value)


@pytest.mark.parametrize("value", [None, [], [("a", 1)], "a", 7, {1: 2}, {"a": 1, None: 2}])
def test_arguments_that_are_no_mapping_of_names_are_refused(value: object) -> None:
    with pytest.raises(NotStorable, match="must be a mapping of names to values, such as"):
        encode_plain(value)


@pytest.mark.parametrize("value", [{"a": "\0"}, {"\ud800": 1}, {"a": object()}, {"a": nested(202)}])
def test_arguments_by_name_pass_the_same_checks(value: dict[str, Any]) -> None:
    with pytest.raises(NotStorable, match=r"^arguments: "):
        encode_plain(value)


def test_arguments_by_name_have_the_same_limit() -> None:
    with pytest.raises(TooLarge, match=r"^arguments take"):
        encode_plain({"a": "x" * LIMIT})
