from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from worker.core.errors import EmbeddedServerError
from worker.embedded.account import server_account
from worker.embedded.binaries import find_postgres, find_redis


def program(folder: Path, name: str, says: str = "", mode: int = 0o755) -> Path:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(mode)
    return path


@pytest.fixture
def no_wheels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


def test_programs_found_on_path_win(empty_path: Path, open_folder: Path) -> None:
    program(empty_path, "postgres", "postgres (PostgreSQL) 17.2")
    program(empty_path, "initdb")
    redis = program(empty_path, "redis-server", "Redis server v=7.4.1 sha=00000000:0")
    program(empty_path, "valkey-server", "Valkey server v=8.0.1 sha=00000000:0")

    assert find_postgres(open_folder, server_account()) == empty_path
    assert find_redis(open_folder, server_account()) == redis


def test_valkey_on_path_is_taken_when_there_is_no_redis(empty_path: Path, open_folder: Path) -> None:
    valkey = program(empty_path, "valkey-server", "Valkey server v=8.0.1 sha=00000000:0")

    assert find_redis(open_folder, server_account()) == valkey


def test_a_postgres_without_its_initdb_falls_through_to_the_wheel(empty_path: Path, open_folder: Path) -> None:
    program(empty_path, "postgres", "postgres (PostgreSQL) 17.2")

    assert find_postgres(open_folder, server_account()) != empty_path


def test_programs_that_are_too_old_or_refuse_fall_through_to_the_wheels(empty_path: Path, open_folder: Path) -> None:
    program(empty_path, "postgres", "postgres (PostgreSQL) 9.6.24")
    program(empty_path, "initdb")
    program(empty_path, "redis-server", "error while loading shared libraries")

    assert find_postgres(open_folder, server_account()) != empty_path
    assert find_redis(open_folder, server_account()).parent != empty_path


@pytest.mark.usefixtures("no_wheels", "empty_path")
def test_when_nothing_is_found_the_error_says_what_to_do(open_folder: Path) -> None:
    with pytest.raises(EmbeddedServerError) as postgres:
        find_postgres(open_folder, server_account())
    with pytest.raises(EmbeddedServerError) as redis:
        find_redis(open_folder, server_account())

    assert str(postgres.value) == ("no PostgreSQL server found; install exarq[embedded] or set EXARQ_DATABASE_URL")
    assert str(redis.value) == "no Redis server found; install exarq[embedded] or set EXARQ_REDIS_URL"


@pytest.mark.usefixtures("no_wheels")
def test_what_was_found_and_refused_is_named(empty_path: Path, open_folder: Path) -> None:
    old = program(empty_path, "redis-server", "Redis server v=6.0.16 sha=00000000:0")

    with pytest.raises(EmbeddedServerError, match=rf"refused:\n  {old}: Redis server v=6.0.16 .* is older than 6.2"):
        find_redis(open_folder, server_account())
