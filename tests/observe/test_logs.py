"""Events as lines, and how loud each is."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import select
import subprocess
import sys
from collections.abc import Iterator
from uuid import UUID

import pytest
import structlog

from worker.observe import events, logs
from worker.observe.events import AttemptEnded, Pruned, RedisBack, StepFailed, emit

JOB = UUID(int=7)


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root, listeners = logging.getLogger(), list(events._listeners)
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in (*logs._QUIET_BELOW_WARNING, "exarq")}
    yield
    root.handlers[:], events._listeners[:] = handlers, listeners
    root.setLevel(level)
    for name, before in levels.items():
        logging.getLogger(name).setLevel(before)
    structlog.reset_defaults()


class Written(io.StringIO):
    """A stream that notes what is written at once."""

    def __init__(self, written: list[str]) -> None:
        super().__init__()
        self.written = written

    def write(self, text: str) -> int:
        self.written.append(text)
        return len(text)


class Theirs(logging.Handler):
    """A handler of the user's."""

    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__()
        self.emit = records.append  # type: ignore[assignment]


def ended(outcome: str) -> AttemptEnded:
    return AttemptEnded(job=JOB, name="a.b", attempt=1, outcome=outcome, seconds=0.123456)


def test_json_lines_carry_the_fields_as_plain_values(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")

    emit(ended("succeeded"))

    line = json.loads(capsys.readouterr().err)
    assert (line["event"], line["level"], line["job"], line["seconds"], line["error"]) == (
        "attempt ended",
        "info",
        str(JOB),
        0.123,
        None,
    )


@pytest.mark.parametrize(
    ("moment", "said"),
    [
        (1_700_000_000.000007, "2023-11-14T22:13:20.000007Z"),
        (1_700_000_000.0, "2023-11-14T22:13:20.000000Z"),
        (1_700_000_000.25, "2023-11-14T22:13:20.250000Z"),
        (1_700_000_000.9999999, "2023-11-14T22:13:21.000000Z"),
    ],
)
def test_json_lines_say_when_to_the_microsecond_in_utc(moment: float, said: str) -> None:
    assert logs._stamp_of_json(moment) == said


def test_what_a_job_has_bound_to_its_context_does_not_hide_the_events_own_fields(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("info", "json")

    with structlog.contextvars.bound_contextvars(name="of the order", customer=7):
        emit(ended("succeeded"))

    line = json.loads(capsys.readouterr().err)
    assert (line["name"], line["customer"]) == ("a.b", 7)


@pytest.mark.parametrize(
    "event",
    [
        AttemptEnded(job=JOB, name="a.b", attempt=1, outcome="succeeded", seconds=0.123456),
        AttemptEnded(job=JOB, name='an "é"\\', attempt=2, outcome="snoozed", seconds=12.0, blocked=1.23456),
    ],
)
def test_the_short_way_of_an_end_without_an_error_makes_the_line_of_any_event(
    event: AttemptEnded, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs.configure("info", "json")
    handler = logging.getLogger().handlers[0]
    record = logging.LogRecord("exarq", logging.INFO, "", 0, event, None, None)
    short = handler.format(record)

    monkeypatch.setattr(logs, "AttemptEnded", type(None))

    assert short == handler.format(record)


async def test_lines_of_one_turn_of_the_loop_are_written_at_its_end_in_their_order(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("info", "json")
    emit(Pruned(jobs=1))
    emit(Pruned(jobs=2))
    before = capsys.readouterr().err

    await asyncio.sleep(0)

    assert before == ""
    assert [json.loads(line)["jobs"] for line in capsys.readouterr().err.splitlines()] == [1, 2]


async def test_a_warning_does_not_wait_and_takes_along_what_waits(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")

    emit(Pruned(jobs=1))
    emit(StepFailed(step="claim", error="away"))

    assert [json.loads(line)["level"] for line in capsys.readouterr().err.splitlines()] == ["info", "warning"]


async def test_a_line_of_a_jobs_own_comes_behind_what_waits(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")

    emit(Pruned(jobs=1))
    logging.getLogger("shop").info("said")

    assert [json.loads(line)["event"] for line in capsys.readouterr().err.splitlines()][1:] == ["said"]


async def test_no_more_waits_than_a_pipe_takes_in_one_piece(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    logs.configure("info", "json")
    monkeypatch.setattr(logging.getLogger().handlers[0], "stream", Written(written))

    for number in range(100):
        emit(Pruned(jobs=number))
    await asyncio.sleep(0)

    assert len(written) < 20
    assert max(map(len, written)) <= select.PIPE_BUF
    assert [json.loads(line)["jobs"] for line in "".join(written).splitlines()] == list(range(100))


def test_what_waits_is_not_lost_when_the_process_ends() -> None:
    program = """
import asyncio
from worker.observe import events, logs
logs.configure("info", "json")
async def main():
    events.emit(events.Pruned(jobs=1))
    raise SystemExit(3)
loop = asyncio.new_event_loop()
loop.run_until_complete(main())
"""

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=55)

    assert found.returncode == 3
    assert [json.loads(line)["jobs"] for line in found.stderr.splitlines() if line.startswith("{")] == [1]


@pytest.mark.parametrize("then", ["another loop's turn", "the end of the process"])
def test_what_waits_for_a_loop_that_has_ended_is_written_by(then: str) -> None:
    program = f"""
import asyncio, sys
from worker.observe import events, logs
logs.configure("info", "json")
def say(jobs):
    events.emit(events.Pruned(jobs=jobs))
async def turns(jobs):
    say(jobs)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    print("turned", file=sys.stderr)
ended = asyncio.new_event_loop()
ended.call_soon(ended.stop)
ended.call_soon(say, 1)  # in the turn that is the loop's last, so that what it asked for is never called
ended.run_forever()
ended.close()
print("ended", file=sys.stderr)
if {then == "another loop's turn"}:
    asyncio.run(turns(2))
"""

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=55)

    said = [line if line[0] != "{" else json.loads(line)["jobs"] for line in found.stderr.splitlines()]
    assert said == (["ended", 1, 2, "turned"] if "loop" in then else ["ended", 1])


def test_a_handler_of_the_users_beside_ours_is_given_records(capsys: pytest.CaptureFixture[str]) -> None:
    records: list[logging.LogRecord] = []
    logs.configure("info", "json")
    logging.getLogger().addHandler(Theirs(records))

    emit(RedisBack())

    assert [record.getMessage() for record in records] == ["Redis is back"]
    assert json.loads(capsys.readouterr().err)["event"] == "Redis is back"


def test_an_error_tracker_that_listens_to_loggers_hears_of_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[logging.LogRecord] = []
    logs.configure("info", "json")
    monkeypatch.setattr(logging.Logger, "callHandlers", lambda _logger, record: heard.append(record))

    emit(StepFailed(step="claim", error="away"))

    assert [record.levelname for record in heard] == ["WARNING"]


def test_text_lines_name_the_event_and_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")

    emit(Pruned(jobs=3))

    line = capsys.readouterr().err
    assert "deleted old finished jobs" in line
    assert "jobs" in line


def test_an_attempt_is_named_first_and_nothing_is_said_of_what_there_is_not(
    capsys: pytest.CaptureFixture[str],
) -> None:
    logs.configure("info", "text")

    emit(ended("succeeded"))
    emit(AttemptEnded(job=JOB, name="a.b", attempt=1, outcome="failed", seconds=1, error="E: x"))

    fine, bad = capsys.readouterr().err.splitlines()
    assert fine.split("attempt ended")[1].split()[:2] == ["name=a.b", "outcome=succeeded"]
    assert "None" not in fine
    assert "error=" not in fine
    assert "E: x" in bad


def test_text_that_goes_to_no_terminal_has_no_colours(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "text")

    emit(ended("retried"))

    assert "attempt ended" in (said := capsys.readouterr().err)
    assert "\x1b" not in said


def test_what_is_below_the_level_is_not_said(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("warning", "json")

    emit(RedisBack())
    emit(StepFailed(step="claim", error="away"))

    assert [json.loads(line)["step"] for line in capsys.readouterr().err.splitlines()] == ["claim"]


@pytest.mark.parametrize(
    ("outcome", "level"),
    [("succeeded", "info"), ("snoozed", "info"), ("retried", "warning"), ("failed", "warning")],
)
def test_an_attempt_is_as_loud_as_its_outcome(outcome: str, level: str, capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")

    emit(ended(outcome))

    assert json.loads(capsys.readouterr().err)["level"] == level


def test_configuring_twice_says_everything_once(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "json")
    logs.configure("info", "json")

    emit(RedisBack())

    assert len(capsys.readouterr().err.splitlines()) == 1


def test_without_a_terminal_auto_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    logs.configure("info", "auto")

    emit(RedisBack())

    assert json.loads(capsys.readouterr().err)["event"] == "Redis is back"


def test_importing_configures_nothing() -> None:
    program = "import logging, worker.observe.logs; print(logging.getLogger().handlers)"

    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=55)

    assert found.stdout == "[]\n"


def test_a_handler_of_the_users_is_given_a_readable_line(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", "exarq"):
        logs.log(ended("succeeded"))

    assert caplog.messages == [f"attempt ended name=a.b outcome=succeeded job={JOB} attempt=1 seconds=0.123456"]
