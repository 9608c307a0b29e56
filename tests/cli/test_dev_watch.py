"""`exarq dev` says what it sees change, once, and so when it cannot see the code change."""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from pathlib import Path

import pytest
import watchfiles

from tests.support import until
from worker.cli.dev import _watch, _watch_or_tell
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


async def test_a_change_is_told_once(
    settings: Settings,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    renewed: list[bool] = []
    parent = Parent(settings, [])
    monkeypatch.setattr(parent, "renew", lambda: renewed.append(True))
    caplog.set_level(logging.INFO)

    def changes() -> list[bool]:
        (tmp_path / "shop.py").write_text(f"# {len(renewed)}")
        return renewed

    watching = asyncio.create_task(_watch(tmp_path, parent))
    await until(changes, "a change is seen")
    watching.cancel()
    with suppress(asyncio.CancelledError):
        await watching

    assert "note: shop.py changed; the worker starts anew" in capsys.readouterr().err
    assert "detected" not in caplog.text
