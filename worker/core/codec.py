"""JSON as PostgreSQL's jsonb keeps it and Python reads it back; everything else is refused with a reason."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping
from decimal import Decimal
from typing import Any, Generic, Literal, NewType, TypeAlias, TypeVar, cast

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic_core import from_json

from worker.core.errors import NotStorable, TooLarge, nearest
from worker.core.outcome import ErrorText, storable_text

T = TypeVar("T")

LIMIT = 1024 * 1024
"""The most that arguments or a result may take, in bytes of UTF-8."""

_SHOWN = 3  # faults named in one message
_LONGEST = 1_000  # characters of one message

DEEPEST = 200  # the parser behind pydantic stops just above; jsonb itself could go deeper
WHOLE_DIGITS = 4_300  # more, and neither Python nor pydantic's parser reads the number back
FRACTION_DIGITS = 16_383  # more, and jsonb refuses the number

_CONFIG = ConfigDict(
    ser_json_bytes="base64", val_json_bytes="base64", ser_json_inf_nan="strings", ser_json_timedelta="iso8601"
)
_NUL = "has a NUL character, which jsonb cannot keep; remove it, or pass the data as bytes"
_SURROGATE = "has a lone surrogate, which is not text for PostgreSQL; decode the data properly, or pass it as bytes"
_MISFIT = "a value does not fit its annotation"
_DEEP = f"is nested deeper than {DEEPEST} levels; flatten it, or store it in a table and pass its key"

# Most texts have none of these and need no second look.
_SUSPECT = re.compile(r"\\u0000|\\u[dD]|NaN|Infinity|[eE][+-]?[0-9]{4}")
_LONG_NUMBER = re.compile(rf"(?<![0-9])[0-9]{{{WHOLE_DIGITS + 1}}}")

_LONE = re.compile("[\ud800-\udfff]")

_Path: TypeAlias = "tuple[_Path, str | int] | None"


class _Refused:
    """Stands in a parsed document for what cannot be kept."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class Codec(Generic[T]):
    """Values of one type as JSON text, and back.

    Args:
        annotation: any type pydantic has a schema for.
        what: how messages call the values, in the plural: "arguments of billing.charge".

    """

    __slots__ = ("_adapter", "_warnings", "_what")

    def __init__(self, annotation: Any, what: str = "values") -> None:
        self._what = what
        # Its validator and its serializer are called themselves: every job would pay for a layer that adds nothing.
        # As a NewType even a dataclass or TypedDict takes our configuration where it has none of its own.
        self._adapter: TypeAdapter[T] = TypeAdapter(cast("Any", NewType)("Stored", annotation), config=_CONFIG)
        # To ask for errors takes as long as all the rest of writing a few arguments.
        plain = _is_plain(cast("dict[str, Any]", self._adapter.core_schema))
        self._warnings: Literal["error", False] = False if plain else "error"

    def encode(self, value: T) -> str:
        """The value as JSON text that jsonb keeps and `decode` reads.

        Raises:
            NotStorable: it does not fit its annotation, is not JSON, or jsonb would refuse it.
            TooLarge: it takes more than 1 MiB.

        """
        try:
            # pydantic writes a model of another class as `{}`, without a warning: look before.
            self._adapter.validator.validate_python(value, strict=True, by_alias=True, by_name=True)
        except Exception as error:  # validators are code of anybody
            raise NotStorable(f"{self._what}: {_MISFIT}: {faults(error)}; change the one or the other") from error
        return self._write(value)

    def encode_input(self, value: object) -> str:
        """What the value stands for ("7" for an int), as `encode` writes it.

        Raises:
            pydantic.ValidationError: it stands for no value of the type; a validator's own errors pass through.
            NotStorable: it is not JSON, or jsonb would refuse it.
            TooLarge: it takes more than 1 MiB.

        """
        checked = self._adapter.validator.validate_python(value, by_alias=True, by_name=True)
        return self._write(checked, self._warnings)

    def decode(self, text: str) -> T:
        """The value of a stored text.

        Raises:
            pydantic.ValidationError: the text is no value of the type; a validator's own errors pass through.

        """
        value: T = self._adapter.validator.validate_json(text, by_alias=True, by_name=True)
        return value

    def _write(self, value: T, warnings: Literal["error", False] = "error") -> str:
        try:
            # round_trip, and names instead of aliases: what is written is what validation accepts.
            data = self._adapter.serializer.to_json(value, by_alias=False, round_trip=True, warnings=warnings)
        except Exception as error:  # serializers are code of anybody
            raise NotStorable(f"{self._what}: {_reason(self._adapter, value, error)}") from error
        if len(data) > LIMIT:
            raise TooLarge(self._what, len(data), LIMIT)
        text = data.decode()
        return storable(text, self._what) if _suspicious(text) else text


