"""Whatever stands in the file, the environment or the arguments: settings, or one line of our own that shows no secret."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import asyncpg
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from worker.broker.connection import connect
from worker.core.errors import SettingsError
from worker.settings import Settings, WorkerSettings, _known, load_settings

SECRET = "hunter2"
KEYS = list(_known())
VARIABLES = list(_known().values())

repeatable = settings(derandomize=True, max_examples=300)


@pytest.fixture(autouse=True)
def _an_empty_folder_and_no_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    for name in os.environ:
        if name.upper().startswith("EXARQ_"):
            monkeypatch.delenv(name)


def loaded(**overrides: Any) -> Settings | None:
    """The settings, or None after one line that anybody may read."""
    try:
        found = load_settings(**overrides)
    except SettingsError as error:
        is_one_line(error)
        return None
    assert SECRET not in f"{found!r} {found} {json.dumps(found.shown())}"
    return found


def is_one_line(error: SettingsError) -> None:
    assert str(error)
    assert len(str(error).splitlines()) == 1
    assert SECRET not in f"{error} {error!r}"
    assert error.__cause__ is None, "a traceback would show what was wrong, with the value"
    assert error.__suppress_context__ or error.__context__ is None


# ── values of any kind ──────────────────────────────────────────────────────────────────────────────────────────────


class Hostile:
    """Raises whatever it is asked."""

    def __str__(self) -> str:
        raise RuntimeError(SECRET)

    __repr__ = __str__

    def __iter__(self) -> Any:
        raise ZeroDivisionError(SECRET)


any_text = st.text(st.characters(codec=None, exclude_categories=[]), max_size=20)
durations = st.sampled_from(
    [
        "P1D",
        "PT1S",
        "P999999999D",
        "-PT1S",
        "15:30",
        "nan",
        "inf",
        "1e9999",
        "1e-9",
        "1_000",
        " 7 ",
        "٣",
        "0x10",
        "9" * 5_000,
    ]
)
lists = st.sampled_from(
    ["a,b", "a,,b", "[]", '["a"]', "[1]", "[" * 50_000, '["a', '[["a"]]', "arq:queue", "a\0b", "x" * 300]
)
texts = any_text | durations | lists | st.integers().map(str) | st.floats().map(str)
values: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.integers(1, 9).map(lambda digit: digit * 10**5_000) | st.floats()
    | texts | st.binary(max_size=5) | st.timedeltas() | st.just(timedelta.max) | st.just(date.max) | st.builds(Hostile)
    | st.just(WorkerSettings()),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(any_text, inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
sections = st.dictionaries(st.sampled_from([key.partition(".")[2] for key in KEYS]) | any_text, values, max_size=4)


@repeatable
@given(
    overrides=st.dictionaries(st.sampled_from(list(Settings.model_fields)) | any_text, sections | values, max_size=3)
)
@example(overrides={"worker": {"lease": timedelta.max, "beat": timedelta.max}})
@example(overrides={"worker": {"lease": "P999999999D"}})
def test_any_arguments_are_settings_or_one_line(overrides: dict[str, Any]) -> None:
    loaded(**overrides)


environment = st.dictionaries(
    st.sampled_from(VARIABLES),
    texts.map(lambda text: os.fsdecode(text.replace("\0", "").encode("utf-8", "replace"))) | st.binary(max_size=9).map(
        lambda raw: os.fsdecode(raw.replace(b"\0", b""))
    ),
    max_size=4,
)  # fmt: skip


@repeatable
@given(variables=environment)
@example(variables={"EXARQ_WORKER_QUEUES": "[" * 100_000})
@example(variables={"EXARQ_SETTINGS": "/" + "a" * 5_000})
@example(variables={"EXARQ_SETTINGS": "/proc/self/mem"})
def test_any_environment_is_settings_or_one_line(variables: Mapping[str, str]) -> None:
    with mock.patch.dict(os.environ, variables):
        loaded()


def _written(value: Any) -> str:
    """A value as TOML, or as something like it."""
    match value:
        case bool() | int() | float():
            with suppress(ValueError):  # too many digits for Python, not for a file
                return str(value).lower()
            return "9" * 5_001
        case list():
            return f"[{', '.join(map(_written, value))}]"
        case dict():
            return "{" + ", ".join(f"{json.dumps(key)} = {_written(inner)}" for key, inner in value.items()) + "}"
        case str():
            return json.dumps(value)
        case _:
            return "2026-10-01T00:00:00Z"


tables = st.dictionaries(st.sampled_from(KEYS) | any_text.map(json.dumps), values.map(_written), max_size=5).map(
    lambda found: "\n".join(f"{key} = {value}" for key, value in found.items())
)
files = st.binary(max_size=60) | tables.map(lambda text: text.encode("utf-8", "surrogatepass"))


@repeatable
@given(content=files)
@example(content=b"a=" + b"[" * 5_000)
@example(content=b"a=" + b"{a=" * 3_000 + b"1" + b"}" * 3_000)
@example(content=b"\xef\xbb\xbf[worker]\ngrace = 1")
def test_any_file_is_settings_or_one_line(content: bytes) -> None:
    Path("settings.toml").write_bytes(content)

    loaded()


def test_a_folder_that_was_deleted_is_named_as_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()

    with pytest.raises(SettingsError, match="the current folder"):
        load_settings()


# ── addresses ───────────────────────────────────────────────────────────────────────────────────────────────────────

around = st.text(st.sampled_from("@:/?#&=%[]\\ ;+é\t\0a1") | st.characters(), max_size=4)
secrets = st.builds(lambda left, right: f"{left}{SECRET}{right}", around, around)
encoded = secrets.map(lambda text: "".join(f"%{byte:02X}" for byte in text.encode("utf-8", "replace")).replace(
    "".join(f"%{byte:02X}" for byte in SECRET.encode()), SECRET))  # fmt: skip
passwords = st.one_of(encoded, encoded, encoded, secrets)


def mostly(good: list[str], odd: list[str]) -> st.SearchStrategy[str]:
    """Seldom something odd, so that whole addresses pass."""
    return st.one_of(*[st.sampled_from(good)] * 9, st.sampled_from(odd))


hosts = mostly(
    ["h", "127.0.0.1", "[::1]", "db.example.com", "é"], ["", "a..b", "a" * 300, "h1,h2", "xn--zz", "[", "h%00"]
)
ports = mostly(["", ":5432"], [":0", ":", ":99999", ":x", ":٣", ":-1"])
paths = mostly(["", "/", "/0", "/15"], ["/1/2", "/d%20d", "/%00", "//d", "/-5", "/d;x", "/é"])
options = st.one_of(
    mostly(
        ["port=6", "user=x", "ssl=require", "passfile=/p", "prepared_statement_cache_size=0", "host=h"],
        ["host=", "port=x"],
    ),
    mostly(
        ["db=3", "username=x", "client_name=x"],
        ["db=x", "decode_responses=1", "socket_timeout=5", "protocol=3", "retry=1"],
    ),
    mostly(
        ["sslmode=disable", "target_session_attrs=any"],
        ["sslmode=x", "dsn=x", "loop=1", "connect_timeout=5", "foo", ""],
    ),
    passwords.map(lambda secret: f"password={secret}"),
)
queries = st.one_of(
    st.just(""), options.map("?{}".format), st.lists(options, max_size=3).map(lambda found: "?" + "&".join(found))
)
logins = st.one_of(passwords.map("u:{}@".format), passwords.map(":{}@".format), st.sampled_from(["u@", ""]))
schemes = mostly(["postgresql", "postgres", "redis", "rediss"], ["postgresql+asyncpg", "unix", "mysql", ""])
addresses = st.builds("{}://{}{}{}{}{}".format, schemes, logins, hosts, ports, paths, queries)


@settings(repeatable, max_examples=600)
@given(url=addresses)
@example(url=f"postgresql://u:{SECRET}@h:/d")
@example(url=f"postgresql://u:{SECRET}@a..b/d")
@example(url=f"postgresql://u:{SECRET}@h/d?channel_binding=require")
@example(url=f"postgresql://u:{SECRET}@h/d?port=x")
@example(url=f"redis://u:{SECRET}@h?db=x")
@example(url=f"redis://u:{SECRET}@h?decode_responses=true")
def test_any_address_is_one_that_the_libraries_take_or_one_line(url: str) -> None:
    for section, takes in (("database", asyncpg_takes), ("redis", redis_takes)):
        found = loaded(**{section: {"url": url}})
        if found is not None:
            takes(str(found.shown()[section]["url"]), str(getattr(found, section).url))


def asyncpg_takes(_shown: str, url: str) -> None:
    """What asyncpg's connect() would do before it goes to the network."""
    engine = create_async_engine(url)
    _, parameters = engine.dialect.create_connect_args(make_url(url))
    ours = {"prepared_statement_cache_size", "prepared_statement_name_func"}  # of SQLAlchemy's dialect
    inspect.signature(asyncpg.connect).bind(**{name: parameters[name] for name in parameters.keys() - ours})
    for host in [parameters.get("host", "")]:
        for name in host if isinstance(host, list) else [host]:
            str(name).encode("idna")


def redis_takes(_shown: str, url: str) -> None:
    """What redis-py would do before it goes to the network."""
    pool: Any = connect(url, timeout=timedelta(seconds=1)).connection_pool
    made = pool.make_connection()
    assert not made.encoder.decode_responses
    assert made.socket_timeout == 1
