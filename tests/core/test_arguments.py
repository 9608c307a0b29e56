from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import pytest
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PlainSerializer
from sqlalchemy.ext.asyncio import AsyncSession
from typing_extensions import TypedDict

from tests.core.modules import a_module
from worker.core.errors import ArgumentsInvalid, NotStorable, ResultInvalid, TooLarge
from worker.core.signature import Signature


class Line(TypedDict):
    amount: int


class Item(BaseModel):
    price: int


@dataclass
class Receipt:
    number: int


async def charge(
    session: AsyncSession, invoice_id: int, note: str = "none", *, lines: list[Line] | None = None
) -> Receipt:
    return Receipt(invoice_id)


CHARGE = Signature(charge, "billing.charge")


FREE = Item(price=1)
FREE.price = "none"  # type: ignore[assignment]


class Open(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    amount: int


# --- binding


@pytest.mark.parametrize(
    ("args", "kwargs", "stored"),
    [
        ((7,), {}, {"invoice_id": 7}),
        (("7",), {}, {"invoice_id": 7}),
        ((7, "hi"), {}, {"invoice_id": 7, "note": "hi"}),
        ((), {"note": "hi", "invoice_id": 7}, {"invoice_id": 7, "note": "hi"}),
        ((7,), {"lines": [{"amount": "3"}]}, {"invoice_id": 7, "lines": [{"amount": 3}]}),
        ((7,), {"note": "none"}, {"invoice_id": 7, "note": "none"}),
    ],
)
def test_arguments_are_checked_and_normalised_and_defaults_left_out(
    args: tuple[Any, ...], kwargs: dict[str, Any], stored: dict[str, Any]
) -> None:
    text = CHARGE.bind(*args, **kwargs)

    assert json.loads(text) == stored
    assert CHARGE.call_arguments(text) == stored


def test_a_call_and_its_mapping_bind_alike() -> None:
    assert CHARGE.bind(7, note="x") == CHARGE.bind_mapping({"note": "x", "invoice_id": "7"})


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        ((), {}, "argument invoice_id is missing"),
        (
            ("x",),
            {},
            "argument invoice_id: Input should be a valid integer, unable to parse string as an integer (got str)",
        ),
        ((7, "a", []), {}, "takes at most 2 arguments by position, got 3"),
        ((7,), {"invoice_id": 8}, "argument invoice_id is given twice"),
        (
            (7,),
            {"note": 1, "lines": 2},
            "argument note: Input should be a valid string (got int); argument lines: Input should be a valid list (got int)",
        ),
        ((7,), {"lines": [{"amount": 1}, {"amount": "x"}]}, "argument lines[1].amount: "),
        ((7,), {"lines": [{}]}, "argument lines[0].amount is missing"),
        (
            (),
            {"invoiceid": 7},
            "argument invoice_id is missing; unknown argument 'invoiceid'; did you mean 'invoice_id'?",
        ),
        ((7,), {"session": 1}, "unknown argument 'session'"),
        ((7,), {"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "; and 2 more"),
        ((7,), {"a\n\0": 1}, r"unknown argument 'a\n\x00'"),
        ((7,), {"\ud800": 1}, "arguments: Input should be a valid string"),
    ],
)
def test_wrong_arguments_are_told_in_one_line(args: tuple[Any, ...], kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentsInvalid) as caught:
        CHARGE.bind(*args, **kwargs)

    text = str(caught.value)
    assert text.startswith("billing.charge: ")
    assert message in text
    assert "\n" not in text
    assert "\0" not in text
    text.encode()


def raises(error: Exception) -> Signature:
    """The signature of a job with an argument and a result whose validator raises this error."""

    def check(value: int) -> int:
        if value == 1:
            raise error
        return value

    async def job(session: AsyncSession, n: Any) -> Any: ...

    job.__annotations__["n"] = job.__annotations__["return"] = Annotated[int, AfterValidator(check)]
    return Signature(job, "x")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("no\nsuch invoice"), "argument n: Value error, no such invoice (got int)"),
        (KeyError("lost\nkey"), r"a validator raised KeyError: 'lost\nkey'"),
        (RuntimeError("a\n\0\ud800"), r"a validator raised RuntimeError: a \x00\ud800"),
        (ValueError("\ud800"), ""),
    ],
)
def test_a_validators_words_become_one_line(error: Exception, message: str) -> None:
    signature = raises(error)
    uses: list[tuple[Callable[[], Any], Any]] = [
        (lambda: signature.bind(1), ArgumentsInvalid),
        (lambda: signature.call_arguments('{"n":1}'), ArgumentsInvalid),
        (lambda: signature.decode_result("1"), ResultInvalid),
        (lambda: signature.encode_result(1), NotStorable),
    ]

    for use, kind in uses:
        with pytest.raises(kind) as caught:
            use()
        text = str(caught.value)
        assert message.removeprefix("argument n: ") in text
        assert "\n" not in text
        text.encode()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"note": "a\0"}, NotStorable),
        ({"note": "x" * 1_100_000}, TooLarge),
        ({"lines": [{"amount": 10**4300}]}, (NotStorable, ArgumentsInvalid)),
    ],
)
def test_what_jsonb_does_not_keep_is_refused_with_the_jobs_name(arguments: dict[str, Any], error: Any) -> None:
    with pytest.raises(error, match=r"billing\.charge"):
        CHARGE.bind_mapping({"invoice_id": 1, **arguments})


