from __future__ import annotations

import json
import os
import pickle
import string
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.engine import make_url

from worker.core.errors import SettingsError
from worker.settings import (
    Settings,
    WorkerSettings,
    _known,
    load_settings,
)
from worker.settings.values import masked

REPOSITORY = Path(__file__).parents[1]
PASSWORD = "hunter2"


@pytest.fixture(autouse=True)
def _an_empty_folder_and_no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.upper().startswith("EXARQ_"):
            monkeypatch.delenv(name)


def write(text: str, name: str = "settings.toml") -> None:
    Path(name).write_text(text, encoding="utf-8")


def error(**overrides: dict[str, object]) -> str:
    with pytest.raises(SettingsError) as raised:
        load_settings(**overrides)
    message = str(raised.value)
    assert "\n" not in message
    assert PASSWORD not in message
    assert PASSWORD not in repr(raised.value)
    return message


def test_without_a_file_and_variables_everything_has_its_default() -> None:
    settings = load_settings()

    assert settings.database.url is None
    assert settings.worker.lease == timedelta(seconds=10)
    assert settings.keep.failed == timedelta(days=30)
    assert settings.origin("worker.lease") == "default"
    assert settings.settings_key() == Path.cwd()


def test_the_file_is_weaker_than_the_environment_and_that_than_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    write("[worker]\nconcurrency = 2\ngrace = 2\nsweep = 2")
    monkeypatch.setenv("EXARQ_WORKER_CONCURRENCY", "3")
    monkeypatch.setenv("EXARQ_WORKER_GRACE", "3")

    settings = load_settings(worker={"concurrency": 4})

    assert settings.worker == WorkerSettings(concurrency=4, grace=timedelta(seconds=3), sweep=timedelta(seconds=2))
    assert settings.origin("worker.concurrency") == "argument"
    assert settings.origin("worker.grace") == "EXARQ_WORKER_GRACE"
    assert settings.origin("worker.sweep") == "settings.toml"


def test_the_constructor_is_the_loader_and_takes_sections_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXARQ_WORKER_GRACE", "3")

    settings = Settings(worker=WorkerSettings(concurrency=4))

    assert (settings.worker.concurrency, settings.worker.grace) == (4, timedelta(seconds=3))
    with pytest.raises(SettingsError, match=r"worker\.concurrency must be"):
        Settings(worker={"concurrency": 0})


@pytest.mark.parametrize(("key", "variable"), _known().items())
def test_every_key_has_a_variable(monkeypatch: pytest.MonkeyPatch, key: str, variable: str) -> None:
    good = {"url": "embedded", "level": "DEBUG", "format": "json", "modules": "a", "queues": "a", "pooler": "pgbouncer"}
    good |= dict.fromkeys(("sessions", "on_startup", "on_shutdown", "arq_serializer", "arq_deserializer"), "a.b:c")
    good |= {"hide_parameters": "false", "arq_pickles": "any"}
    section, name = key.split(".")
    value = "7200" if section == "keep" else good.get(name, "4" if key != "worker.lease" else "9")
    monkeypatch.setenv(variable, value)

    settings = load_settings()

    assert settings.origin(key) == variable
    assert str(settings.shown()[section][name]).strip("[]'").lower() == value.lower()


def test_every_key_says_what_it_is() -> None:
    for section in Settings.model_fields.values():
        for name, field in type(section.default).model_fields.items():
            assert field.description, name


def test_settings_names_the_file_and_the_key_of_its_servers(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("folder").mkdir()
    write("[worker]\nconcurrency = 2", "folder/other.toml")
    write("[worker]\nconcurrency = 3")
    monkeypatch.setenv("EXARQ_SETTINGS", "folder/other.toml")

    settings = load_settings()

    assert settings.worker.concurrency == 2
    assert settings.settings_key() == Path("folder/other.toml").resolve()


def test_settings_naming_no_file_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXARQ_SETTINGS", "nowhere.toml")
    assert error().startswith("EXARQ_SETTINGS: no file 'nowhere.toml'")

    monkeypatch.setenv("EXARQ_SETTINGS", "")
    assert error().startswith("EXARQ_SETTINGS: no file ''")


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ("[worker]\nconcurrency 5", "settings.toml: not TOML: .*line 2, column 13"),
        ("[worker]\n\nconcurrency =", "settings.toml: not TOML: .*line 3"),
        ("[worker]\nqueues = [", "settings.toml: not TOML: .*line 2, "),
    ],
)
def test_broken_toml_is_an_error_with_file_and_line(text: str, where: str) -> None:
    write(text)

    with pytest.raises(SettingsError, match=where):
        load_settings()
    error()


