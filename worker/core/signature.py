"""What a function tells about its arguments and its result, and how they become JSON and come back."""

from __future__ import annotations

import inspect
import json
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, NoReturn, NotRequired, TypeAlias, cast

from pydantic import GetCoreSchemaHandler, PydanticUserError, TypeAdapter
from pydantic_core import CoreSchema
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from typing_extensions import TypedDict

from worker.core.codec import Codec, faults
from worker.core.context import JobContext
from worker.core.errors import ArgumentsInvalid, DefinitionError, NotStorable, ResultInvalid

Takes: TypeAlias = Literal["session", "context", "sync session"]
_Parameter: TypeAlias = inspect.Parameter

POSITIONAL: Final = "*"
"""The key of arguments by position, of a job that was adopted where its function was not known."""

_WANTED = "session: AsyncSession or ctx: JobContext"
_WANTED_SYNC = "session: Session"


@dataclass(frozen=True, slots=True)
class _Plan:
    takes: Takes
    arguments: Codec[dict[str, Any]]
    result: Codec[Any]


class Signature:
    """The arguments and the result of one job function.

    Annotations that name something defined later are resolved at the first use.

    Args:
        fn: the job's function.
        name: the job's name, for messages.

    Raises:
        DefinitionError: the function cannot be a job; the message says what to write instead.

    """

    __slots__ = ("_by_position", "_first", "_fn", "_name", "_parameters", "_plan")

    def __init__(self, fn: Callable[..., Any], name: str) -> None:
        self._fn = fn
        self._name = name
        _check_kind(fn)
        self._first, *rest = _parameters_of(fn)
        self._parameters = {parameter.name: parameter for parameter in rest}
        self._by_position = [p.name for p in rest if p.kind is not p.KEYWORD_ONLY]
        self._plan: _Plan | None
        try:
            self._plan = self._resolve()
        except NameError:
            self._plan = None

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the job's arguments, in order."""
        return tuple(self._parameters)

    @property
    def required(self) -> tuple[str, ...]:
        """The names of the arguments that have no default, in order."""
        return tuple(name for name, one in self._parameters.items() if one.default is one.empty)

    @property
    def takes(self) -> Takes:
        """What the function's first parameter is; a `def` takes the sync session."""
        return self._resolved().takes

    def bind(self, /, *args: Any, **kwargs: Any) -> str:
        """The arguments of a call, checked, as JSON text; defaults are left out and apply at the run.

        Raises:
            ArgumentsInvalid: they do not fit the signature.
            NotStorable: they cannot be kept as jsonb, or are too large.

        """
        by_position = self._by_position
        if len(args) > len(by_position):
            raise ArgumentsInvalid(
                f"{self._name}: takes at most {len(by_position)} arguments by position, got {len(args)}"
            )
        given = dict(zip(by_position, args, strict=False))
        if kwargs:
            if twice := given.keys() & kwargs.keys():
                raise ArgumentsInvalid(f"{self._name}: argument {min(twice)} is given twice")
            given |= kwargs
        return self.bind_mapping(given)

    def bind_mapping(self, arguments: Mapping[str, Any]) -> str:
        """Like `bind`, for arguments by name.

        Raises:
            ArgumentsInvalid: they do not fit the signature.
            NotStorable: they cannot be kept as jsonb, or are too large.

        """
        codec = self._resolved().arguments
        try:
            return codec.encode_input(arguments)
        except NotStorable:
            raise
        except Exception as error:  # validators are code of anybody
            raise ArgumentsInvalid(self._complaint(error)) from error

    def call_arguments(self, text: str) -> dict[str, Any]:
        """The keyword arguments for the function, from stored JSON text.

        Raises:
            ArgumentsInvalid: they do not fit the signature as it is now.

        """
        codec = self._resolved().arguments
        try:
            return codec.decode(text)
        except Exception as error:  # validators are code of anybody
            given = _by_position(text)
            if given is None:
                raise ArgumentsInvalid(self._complaint(error)) from error
            positional, named = given
            return codec.decode(self.bind(*positional, **named))

    def encode_result(self, value: object) -> str:
        """What the function returned, as JSON text.

        Raises:
            NotStorable: it does not fit the return annotation, cannot be kept as jsonb, or is too large.

        """
        return self._resolved().result.encode(value)

    def decode_result(self, text: str) -> Any:
        """What the function returned, from stored JSON text.

        Raises:
            ResultInvalid: it does not fit the return annotation as it is now.

        """
        codec = self._resolved().result
        try:
            return codec.decode(text)
        except Exception as error:  # validators are code of anybody
            raise ResultInvalid(f"{self._name}: the stored result does not fit: {faults(error)}") from error

    def _resolved(self) -> _Plan:
        if self._plan is None:
            try:
                self._plan = self._resolve()
            except NameError as error:
                missing = f"the name {error.name!r}" if error.name else "a type"
                raise DefinitionError(
                    f"{label_of(self._fn)}: {missing} in its annotations is not defined at run time;"
                    " define it at module level, or import it outside of `if TYPE_CHECKING`"
                ) from error
        return self._plan

    def _resolve(self) -> _Plan:
        label = label_of(self._fn)
        try:
            hints = typing.get_type_hints(self._fn, include_extras=True)
        except NameError:
            raise
        except Exception as error:  # annotations are code of anybody
            raise DefinitionError(f"{label}: its annotations cannot be read: {_one_line(error)}") from error
        judge = _takes if inspect.iscoroutinefunction(self._fn) else _sync_takes
        takes = judge(hints.get(self._first.name), self._first.name, label)
        fields = {name: hints.get(name, Any) for name in self._parameters}
        returns = hints.get("return", Any)
        returns = Any if returns in (NoReturn, typing.Never) else returns
        for name, hint in fields.items():
            _check_type(hint, {name: hint}, f"{label}: parameter {name}: ", "pass its key instead")
        _check_type(returns, {"result": returns}, f"{label}: returns ", "return plain data or a pydantic model instead")
        fields = {name: hint if name in self.required else NotRequired[hint] for name, hint in fields.items()}
        arguments: Codec[dict[str, Any]] = Codec(_shape(fields), f"arguments of {self._name}")
        return _Plan(takes, arguments, Codec(returns, f"results of {self._name}"))

    def _complaint(self, error: Exception) -> str:
        return f"{self._name}: {faults(error, self._parameters)}"


