from __future__ import annotations

import os
import signal
import stat
from pathlib import Path

import pytest

from tests.embedded.helpers import wait_for
from worker.core.errors import EmbeddedServerError
from worker.embedded import attach
from worker.embedded.servers import RunningServers, start

KEY = "/somewhere/settings.toml"


@pytest.fixture
def folder(temporary: Path) -> Path:
    return temporary / f"exarq-{os.geteuid()}"


def test_announced_servers_are_found_by_their_key_only(folder: Path, only_redis: RunningServers) -> None:
    attach.announce(only_redis, KEY)

    assert attach.find(KEY) == only_redis.urls
    assert attach.find("/elsewhere/settings.toml") is None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_without_any_announcement_nothing_is_found_and_nothing_is_made(folder: Path) -> None:
    assert attach.find(KEY) is None
    assert not folder.exists()


def test_an_announcement_is_removed_when_the_servers_stop(folder: Path, only_redis: RunningServers) -> None:
    attach.announce(only_redis, KEY)

    only_redis.stop()

    assert list(folder.iterdir()) == []


def test_a_stale_announcement_is_ignored_and_removed(folder: Path, only_redis: RunningServers) -> None:
    attach.announce(only_redis, KEY)
    os.kill(only_redis.urls.redis_pid, signal.SIGKILL)
    wait_for(lambda: not only_redis.urls.all[0].answers())

    assert attach.find(KEY) is None
    assert list(folder.iterdir()) == []


def test_an_announcement_that_cannot_be_read_is_ignored(folder: Path, only_redis: RunningServers) -> None:
    attach.announce(only_redis, KEY)
    (announcement,) = folder.iterdir()
    announcement.write_text('{"folder": "/tmp')

    assert attach.find(KEY) is None


@pytest.mark.usefixtures("temporary")
def test_a_later_announcement_replaces_an_earlier_one_and_outlives_it(only_redis: RunningServers) -> None:
    attach.announce(only_redis, KEY)
    with start(postgres=False) as later:
        attach.announce(later, KEY)

        only_redis.stop()

        assert attach.find(KEY) == later.urls


@pytest.mark.usefixtures("temporary")
def test_a_folder_owned_by_someone_else_is_refused(
    folder: Path, only_redis: RunningServers, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.mkdir(mode=0o700)
    if os.geteuid() == 0:
        os.chown(folder, 65534, -1)
    else:  # who cannot give a folder away becomes the other user instead
        other = os.geteuid() + 1
        folder.rename(folder.with_name(f"exarq-{other}"))
        monkeypatch.setattr(os, "geteuid", lambda: other)

    with pytest.raises(EmbeddedServerError, match="must be a folder that you own"):
        attach.find(KEY)
    with pytest.raises(EmbeddedServerError, match="must be a folder that you own"):
        attach.announce(only_redis, KEY)


def test_a_folder_that_others_may_enter_is_refused(folder: Path) -> None:
    folder.mkdir()
    folder.chmod(0o755)

    with pytest.raises(EmbeddedServerError, match="mode 0700"):
        attach.find(KEY)


def test_a_symlink_in_place_of_the_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o700)
    folder.symlink_to(tmp_path)

    with pytest.raises(EmbeddedServerError, match="must be a folder that you own"):
        attach.find(KEY)


def test_servers_whose_folder_others_can_enter_are_not_trusted(folder: Path, only_redis: RunningServers) -> None:
    attach.announce(only_redis, KEY)
    only_redis.urls.all[0].socket.parent.chmod(0o755)

    assert attach.find(KEY) is None