@pytest.mark.parametrize("mapping", [[], None, "x", 7])
def test_arguments_by_name_must_be_a_mapping(mapping: Any) -> None:
    with pytest.raises(ArgumentsInvalid, match="arguments: Input should be a valid dictionary"):
        CHARGE.bind_mapping(mapping)


NAMES = [
    "copy",
    "json",
    "keys",
    "items",
    "model_config",
    "self",
    "cls",
    "_private",
    "__dunder__",
    "args",
    "kwargs",
    "name",
    "text",
    "mapping",
    "type",
]


@pytest.mark.parametrize("name", NAMES)
def test_any_name_can_be_an_argument(name: str) -> None:
    job = a_module(f"async def job(session: AsyncSession, {name}: int) -> None: ...").job
    signature = Signature(job, "x")

    assert (
        signature.bind(**{name: "7"}) == signature.bind("7") == signature.bind_mapping({name: 7}) == f'{{"{name}":7}}'
    )
    assert signature.call_arguments(f'{{"{name}":7}}') == {name: 7}


def test_an_argument_without_annotation_takes_anything() -> None:
    job = a_module("async def job(session: AsyncSession, n): ...").job

    assert Signature(job, "x").bind([1, "a"]) == '{"n":[1,"a"]}'


def test_unknown_keys_are_forbidden_for_arguments_only() -> None:
    text = CHARGE.bind(7, lines=[{"amount": 1, "more": 2}])

    assert CHARGE.call_arguments(text)["lines"] == [{"amount": 1}]


def test_an_alias_binds_and_runs() -> None:
    async def job(session: AsyncSession, n: Any) -> None: ...

    job.__annotations__["n"] = Annotated[int, Field(alias="N")]
    signature = Signature(job, "x")

    assert signature.bind(7) == '{"n":7}'
    assert signature.bind_mapping({"N": 7}) == '{"n":7}'
    assert signature.call_arguments('{"n":7}') == {"n": 7}


# --- the run


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "argument invoice_id is missing"),
        ('{"invoice_id": "x"}', "argument invoice_id: "),
        ('{"invoice_id": 1, "gone": 2}', "unknown argument 'gone'"),
        ("[]", "arguments: "),
        ("{", "arguments: Invalid JSON"),
    ],
)
def test_stored_arguments_are_checked_again(text: str, message: str) -> None:
    with pytest.raises(ArgumentsInvalid, match=r"^billing\.charge: ") as caught:
        CHARGE.call_arguments(text)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


async def test_stored_arguments_call_the_function() -> None:
    arguments = CHARGE.call_arguments(CHARGE.bind(7, lines=[]))

    async with AsyncSession() as session:
        assert await charge(session, **arguments) == Receipt(7)


def test_a_model_arrives_as_a_model() -> None:
    async def job(session: AsyncSession, item: Item) -> None: ...

    signature = Signature(job, "x")

    assert signature.call_arguments(signature.bind({"price": "3"})) == {"item": Item(price=3)}


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (Annotated[int, AfterValidator(str)], 7),
        (list[Annotated[int, AfterValidator(str)]], [7]),
        (Open, {"amount": 1, "item": FREE}),
    ],
)
def test_what_validation_gives_and_does_not_fit_is_refused(annotation: Any, value: Any) -> None:
    async def job(session: AsyncSession, given: Any) -> None: ...

    job.__annotations__["given"] = annotation

    with pytest.raises(NotStorable, match="does not fit its annotation"):
        Signature(job, "tests.job").bind(value)


def test_a_users_serializer_writes_an_argument() -> None:
    async def job(session: AsyncSession, given: Annotated[int, PlainSerializer(lambda number: -number)]) -> None: ...

    assert Signature(job, "tests.job").bind(7) == '{"given":-7}'