class _NothingElse:
    """Forbids unknown arguments; the configuration would forbid them in the user's nested types too."""

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        schema = handler(source)
        inner = cast("dict[str, Any]", handler.resolve_ref_schema(schema))
        assert inner["type"] == "typed-dict"
        inner["extra_behavior"] = "forbid"
        return schema


def _by_position(text: str) -> tuple[list[Any], dict[str, Any]] | None:
    """What was stored for a function that nobody knew; None where all arguments have names."""
    if f'"{POSITIONAL}"' not in text:
        return None
    try:
        stored = json.loads(text)
    except (ValueError, RecursionError):
        return None
    positional = stored.pop(POSITIONAL, None) if isinstance(stored, dict) else None
    return (positional, stored) if isinstance(positional, list) else None


def label_of(fn: Callable[..., Any]) -> str:
    """How messages call a function: its module and qualified name."""
    return f"{getattr(fn, '__module__', '?')}.{getattr(fn, '__qualname__', type(fn).__qualname__)}"


def _check_kind(fn: Callable[..., Any]) -> None:
    label = label_of(fn)
    if not inspect.isfunction(fn):
        raise DefinitionError(
            f"{label}: not a function but {type(fn).__name__}; put @job on an `async def` or `def` function"
        )
    if inspect.isgeneratorfunction(fn) or inspect.isasyncgenfunction(fn):
        raise DefinitionError(f"{label}: a generator cannot be a job; write `return`, not `yield`")


