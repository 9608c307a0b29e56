"""What docker-compose.yml starts, in which order, and how each part is looked after and ended."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import redis
from sqlalchemy.engine import make_url

from tests.deploy.compose import compose, duration, stage_of
from tests.deploy.dockerfile import REPOSITORY
from tests.embedded.helpers import wait_for
from worker.embedded.binaries import find_redis
from worker.settings import load_settings
from worker.supervise import parent

OURS = ("migrate", "worker", "service")


def services() -> dict[str, Any]:
    found: dict[str, Any] = compose()["services"]
    return found


def health_check(name: str) -> dict[str, Any]:
    """The health check of a service: its own, else the image's."""
    service = services()[name]
    if "healthcheck" in service:
        own: dict[str, Any] = service["healthcheck"]
        return own
    options, command = stage_of(name).health_check
    return {"test": ["CMD", *command], **{key.replace("-", "_"): value for key, value in options.items()}}


@contextmanager
def a_redis(arguments: list[str], folder: Path) -> Iterator[redis.Redis]:
    """A server that is told the same, on a socket of its own."""
    socket = folder / "s"
    line = [str(find_redis(folder, None)), *arguments, "--port", "0", "--unixsocket", str(socket), "--dir", str(folder)]
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as process:
        try:
            with redis.Redis(unix_socket_path=str(socket), decode_responses=True) as client:
                wait_for(lambda: _answers(client) or process.poll() is not None)
                assert process.poll() is None
                yield client
        finally:
            process.kill()


def _answers(client: redis.Redis) -> bool:
    try:
        return bool(client.ping())
    except redis.ConnectionError:  # its socket is there a moment before it listens
        return False


def test_compose_itself_reads_it_where_it_is_installed() -> None:
    docker = shutil.which("docker")
    has_compose = docker and subprocess.run([docker, "compose", "version"], capture_output=True).returncode == 0

    read = compose()

    assert {"postgres", "redis", "migrate", "worker", "service"} <= read["services"].keys()
    assert read.keys() <= {"name", "x-exarq", "services", "volumes"}
    if has_compose:
        done = subprocess.run(
            ["docker", "compose", "config", "--quiet"], cwd=REPOSITORY, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "")


def test_workers_and_the_service_start_after_the_migration_and_that_after_a_healthy_postgresql() -> None:
    found = services()

    assert found["migrate"]["depends_on"] == {"postgres": {"condition": "service_healthy"}}
    assert found["migrate"]["restart"] == "on-failure"  # one that has ended with 0 is not started again
    for name in ("worker", "service"):
        assert found[name]["depends_on"]["migrate"] == {"condition": "service_completed_successfully"}
    assert found["worker"]["deploy"] == {"replicas": 2}
    assert all(other in found for service in found.values() for other in service.get("depends_on", {}))


def test_each_service_that_lives_on_has_a_health_check() -> None:
    for name in services().keys() - {"migrate"}:
        check = health_check(name)
        assert check["test"][0] == "CMD", name
        assert duration(check["timeout"]) <= duration(check["interval"]), name
        assert duration(check["start_period"]), name
    assert health_check("migrate") == {"disable": True}  # it is not healthy but done
    assert health_check("worker")["test"] == ["CMD", "exarq", "check"]


def test_the_containers_of_ours_need_no_right_and_write_to_tmp_only() -> None:
    for name in OURS:
        service = services()[name]
        assert service["read_only"] is True
        assert service["tmpfs"] == "/tmp"
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert service["init"] is True
        assert service.keys().isdisjoint(
            {"user", "stop_signal", "entrypoint"}
        )  # the image's, an ordinary user among them
    assert {name: service["image"] for name, service in services().items() if "build" in service} == {
        "migrate": "exarq",
        "service": "exarq-service",
    }
    assert [stage_of(name).name for name in OURS] == ["worker", "worker", "service"]


def test_a_worker_is_given_longer_to_stop_than_it_takes_at_most(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    worker = services()["worker"]
    for variable, value in worker["environment"].items():
        monkeypatch.setenv(variable, value)

    settings = load_settings()

    longest = settings.worker.grace + parent._PATIENCE
    assert longest < duration(worker["stop_grace_period"]) <= longest + timedelta(seconds=30)
    assert make_url(settings.require_database_url()).host == "postgres"
    assert make_url(settings.require_redis_url()).host == "redis"


def test_the_service_is_given_longer_to_stop_than_its_requests_to_end_and_is_reached_from_this_machine_only() -> None:
    service = services()["service"]
    environment = dict(word.split("=", 1) for word in stage_of("service").last("ENV").words)

    longest = timedelta(seconds=int(environment["UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN"]))
    assert longest < duration(service["stop_grace_period"]) <= longest + timedelta(seconds=30)
    assert environment["UVICORN_HOST"] == "0.0.0.0"  # in the container
    assert service["ports"] == [f"127.0.0.1:8000:{environment['UVICORN_PORT']}"]
    assert service["environment"] == services()["worker"]["environment"]


def test_the_database_that_is_made_is_the_one_that_is_used() -> None:
    made = services()["postgres"]["environment"]
    used = make_url(services()["worker"]["environment"]["EXARQ_DATABASE_URL"])

    assert (used.username, used.password, used.database) == (
        made["POSTGRES_USER"],
        made["POSTGRES_PASSWORD"],
        made["POSTGRES_DB"],
    )
    assert services()["postgres"]["volumes"] == ["postgres:/var/lib/postgresql"]  # where 18 has its data
    assert compose()["volumes"] == {"postgres": None}


def test_its_redis_stores_nothing_and_evicts_nothing(tmp_path: Path) -> None:
    command = services()["redis"]["command"]

    with a_redis(command[1:], tmp_path) as client:
        told: Any = client.config_get("*")

    assert command[0] == "redis-server"
    wanted = {
        "save": "",
        "appendonly": "no",
        "maxmemory-policy": "noeviction",
        "maxmemory": str(256 * 2**20),
    }
    assert {name: told[name] for name in wanted} == wanted
