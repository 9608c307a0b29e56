"""Definitions: functions with a name and options, and the registry that finds them by name."""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Concatenate, Generic, ParamSpec, TypeVar, Unpack, overload

from worker.core.errors import DefinitionError, DuplicateJob, ModuleNotLoaded, UnknownJob
from worker.core.options import JobOptions, Rules, checked_name
from worker.core.outcome import ErrorText
from worker.core.signature import Signature, label_of

P = ParamSpec("P")
First = TypeVar("First")
R = TypeVar("R")


class Definition(Generic[First, P, R]):
    """A job's function with its name and options; called, it is the function it was.

    Args:
        fn: an `async def` whose first parameter is an `AsyncSession` or a `JobContext`, or a `def` whose first is a
            `Session`.
        options: as in `JobOptions`; `name` is how rows name the job, without one the last part of the module and the
            function's qualified name.

    Raises:
        DefinitionError: the function or an option cannot be used; the message says what to write instead.

    """

    def __init__(
        self, fn: Callable[Concatenate[First, P], Coroutine[Any, Any, R]], **options: Unpack[JobOptions]
    ) -> None:
        functools.update_wrapper(self, fn, updated=())
        self.fn = fn
        name = options.get("name")
        self.name = default_name(fn) if name is None else name
        self.signature = Signature(fn, self.name)
        label = label_of(fn)
        checked_name(self.name, label)
        self.rules = Rules.of(options, label)
        if self.rules.schedule is not None and self.signature.required:
            needs = ", ".join(self.signature.required)
            raise DefinitionError(f"{label}: nobody gives the clock's jobs arguments; give a default to {needs}")
        if inspect.iscoroutinefunction(fn):
            _look_async(self, fn)

    def __call__(self, first: First, /, *args: P.args, **kwargs: P.kwargs) -> Coroutine[Any, Any, R]:
        """Call the function itself, here and now."""
        return self.fn(first, *args, **kwargs)

    @property
    def source(self) -> tuple[str, str]:
        """The file and qualified name: the same after a reload, or when `__main__` is imported again."""
        return os.path.realpath(_code_of(self.fn).co_filename), self.fn.__qualname__

    def __repr__(self) -> str:
        return f"<job {self.name}>"


class Registry:
    """The definitions of this process by name."""

    def __init__(self) -> None:
        self._definitions: dict[str, Definition[Any, ..., Any]] = {}

    def register(self, definition: Definition[Any, ..., Any]) -> None:
        """Add a definition; the same function again, as after a reload, takes the place of the first.

        Raises:
            DuplicateJob: another function has the name.

        """
        present = self._definitions.get(definition.name)
        if present is not None and present.source != definition.source:
            raise DuplicateJob(definition.name, _described(present), _described(definition))
        self._definitions[definition.name] = definition

    def get(self, name: str) -> Definition[Any, ..., Any]:
        """The definition with this name.

        Raises:
            UnknownJob: there is none.

        """
        try:
            return self._definitions[name]
        except KeyError:
            raise UnknownJob(name, self._definitions) from None

    def names(self) -> tuple[str, ...]:
        """All names, sorted."""
        return tuple(sorted(self._definitions))

    def __contains__(self, name: object) -> bool:
        return name in self._definitions


default_registry = Registry()

D = TypeVar("D", bound=Definition[Any, ..., Any])


@overload
def define(
    fn: Callable[Concatenate[First, P], Coroutine[Any, Any, R]], *, registry: Registry = ..., **options: Any
) -> Definition[First, P, R]: ...


@overload
def define(fn: Callable[..., Any], cls: Callable[..., D], registry: Registry = ..., **options: Any) -> D: ...


def define(
    fn: Callable[..., Any],
    cls: Callable[..., Any] = Definition,
    registry: Registry = default_registry,
    **options: Any,
) -> Any:
    """Make a definition of a function and register it.

    Args:
        fn: the function.
        cls: the class to make, `Definition` or one derived from it.
        registry: where it is found by name.
        options: as in `JobOptions`.

    Raises:
        DefinitionError: the function or an option cannot be used.
        DuplicateJob: another function has the name.

    """
    definition = cls(fn, **options)
    registry.register(definition)
    return definition


def default_name(fn: Callable[..., Any]) -> str:
    """The name of a job that was given none: "billing.charge" for `charge` in `jobs/billing.py`."""
    module = str(getattr(fn, "__module__", "?"))
    last = module.rpartition(".")[2]
    if module == "__main__" and isinstance(fn, FunctionType):
        stem = Path(_code_of(fn).co_filename).stem
        last = last if stem.startswith("<") else stem
    qualname = str(getattr(fn, "__qualname__", type(fn).__qualname__))
    return ".".join([last, *(part for part in qualname.split(".") if part != "<locals>")])


def load_modules(names: Iterable[str], registry: Registry = default_registry) -> None:
    """Import the modules, the current folder first on the path; then `registry` holds the jobs they define.

    Raises:
        ModuleNotLoaded: an import failed; one line says which, why and where.
        DuplicateJob: two functions have one name.

    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    for name in names:
        try:
            module = importlib.import_module(name)
        except DuplicateJob:
            raise
        except (Exception, SystemExit) as error:  # a module is code of anybody
            raise ModuleNotLoaded(_not_loaded(name, error)) from error
        for value in list(vars(module).values()):
            if isinstance(value, Definition):  # imported before, or registered elsewhere
                registry.register(value)


def _look_async(definition: Definition[Any, ..., Any], fn: Callable[..., Any]) -> None:
    """Make `inspect.iscoroutinefunction` say of the definition what it says of the function."""
    if sys.version_info >= (3, 12):
        inspect.markcoroutinefunction(definition)
    else:  # there it believes whatever looks like a function with a coroutine's code
        for attribute in ("__code__", "__defaults__", "__kwdefaults__"):
            setattr(definition, attribute, getattr(fn, attribute))


def _code_of(fn: Callable[..., Any]) -> CodeType:
    code = inspect.unwrap(fn).__code__
    assert isinstance(code, CodeType)
    return code


def _described(definition: Definition[Any, ..., Any]) -> str:
    code = _code_of(definition.fn)
    return f"{label_of(definition.fn)} ({code.co_filename}:{code.co_firstlineno})"


def _not_loaded(name: str, error: BaseException) -> str:
    text = ErrorText.of(error)
    why = f"{text.type}: {text.message}" if text.message else text.type
    place = _place(error)
    return f"cannot import {name!r}: {' '.join(why.split())}" + (f" ({place})" if place else "")


def _place(error: BaseException) -> str | None:
    """The last line of the user's own code that led to the error."""
    if isinstance(error, SyntaxError) and error.filename and is_users_code(error.filename):
        return f"{error.filename}:{error.lineno}"
    lines = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return next((f"{file}:{line}" for file, line in reversed(lines) if is_users_code(file)), None)


def is_users_code(file: str) -> bool:
    """Whether this file is neither of Python, nor of a library, nor of Exarq."""
    path = Path(file)
    if file.startswith("<") or {"site-packages", "dist-packages"} & set(path.parts):
        return False
    ours = [Path(__file__).parents[1], *(Path(sysconfig.get_path(key)) for key in ("stdlib", "platstdlib"))]
    return not any(path.is_relative_to(folder) for folder in ours)
