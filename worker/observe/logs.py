"""Events as log lines on stderr: readable on a terminal, JSON elsewhere."""

from __future__ import annotations

import functools
import json
import logging
import os
import sys
from collections.abc import Callable, MutableMapping, Sequence
from datetime import UTC, datetime
from typing import Any, Literal

import structlog

from worker.observe.events import AttemptEnded, Event, is_listening, listen

_LONGEST = 4_000
_QUIET_BELOW_WARNING = ("arq", "sqlalchemy", "asyncio", "alembic")

_logger = logging.getLogger("exarq")
_json = json.JSONEncoder(default=str).encode


def configure(level: str, style: Literal["auto", "text", "json"]) -> None:
    """Log from here on: `level` and louder, as text or JSON; `auto` is text on a terminal."""
    as_text = style == "text" or (style == "auto" and sys.stderr.isatty())
    text = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"), sort_keys=False)
    renderers: list[Any] = [_without_nothing, text] if as_text else [_as_json]
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if as_text else "iso", utc=not as_text),
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Lines(shared, renderers, stamp=_stamp_of_text if as_text else _stamp_of_json))
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _QUIET_BELOW_WARNING:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    structlog.configure(  # for jobs that log with it
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    if not is_listening(log):
        listen(log)


class _Lines(structlog.stdlib.ProcessorFormatter):
    """Our events and everybody's records in one form; an event, of which each job has one, goes the short way."""

    def __init__(self, shared: Sequence[Any], renderers: list[Any], stamp: Callable[[float], str]) -> None:
        prepare: list[Any] = [
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
        ]
        super().__init__(foreign_pre_chain=shared, processors=[*prepare, *renderers])
        self._renderers = renderers
        self._stamp = stamp

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        event: object = record.msg
        if not isinstance(event, Event):
            return super().format(record)
        said: Any = {name: _plain(value) for name, value in event.fields.items()}
        said = structlog.contextvars.merge_contextvars(None, "", said)  # which a field of the event's outweighs
        level = record.levelname.lower()
        said |= {"event": event.text, "level": level, "timestamp": self._stamp(record.created)}
        for render in self._renderers:
            said = render(None, level, said)
        return str(said)


def _stamp_of_text(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment):%H:%M:%S}"


def _stamp_of_json(moment: float) -> str:
    second, microseconds = divmod(round(moment * 1_000_000), 1_000_000)
    return f"{_second_of_json(second)}.{microseconds:06}Z"


@functools.lru_cache(maxsize=2)  # a busy worker has many lines a second
def _second_of_json(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat().removesuffix("+00:00")


def _as_json(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> str:
    return _json(fields)


def _without_nothing(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """For people: a field that says nothing is not shown; programs find every field on every line."""
    return {name: value for name, value in fields.items() if value is not None}


def log(event: Event) -> None:
    """One line for an event, made only when its level is on."""
    level = _level(event)
    if _logger.isEnabledFor(level):
        _logger.handle(logging.LogRecord(_logger.name, level, "", 0, event, None, None))


def _level(event: Event) -> int:
    if isinstance(event, AttemptEnded) and event.outcome not in ("succeeded", "snoozed"):
        return logging.WARNING
    return event.level


def _plain(value: object) -> object:
    if value is None or isinstance(value, int):
        return value
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, (tuple, list)):
        return [str(item) for item in value]
    return _cut(str(value))


def _cut(text: str) -> str:
    """The text without its middle where it is too long for a line: what stands in Redis may be anybody's."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} … [{len(text) - _LONGEST:,} characters cut] … {text[-_LONGEST // 2 :]}"
