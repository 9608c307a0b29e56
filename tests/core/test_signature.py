from __future__ import annotations

import functools
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, Session, mapped_column

from tests.core.modules import a_module
from worker.core.context import JobContext
from worker.core.errors import ArgumentsInvalid, DefinitionError
from worker.core.signature import Signature

if TYPE_CHECKING:
    from decimal import Decimal as OnlyForTheChecker


class OurSession(AsyncSession):
    pass


class Base(DeclarativeBase):
    pass


class User(Base):
    __tablename__ = "signature_user"
    id: Mapped[int] = mapped_column(primary_key=True)


class MappedData(MappedAsDataclass, Base):
    __tablename__ = "signature_data"
    id: Mapped[int] = mapped_column(primary_key=True)


class Plain:
    pass


class BadSchema:
    @classmethod
    def __get_pydantic_core_schema__(cls, *_: Any) -> Any:
        raise RuntimeError("out\nof order")


@dataclass
class Receipt:
    number: int


async def charge(session: AsyncSession, invoice_id: int, note: str = "none") -> Receipt:
    return Receipt(invoice_id)


CHARGE = Signature(charge, "billing.charge")


def refusal(fn: Any) -> str:
    """The one line with which the function is refused."""
    with pytest.raises(DefinitionError) as caught:
        Signature(fn, "a.name")
    text = str(caught.value)
    assert "\n" not in text
    return text


# --- the first parameter


async def takes_session(session: AsyncSession) -> None: ...
async def takes_ours(session: OurSession) -> None: ...
async def takes_annotated(session: Annotated[Annotated[AsyncSession, 1], 2]) -> None: ...
async def takes_quoted(session: "Annotated['AsyncSession', 1]") -> None: ...  # noqa: UP037
async def takes_only_by_position(session: AsyncSession, /, n: int) -> None: ...
async def takes_context(ctx: JobContext) -> None: ...
async def takes_annotated_context(ctx: Annotated[JobContext, "x"], n: int) -> None: ...


@pytest.mark.parametrize("fn", [takes_session, takes_ours, takes_annotated, takes_quoted, takes_only_by_position])
def test_a_job_may_take_a_session(fn: Any) -> None:
    assert Signature(fn, "x").takes == "session"


@pytest.mark.parametrize("fn", [takes_context, takes_annotated_context])
def test_a_job_may_take_the_context(fn: Any) -> None:
    assert Signature(fn, "x").takes == "context"


@pytest.mark.skipif(sys.version_info < (3, 12), reason="the type statement is new in 3.12")
def test_an_alias_of_the_session_is_the_session() -> None:
    module = a_module("type Db = Annotated[AsyncSession, 1]\nasync def job(session: Db, n: int) -> None: ...")

    assert Signature(module.job, "x").takes == "session"


def no_parameter() -> Any:
    async def job() -> None: ...

    return job


def only_by_name() -> Any:
    async def job(*, session: AsyncSession) -> None: ...

    return job


def only_star() -> Any:
    async def job(*session: AsyncSession) -> None: ...

    return job


def not_annotated() -> Any:
    async def job(session, n: int) -> None: ...  # type: ignore[no-untyped-def]

    return job


def other() -> Any:
    async def job(session: int) -> None: ...

    return job


def maybe() -> Any:
    async def job(session: AsyncSession | None) -> None: ...

    return job


def synchronous() -> Any:
    async def job(session: Session) -> None: ...

    return job


WRITE = "write session: AsyncSession or ctx: JobContext"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (no_parameter, f"has no first parameter; {WRITE}"),
        (only_by_name, f"has no first parameter; {WRITE}"),
        (only_star, f"has no first parameter; {WRITE}"),
        (not_annotated, f"its first parameter session has no annotation; {WRITE}"),
        (other, f"its first parameter session is int; {WRITE}"),
        (maybe, f"AsyncSession | None; {WRITE}"),
        (synchronous, f"an async job takes an AsyncSession, not a Session; {WRITE}"),
    ],
)
def test_another_first_parameter_is_refused(make: Callable[[], Any], message: str) -> None:
    text = refusal(make())

    assert text.startswith(f"{__name__}.{make.__name__}.<locals>.job: ")
    assert text.endswith(message)


