from __future__ import annotations

import asyncio
import inspect
import runpy
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from worker.core.context import JobContext
from worker.core.errors import DefinitionError, DuplicateJob, UnknownJob
from worker.core.options import Rules
from worker.core.registry import Definition, Registry, default_name, default_registry, define

T = TypeVar("T")


async def charge(session: AsyncSession, invoice_id: int, /, *rest: int, note: str = "none") -> str:
    """Charge one invoice."""
    return f"{invoice_id} {note}"


async def pay(session: AsyncSession, invoice_id: int, note: str = "none") -> str:
    """Pay one invoice."""
    return f"{invoice_id} {note}"


async def report(ctx: JobContext, self: int = 0) -> int:
    return ctx.attempt + self


@pytest.fixture
def registry() -> Registry:
    return Registry()


# --- a definition is its function


async def test_a_definition_is_called_as_its_function(registry: Registry) -> None:
    job = define(pay, registry=registry)

    async with AsyncSession() as session:
        assert await job(session, 7) == "7 none"
        assert await job(session, invoice_id=7, note="x") == "7 x"


async def test_an_argument_called_self_reaches_the_function(registry: Registry) -> None:
    job = define(report, registry=registry)
    context: Any = type("Context", (), {"attempt": 1})()

    assert await job(context, self=2) == 3


def test_a_definition_looks_like_its_function(registry: Registry) -> None:
    job: Any = define(pay, registry=registry)

    assert (job.__name__, job.__qualname__, job.__module__) == ("pay", "pay", __name__)
    assert job.__doc__ == "Pay one invoice."
    assert job.__wrapped__ is job.fn is pay
    assert inspect.signature(job) == inspect.signature(pay)
    assert repr(job) == "<job test_registry.pay>"


def test_a_definition_is_a_coroutine_function(registry: Registry) -> None:
    job = define(pay, registry=registry)

    assert inspect.iscoroutinefunction(job)
    if sys.version_info < (3, 14):
        assert asyncio.iscoroutinefunction(job)


def test_attributes_of_the_function_do_not_hide_those_of_the_definition(registry: Registry) -> None:
    class Job(Definition[Any, ..., Any]):
        def enqueue(self) -> str:
            return "enqueued"

    async def job(session: AsyncSession) -> None: ...

    job.enqueue = job.name = "other"  # type: ignore[attr-defined]
    definition = define(job, Job, registry, name="mine")

    assert definition.name == "mine"
    assert definition.enqueue() == "enqueued"


# --- options


def test_options_have_defaults(registry: Registry) -> None:
    job = define(pay, registry=registry)

    assert (job.name, job.rules) == ("test_registry.pay", Rules("default", timeout=None, max_attempts=None))


def test_options_are_kept(registry: Registry) -> None:
    job = define(pay, registry=registry, name="pay it", queue="billing", timeout=1.5, max_attempts=1)

    assert (job.name, job.rules) == ("pay it", Rules("billing", timeout=timedelta(seconds=1.5), max_attempts=1))
    assert define(pay, registry=registry, timeout=timedelta(minutes=1)).rules.timeout == timedelta(minutes=1)


@pytest.mark.parametrize("name", ["x", "x" * 200, "Rechnung stellen ü"])
def test_a_name_of_up_to_200_printable_characters_is_accepted(registry: Registry, name: str) -> None:
    assert define(pay, registry=registry, name=name, queue=name).name == name


@pytest.mark.parametrize("option", ["name", "queue"])
@pytest.mark.parametrize("word", ["", "x" * 201, "a\nb", "a\0", "\ud800", "a\u200b", 7, b"x"])
def test_other_names_are_refused(registry: Registry, option: str, word: object) -> None:
    with pytest.raises(DefinitionError, match=f"pay: {option} must be 1 to 200 printable characters") as caught:
        define(pay, registry=registry, **{option: word})

    str(caught.value).encode()
    assert "\n" not in str(caught.value)
    assert registry.names() == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0}, "timeout must be more than 0 seconds"),
        ({"timeout": timedelta(0)}, "timeout must be more than 0 seconds"),
        ({"timeout": -1}, "timeout must be between 0 seconds and 36,500 days"),
        ({"timeout": float("nan")}, "timeout must be between"),
        ({"timeout": "60"}, "timeout must be seconds or a timedelta, not str"),
        ({"max_attempts": 0}, "max_attempts must be a whole number of at least 1, not 0"),
        ({"max_attempts": -1}, "max_attempts must be"),
        ({"max_attempts": 1.5}, "max_attempts must be"),
        ({"max_attempts": True}, "max_attempts must be"),
        ({"isolation": "serializable"}, 'isolation must be None or one of "READ COMMITTED", "REPEATABLE READ", "SER'),
        ({"isolation": "AUTOCOMMIT"}, "isolation must be None or one of"),
        ({"read_only": 1}, "read_only must be True or False, not 1"),
        ({"commits": "mine"}, "commits must be None or one of \"own\", not 'mine'"),
        ({"commits": "own", "read_only": True}, "a job that is read_only has nothing to commit; leave commits out"),
        ({"lazy_loads": -1}, "lazy_loads must be a whole number of at least 0, or None, not -1"),
        ({"lazy_loads": 1.5}, "lazy_loads must be"),
        ({"lazy_loads": True}, "lazy_loads must be"),
    ],
)
def test_an_option_out_of_range_is_refused(registry: Registry, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError, match=f"test_registry.pay: {message}"):
        define(pay, registry=registry, **options)


