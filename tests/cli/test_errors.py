"""Whatever is wrong is one clear line on stderr, exit code 2, no traceback, no password, and nothing lost."""

from __future__ import annotations

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.cli.conftest import Command
from worker.db.reads import SHOWN_STATES

ENQUEUE = ("enqueue", "shop.charge", '{"invoice_id": 7}')

pytestmark = pytest.mark.timeout(300)  # processes start slowly on a loaded machine


async def stored(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        return int((await connection.execute(text("SELECT count(*) FROM exarq.job"))).scalar_one())


def test_a_wrong_setting_names_the_variable_and_what_would_be_right(bare: Command) -> None:
    line = bare("config", EXARQ_WORKER_CONCURRENCY="many").error

    assert "EXARQ_WORKER_CONCURRENCY" in line
    assert "a number from 1 to 1000" in line


def test_an_unknown_variable_names_the_nearest_one(bare: Command) -> None:
    line = bare("config", EXARQ_DATABASE_ULR="postgresql://u:hunter2@h/d").error

    assert "'EXARQ_DATABASE_ULR'" in line
    assert "did you mean 'EXARQ_DATABASE_URL'" in line
    assert "hunter2" not in line


@pytest.mark.parametrize("command", [("run",), ("jobs", "list")])
def test_without_a_database_address_the_error_says_which_to_set(bare: Command, command: tuple[str, ...]) -> None:
    assert "set EXARQ_DATABASE_URL" in bare(*command).error


async def test_without_a_redis_address_nothing_is_enqueued(exarq: Command, engine: AsyncEngine) -> None:
    line = exarq(*ENQUEUE, EXARQ_REDIS_URL="").error

    assert "set EXARQ_REDIS_URL" in line
    assert await stored(engine) == 0


@pytest.mark.parametrize("command", [("run",), ENQUEUE, ("db", "upgrade")])
def test_an_unreachable_postgresql_is_named_without_its_password(
    exarq: Command, closed_port: int, command: tuple[str, ...]
) -> None:
    line = exarq.cold(*command, EXARQ_DATABASE_URL=f"postgresql://u:hunter2@127.0.0.1:{closed_port}/d").error

    assert f"PostgreSQL does not answer at postgresql+asyncpg://u:***@127.0.0.1:{closed_port}/d" in line
    assert "hunter2" not in line


@pytest.mark.parametrize("command", [("run",), ("jobs", "list")])
def test_a_database_that_does_not_exist_is_named(exarq: Command, database_url: str, command: tuple[str, ...]) -> None:
    url = make_url(database_url).set(database="exarq_not_there").render_as_string(hide_password=False)

    line = exarq(*command, EXARQ_DATABASE_URL=url).error

    assert 'database "exarq_not_there" does not exist' in line
    assert "correct EXARQ_DATABASE_URL" in line


@pytest.mark.parametrize("command", [("run",), ENQUEUE, ("jobs", "list")])
async def test_tables_that_are_not_migrated_are_an_error_with_the_command_to_run(
    exarq: Command, engine: AsyncEngine, command: tuple[str, ...]
) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("DROP SCHEMA exarq CASCADE"))

    line = exarq(*command).error

    assert "run `exarq db upgrade`" in line


@pytest.mark.parametrize("command", [("run",), ENQUEUE])
def test_a_module_that_does_not_import_is_named_with_the_reason(exarq: Command, command: tuple[str, ...]) -> None:
    exarq.write("shop.py", "import nowhere_to_be_found")

    line = exarq(*command).error

    assert "cannot import 'shop'" in line
    assert "nowhere_to_be_found" in line
    assert "shop.py:1" in line
    assert line.startswith("exarq: jobs.modules (set by EXARQ_JOBS_MODULES): ")
    assert line.endswith("shop.py:1): import nowhere_to_be_found")


def test_a_module_that_is_nowhere_is_told_with_where_it_was_looked_for(exarq: Command) -> None:
    line = exarq("run", EXARQ_JOBS_MODULES="nowhere_to_be_found").error

    assert "No module named 'nowhere_to_be_found'; looked in" in line
    assert str(exarq.folder) in line


