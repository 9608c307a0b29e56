"""Help comes at once, completion works, and colours stay away where they are not wanted."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from tests.cli.conftest import Command

HEAVY = {"alembic", "arq", "asyncpg", "redis", "sqlalchemy", "structlog", "watchfiles"}


@pytest.mark.parametrize("command", [(), ("run",), ("dev",), ("jobs", "list")])
def test_help_imports_nothing_heavy(bare: Command, command: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "worker", *command, "--help"],
        cwd=bare.folder,
        capture_output=True,
        text=True,
    )

    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert " ".join(("Usage: exarq", *command)) in done.stdout
    assert "typer" in imported
    assert not imported & HEAVY


def test_the_exit_codes_are_told_in_the_help(bare: Command) -> None:
    said = " ".join(bare("--help").out.split())

    assert "Ends with 0: done; 1: not found" in said


def test_words_are_completed(bare: Command) -> None:
    done = bare.cold(_EXARQ_COMPLETE="complete_bash", COMP_WORDS="exarq ru", COMP_CWORD="1")
    script = bare.cold("--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1")

    assert (done.code, done.out.split(), done.err) == (0, ["run"], "")
    assert "complete -o default -F _exarq_completion exarq" in script.out


@pytest.mark.parametrize("option", ["-c", "--concurrency", "-p", "--processes"])
def test_a_number_that_is_too_small_is_an_error_that_names_its_option(bare: Command, option: str) -> None:
    line = bare("run", option, "0").error

    assert ("--concurrency" if "c" in option.strip("-")[0] else "--processes") in line
    assert "exarq run --help" in line


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_are_left_out_where_nobody_wants_them(exarq: Command, no_color: str) -> None:
    for command in (("run", "--burst"), ("jobs", "list", "--state", "nonsense")):
        terminal, stderr = pty.openpty()
        environment = {**os.environ, **exarq.environment, "NO_COLOR": no_color, "TERM": "xterm-256color"}
        subprocess.run(
            [sys.executable, "-m", "worker", *command],
            cwd=exarq.folder,
            env={name: value for name, value in environment.items() if value},
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            timeout=120,
        )
        os.close(stderr)
        said = b""
        while True:
            try:
                said += os.read(terminal, 65536)
            except OSError:  # all was read, and the other end is closed
                break
        os.close(terminal)

        assert said
        coloured = re.search(rb"\x1b\[[\d;]*3\dm", said) is not None
        assert coloured is not bool(no_color), said