def test_a_file_that_is_not_text_is_an_error() -> None:
    Path("settings.toml").write_bytes(b"\xff\xfe")

    assert error().startswith("settings.toml: not TOML: it must be UTF-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "[worker]\nconcurency = 5",
            "settings.toml: unknown key 'worker.concurency'; did you mean 'worker.concurrency'?",
        ),
        ("[wroker]\nconcurrency = 5", "settings.toml: unknown key 'wroker'; did you mean 'worker'?"),
        ("concurrency = 5", "settings.toml: unknown key 'concurrency'; did you mean 'worker.concurrency'?"),
        ('[log]\n"zzz\\nzzz" = 5', r"settings.toml: unknown key 'log.zzz\nzzz'"),
        ("worker = 5", "settings.toml: worker must be a table such as [worker] with its keys below"),
    ],
)
def test_an_unknown_key_in_the_file_names_the_nearest(text: str, message: str) -> None:
    write(text)

    assert error() == message


def test_an_unknown_argument_names_the_nearest() -> None:
    assert error(worker={"leese": 5}) == "argument: unknown key 'worker.leese'; did you mean 'worker.lease'?"
    assert error(wroker={"lease": 5}) == "argument: unknown key 'wroker'; did you mean 'worker'?"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EXARQ_WORKER_CONCURENCY", "EXARQ_WORKER_CONCURRENCY"),
        ("EXARQ_DATABASE", "EXARQ_DATABASE_URL"),
        ("EXARQ_DATABSE_URL", "EXARQ_DATABASE_URL"),
        ("exarq_redis_url", "EXARQ_REDIS_URL"),
        ("EXARQ_SETINGS", "EXARQ_SETTINGS"),
    ],
)
def test_an_unknown_variable_names_the_nearest(monkeypatch: pytest.MonkeyPatch, name: str, meant: str) -> None:
    monkeypatch.setenv(name, f"postgresql://u:{PASSWORD}@h/d")

    assert error() == f"unknown variable {name!r}: correct or unset it; did you mean {meant!r}?"


@given(st.text(string.ascii_letters + string.digits + "_ .é\n", min_size=0, max_size=40))
def test_any_other_variable_with_our_prefix_is_an_error(rest: str) -> None:
    name = f"EXARQ_{rest}"
    if name in {*_known().values(), "EXARQ_SETTINGS"} or name.startswith("EXARQ_TEST_"):
        return

    with mock.patch.dict(os.environ, {name: PASSWORD}):
        assert "unknown variable" in error()


def test_variables_of_the_tests_and_of_others_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXARQ_TEST_DATABASE_URL", "anything")
    monkeypatch.setenv("EXARQTHING", "anything")

    assert load_settings().database.url is None


@pytest.mark.parametrize(
    ("written", "meant"), [("a,b", ("a", "b")), (" a , b,", ("a", "b")), ('["a", "b"]', ("a", "b")), ("a", ("a",))]
)
def test_lists_in_the_environment_are_comma_separated_or_json(
    monkeypatch: pytest.MonkeyPatch, written: str, meant: tuple[str, ...]
) -> None:
    monkeypatch.setenv("EXARQ_WORKER_QUEUES", written)
    monkeypatch.setenv("EXARQ_JOBS_MODULES", written)

    settings = load_settings()

    assert settings.worker.queues == settings.jobs.modules == meant


def test_an_empty_list_of_modules_overrides_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write('[jobs]\nmodules = ["a"]')
    monkeypatch.setenv("EXARQ_JOBS_MODULES", "")

    assert load_settings().jobs.modules == ()


@pytest.mark.parametrize(
    ("written", "seconds"), [("5", 5), ("0.25", 0.25), ('"PT1M30S"', 90), ('"P1D"', 86400), ('"7"', 7)]
)
def test_durations_are_seconds_or_iso_8601(monkeypatch: pytest.MonkeyPatch, written: str, seconds: float) -> None:
    write(f"[worker]\ngrace = {written}")
    monkeypatch.setenv("EXARQ_WORKER_SWEEP", written.strip('"'))

    settings = load_settings(worker={"stall_limit": timedelta(seconds=seconds)})

    worker = settings.worker
    assert worker.grace == worker.sweep == worker.stall_limit == timedelta(seconds=seconds)


