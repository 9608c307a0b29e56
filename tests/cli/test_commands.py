"""Each command against real servers: data on stdout, everything else on stderr."""

from __future__ import annotations

import json
import signal
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest
from arq.connections import ArqRedis
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cli.conftest import Command
from tests.support import a_job, hints, row, state, until
from worker.db.ids import uuid7s

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine


def test_the_version_is_printed(bare: Command) -> None:
    done = bare.cold("--version")

    assert (done.code, done.out.split()[0], done.err) == (0, "exarq", "")


def test_the_settings_are_shown_with_their_origin_and_without_passwords(bare: Command) -> None:
    bare.write("settings.toml", "[worker]\nconcurrency = 3\n")

    done = bare.cold("config", "--json", EXARQ_DATABASE_URL="postgresql://u:hunter2@h/d")
    table = bare("config", EXARQ_DATABASE_URL="postgresql://u:hunter2@h/d")

    assert done.json["worker.concurrency"] == {"value": 3, "origin": "settings.toml"}
    assert done.json["worker.lease"] == {"value": 10, "origin": "default"}
    assert done.json["database.url"] == {"value": "postgresql+asyncpg://u:***@h/d", "origin": "EXARQ_DATABASE_URL"}
    assert done.json["redis.url"] == {"value": None, "origin": "default"}
    assert done.err == table.err == ""
    assert "hunter2" not in done.out + table.out
    assert "EXARQ_DATABASE_URL" in table.out
    assert "postgresql://u:***@h/d" in table.out
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in table.out.splitlines()}
    assert rows["worker.lease"].startswith("10 s ")
    assert rows["keep.failed"].startswith("30 d ")
    assert "seconds" not in rows["worker.lease"]


async def test_an_enqueued_job_is_stored_and_hinted_and_its_id_is_all_that_is_printed(
    exarq: Command, engine: AsyncEngine, redis: ArqRedis
) -> None:
    done = exarq.cold("enqueue", "shop.charge", '{"invoice_id": 7}')

    job_id = UUID(done.out.strip())
    assert (done.code, done.err) == (0, "")
    assert await state(engine, job_id) == "queued"
    assert str(job_id) in await hints(redis)


async def test_an_enqueue_with_a_key_that_a_job_has_prints_that_jobs_id_and_says_so(
    exarq: Command, engine: AsyncEngine
) -> None:
    first = exarq("enqueue", "shop.charge", '{"invoice_id": 7}', "--key", "k", "--priority", "0")
    again = exarq("enqueue", "shop.charge", '{"invoice_id": 7}', "--key", "k")

    assert (first.code, first.err) == (0, "")
    assert (again.code, again.out) == (0, first.out)
    assert again.err == "note: shop.charge with the key 'k' is enqueued already; this is its job\n"
    assert (await row(engine, UUID(first.out.strip()))).priority == 0


async def test_an_enqueue_takes_a_queue_a_delay_and_arguments_from_stdin(exarq: Command, engine: AsyncEngine) -> None:
    done = exarq.cold(
        "enqueue", "shop.charge", "-", "--queue", "night", "--delay", "3600", "--json", stdin='{"invoice_id": 8}'
    )

    found = await row(engine, UUID(done.json["id"]))
    assert done.json["name"] == "shop.charge"
    assert (found.queue, found.args) == ("night", {"invoice_id": 8})
    assert abs(found.run_at - found.enqueued_at - timedelta(hours=1)) < timedelta(seconds=1)


async def test_an_unknown_name_is_accepted_with_a_note_that_names_the_nearest(
    exarq: Command, engine: AsyncEngine
) -> None:
    done = exarq("enqueue", "shop.chrge", '{"anything": 1}')

    assert done.code == 0
    assert "note: no job named 'shop.chrge'" in done.err
    assert "did you mean 'shop.charge'?" in done.err
    assert await state(engine, UUID(done.out.strip())) == "queued"


async def test_without_redis_the_job_is_stored_all_the_same_and_a_note_says_so(
    exarq: Command, engine: AsyncEngine, closed_port: int
) -> None:
    done = exarq("enqueue", "shop.charge", '{"invoice_id": 7}', EXARQ_REDIS_URL=f"redis://127.0.0.1:{closed_port}")

    (line,) = done.err.splitlines()
    assert done.code == 0
    assert line.startswith("note: the job is stored, but Redis does not answer")
    assert await state(engine, UUID(done.out.strip())) == "queued"


async def test_the_list_is_narrowed_by_state_name_queue_and_number(exarq: Command, engine: AsyncEngine) -> None:
    later = datetime.now(UTC) + timedelta(hours=1)
    wanted = {"name": "shop.charge", "queue": "night", "run_at": later}
    ids = uuid7s(5)  # in this order, though of one millisecond
    await a_job(engine, **wanted, id=ids[0])
    newest = await a_job(engine, **wanted, id=ids[1])
    due = await a_job(engine, **{**wanted, "run_at": datetime.now(UTC) - timedelta(hours=1)}, id=ids[2])
    other_name = await a_job(engine, **{**wanted, "name": "shop.broken"}, id=ids[3])
    other_queue = await a_job(engine, **{**wanted, "queue": "day"}, id=ids[4])

    narrowed = exarq(
        *("jobs", "list", "--json", "--state", "scheduled", "--name", "shop.charge", "--queue", "night", "--limit", "1")
    )
    all_of_night = exarq("jobs", "list", "--json", "--queue", "night", "--limit", "2")

    assert [line["id"] for line in narrowed.json] == [str(newest)]
    assert narrowed.err == "note: the newest 1 only; --limit shows more\n"
    assert [line["id"] for line in all_of_night.json] == [str(other_name), str(due)]
    assert str(other_queue) not in all_of_night.out