# --- the kind of function


def plain(session: Session, n: int) -> None: ...
def plain_annotated(session: "Annotated[Session, 1]", /) -> None: ...  # noqa: UP037
def plain_async(session: AsyncSession) -> None: ...
def plain_context(ctx: JobContext) -> None: ...
def plain_other(number: int) -> None: ...
def plain_nothing() -> None: ...


@pytest.mark.parametrize("fn", [plain, plain_annotated])
def test_a_def_job_takes_a_sync_session(fn: Any) -> None:
    assert Signature(fn, "x").takes == "sync session"


def generator(session: Session) -> Any:
    yield 1


async def async_generator(session: AsyncSession) -> AsyncIterator[int]:
    yield 1


class Callable_:  # noqa: N801
    async def __call__(self, session: AsyncSession) -> None: ...
    async def method(self, session: AsyncSession) -> None: ...


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (plain_async, "takes an AsyncSession; write `async def`, or session: Session"),
        (plain_context, "takes the context; write session: Session and call worker.current_job()"),
        (plain_other, "its first parameter number is int; write session: Session"),
        (plain_nothing, "has no first parameter; write session: Session"),
        (lambda session: None, "its first parameter session has no annotation; write session: Session"),
        (generator, "a generator cannot be a job; write `return`, not `yield`"),
        (async_generator, "a generator cannot be a job; write `return`, not `yield`"),
        (Callable_(), "not a function but Callable_; put @job on an `async def` or `def` function"),
        (Callable_().method, "not a function but method"),
        (functools.partial(charge, invoice_id=1), "not a function but partial"),
        (staticmethod(charge), "not a function but staticmethod"),
        (7, "not a function but int"),
        (Callable_.method, "its first parameter self has no annotation"),
    ],
)
def test_what_is_no_function_that_a_worker_can_call_is_refused(fn: Any, message: str) -> None:
    assert message in refusal(fn)


# --- the arguments' parameters


async def star(session: AsyncSession, *ids: int) -> None: ...
async def stars(session: AsyncSession, **more: int) -> None: ...
async def by_position(session: AsyncSession, n: int, /) -> None: ...
async def orm(session: AsyncSession, n: int, user: User) -> None: ...
async def orm_list(session: AsyncSession, users: list[User]) -> None: ...
async def orm_data(session: AsyncSession, data: dict[str, MappedData]) -> None: ...
async def unknown(session: AsyncSession, n: int, thing: list[Plain]) -> None: ...
async def second_session(session: AsyncSession, ctx: JobContext) -> None: ...
async def annotated_wrongly(session: AsyncSession, n: Annotated[int, BadSchema]) -> None: ...
async def returns_orm(session: AsyncSession) -> list[User]: ...  # type: ignore[empty-body]
async def returns_unknown(session: AsyncSession) -> Plain: ...  # type: ignore[empty-body]
async def no_expression(session: AsyncSession, n: charge.nothing) -> None: ...  # type: ignore[name-defined]
async def not_a_type(session: AsyncSession, n: 1 + 1) -> None: ...  # type: ignore[valid-type]


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (star, "takes *ids: 'int'; name each argument instead"),
        (stars, "takes **more: 'int'; name each argument instead"),
        (by_position, "argument n is positional-only; put the `/` before it"),
        (orm, "parameter user: User is an ORM class; pass its key instead"),
        (orm_list, "parameter users: "),
        (orm_data, "MappedData] is an ORM class; pass its key instead"),
        (unknown, "parameter thing: "),
        (unknown, "Plain] has no JSON form; pass its key instead"),
        (second_session, "parameter ctx: JobContext has no JSON form"),
        (annotated_wrongly, "parameter n: "),
        (returns_orm, "User] is an ORM class; return plain data or a pydantic model instead"),
        (returns_unknown, "returns Plain has no JSON form; return plain data or a pydantic model instead"),
        (not_a_type, "parameter n: 2 has no JSON form"),
        (no_expression, "its annotations cannot be read: "),
    ],
)
def test_what_cannot_be_json_is_refused_at_the_decoration(fn: Any, message: str) -> None:
    text = refusal(fn)

    assert text.startswith(f"{__name__}.{fn.__name__}: ")
    assert message in text


