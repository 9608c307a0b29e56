"""Events as log lines on stderr: readable on a terminal, JSON elsewhere."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from collections.abc import MutableMapping
from typing import Any, Literal

import structlog

from worker.observe.events import AttemptEnded, Event, is_listening, listen

_LONGEST = 4_000
_QUIET_BELOW_WARNING = ("arq", "sqlalchemy", "asyncio", "alembic")


def configure(level: str, style: Literal["auto", "text", "json"]) -> None:
    """Log from here on: `level` and louder, as text or JSON; `auto` is text on a terminal."""
    as_text = style == "text" or (style == "auto" and sys.stderr.isatty())
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="%H:%M:%S" if as_text else "iso", utc=not as_text),
    ]
    text = structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"), sort_keys=False)
    renderers: list[Any] = [_without_nothing, text] if as_text else [structlog.processors.JSONRenderer(default=str)]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.format_exc_info,
                *renderers,
            ],
        )
    )
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    for name in _QUIET_BELOW_WARNING:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level.upper())))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
    if not is_listening(log):
        listen(log)


def _without_nothing(_logger: Any, _name: str, fields: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """For people: a field that says nothing is not shown; programs find every field on every line."""
    return {name: value for name, value in fields.items() if value is not None}


def log(event: Event) -> None:
    """One line for an event, made only when its level is on."""
    logger = logging.getLogger("exarq")
    level = _level(event)
    if logger.isEnabledFor(level):
        fields = {field.name: getattr(event, field.name) for field in dataclasses.fields(event)}
        structlog.get_logger("exarq").log(level, event.text, **{k: _plain(v) for k, v in fields.items()})


def _level(event: Event) -> int:
    if isinstance(event, AttemptEnded) and event.outcome not in ("succeeded", "snoozed"):
        return logging.WARNING
    return event.level


def _plain(value: object) -> object:
    if isinstance(value, float):
        return round(value, 3)
    if isinstance(value, (tuple, list)):
        return [str(item) for item in value]
    return value if isinstance(value, (int, bool)) or value is None else _cut(str(value))


def _cut(text: str) -> str:
    """The text without its middle where it is too long for a line: what stands in Redis may be anybody's."""
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST // 2]} … [{len(text) - _LONGEST:,} characters cut] … {text[-_LONGEST // 2 :]}"
