"""What plain ARQ's clients put beside their ids, read without trusting it, and the results that they read back."""

from __future__ import annotations

import hashlib
import io
import json
import pickle  # nosec — see `_PlainData`
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Literal

from arq.jobs import Deserializer, Serializer, serialize_result

from worker.core.names import LONGEST_NAME, is_name
from worker.core.outcome import ErrorText

Pickles = Literal["plain", "any"]

_PLAIN_CLASSES: Final = {
    "builtins": {"set", "frozenset", "complex"},
    "datetime": {"date", "datetime", "time", "timedelta", "timezone"},
    "decimal": {"Decimal"},
    "uuid": {"UUID"},
}
_LATEST: Final = 2**53
_MOST_TRIES: Final = 10_000


class PickleRefused(ValueError):
    """Raised for a pickle that holds more than plain data, which would run what it says."""


@dataclass(frozen=True, slots=True)
class Enqueued:
    """A job as plain ARQ code enqueued it; `tries` is its `_job_try`, `at` its enqueue time in ms by that client."""

    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tries: int
    at: int


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A payload that is no job; `at` is a number made of its bytes, negative so that it is no time."""

    why: ErrorText
    at: int


class Payloads:
    """Reads payloads of plain ARQ and writes results in the format in which the payload came.

    Args:
        serializer: as ARQ's `job_serializer`; None: JSON for who sent JSON, else pickle.
        deserializer: as ARQ's `job_deserializer`; None: JSON, and pickles as `pickles` says.
        pickles: "plain" reads plain data only and runs nothing; "any" runs what a pickle says, as ARQ does.
        warn: called before a pickle is read that may run something, the first time.

    """

    def __init__(
        self,
        serializer: Serializer | None = None,
        deserializer: Deserializer | None = None,
        *,
        pickles: Pickles = "plain",
        warn: Callable[[], None] = lambda: None,
    ) -> None:
        self._serializer = serializer
        self._deserializer = deserializer
        self._pickles = pickles
        self._warn: Callable[[], None] | None = warn

    def read(self, payload: bytes) -> Enqueued | Unreadable:
        """The job that was enqueued; never raises, for a payload is anybody's."""
        try:
            return _checked(self._load(payload))
        except Exception as error:
            digest = hashlib.sha256(payload).digest()
            return Unreadable(ErrorText.of(error), -1 - int.from_bytes(digest[:7]))

    def result(self, format_: bytes, **ended: Any) -> bytes | None:
        """What ARQ's `Job.result()` reads of a job that has ended; None where the serializer refuses everything.

        Args:
            format_: how what was enqueued began, which tells JSON from pickles; nothing where nobody knows.
            ended: as `arq.jobs.serialize_result` takes it, without its serializer.

        """
        serializer = self._serializer
        if serializer is None and _is_json(format_):
            serializer = _to_json
            if isinstance(ended["result"], BaseException):  # which JSON does not have
                ended["result"] = f"{type(ended['result']).__name__}: {ended['result']}"
        return serialize_result(**ended, serializer=serializer)

    def _load(self, payload: bytes) -> Any:
        if self._deserializer is not None:
            return self._deserializer(payload)
        if _is_json(payload):
            return json.loads(payload)
        if self._pickles == "plain":
            return _PlainData(io.BytesIO(payload)).load()
        if self._warn is not None:
            self._warn()
            self._warn = None
        return pickle.loads(payload)  # noqa: S301 — a setting says so


class _PlainData(pickle.Unpickler):
    """Finds no class but those of plain data: without one, a pickle has nothing that it could call."""

    def find_class(self, module: str, name: str) -> Any:
        if name not in _PLAIN_CLASSES.get(module, ()):
            raise PickleRefused(
                f"the pickle holds {module}.{name}, and only plain data is read, for a pickle runs what it says;"
                " enqueue plain data, or set jobs.arq_pickles to 'any' where nobody else can write to Redis"
            )
        return super().find_class(module, name)


def _is_json(payload: bytes) -> bool:
    return payload.startswith(b"{")  # no pickle does


def _to_json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields).encode()


def _checked(fields: Any) -> Enqueued:
    """The fields of ARQ's own layout."""
    name, args, kwargs, tries, at = (fields[key] for key in ("f", "a", "k", "t", "et"))
    if not is_name(name):
        raise ValueError(f"its function's name is not 1 to {LONGEST_NAME} printable characters")
    if not isinstance(args, list | tuple) or not isinstance(kwargs, dict):
        raise TypeError("its arguments are no list and no mapping")
    if not all(isinstance(key, str) for key in kwargs):
        raise TypeError("an argument's name is not text")
    if isinstance(at, bool) or not isinstance(at, int) or not 0 <= at <= _LATEST:
        raise ValueError("its enqueue time is no time in milliseconds")
    if tries is not None and (isinstance(tries, bool) or not isinstance(tries, int) or not 0 <= tries <= _MOST_TRIES):
        raise ValueError(f"its _job_try is not a whole number from 0 to {_MOST_TRIES:,}")
    return Enqueued(name, tuple(args), kwargs, tries or 1, at)
