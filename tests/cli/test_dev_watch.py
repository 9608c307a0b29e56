"""`exarq dev` says so when it cannot see the code change."""

from __future__ import annotations

from pathlib import Path

import pytest
import watchfiles

from worker.cli.dev import _watch_or_tell
from worker.settings import Settings
from worker.supervise.parent import Parent


async def test_code_that_cannot_be_watched_is_told(
    settings: Settings, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def awatch(*_paths: Path, **_options: object) -> None:
        raise OSError("OS file watch limit reached")  # the limit is the machine's, so no test may lower it

    monkeypatch.setattr(watchfiles, "awatch", awatch)

    await _watch_or_tell(tmp_path, Parent(settings, []))

    said = capsys.readouterr().err
    assert "changes of the code are not seen any more: OS file watch limit reached" in said
