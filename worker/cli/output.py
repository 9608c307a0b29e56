"""What people and programs see: data on stdout, everything said about them on stderr."""

from __future__ import annotations

import errno
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Final
from uuid import UUID

from rich.console import Console
from rich.table import Table
from rich.text import Text

from worker.core.errors import ExarqError

_STYLES: Final = {
    "succeeded": "green",
    "failed": "bold red",
    "cancelled": "dim",
    "running": "cyan",
    "retrying": "yellow",
    "scheduled": "blue",
}
_WIDTH_OF_A_PIPE: Final = 240
_LEAST_ROOM: Final = 12
_ROOM_FOR_IDS: Final = 130
_WORTH_A_BAR: Final = 1_000


class NotWritten(ExarqError):
    """Raised when nobody can take what a command has to say, as on a full disk."""


def complain(message: str) -> None:
    """Say what is wrong, in one line on stderr."""
    _say("exarq: ", "bold red", message)


def note(message: str) -> None:
    """Say what is worth knowing, in one line on stderr."""
    _say("note: ", "bold yellow", message)


def prompt(question: str) -> None:
    """Ask something on stderr, and stay on the line."""
    console = _console(stderr=True)
    console.print(Text(readable(question), style="bold"), end="", soft_wrap=True)
    console.file.flush()


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr while the block lasts, if that is a terminal; what is yielded advances it."""
    console = _console(stderr=True)
    if not console.is_terminal or total < _WORTH_A_BAR:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=total)
        yield lambda count: bars.advance(task, count)


def print_json(value: object) -> None:
    """Print one JSON document."""
    with _writing():
        print(json.dumps(value, indent=2, default=_plain))  # noqa: T201 — this is where data leave


def print_line(text: str, style: str = "") -> None:
    """Print one line of data, however long."""
    with _writing():
        _out().print(Text(readable(text), style=style), soft_wrap=True)


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: one that `folds` takes several lines where it must, the others stay whole."""

    name: str
    folds: bool = False


def print_table(columns: Sequence[Column], rows: Sequence[Sequence[str | Text]], *, last: str = "") -> None:
    """Print rows for people, as wide as the terminal is.

    Args:
        columns: what stands above them.
        rows: a cell for each column; with `last`, one more.
        last: the name of a column that takes what the others leave of the width, and is cut there or left out.

    """
    with _writing():
        _print_table(_out(), columns, rows, last)


def _print_table(console: Console, columns: Sequence[Column], rows: Sequence[Sequence[str | Text]], last: str) -> None:
    cells = [[_one_line(cell) for cell in row] for row in rows]
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column.name, no_wrap=not column.folds, overflow="fold")
    if last:
        widths = (
            max(len(name), *(row[i].cell_len for row in cells))
            for i, name in enumerate(column.name for column in columns)
        )
        room = console.width - sum(width + 2 for width in widths)
        if room < _LEAST_ROOM or not any(row[-1].cell_len for row in cells):
            cells = [row[:-1] for row in cells]
        else:
            table.add_column(last, no_wrap=True)
            for row in cells:
                row[-1].truncate(room, overflow="ellipsis")
    for row in cells:
        table.add_row(*row)
    if console.is_terminal:
        console.print(table)
        return
    with console.capture() as drawn:
        console.print(table)
    console.file.write("".join(f"{line.rstrip()}\n" for line in drawn.get().splitlines()))


def print_facts(facts: Mapping[str, str | Text]) -> None:
    """Print names and values below each other."""
    width = max(map(len, facts))
    with _writing():
        for name, value in facts.items():
            first, *more = readable(value.rstrip()).split("\n") if isinstance(value, str) else [value]
            _out().print(Text.assemble((name.ljust(width), "dim"), "  ", first), soft_wrap=True)
            for line in more:
                _out().print(Text(f"{'':{width}}  {line}".rstrip()), soft_wrap=True)


def short(job_or_worker: UUID) -> str:
    """An id as far as there is room: on a narrow terminal its end, which is enough wherever an id is asked for."""
    return str(job_or_worker) if _out().width >= _ROOM_FOR_IDS else str(job_or_worker)[-8:]


def state_text(state: str) -> Text:
    """A state in its colour."""
    return Text(state, style=_STYLES.get(state, ""))


def readable(text: str) -> str:
    """The text with everything escaped that a terminal would obey."""
    return "".join(char if char.isprintable() or char == "\n" else _escaped(char) for char in text)


def ago(moment: datetime | None, now: datetime | None = None) -> str:
    """How far a moment is from now, as people say it: `12 s ago`, `in 3 h`."""
    if moment is None:
        return "–"
    away = moment - (now or datetime.now(UTC))
    span = length(abs(away))
    if span == "0 s":
        return "now"
    return f"in {span}" if away > timedelta(0) else f"{span} ago"


def length(span: timedelta) -> str:
    """A length of time in one unit: `12 s`, `3 h`."""
    seconds = span.total_seconds()
    for unit, size, until in (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 36 * 3600)):
        if seconds < until:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"


def duration(span: timedelta) -> str:
    """A length of time exactly, in the largest unit that it is a whole number of: `90 s`, `7 d`, `250 ms`."""
    milliseconds = round(span.total_seconds() * 1000)
    for unit, size in (("d", 86_400_000), ("h", 3_600_000), ("min", 60_000), ("s", 1000)):
        if milliseconds and milliseconds % size == 0:
            return f"{milliseconds // size} {unit}"
    return f"{milliseconds / 1000:g} s" if milliseconds >= 1000 else f"{milliseconds} ms"


def _escaped(char: str) -> str:
    return "    " if char == "\t" else char.encode("unicode_escape").decode()


def _one_line(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(readable(" ".join(cell.split())))


def _say(prefix: str, style: str, message: str) -> None:
    line = Text.assemble((prefix, style), readable(" ".join(message.splitlines())))
    _console(stderr=True).print(line, soft_wrap=True)


@contextmanager
def _writing() -> Iterator[None]:
    if sys.stdout is None:
        raise NotWritten("stdout is closed")
    try:
        yield
        sys.stdout.flush()
    except OSError as error:
        if error.errno == errno.EPIPE:  # whoever reads has read enough
            raise
        raise NotWritten(f"cannot write to stdout: {error.strerror}") from None


def _out() -> Console:
    return _console(width=None if sys.stdout.isatty() else _WIDTH_OF_A_PIPE)


def _console(**options: Any) -> Console:
    return Console(markup=False, highlight=False, emoji=False, **options)


def _plain(value: object) -> object:
    match value:
        case datetime():
            return value.astimezone(UTC).isoformat()
        case UUID() | Enum():
            return str(value)
    raise TypeError(f"not JSON: {type(value).__name__}")
