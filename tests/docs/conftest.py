"""A reader of the pages who has followed the README so far."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.helpers import environment
from tests.docs.pages import README, Reader, blocks


@pytest.fixture
def reader(tmp_path: Path, database_url: str, redis_url: str) -> Reader:
    """With the README's app.py and settings.toml, and the servers of the test in the environment."""
    folder = tmp_path / "reader"
    folder.mkdir()
    soon = {"EXARQ_JOBS_FIRST_WAIT": "0.1"}  # the reader's time, not the tests', is for waiting
    reader = Reader(folder, {**environment(database_url, redis_url), **soon})
    reader.write(blocks(README, "toml")[0])
    reader.write(blocks(README, "python")[0])
    return reader