def test_an_option_that_is_none_names_the_nearest(registry: Registry) -> None:
    with pytest.raises(
        DefinitionError, match=r"test_registry.pay: @job has no option 'max_attempt'; did you mean 'max_attempts'\?"
    ):
        define(pay, registry=registry, max_attempt=3)

    assert registry.names() == ()


def test_a_function_that_cannot_be_a_job_is_not_registered(registry: Registry) -> None:
    for bad in (charge, lambda session: None, 7):
        with pytest.raises(DefinitionError):
            define(bad, Definition, registry)  # type: ignore[arg-type]

    assert registry.names() == ()


def test_a_class_of_ones_own_takes_options_of_its_own(registry: Registry) -> None:
    class Job(Definition[Any, ..., Any]):
        def __init__(self, fn: Any, *, color: str = "red", **options: Any) -> None:
            super().__init__(fn, **options)
            self.color = color

    job = define(pay, Job, registry, color="blue", queue="billing")

    assert (type(job), job.color, job.rules.queue) == (Job, "blue", "billing")
    assert registry.get("test_registry.pay") is job


# --- names


def renamed(fn: T, **attributes: str) -> T:
    for attribute, value in attributes.items():
        setattr(fn, f"__{attribute}__", value)
    return fn


def test_the_default_name_is_the_last_part_of_the_module_and_the_qualified_name() -> None:
    async def inner(session: AsyncSession) -> None: ...

    here = "test_registry.test_the_default_name_is_the_last_part_of_the_module_and_the_qualified_name"
    assert default_name(inner) == f"{here}.inner"
    assert default_name(renamed(inner, module="jobs.billing", qualname="charge")) == "billing.charge"
    assert default_name(renamed(inner, module="billing", qualname="Group.charge")) == "billing.Group.charge"


def test_a_job_in_main_is_named_after_its_file(tmp_path: Path) -> None:
    script = tmp_path / "nightly.py"
    script.write_text("async def sweep(session): ...")

    sweep = runpy.run_path(str(script), run_name="__main__")["sweep"]

    assert default_name(sweep) == "nightly.sweep"


def test_a_job_typed_into_a_prompt_is_named_after_main() -> None:
    namespace: dict[str, Any] = {"__name__": "__main__"}
    exec(compile("async def sweep(session): ...", "<stdin>", "exec"), namespace)

    assert default_name(namespace["sweep"]) == "__main__.sweep"


# --- the registry


def test_a_registry_finds_by_name(registry: Registry) -> None:
    job, other = define(pay, registry=registry), define(report, registry=registry, name="a")

    assert registry.get("test_registry.pay") is job
    assert registry.get("a") is other
    assert registry.names() == ("a", "test_registry.pay")
    assert "a" in registry
    assert "b" not in registry


def test_an_unknown_name_says_which_there_are(registry: Registry) -> None:
    define(pay, registry=registry)

    with pytest.raises(UnknownJob, match=r"no job named 'test_registry\.pai'; did you mean 'test_registry\.pay'\?"):
        registry.get("test_registry.pai")


def test_two_functions_cannot_have_one_name(registry: Registry) -> None:
    first = define(pay, registry=registry, name="x")

    with pytest.raises(DuplicateJob, match=r"two jobs are named 'x': .*\.pay \(.*:\d+\) and .*\.report \(.*:\d+\)"):
        define(report, registry=registry, name="x")

    assert registry.get("x") is first


def test_the_same_function_again_takes_the_place_of_the_first(registry: Registry) -> None:
    define(pay, registry=registry, queue="old")
    again = define(pay, registry=registry, queue="new")

    assert registry.get("test_registry.pay") is again


def test_a_definition_goes_to_the_default_registry_unless_told() -> None:
    job = define(pay, name="test of the default")

    assert default_registry.get("test of the default") is job
