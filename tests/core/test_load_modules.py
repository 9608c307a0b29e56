from __future__ import annotations

import importlib
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker.core.errors import DuplicateJob, ModuleNotLoaded
from worker.core.registry import Registry, default_registry, load_modules


@pytest.fixture
def registry() -> Registry:
    return Registry()


JOB = """
from sqlalchemy.ext.asyncio import AsyncSession
from worker.core.registry import define

async def {name}(session: AsyncSession) -> None: ...
{name} = define({name})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, empty; what is imported and registered from it is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(default_registry, "_definitions", {})
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_modules_of_the_current_folder_are_loaded(folder: Path) -> None:
    (folder / "shop_one.py").write_text(JOB.format(name="buy"))
    (folder / "shop_two.py").write_text(JOB.format(name="sell"))

    load_modules(["shop_one", "shop_two"], default_registry)

    assert default_registry.names() == ("shop_one.buy", "shop_two.sell")
    assert sys.path[0] == str(folder)


def test_the_current_folder_is_put_on_the_path_once(folder: Path) -> None:
    load_modules([], default_registry)
    load_modules([], default_registry)

    assert sys.path.count(str(folder)) == 1


def test_a_registry_of_ones_own_holds_what_was_loaded_before(folder: Path, registry: Registry) -> None:
    (folder / "shop_known.py").write_text(JOB.format(name="buy"))
    load_modules(["shop_known"], default_registry)

    load_modules(["shop_known"], registry)

    assert registry.names() == ("shop_known.buy",)
    assert registry.get("shop_known.buy") is default_registry.get("shop_known.buy")


def test_a_reloaded_module_replaces_its_jobs(folder: Path) -> None:
    (folder / "shop_again.py").write_text(JOB.format(name="buy"))
    load_modules(["shop_again"], default_registry)
    first = default_registry.get("shop_again.buy")
    (folder / "shop_again.py").write_text("# moved down\n" + JOB.format(name="buy"))

    importlib.reload(sys.modules["shop_again"])

    assert default_registry.get("shop_again.buy") is not first


def test_a_script_imported_again_by_name_replaces_its_jobs(folder: Path) -> None:
    (folder / "shop_main.py").write_text(JOB.format(name="buy"))
    runpy.run_path("shop_main.py", run_name="__main__")  # a relative path, as on the command line

    load_modules(["shop_main"], default_registry)

    assert default_registry.names() == ("shop_main.buy",)


def not_loaded(name: str) -> str:
    with pytest.raises(ModuleNotLoaded) as caught:
        load_modules([name], default_registry)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"cannot import {name!r}: ")
    return text


@pytest.mark.parametrize(
    ("source", "message", "line"),
    [
        ("x = 1\nraise RuntimeError('first\\nsecond')", "RuntimeError: first second", 2),
        ("\n\nimport no_such_thing_at_all", "ModuleNotFoundError: No module named 'no_such_thing_at_all'", 3),
        ("x = 1\nif x\n", "SyntaxError: ", 2),
        ("import json\n\njson.loads('{')", "JSONDecodeError: ", 3),
        ("import sys\nsys.exit(3)", "SystemExit: 3", 2),
        ("class E(Exception):\n  def __str__(self): raise E\n\nraise E", "E: <cannot be shown: ", 4),
        ("raise ValueError", "ValueError (", 1),
        ("def deep():\n  raise OSError(1)\n\ndeep()", "OSError: 1", 2),
        (JOB.format(name="buy").replace("session: AsyncSession", "session: int"), "DefinitionError: shop_bad.buy: ", 6),
    ],
)
def test_an_import_that_fails_is_one_line_with_the_users_place(
    folder: Path, source: str, message: str, line: int
) -> None:
    (folder / "shop_bad.py").write_text(source)

    text = not_loaded("shop_bad")

    assert message in text
    assert text.endswith(f"({folder / 'shop_bad.py'}:{line})")


def test_the_place_is_in_the_module_that_broke_not_in_the_one_that_imports_it(folder: Path) -> None:
    (folder / "shop_outer.py").write_text("import shop_inner")
    (folder / "shop_inner.py").write_text("\n1 / 0")

    assert not_loaded("shop_outer").endswith(f"ZeroDivisionError: division by zero ({folder / 'shop_inner.py'}:2)")


def test_the_place_is_in_the_users_code_not_in_an_installed_package(folder: Path) -> None:
    installed = folder / "site-packages"
    installed.mkdir()
    (installed / "shop_package.py").write_text("\n1 / 0")
    (folder / "shop_user.py").write_text("import shop_package")
    sys.path.append(str(installed))

    assert not_loaded("shop_user").endswith(f"({folder / 'shop_user.py'}:1)")


@pytest.mark.parametrize(
    ("name", "message"), [("no_such_module", "No module named"), ("", "Empty module name"), (".x", "relative import")]
)
def test_a_module_that_is_not_there_has_no_place(folder: Path, name: str, message: str) -> None:
    text = not_loaded(name)

    assert message in text
    assert ".py" not in text


def test_a_duplicate_among_the_modules_is_told_as_such(folder: Path) -> None:
    (folder / "shop_left.py").write_text(JOB.format(name="buy") + "define(buy.fn, name='same')")
    (folder / "shop_right.py").write_text(JOB.format(name="buy") + "define(buy.fn, name='same')")

    with pytest.raises(DuplicateJob, match="two jobs are named 'same'"):
        load_modules(["shop_left", "shop_right"], default_registry)


def test_an_interrupt_while_loading_is_not_swallowed(folder: Path) -> None:
    (folder / "shop_stop.py").write_text("raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        load_modules(["shop_stop"], default_registry)
