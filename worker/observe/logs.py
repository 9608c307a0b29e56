"""Events as log lines on stderr: readable on a terminal, JSON elsewhere."""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import select
import sys
import time
from collections.abc import MutableMapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, Literal, TextIO

import structlog

from worker.observe.events import AttemptEnded, Event, is_listening, listen

_LONGEST = 4_000
_QUIET_BELOW_WARNING = ("arq", "sqlalchemy", "asyncio", "alembic")
_PAGE: Final = getattr(select, "PIPE_BUF", 512)
"""So many bytes reach a pipe in one piece, whoever else writes to it."""

_logger = logging.getLogger("exarq")
_json = json.JSONEncoder(default=str).encode
_handler: _Handler | None = None


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
    global _handler
    handler = _handler = _Handler(_Lines(shared, renderers, as_text=as_text))
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

    def __init__(self, shared: Sequence[Any], renderers: list[Any], *, as_text: bool) -> None:
        prepare: list[Any] = [
            structlog.stdlib.ProcessorFormatter.remove_processors_meta,
            structlog.processors.format_exc_info,
        ]
        super().__init__(foreign_pre_chain=shared, processors=[*prepare, *renderers])
        self._renderers = renderers
        self._stamp = _stamp_of_text if as_text else _stamp_of_json
        self._as_json = not as_text

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        event: object = record.msg
        if not isinstance(event, Event):
            return super().format(record)
        return self.line(event, record.levelno, record.created)

    def line(self, event: Event, level: int, moment: float) -> str:
        """The line of an event."""
        bound = structlog.contextvars.get_contextvars()
        name, stamp = _name_of(level), self._stamp(moment)
        if self._as_json and type(event) is AttemptEnded and event.error is None and not bound:
            return _line_of_an_end(event, name, stamp)
        said: Any = {field: _plain(value) for field, value in event.fields.items()}
        said = {**bound, **said, "event": event.text, "level": name, "timestamp": stamp}
        for render in self._renderers:
            said = render(None, name, said)
        return str(said)


def _line_of_an_end(ended: AttemptEnded, level: str, stamp: str) -> str:
    """The same line as any event's, in a quarter of the time: most lines of a busy worker are such."""
    blocked = "null" if ended.blocked is None else round(ended.blocked, 3)
    return (
        f'{{"name": {_quoted(ended.name)}, "outcome": "{ended.outcome}", "job": "{ended.job}", '
        f'"attempt": {ended.attempt}, "seconds": {round(ended.seconds, 3)}, "error": null, "blocked": {blocked}, '
        f'"event": "{ended.text}", "level": "{level}", "timestamp": "{stamp}"}}'
    )


_quoted = functools.lru_cache(maxsize=256)(_json)


class _Handler(logging.StreamHandler[TextIO]):
    """Writes to stderr; what is no warning waits for the end of the event loop's turn, so that many lines go at once.

    No more than `_PAGE` waits, and what comes after it takes it along.
    """

    def __init__(self, lines: _Lines) -> None:
        super().__init__(sys.stderr)
        self.setFormatter(lines)
        self._lines = lines
        self._waiting: list[str] = []
        self._size = 0
        self._loop: asyncio.AbstractEventLoop | None = None  # in which what waits will be written
        assert self.lock is not None
        self._guard = self.lock
        os.register_at_fork(after_in_child=self._waiting.clear)

    @property
    def is_alone(self) -> bool:
        """Whether nobody else is given what Exarq logs, so that it needs no record."""
        nobodys = not (_logger.handlers or _logger.filters or self.filters)
        return nobodys and _logger.propagate and _logger.root.handlers == [self]

    def say(self, event: Event, level: int) -> None:
        """Write the line of an event."""
        line = f"{self._lines.line(event, level, time.time())}{self.terminator}"
        with self._guard:
            if self._size + len(line) > _PAGE:
                self.flush()
            self._waiting.append(line)
            self._size += len(line)
            if not self._will_flush():
                self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record of anybody's, behind what waits."""
        try:
            self.flush()
        except Exception:
            self.handleError(record)
        super().emit(record)

    def flush(self) -> None:
        """Write what waits."""
        with self._guard:
            self._loop = None
            if self._waiting:
                lines = "".join(self._waiting)
                self._waiting.clear()
                self._size = 0
                self.stream.write(lines)
            super().flush()

    def _will_flush(self) -> bool:
        """Have what waits written at the end of this event loop's turn; False where none runs here."""
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            return False
        if self._loop is not loop:
            self._loop = loop
            loop.call_soon(self.flush)
        return True


def _stamp_of_text(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment):%H:%M:%S}"


def _stamp_of_json(moment: float) -> str:
    second, microseconds = divmod(round(moment * 1_000_000), 1_000_000)
    return f"{_second_of_json(second)}.{microseconds:06}Z"


@functools.lru_cache(maxsize=2)  # a busy worker has many lines a second
def _second_of_json(moment: int) -> str:
    return datetime.fromtimestamp(moment, UTC).isoformat().removesuffix("+00:00")


@functools.cache
def _name_of(level: int) -> str:
    return logging.getLevelName(level).lower()


def _as_json(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> str:
    return _json(fields)


def _without_nothing(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """For people: a field that says nothing is not shown; programs find every field on every line."""
    return {name: value for name, value in fields.items() if value is not None}


def log(event: Event) -> None:
    """One line for an event, made only when its level is on."""
    level = _level(event)
    if not _logger.isEnabledFor(level):
        return
    # A warning is a record whoever handles it: error trackers listen where records are given to handlers.
    if level < logging.WARNING and _handler is not None and _handler.is_alone:
        _handler.say(event, level)
    else:
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
    text = value if isinstance(value, str) else str(value)
    return text if len(text) <= _LONGEST else _cut(text)


def _cut(text: str) -> str:
    """The text without its middle, for it is too long for a line: what stands in Redis may be anybody's."""
    return f"{text[: _LONGEST // 2]} … [{len(text) - _LONGEST:,} characters cut] … {text[-_LONGEST // 2 :]}"