def _is_plain(schema: dict[str, Any]) -> bool:
    """Whether what validation gives is exactly what serialization expects: no code of anybody makes it."""
    if "serialization" in schema:
        return False
    match schema["type"]:
        case "none" | "bool" | "int" | "float" | "str" | "uuid" | "date" | "datetime":
            return True
        case "list":
            return "items_schema" in schema and _is_plain(schema["items_schema"])
        case "nullable" | "typed-dict-field":
            return _is_plain(schema["schema"])
        case "typed-dict":
            closed = schema.get("extra_behavior") == "forbid"  # what else it may hold can be of any type
            return closed and all(map(_is_plain, schema["fields"].values()))
        case _:
            return False


_PLAIN: Codec[Any] = Codec(Any, "arguments")


def encode_plain(value: object) -> str:
    """Arguments by name as JSON text, for a job whose definition is not at hand.

    Raises:
        NotStorable: it is not a mapping with text keys, not JSON, or jsonb would refuse it.
        TooLarge: it takes more than 1 MiB.

    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise NotStorable("arguments must be a mapping of names to values, such as {'invoice_id': 7}")
    return _PLAIN.encode(dict(value))


def faults(error: Exception, arguments: Collection[str] | None = None) -> str:
    """What a validation found, in one line that can be stored; given all `arguments`, it speaks of arguments."""
    if not isinstance(error, ValidationError):
        return f"a validator raised {type(error).__name__}: {_one_line(error)}"
    found = error.errors(include_url=False, include_context=False)
    texts = [_fault(fault["type"], fault["loc"], fault["msg"], fault["input"], arguments) for fault in found[:_SHOWN]]
    if len(found) > _SHOWN:
        texts.append(f"and {len(found) - _SHOWN} more")
    return " ".join(storable_text("; ".join(texts), _LONGEST).split())


def storable(text: str, what: str = "values") -> str:
    """The JSON text itself, if jsonb keeps it and Python reads it back.

    Raises:
        NotStorable: it would be refused; the message says where and why.
        TooLarge: it takes more than 1 MiB.

    """
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > LIMIT:
        raise TooLarge(what, size, LIMIT)
    try:
        document = json.loads(
            text, object_pairs_hook=_object, parse_int=_whole, parse_float=_fraction, parse_constant=_constant
        )
    except RecursionError:
        raise NotStorable(f"{what}: the value {_DEEP}") from None
    except ValueError as error:
        raise NotStorable(f"{what}: not JSON: {error}") from error
    if (fault := _first_fault(document)) is not None:
        raise NotStorable(f"{what}: {fault}")
    try:
        from_json(text)
    except ValueError as error:
        raise NotStorable(
            f"{what}: the value {_DEEP if 'recursion' in str(error) else f'cannot be read back: {error}'}"
        ) from None
    return text


def _suspicious(text: str) -> bool:
    if _SUSPECT.search(text):
        return True
    if len(text) <= DEEPEST:
        return False
    # A number too long covers one of these places, so that other texts are not searched for it.
    if any(character.isdigit() for character in text[WHOLE_DIGITS :: WHOLE_DIGITS + 1]) and _LONG_NUMBER.search(text):
        return True
    if text.count("[") + text.count("{") <= DEEPEST:
        return False
    try:
        from_json(text)
    except ValueError:
        return True
    return False


def _reason(adapter: TypeAdapter[Any], value: object, error: Exception) -> str:
    message = _one_line(error)
    if "surrogates not allowed" in message:
        return _surrogate_in(adapter, value)
    if "depth exceeded" in message or isinstance(error, RecursionError):
        return f"the value {_DEEP}"
    if "serializer warnings" in message:
        return f"{_MISFIT}: {message}; change the one or the other"
    return f"no JSON form: {message}; pass plain data"


def _surrogate_in(adapter: TypeAdapter[Any], value: object) -> str:
    try:
        return _first_fault(adapter.dump_python(value, warnings=False)) or f"the value {_SURROGATE}"
    except Exception:  # only the place is unknown then
        return f"the value {_SURROGATE}"


def _first_fault(document: object) -> str | None:
    for path, leaf in _leaves(document):
        if isinstance(leaf, _Refused):
            return f"{_place(path)} {leaf.reason}"
        if "\0" in leaf:
            return f"{_place(path)} {_NUL}"
        if _LONE.search(leaf):
            return f"{_place(path)} {_SURROGATE}"
    return None


def _leaves(document: object) -> Iterator[tuple[_Path, str | _Refused]]:
    """Every text, key and refused part in the order written, each with the path that leads to it."""
    waiting: list[tuple[_Path, object]] = [(None, document)]
    while waiting:
        path, value = waiting.pop()
        if isinstance(value, str | _Refused):
            yield path, value
        elif isinstance(value, dict):
            yield from (((path, key), key) for key in value if isinstance(key, str))
            waiting.extend(reversed([((path, key), inner) for key, inner in value.items()]))
        elif isinstance(value, list | tuple | set | frozenset):
            waiting.extend(reversed([((path, index), inner) for index, inner in enumerate(value)]))


def _place(path: _Path) -> str:
    parts: list[str] = []
    while path is not None:
        path, step = path
        parts.append(f"[{ascii(step)[:100]}]")
    return "the value" + (f" at {''.join(reversed(parts))}" if parts else "")


def _object(pairs: list[tuple[str, object]]) -> dict[str, object] | _Refused:
    members = dict(pairs)
    return members if len(members) == len(pairs) else _Refused("has a key twice, and jsonb keeps only one")


def _whole(token: str) -> int | _Refused:
    if len(token.lstrip("-")) > WHOLE_DIGITS:
        return _Refused(f"is a number of more than {WHOLE_DIGITS:,} digits; pass it as text")
    return 0  # only the refused are looked at


def _fraction(token: str) -> float | _Refused:
    try:
        _, digits, exponent = Decimal(token).as_tuple()
    except ArithmeticError:
        return _Refused("is a number with an exponent too large; pass it as text")
    if not isinstance(exponent, int) or len(digits) + exponent > WHOLE_DIGITS or -exponent > FRACTION_DIGITS:
        return _Refused("is a number with too many digits or an exponent too large; pass it as text")
    return 0.0


def _constant(token: str) -> _Refused:
    return _Refused(f"is {token}, which JSON does not have; pass it as text, or None")


def _fault(
    kind: str, loc: tuple[int | str, ...], message: str, given: object, arguments: Collection[str] | None
) -> str:
    place = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc).removeprefix(".")
    if arguments is not None:
        if kind == "extra_forbidden" and len(loc) == 1:
            return f"unknown argument {place[:100]!r}{nearest(place[:100], arguments)}"
        place = f"argument {place}" if place else "arguments"
    if kind == "missing":
        return f"{place} is missing"
    return f"{place or 'the value'}: {message} (got {type(given).__name__})"


def _one_line(error: Exception) -> str:
    return " ".join(ErrorText.of(error).message.split())