def test_arguments_have_their_names_in_order() -> None:
    assert CHARGE.names == ("invoice_id", "note")


def test_a_wrapped_function_tells_what_it_wraps() -> None:
    def logged(fn: Callable[..., Coroutine[Any, Any, Any]]) -> Callable[..., Coroutine[Any, Any, Any]]:
        @functools.wraps(fn)
        async def wrapper(*args: Any, **kwargs: Any) -> Any:
            return await fn(*args, **kwargs)

        return wrapper

    assert Signature(logged(charge), "x").bind(invoice_id=7) == '{"invoice_id":7}'


# --- names that come later


@pytest.mark.parametrize(
    "source",
    [
        "async def job(session: AsyncSession, n: 'Later') -> None: ...",
        "async def job(session: AsyncSession, n: 'list[Later]') -> None: ...",
        "async def job(session: AsyncSession, n: Any) -> 'Later': ...",
        "async def job(session: 'AsyncSession', n: 'Later') -> None: ...",
    ],
)
def test_a_name_defined_later_is_found_at_the_first_use(source: str) -> None:
    module = a_module(source)
    signature = Signature(module.job, "x")

    with pytest.raises(
        DefinitionError, match=r"^later_module\.job: the name 'Later' in its annotations is not defined"
    ):
        _ = signature.takes
    module.Later = int  # type: ignore[attr-defined]

    assert signature.takes == "session"
    assert signature.bind_mapping({"n": [1] if "list" in source else 1})


def test_a_model_completed_later_is_found_at_the_first_use(monkeypatch: pytest.MonkeyPatch) -> None:
    module = a_module("")
    monkeypatch.setitem(sys.modules, "later_module", module)
    exec(
        "class Order(BaseModel):\n    item: 'Thing'\nasync def job(session: AsyncSession, order: Order) -> None: ...",
        module.__dict__,
    )
    signature = Signature(module.job, "x")

    with pytest.raises(DefinitionError, match="in its annotations is not defined at run time"):
        signature.bind(order={"item": 1})
    exec("class Thing(BaseModel):\n    n: int\nOrder.model_rebuild()", module.__dict__)

    assert signature.bind(order={"item": {"n": 1}}) == '{"order":{"item":{"n":1}}}'


async def only_for_the_checker(session: AsyncSession, amount: OnlyForTheChecker) -> None: ...


def test_a_name_only_the_type_checker_knows_is_told_at_the_first_use() -> None:
    with pytest.raises(DefinitionError, match=r"'OnlyForTheChecker'.*import it outside of `if TYPE_CHECKING`"):
        Signature(only_for_the_checker, "x").bind(1)


def test_arguments_by_position_of_a_job_adopted_elsewhere_are_mapped_at_the_run() -> None:
    async def move(session: AsyncSession, what: str, count: int = 1, *, to: str) -> None: ...

    signature = Signature(move, "x")

    assert signature.call_arguments('{"*":["a","2"],"to":"b"}') == {"what": "a", "count": 2, "to": "b"}
    with pytest.raises(ArgumentsInvalid, match="takes at most 2 arguments by position, got 3"):
        signature.call_arguments('{"*":[1,2,3],"to":"b"}')
    with pytest.raises(ArgumentsInvalid, match="unknown argument 'too'"):
        signature.call_arguments('{"what":"*","too":"b"}')
