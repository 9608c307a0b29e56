"""`import worker`: everything a user writes with, and nothing that takes time."""

from __future__ import annotations

import inspect
import subprocess
import sys

import pytest

import worker
from worker.core import errors

HEAVY = ("sqlalchemy", "pydantic", "arq", "redis", "asyncpg", "alembic", "rich", "typer")


def imported_by(statement: str) -> set[str]:
    program = f"import sys\n{statement}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_importing_the_front_door_imports_nothing_heavy() -> None:
    modules = imported_by("import worker")

    assert "worker" in modules
    assert not modules & set(HEAVY)


def test_a_name_brings_only_what_it_needs() -> None:
    modules = imported_by("from worker import ExarqError")

    assert "worker.core.errors" in modules
    assert "sqlalchemy" not in modules


@pytest.mark.parametrize("name", worker.__all__)
def test_each_name_of_the_front_door_is_there(name: str) -> None:
    found = getattr(worker, name)

    assert found.__name__ == name
    assert found.__doc__
    assert name in dir(worker)


def test_every_error_that_a_user_can_catch_is_at_the_front_door() -> None:
    all_errors = {
        name for name, found in inspect.getmembers(errors, inspect.isclass) if found.__module__ == errors.__name__
    }

    assert all_errors - set(worker.__all__) == {"LeaseLost"}  # raised and caught inside


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'worker' has no attribute 'enqeue'"):
        worker.enqeue  # type: ignore[attr-defined]  # noqa: B018