@pytest.mark.parametrize("written", ["soon", "15:30", "", "nan", "inf", "1e300", "PT", "true"])
def test_anything_else_is_no_duration(monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    monkeypatch.setenv("EXARQ_WORKER_GRACE", written)

    assert error().startswith("EXARQ_WORKER_GRACE: worker.grace must be seconds, such as 90 or 0.5, or ISO 8601")


def test_toml_values_of_other_types_are_no_duration() -> None:
    for written in ("true", "00:05:00", "[5]", "1" + "0" * 40):
        write(f"[worker]\ngrace = {written}")
        assert error().startswith("settings.toml: worker.grace must be seconds")


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("EXARQ_WORKER_CONCURRENCY", "many", "worker.concurrency must be a valid integer"),
        ("EXARQ_WORKER_CONCURRENCY", "0", "worker.concurrency must be greater than or equal to 1"),
        ("EXARQ_WORKER_CONCURRENCY", "1001", "worker.concurrency must be less than or equal to 1000"),
        ("EXARQ_JOBS_MAX_ATTEMPTS", "0", "jobs.max_attempts must be greater than or equal to 1"),
        ("EXARQ_JOBS_TIMEOUT", "0", "jobs.timeout must be more than 0 seconds"),
        ("EXARQ_REDIS_TIMEOUT", "-PT5S", "redis.timeout must be seconds"),
        ("EXARQ_REDIS_TIMEOUT", "-5", "redis.timeout must be more than 0 seconds"),
        ("EXARQ_WORKER_GRACE", "0.0001", "worker.grace must be between 0.001 seconds and 36,500 days"),
        ("EXARQ_KEEP_FAILED", "P999999999D", "keep.failed must be between 0.001 seconds and 36,500 days"),
        ("EXARQ_DATABASE_STATEMENT_TIMEOUT", "P25D", "database.statement_timeout must be 24 days"),
        ("EXARQ_KEEP_SUCCEEDED", "3599", "keep.succeeded must be an hour (3600 seconds) or more"),
        ("EXARQ_WORKER_QUEUES", "", "worker.queues must name at least one"),
        ("EXARQ_WORKER_QUEUES", "a,b,a", "worker.queues must not name one twice"),
        ("EXARQ_WORKER_QUEUES", "[a", "worker.queues must be names such as a,b or JSON"),
        ("EXARQ_WORKER_QUEUES", "[" * 100_000, "worker.queues must be names such as a,b or JSON"),
        ("EXARQ_WORKER_QUEUES", '["a\\u0000b"]', "worker.queues must be names of 1 to 200 printable characters"),
        ("EXARQ_WORKER_QUEUES", "x" * 201, "worker.queues must be names of 1 to 200 printable characters"),
        ("EXARQ_WORKER_QUEUES", "arq:queue", "worker.queues must not begin with arq: or exarq:"),
        ("EXARQ_WORKER_QUEUES", "[1]", "each of worker.queues must be a valid string"),
        ("EXARQ_WORKER_QUEUES", '[""]', "each of worker.queues must have at least 1 character"),
        ("EXARQ_JOBS_ON_STARTUP", "app.main.startup", "jobs.on_startup must be a module and a name in it, such as"),
        ("EXARQ_DATABASE_SESSIONS", "app db:make", "database.sessions must be a module and a name in it, such as"),
        ("EXARQ_LOG_LEVEL", "loud", "log.level must be 'debug', 'info', 'warning' or 'error'"),
        ("EXARQ_WORKER_BEAT", "5", "worker.lease (10 s) must be more than twice worker.beat (5 s)"),
    ],
)
def test_a_wrong_value_names_its_variable_and_what_is_right(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)

    assert error().startswith(f"{variable}: {message}")


def test_a_wrong_value_names_its_file_or_argument() -> None:
    assert error(log={"level": "loud"}).startswith("argument: log.level must be")
    write("[worker]\nconcurrency = true")
    assert error().startswith("settings.toml: worker.concurrency must be a number")
    write("[log]\nlevel = 7")
    assert error().startswith("settings.toml: log.level must be")


