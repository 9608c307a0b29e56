"""What processes note outside the database: append-only files of JSON lines, which outlive the process and both servers."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

EPOCH: Final = "CHAOS_EPOCH"
"""When the machine's monotonic clock began, as the stage sees it: some processes live by another time of day."""


class Evidence:
    """One process' file; a line is one write."""

    def __init__(self, path: Path, epoch: float) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        self._epoch = epoch

    @classmethod
    def of_this_process(cls, path_variable: str) -> Evidence:
        """The file that the environment names."""
        return cls(Path(os.environ[path_variable]), float(os.environ[EPOCH]))

    def note(self, what: str, **fields: Any) -> None:
        """Add a line."""
        line = json.dumps({"what": what, "at": self._epoch + time.monotonic(), **fields}, default=str)
        os.write(self._file, f"{line}\n".encode())


def epoch() -> float:
    """What to add to the monotonic clock, which all processes of a machine share."""
    return time.time() - time.monotonic()


def whole_lines(text: bytes) -> list[dict[str, Any]]:
    """The lines in these bytes; a last one that a kill has torn is left out."""
    return [json.loads(line) for line in text[: text.rfind(b"\n") + 1].splitlines()]


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """All lines of all processes, file by file, each with the name of its file."""
    for path in sorted(folder.glob("*.jsonl")):
        for line in whole_lines(path.read_bytes()):
            yield {"by": path.stem, **line}
