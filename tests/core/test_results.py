from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Never, NoReturn

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from tests.core.modules import a_module
from worker.core.errors import NotStorable, ResultInvalid
from worker.core.signature import Signature


class Plain:
    pass


@dataclass
class Receipt:
    number: int


async def charge(session: AsyncSession, invoice_id: int) -> Receipt:
    return Receipt(invoice_id)


CHARGE = Signature(charge, "billing.charge")


def test_a_result_comes_back_as_its_annotation() -> None:
    text = CHARGE.encode_result(Receipt(7))

    assert text == '{"number":7}'
    assert CHARGE.decode_result(text) == Receipt(7)


@pytest.mark.parametrize(
    ("value", "error"), [({"number": 7}, NotStorable), (None, NotStorable), (Plain(), NotStorable)]
)
def test_a_result_that_does_not_fit_is_refused(value: object, error: Any) -> None:
    with pytest.raises(error, match=r"^results of billing\.charge: "):
        CHARGE.encode_result(value)


@pytest.mark.parametrize(
    ("text", "message"), [('{"number": "x"}', "number: "), ("[]", "the value: "), ("{}", "number is missing")]
)
def test_a_stored_result_that_no_longer_fits_is_told(text: str, message: str) -> None:
    with pytest.raises(ResultInvalid, match=r"^billing\.charge: the stored result does not fit: ") as caught:
        CHARGE.decode_result(text)

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_a_return_annotation_any_json_is_a_result() -> None:
    job = a_module("async def job(session: AsyncSession): ...").job
    signature = Signature(job, "x")

    assert signature.decode_result(signature.encode_result([1, {"a": None}])) == [1, {"a": None}]


async def never(session: AsyncSession) -> Never: ...  # type: ignore[empty-body]
async def no_return(session: AsyncSession) -> NoReturn: ...  # type: ignore[empty-body]


@pytest.mark.parametrize("fn", [never, no_return])
def test_a_job_that_never_returns_can_be_a_job(fn: Any) -> None:
    assert Signature(fn, "x").takes == "session"