async def test_the_table_shows_ids_whole_and_obeys_nothing_that_a_job_wrote(
    exarq: Command, engine: AsyncEngine
) -> None:
    failed = await a_job(engine, name="shop.broken", state="failed", error="no [red]money[/red]\x1b[2J", attempt=2)

    done = exarq.cold("jobs", "list")

    header, line = done.out.splitlines()
    assert header.split() == ["id", "state", "attempts", "when", "name", "error"]
    assert line.startswith(str(failed))
    assert r"no [red]money[/red]\x1b[2J" in line
    assert done.err == ""


def test_an_empty_list_is_empty_on_stdout_and_explained_on_stderr(exarq: Command) -> None:
    people, program = exarq("jobs", "list"), exarq("jobs", "list", "--json", "--state", "failed")

    assert (people.out, people.err) == ("", "note: there are no jobs yet\n")
    assert (program.json, program.err) == ([], "note: no jobs match\n")


def test_a_failed_job_is_shown_with_its_arguments_and_the_traceback_of_each_attempt(exarq: Command) -> None:
    job_id = exarq("enqueue", "shop.broken", '{"word": "Zoë"}').out.strip()
    assert exarq("run", "--burst").code == 0

    people, program = exarq("jobs", "show", job_id), exarq("jobs", "show", job_id, "--json")

    assert '{"word": "Zoë"}' in people.out
    assert "attempt 1: failed" in people.out
    assert "ValueError: cannot [red]Zoë[/red]" in people.out.splitlines()[-1]
    assert program.json["id"] == job_id
    assert program.json["state"] == "failed"
    assert program.json["args"] == {"word": "Zoë"}
    (attempt,) = program.json["attempts"]
    assert (attempt["number"], attempt["ending"]) == (1, "failed")
    assert attempt["traceback"].startswith("Traceback")
    assert people.err == program.err == ""


def test_a_succeeded_job_is_shown_with_its_result(exarq: Command) -> None:
    job_id = exarq("enqueue", "shop.charge", '{"invoice_id": 7}').out.strip()
    assert exarq("run", "--burst").code == 0

    done = exarq.cold("jobs", "show", job_id, "--json")

    assert (done.json["state"], done.json["result"], done.json["attempts"]) == ("succeeded", {"paid": 7}, [])


def test_a_job_that_is_not_there_ends_with_1_and_one_line(exarq: Command) -> None:
    done = exarq("jobs", "show", "0199c0de-0000-7000-8000-000000000000")

    (line,) = done.err.splitlines()
    assert (done.code, done.out) == (1, "")
    assert "no job 0199c0de-0000-7000-8000-000000000000" in line


async def test_the_tables_are_made_once_and_their_revision_is_told(exarq: Command, engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA exarq CASCADE"))

    before, made, again, after = (
        command("db", name, "--json")
        for command, name in (
            (exarq, "current"),
            (exarq.cold, "upgrade"),
            (exarq, "upgrade"),
            (exarq.cold, "current"),
        )
    )

    head = before.json["head"]
    assert before.json == {"current": None, "head": head, "up_to_date": False}
    assert made.json == {"before": None, "current": head}
    assert again.json == {"before": head, "current": head}
    assert after.json == {"current": head, "head": head, "up_to_date": True}
    assert made.err == ""


async def test_a_worker_takes_only_the_queues_it_was_given(exarq: Command, engine: AsyncEngine) -> None:
    night = await a_job(engine, name="shop.charge", queue="night", args={"invoice_id": 1})
    day = await a_job(engine, name="shop.charge", args={"invoice_id": 1})

    done = exarq.cold("run", "--burst", "--queue", "night", "--queue", "other", "--concurrency", "2")

    assert (done.code, done.out) == (0, "")
    assert await state(engine, night) == "succeeded"
    assert await state(engine, day) == "queued"


async def test_a_worker_starts_without_redis_warns_and_runs_what_it_finds_in_postgresql(
    exarq: Command, engine: AsyncEngine, closed_port: int
) -> None:
    job_id = await a_job(engine, name="shop.charge", args={"invoice_id": 7})

    done = exarq("run", "--burst", EXARQ_REDIS_URL=f"redis://127.0.0.1:{closed_port}")

    assert done.code == 0
    said = [json.loads(line) for line in done.err.splitlines()]
    assert any(line["level"] == "warning" and "Redis" in line["event"] for line in said)
    assert await state(engine, job_id) == "succeeded"


@pytest.mark.parametrize("signal_name", ["SIGTERM", "SIGINT"])
async def test_a_worker_that_is_told_to_stop_ends_with_0(exarq: Command, engine: AsyncEngine, signal_name: str) -> None:
    async def beats() -> bool:
        async with engine.connect() as connection:
            query = text("SELECT EXISTS (SELECT FROM exarq.worker WHERE beat > 0)")
            return bool((await connection.execute(query)).scalar_one())

    with exarq.started("run") as process:
        await until(lambda: process.poll() is not None or beats(), "a worker that beats", limit=90)
        await until(lambda: exarq.cold("check").code == 0, "its heartbeat file", limit=90)
        process.send_signal(signal.Signals[signal_name])
        out, err = process.communicate(timeout=60)

    assert (process.returncode, out) == (0, "")
    assert "worker stopped" in err
    assert exarq.cold("check").code == 1
