"""What docs/deploy.md prints to be copied fits what a worker does."""

from __future__ import annotations

import configparser
import re
import shlex

from tests.deploy.compose import stage_of
from tests.deploy.dockerfile import REPOSITORY
from worker.settings import WorkerSettings
from worker.supervise import parent

PAGE = (REPOSITORY / "docs" / "deploy.md").read_text(encoding="utf-8")
LONGEST_STOP = (WorkerSettings().grace + parent._PATIENCE).total_seconds()


def units() -> list[configparser.ConfigParser]:
    found = []
    for block in re.findall(r"```ini\n(.*?)```", PAGE, flags=re.DOTALL):
        parser = configparser.ConfigParser(interpolation=None)
        parser.read_string(block)
        found.append(parser)
    return found


def test_a_supervisor_runs_workers_that_it_gives_time_to_stop() -> None:
    systemd, supervisord = units()
    service, program = systemd["Service"], supervisord["program:exarq"]

    for line in (service["ExecStart"], program["command"]):
        command, *words = shlex.split(line)
        assert command.startswith("/opt/exarq/")
        assert command.endswith("/bin/exarq")
        assert words == ["run", "--processes", "4"]
    assert int(service["TimeoutStopSec"]) > LONGEST_STOP
    assert int(program["stopwaitsecs"]) > LONGEST_STOP
    assert service["KillMode"] == "mixed"
    assert "stopasgroup" not in program
    heartbeats = service["Environment"].removeprefix("EXARQ_WORKER_HEARTBEAT_FOLDER=")
    assert heartbeats == f"/run/{service['RuntimeDirectory']}"  # ProtectSystem=strict leaves no other


def test_a_pod_is_given_time_to_stop() -> None:
    (said,) = re.findall(r"`terminationGracePeriodSeconds`: (\d+)", PAGE)

    assert int(said) > LONGEST_STOP


def test_the_service_stops_as_it_says() -> None:
    (said,) = re.findall(r"`UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN` \((\d+) s\)", PAGE)
    (number,) = re.findall(r"stop signal is (SIG\w+)", PAGE)

    assert f"UVICORN_TIMEOUT_GRACEFUL_SHUTDOWN={said}" in stage_of("service").last("ENV").words
    assert stage_of("service").stop_signal.name == number