def test_two_jobs_of_one_name_are_both_named(exarq: Command) -> None:
    one = "from worker import job, JobContext\n@job(name='same')\nasync def f(ctx: JobContext) -> None: ...\n"
    exarq.write("other.py", one)
    exarq.write("shop.py", one)

    line = exarq("run", EXARQ_JOBS_MODULES="shop,other").error

    assert "two jobs are named 'same'" in line
    assert "shop.f" in line
    assert "other.f" in line


def test_a_worker_without_jobs_says_where_to_name_them(exarq: Command) -> None:
    assert "jobs.modules" in exarq("run", EXARQ_JOBS_MODULES="").error
    assert exarq("run", EXARQ_JOBS_MODULES="json").error.startswith("exarq: json registers no jobs; decorate")


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ('{"invoice_id": "seven"}', "invoice_id"),
        ('{"invoice_id": 7, "surplus": 1}', "surplus"),
        ("[7]", "are not a JSON object; give an object of names and values, such as"),
        ("who=anna", "are not JSON: expected value at line 1 column 1; give an object of names and values, such as"),
        ('{"invoice_id": NaN}', "not JSON"),
    ],
)
async def test_wrong_arguments_are_refused_before_anything_is_stored(
    exarq: Command, engine: AsyncEngine, args: str, said: str
) -> None:
    line = exarq("enqueue", "shop.charge", args).error

    assert said in line
    assert await stored(engine) == 0


@pytest.mark.parametrize("name", ["shop.charge", "unknown.here"])
async def test_arguments_over_one_mebibyte_are_refused(exarq: Command, engine: AsyncEngine, name: str) -> None:
    done = exarq("enqueue", name, "-", stdin=f'{{"invoice_id": 7, "memo": "{"x" * 2**20}"}}')

    assert done.code == 2
    assert "the limit is 1,048,576" in done.error
    assert len(done.err) < 1_000
    assert await stored(engine) == 0


async def test_an_impossible_delay_is_refused(exarq: Command, engine: AsyncEngine) -> None:
    assert "delay must be between 0 seconds and 36,500 days" in exarq(*ENQUEUE, "--delay", "nan").error
    assert await stored(engine) == 0


def test_the_help_names_every_state_that_can_be_asked_for(exarq: Command) -> None:
    shown = exarq("jobs", "list", "--help").out

    assert [state for state in SHOWN_STATES if state not in shown] == []


def test_an_unknown_state_names_the_known_ones(exarq: Command) -> None:
    line = exarq("jobs", "list", "--state", "runing").error

    assert "queued, scheduled, retrying, running, succeeded, failed, cancelled" in line
    assert "did you mean 'running'?" in line


def test_an_id_that_is_none_is_refused(exarq: Command) -> None:
    assert "'x' is not a job's id" in exarq("jobs", "show", "x").error


def test_embedded_settings_without_running_servers_say_how_to_start_them(bare: Command) -> None:
    bare.write("settings.toml", "[database]\nurl = 'embedded'\n[redis]\nurl = 'embedded'\n")

    assert "start them with `exarq run`" in bare("jobs", "list").error


def test_a_fault_that_nobody_foresaw_keeps_its_traceback_and_ends_with_1(exarq: Command) -> None:
    exarq.write("alembic.py", "raise RuntimeError('not the alembic you think')")

    done = exarq.cold("db", "upgrade")

    assert done.code == 1
    assert "Traceback" in done.err
    assert "not the alembic you think" in done.err


async def test_a_commit_whose_answer_is_lost_tells_how_to_ask_for_the_job(exarq: Command, engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(
            text(
                "CREATE FUNCTION cut() RETURNS trigger LANGUAGE plpgsql AS"
                " 'BEGIN PERFORM pg_terminate_backend(pg_backend_pid()); RETURN NULL; END'"
            )
        )
        await connection.execute(
            text(
                "CREATE CONSTRAINT TRIGGER cut AFTER INSERT ON exarq.job"
                " DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION cut()"
            )
        )

    line = exarq(*ENQUEUE).error

    assert "went away during the COMMIT" in line
    job_id = line.partition("`exarq jobs show ")[2].partition("`")[0]
    assert exarq("jobs", "show", job_id).code == 1
