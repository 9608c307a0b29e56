"""A command whose standard streams are closed or full, or that was mistyped, says so in one line."""

from __future__ import annotations

import errno
import io
import sys

import pytest

from tests.cli.conftest import Command
from worker.cli import main


class Full(io.StringIO):
    """A file on a full disk."""

    def write(self, _text: str) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")


def ended(monkeypatch: pytest.MonkeyPatch, *argv: str) -> object:
    monkeypatch.setattr(sys, "argv", ["exarq", *argv])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.mark.parametrize("argv", [("config",), ("config", "--json")])
def test_a_full_disk_is_named(
    argv: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdout", Full())

    assert ended(monkeypatch, *argv) == 2
    assert capsys.readouterr().err == "exarq: cannot write to stdout: No space left on device\n"


def test_a_closed_stdout_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdout", None)

    assert ended(monkeypatch, "config") == 2
    assert capsys.readouterr().err == "exarq: stdout is closed\n"


def test_a_closed_stdin_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", None)

    assert ended(monkeypatch, "enqueue", "a.b", "-") == 2
    assert capsys.readouterr().err == "exarq: - reads the arguments from stdin, which is closed\n"


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (("nope",), "exarq: No such command 'nope'; see `exarq --help`"),
        (("jobs", "list", "--limit", "x"), "see `exarq jobs list --help`"),
        (("enqueue",), "see `exarq enqueue --help`"),
        (("jobs", "list", "--name", "\udcff"), r"exarq: '\udcff' is not UTF-8 text"),
    ],
)
def test_what_was_mistyped_is_one_line_with_where_to_read_on(bare: Command, argv: tuple[str, ...], line: str) -> None:
    assert line in bare(*argv).error


def test_a_group_without_its_command_shows_its_commands(bare: Command) -> None:
    done = bare("jobs")

    assert (done.code, done.err) == (2, "")
    assert "Usage: exarq jobs" in done.out