def test_a_lease_that_is_too_short_names_all_its_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    write("[worker]\nlease = 8")
    monkeypatch.setenv("EXARQ_WORKER_BEAT", "4")

    assert error().startswith("settings.toml, EXARQ_WORKER_BEAT: worker.lease (8 s)")


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("embedded", "embedded"),
        ("postgresql://u:p@h:5/d", "postgresql+asyncpg://u:p@h:5/d"),
        ("postgres://u@h/d?ssl=require", "postgresql+asyncpg://u@h/d?ssl=require"),
        ("postgres://u@h/d?port=5&sslmode=require", "postgresql+asyncpg://u@h/d?port=5&ssl=require"),
        (
            "postgresql+asyncpg://u:p%40%2F@[::1]:5/d%20d?passfile=%26&port=1",
            "postgresql+asyncpg://u:p%40%2F@[::1]:5/d%20d?passfile=%26&port=1",
        ),
        ("postgresql:///d?host=/run/postgresql", "postgresql+asyncpg:///d?host=/run/postgresql"),
        ("postgresql:///d?host=/run&user=a+b&password=p%2B%40", "postgresql+asyncpg://a%20b:p%2B%40@/d?host=/run"),
        ("postgresql://u@h/d?user=v", "postgresql+asyncpg://v@h/d"),
        (" postgresql://h/d\n", "postgresql+asyncpg://h/d"),
    ],
)
def test_a_database_url_is_normalised_for_asyncpg(monkeypatch: pytest.MonkeyPatch, written: str, meant: str) -> None:
    monkeypatch.setenv("EXARQ_DATABASE_URL", written)

    assert load_settings().require_database_url() == meant


@pytest.mark.parametrize(
    "url",
    [
        "",
        "postgresql://",
        "postgresql:h/d?host=x",
        "mysql://u:hunter2@h/d",
        "postgresql+psycopg2://u:hunter2@h/d",
        "postgresq://u:hunter2@h/d",
        "postgresql:/u:hunter2@h/d",
        "u:hunter2@h/d",
        "hunter2",
        "postgresql://u:hunter2@h:port/d",
        "postgresql://u:hunter2@[::1/d",
        "postgresql://u:hunter2@x@h/d",
        "postgresql://u:1/hunter2@h/d",
        "postgresql://u:1?hunter2@h/d",
        "postgresql://u:1#hunter2@h/d",
        "postgresql://u:hun ter2@h/d",
        "postgresql://u:hunter2@h:/d",
        "postgresql://u:hunter2@h:0/d",
        "postgresql://u:hunter2@a..b/d",
        "postgresql://u:hunter2%00@h/d",
        "postgresql://u:hunter2%ff@h/d",
        "redis://:hunter2@h",
    ],
)
def test_any_other_database_url_says_which_form_is_right_and_no_password(
    monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv("EXARQ_DATABASE_URL", url)
    message = error()
    assert message.startswith("EXARQ_DATABASE_URL: database.url must be embedded or postgresql://user:password@host")

    monkeypatch.delenv("EXARQ_DATABASE_URL")
    write(f"[database]\nurl = {json.dumps(url)}")
    assert error() == message.replace("EXARQ_DATABASE_URL", "settings.toml")


@pytest.mark.parametrize(
    "url",
    [
        "embedded",
        "redis://h",
        "redis://:p%40@h:6379/0",
        "rediss://u:p@h/1?ssl_cert_reqs=none",
        "unix:///run/r.sock?db=1",
    ],
)
def test_redis_urls_are_kept_as_they_are(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("EXARQ_REDIS_URL", url)

    assert load_settings().require_redis_url() == url


@pytest.mark.parametrize(
    "url",
    ["", "redis://", "unix://", "http://:hunter2@h", "h:6379", "redis://:hun#ter2@h", "hunter2", "redis://h/hunter2"],
)
def test_any_other_redis_url_says_which_form_is_right(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    monkeypatch.setenv("EXARQ_REDIS_URL", url)

    assert error().startswith("EXARQ_REDIS_URL: redis.url must be embedded or redis://user:password@host:6379/0")


def test_there_is_no_default_address() -> None:
    settings = load_settings()

    with pytest.raises(SettingsError) as database:
        settings.require_database_url()
    with pytest.raises(SettingsError) as redis:
        settings.require_redis_url()

    way_out = "in settings.toml; `embedded` means private servers, such as `exarq dev` has"
    assert str(database.value) == f"no database address: set EXARQ_DATABASE_URL or database.url {way_out}"
    assert str(redis.value) == f"no Redis address: set EXARQ_REDIS_URL or redis.url {way_out}"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:hunter2@h:5/d?port=6", "postgresql+asyncpg://u:***@h:5/d?port=6"),
        ("postgresql://h/d?user=u&password=hunter2&port=6", "postgresql+asyncpg://u:***@h/d?port=6"),
        ("postgresql://u:x@h/d?password=hunter2", "postgresql+asyncpg://u:***@h/d"),
        ("postgresql://h/d?password=hunter2", "postgresql+asyncpg://:***@h/d"),
    ],
)
def test_what_is_shown_has_no_database_password(url: str, shown: str) -> None:
    settings = load_settings(database={"url": url})

    assert settings.shown()["database"]["url"] == shown
    assert PASSWORD not in f"{settings!r} {settings} {settings.database!r}"
    assert make_url(str(settings.database.url)).password == PASSWORD
    assert PASSWORD not in repr(make_url(str(settings.database.url))), "SQLAlchemy shows what stands among the options"


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://h/d?sslpassword=hunter2", "postgresql://h/d?sslpassword=***"),
        ("postgresql://h/d?PASS%57ORD=hunter2", "postgresql://h/d?PASS%57ORD=***"),
        ("postgresql://h/d?password=x&hunter2", "postgresql://h/d?password=***&***"),
    ],
)
def test_also_an_option_that_nobody_takes_is_masked(url: str, shown: str) -> None:
    assert masked(url) == shown


