"""Whatever is typed: data or one line on stderr, one of the exit codes of the help, no traceback, no password."""

from __future__ import annotations

import io
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import pytest
import structlog
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

import worker.demo.story
from worker.cli import main
from worker.db.reads import SHOWN_STATES
from worker.observe import events

SECRET = "hunter2"
repeatable = settings(
    derandomize=True,
    max_examples=200,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

COMMANDS = [["run"], ["enqueue"], ["jobs"], ["jobs", "list"], ["jobs", "show"], ["jobs", "cancel"], ["config"], ["db"]]
COMMANDS += [["jobs", "retry"], ["jobs", "delete"], ["queues"], ["workers"], ["doctor"], ["prune"], ["db", "sql"]]
COMMANDS += [["db", "upgrade"], ["db", "current"], ["demo"], []]
OPTIONS = ["--json", "--queue", "-q", "--delay", "--state", "-s", "--name", "-n", "--limit", "-l", "--burst", "-c"]
OPTIONS += ["--all", "--yes", "-y", "--older-than", "--older-than=2h", "--traceback", "--from", "--state=failed"]
OPTIONS += ["--concurrency", "--help", "-h", "--version", "--break", "--", "-", "--limit=5", "--delay=1e400", "--nope"]
JSON = [
    '{"word": "x"}',
    "{}",
    "[]",
    "{",
    "[" * 5_000,
    '{"a": NaN}',
    '{"word": "\\ud800"}',
    '{"word": "\\u0000"}',
    "9" * 5_000,
]
NAMES = ["tests.note", "tests.nothing", "unknown.job", "0199c0de-0000-7000-8000-000000000000", "x" * 300, "arq:queue"]
NUMBERS = ["5", "0", "-1", "nan", "inf", "1e-9", "9" * 400, "1_0", "٣", "0x1"]

bytes_as_typed = st.binary(max_size=8).map(lambda raw: os.fsdecode(raw.replace(b"\0", b"")))
texts = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=10)
words = st.one_of(
    *(st.sampled_from(found) for found in (OPTIONS, OPTIONS, JSON, NAMES, NUMBERS, list(SHOWN_STATES))),
    bytes_as_typed,
    texts,
    st.sampled_from(["\x1b[2J", "a\nb", "[red]x[/red]", "\u202e", "{0}", "%s"]),
)


@dataclass
class Ended:
    """What a command said and how it ended."""

    code: object
    out: str
    err: str


def typed(argv: list[str], stdin: bytes, environment: dict[str, str]) -> Ended:
    """What `exarq` does with these words, in this process."""
    out, err = (io.TextIOWrapper(io.BytesIO(), "utf-8", errors) for errors in ("strict", "backslashreplace"))
    given = io.TextIOWrapper(io.BytesIO(stdin), "utf-8")
    code: object = None
    with (
        mock.patch.dict(os.environ, environment),
        mock.patch.object(sys, "argv", ["exarq", *argv]),
        mock.patch.object(sys, "stdin", given),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as ended:
            code = ended.code
    said = []
    for stream in (out, err):
        stream.flush()
        said.append(stream.buffer.getvalue().decode())
    return Ended(code or 0, *said)


def is_well_behaved(done: Ended) -> None:
    assert done.code in (0, 1, 2), done
    everything = done.out + done.err
    assert "Traceback" not in everything
    assert SECRET not in everything
    obeyed = [char for char in everything if not char.isprintable() and char != "\n"]
    assert not obeyed, "a terminal would obey this"
    wrong = [line for line in done.err.splitlines() if not line.startswith("note: ")]
    if done.code == 0:
        assert wrong == []
    elif "Usage: " not in done.out:  # the help of a group of commands, for want of one
        assert done.out == ""
        assert len(wrong) == 1
        assert wrong[0].startswith("exarq: ")
        assert len(wrong[0]) > len("exarq: ")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty folder without settings; `exarq run` configures the logging of the process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(worker.demo.story, "run_demo", lambda **_: 0)  # it starts servers and processes
    for name in [name for name in os.environ if name.startswith("EXARQ_")]:
        monkeypatch.delenv(name)
    root, listeners = logging.getLogger(), list(events._listeners)
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in ("arq", "sqlalchemy", "asyncio", "alembic", "exarq")}
    yield
    root.handlers[:], events._listeners[:] = handlers, listeners
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
    structlog.reset_defaults()


@repeatable
@given(command=st.sampled_from(COMMANDS), argv=st.lists(words, max_size=5), stdin=st.sampled_from(["", *JSON]))
@example(command=[], argv=["nope"], stdin="")
@example(command=["run"], argv=[], stdin="")
@example(command=["enqueue"], argv=["tests.note", "-"], stdin='{"word": "x"}')
def test_any_words_without_servers_end_with_one_line(
    command: list[str], argv: list[str], stdin: str, closed_port: int
) -> None:
    environment = {
        "EXARQ_DATABASE_URL": f"postgresql://u:{SECRET}@127.0.0.1:{closed_port}/d",
        "EXARQ_REDIS_URL": f"redis://u:{SECRET}@127.0.0.1:{closed_port}/0",
        "EXARQ_JOBS_MODULES": "tests.life.jobs_for_tests",
    }

    is_well_behaved(typed([*command, *argv], stdin.encode(), environment))


@repeatable
@given(
    command=st.sampled_from([command for command in COMMANDS if command not in (["run"], [])]),
    argv=st.lists(words, max_size=5),
    stdin=st.binary(max_size=10) | st.sampled_from(JSON).map(str.encode),
)
@example(command=["jobs", "list"], argv=["--name", "\udcff"], stdin=b"")
@example(command=["enqueue"], argv=["tests.note", "-"], stdin=b'{"word": "\xff"}')
@example(command=["enqueue"], argv=["unknown", "{}", "--queue", "\udcff"], stdin=b"")
def test_any_words_with_servers_end_with_data_or_one_line(
    command: list[str], argv: list[str], stdin: bytes, database_url: str, redis_url: str
) -> None:
    assume("demo" not in command)
    environment = {
        "EXARQ_DATABASE_URL": make_url(database_url).set(password=SECRET).render_as_string(hide_password=False),
        "EXARQ_REDIS_URL": redis_url,
        "EXARQ_JOBS_MODULES": "tests.life.jobs_for_tests",
    }

    is_well_behaved(typed([*command, *argv], stdin, environment))