def _parameters_of(fn: Callable[..., Any]) -> list[inspect.Parameter]:
    label = label_of(fn)
    parameters = list(inspect.signature(fn).parameters.values())
    if not parameters or parameters[0].kind not in (_Parameter.POSITIONAL_ONLY, _Parameter.POSITIONAL_OR_KEYWORD):
        wanted = _WANTED if inspect.iscoroutinefunction(fn) else _WANTED_SYNC
        raise DefinitionError(f"{label}: has no first parameter; write {wanted}")
    for parameter in parameters[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise DefinitionError(f"{label}: takes {parameter}; name each argument instead")
        if parameter.kind is parameter.POSITIONAL_ONLY:
            raise DefinitionError(f"{label}: argument {parameter.name} is positional-only; put the `/` before it")
    return parameters


def _takes(hint: Any, name: str, label: str) -> Takes:
    first = _first_class(hint, name, label, _WANTED)
    if first is JobContext:
        return "context"
    if isinstance(first, type) and issubclass(first, AsyncSession):
        return "session"
    if isinstance(first, type) and issubclass(first, Session):
        raise DefinitionError(f"{label}: an async job takes an AsyncSession, not a Session; write {_WANTED}")
    raise DefinitionError(f"{label}: its first parameter {name} is {_type_text(hint)}; write {_WANTED}")


def _sync_takes(hint: Any, name: str, label: str) -> Takes:
    first = _first_class(hint, name, label, _WANTED_SYNC)
    if isinstance(first, type) and issubclass(first, Session):
        return "sync session"
    if isinstance(first, type) and issubclass(first, AsyncSession):
        raise DefinitionError(f"{label}: takes an AsyncSession; write `async def`, or {_WANTED_SYNC}")
    if first is JobContext:
        raise DefinitionError(f"{label}: takes the context; write {_WANTED_SYNC} and call worker.current_job()")
    raise DefinitionError(f"{label}: its first parameter {name} is {_type_text(hint)}; write {_WANTED_SYNC}")


def _first_class(hint: Any, name: str, label: str, wanted: str) -> Any:
    if hint is None:
        raise DefinitionError(f"{label}: its first parameter {name} has no annotation; write {wanted}")
    while (inner := getattr(hint, "__value__", None) or _unannotated(hint)) is not None:
        hint = inner
    return hint


def _unannotated(hint: Any) -> Any:
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else None


def _shape(fields: dict[str, Any]) -> Any:
    # A TypedDict, for it has no attributes that a parameter called `copy` or `model_config` could hide.
    return Annotated[cast("Any", TypedDict)("Arguments", fields), _NothingElse]


def _check_type(hint: Any, field: dict[str, Any], start: str, instead: str) -> None:
    """Refuse what has no JSON form, naming the one parameter that it is about."""
    try:
        if _has_mapped_class(hint):
            raise DefinitionError(f"{start}{_type_text(hint)} is an ORM class; {instead}")
        complete = TypeAdapter(_shape(field)).pydantic_complete
    except (NameError, DefinitionError):
        raise
    except PydanticUserError as error:
        why = "has no JSON form" if error.code == "schema-for-unknown-type" else f"cannot be used: {_one_line(error)}"
        raise DefinitionError(f"{start}{_type_text(hint)} {why}; {instead}") from error
    except Exception as error:  # a type's own schema is code of anybody
        raise DefinitionError(f"{start}{_type_text(hint)} cannot be used: {_one_line(error)}; {instead}") from error
    if not complete:
        raise NameError("a type that it refers to is not defined yet")


def _has_mapped_class(hint: Any) -> bool:
    # A mapped dataclass has a schema, but making one from JSON would make a new row of it.
    return hasattr(hint, "__mapper__") or any(_has_mapped_class(inner) for inner in typing.get_args(hint))


def _type_text(hint: Any) -> str:
    return hint.__qualname__ if isinstance(hint, type) else str(hint)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).partition("\n")[0].split())