@pytest.mark.parametrize(
    ("section", "url"),
    [
        ("database", "postgresql://u:hunter2@h/d?channel_binding=require"),
        ("database", "postgresql://h/d?password=x&hunter2"),
        ("database", "postgresql://h/d?PASS%57ORD=hunter2"),
        ("database", "postgresql://u@h/d?connect_timeout=5"),
        ("redis", "redis://:hunter2@h?decode_responses=true"),
        ("redis", "redis://:hunter2@h?ssl_cert_reqs=none"),
        ("redis", "redis://h?password=x&hunter2=1"),
    ],
)
def test_an_option_that_the_library_does_not_take_is_refused_and_not_named(section: str, url: str) -> None:
    url_of: dict[str, dict[str, object]] = {section: {"url": url}}
    message = error(**url_of)

    assert f"{section}.url must have no options that" in message
    assert "it knows" in message
    assert "channel_binding" not in message


@pytest.mark.parametrize(
    ("section", "url", "option"),
    [
        ("database", "postgresql://h/d?port=hunter2", "port"),
        ("database", "postgresql://h/d?sslmode=hunter2", "sslmode"),
        ("database", "postgresql://h/d?host=", "host"),
        ("redis", "redis://h?db=hunter2", "db"),
        ("redis", "rediss://h?ssl_cert_reqs=hunter2", "ssl_cert_reqs"),
    ],
)
def test_an_option_whose_value_cannot_be_used_is_named_without_the_value(section: str, url: str, option: str) -> None:
    url_of: dict[str, dict[str, object]] = {section: {"url": url}}

    assert f"must have a value for its option {option} that" in error(**url_of)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("redis://:hunter2@h:6379/0", "redis://:***@h:6379/0"),
        ("rediss://u:hunter2@h", "rediss://u:***@h"),
        ("unix:///run/r.sock?password=hunter2&db=1", "unix:///run/r.sock?password=***&db=1"),
    ],
)
def test_what_is_shown_has_no_redis_password(url: str, shown: str) -> None:
    settings = load_settings(redis={"url": url})

    assert settings.shown()["redis"]["url"] == shown
    assert PASSWORD not in f"{settings!r} {settings.redis}"


def test_what_is_shown_is_json_with_durations_in_seconds() -> None:
    shown = load_settings(worker={"sweep": 0.5}).shown()

    assert json.loads(json.dumps(shown)) == shown
    assert shown["worker"]["sweep"] == 0.5
    assert shown["jobs"]["unknown_job_limit"] == 86400
    assert shown["worker"]["queues"] == ["default"]
    assert list(shown) == ["database", "redis", "jobs", "worker", "keep", "log"]


def test_the_origin_of_a_key_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(SettingsError, match=r"did you mean 'worker\.lease'"):
        load_settings().origin("worker.leese")


def test_settings_do_not_change_and_travel_to_other_processes() -> None:
    settings = load_settings(worker={"concurrency": 4})

    with pytest.raises(ValueError, match="frozen"):
        settings.worker.concurrency = 5  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        settings.worker = WorkerSettings()  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(settings)) == settings


def test_the_settings_of_this_repository_load(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)

    settings = load_settings()

    assert settings.require_database_url() == settings.require_redis_url() == "embedded"
    assert settings.jobs.modules == ("jobs.export", "jobs.inventory", "jobs.ledger")
    assert settings.settings_key() == (REPOSITORY / "settings.toml").resolve()


def test_importing_the_module_reads_nothing() -> None:
    write("this is not TOML")
    program = """
import os, sys
opened = []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" else None)
import worker.settings
assert not [name for name in opened if name.endswith(".toml")], opened
try:
    worker.settings.load_settings()
except worker.settings.SettingsError:
    print("read when asked")
"""
    environment = {**os.environ, "EXARQ_NONSENSE": "1", "PYTHONPATH": str(REPOSITORY)}

    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)

    assert (done.stdout, done.stderr) == ("read when asked\n", "")
