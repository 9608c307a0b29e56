"""The pages as their readers use them: each block of code in the file it names, each command as it is printed."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path

from tests import warm
from tests.cli.conftest import Command

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
DOCS = ROOT / "docs"

_LIMIT = 120  # for one command; a loaded machine needs many seconds to start an interpreter


def blocks(page: Path, language: str) -> list[str]:
    """What stands in the page's blocks of this language."""
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def commands(block: str) -> list[str]:
    """The lines of a block for the shell, but for what tells it where the reader's servers are."""
    return [line for line in block.splitlines() if not line.startswith("export ")]


@dataclass
class Reader:
    """Somebody who follows a page in a folder of their own."""

    folder: Path
    environment: dict[str, str]

    def write(self, block: str) -> None:
        """Put a block into the file that its first line names, or at the end of it."""
        also, name = re.match(r"# (also in )?([\w.]+)", block).groups()  # type: ignore[union-attr]
        path = self.folder / name
        path.write_text((path.read_text(encoding="utf-8") if also else "") + block, encoding="utf-8")

    def types(self, line: str, *, job_id: str = "ID") -> str:
        """What a command prints that has to succeed; the page says ID where the reader has a job's id."""
        words = shlex.split(line.replace(" ID", f" {job_id[-8:]}"), comments=True)
        match words:
            case ["exarq", *arguments]:
                done = self._command(*arguments)
            case ["python", script]:
                done = self._command.forked(warm.script, script)
            case _:
                raise AssertionError(f"nobody has said how to run {line!r}")
        assert done.code == 0, f"{line}: {done}"
        return done.out.strip()

    def starts_python(self, script: str) -> str:
        """What a script prints that a new interpreter runs."""
        done = subprocess.run(
            ["python", script], cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=_LIMIT
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    @property
    def _command(self) -> Command:
        return Command(self.folder, self.environment)
