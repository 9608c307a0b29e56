"""Every knob, its default and its unit: settings.toml < `EXARQ_…` variables < arguments."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationError,
    model_validator,
)
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from worker.core.errors import SettingsError, nearest
from worker.place import DEFAULT_FILE, FILE_VARIABLE, settings_file, settings_key
from worker.settings.file import read
from worker.settings.values import (
    Count,
    Duration,
    KeptFor,
    Names,
    ObjectName,
    StatementTime,
    database_url,
    lowered,
    masked,
    queue_names,
    redis_url,
)

PREFIX = "EXARQ_"
TEST_PREFIX = "EXARQ_TEST_"

SECOND = timedelta(seconds=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)

_OR_EMBEDDED: Final = "; `embedded` means private servers, such as `exarq dev` has"


class Section(BaseModel):
    """What all sections share: they do not change, refuse unknown keys and keep values out of errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)


class DatabaseSettings(Section):
    """PostgreSQL, the truth."""

    url: Annotated[str, AfterValidator(database_url)] | None = Field(
        None, repr=False, description="address of PostgreSQL"
    )
    connect_timeout: Duration = Field(5 * SECOND, description="longest wait for a connection, seconds")
    statement_timeout: StatementTime = Field(
        10 * SECOND, description="longest run of one of Exarq's own statements, not of the jobs', seconds"
    )
    pooler: Literal["pgbouncer"] | None = Field(
        None, description="pgbouncer where the address leads to one in transaction mode"
    )
    hide_parameters: bool = Field(
        True, description="whether errors of a job's or a Client's statements leave out the values sent; true or false"
    )
    sessions: ObjectName | None = Field(
        None, description="module:function that makes the session factory of the jobs from the address"
    )


class RedisSettings(Section):
    """Redis, which only holds hints."""

    url: Annotated[str, AfterValidator(redis_url)] | None = Field(None, repr=False, description="address of Redis")
    timeout: Duration = Field(3 * SECOND, description="longest wait for a connection or an answer, seconds")


class JobsSettings(Section):
    """Where the jobs are, and what a definition has when it does not say otherwise."""

    modules: Names = Field((), description="Python modules whose jobs the workers run")
    timeout: Duration = Field(300 * SECOND, description="longest run of one attempt, seconds")
    max_attempts: Count = Field(10, ge=1, description="failures after which a job is failed, a number from 1")
    first_wait: Duration = Field(SECOND, description="wait after the first failure, doubled by each further, seconds")
    longest_wait: Duration = Field(HOUR, description="longest wait between two attempts, seconds")
    max_crashes: Count = Field(
        4,
        ge=1,
        description="dead workers after which a job is failed; below 3 its neighbours may be, too; a number from 1",
    )
    unknown_job_limit: Duration = Field(
        DAY, description="how long a job that no worker knows waits for one before it is failed, seconds"
    )
    arq_pickles: Annotated[Literal["plain", "any"], BeforeValidator(lowered)] = Field(
        "plain",
        description="what is read of the pickles of plain ARQ's clients: plain data, or any, which runs what it says",
    )
    arq_serializer: ObjectName | None = Field(
        None, description="module:function, as job_serializer of plain ARQ's clients; not set: JSON or pickle as theirs"
    )
    arq_deserializer: ObjectName | None = Field(
        None,
        description="module:function, as job_deserializer of plain ARQ's clients; not set: JSON or pickle as theirs",
    )
    on_startup: ObjectName | None = Field(
        None, description="module:function, async, called with the context before a worker's first claim"
    )
    on_shutdown: ObjectName | None = Field(
        None, description="module:function, async, called with the context when a worker has stopped"
    )


class WorkerSettings(Section):
    """One worker process: what it takes, how it shows that it lives, how it stops."""

    processes: Count = Field(
        1, ge=1, le=256, description="processes that `exarq run` starts below one parent, a number from 1 to 256"
    )
    concurrency: Count = Field(
        20, ge=1, le=1000, description="attempts running at once in each process, a number from 1 to 1000"
    )
    queues: Annotated[Names, AfterValidator(queue_names)] = Field(
        ("default",), description="names of the queues it takes from"
    )
    heartbeat_folder: str | None = Field(
        None, description="folder of the heartbeat files for `exarq check`; not set: below the temporary folder"
    )
    lease: Duration = Field(10 * SECOND, description="silence after which a worker is dead, seconds")
    beat: Duration = Field(2 * SECOND, description="time between two heartbeats, seconds")
    sweep: Duration = Field(3 * SECOND, description="time between two rounds of upkeep, seconds")
    grace: Duration = Field(25 * SECOND, description="time that a stop leaves the running attempts, seconds")
    stall_limit: Duration = Field(
        300 * SECOND, description="how long a blocked event loop still counts as alive, seconds"
    )

    @model_validator(mode="after")
    def _a_lease_outlives_a_lost_beat(self) -> WorkerSettings:
        if self.lease <= 2 * self.beat:
            lease, beat = self.lease.total_seconds(), self.beat.total_seconds()
            raise ValueError(f"worker.lease ({lease:g} s) must be more than twice worker.beat ({beat:g} s)")
        return self


class KeepSettings(Section):
    """How long finished jobs are kept, never under an hour."""

    succeeded: KeptFor = Field(7 * DAY, description="age at which succeeded jobs are pruned, seconds")
    cancelled: KeptFor = Field(7 * DAY, description="age at which cancelled jobs are pruned, seconds")
    failed: KeptFor = Field(30 * DAY, description="age at which failed jobs are pruned, seconds")


class LogSettings(Section):
    """What is logged, and how it looks."""

    level: Annotated[Literal["debug", "info", "warning", "error"], BeforeValidator(lowered)] = Field(
        "info", description="the least that is logged"
    )
    format: Annotated[Literal["auto", "text", "json"], BeforeValidator(lowered)] = Field(
        "auto", description="auto is text on a terminal, else json"
    )


class Settings(BaseSettings):
    """All settings; whatever is wrong with them is a `SettingsError` that never shows a value."""

    model_config = SettingsConfigDict(
        frozen=True,
        extra="forbid",
        hide_input_in_errors=True,
        env_prefix=PREFIX,
        env_nested_delimiter="_",
        env_nested_max_split=1,  # EXARQ_WORKER_STALL_LIMIT is worker.stall_limit
    )

    database: DatabaseSettings = DatabaseSettings()
    redis: RedisSettings = RedisSettings()
    jobs: JobsSettings = JobsSettings()
    worker: WorkerSettings = WorkerSettings()
    keep: KeepSettings = KeepSettings()
    log: LogSettings = LogSettings()

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)
    _key: Path = PrivateAttr(default_factory=Path)

    def __init__(self, **overrides: Any) -> None:
        file = settings_file()
        layers = [*_file_layer(file), *_environment_layer(), *_flat("argument", overrides)]  # weakest first
        origins = {key: origin for key, _, origin in layers}
        values: dict[str, Any] = {}
        for key, value, _ in layers:
            section, _, name = key.partition(".")
            values.setdefault(section, {})[name] = value
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise SettingsError(_one_line(error, origins)) from None
        self._origins = origins
        self._key = settings_key(file)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only the values that `__init__` merged, for it remembers where each one came from."""
        return (init_settings,)

    def require_database_url(self) -> str:
        """The address of PostgreSQL, or the advice to set one: the package has no default."""
        if self.database.url is None:
            raise SettingsError(
                f"no database address: set EXARQ_DATABASE_URL or database.url in {DEFAULT_FILE}{_OR_EMBEDDED}"
            )
        return self.database.url

    def require_redis_url(self) -> str:
        """The address of Redis, or the advice to set one: the package has no default."""
        if self.redis.url is None:
            raise SettingsError(f"no Redis address: set EXARQ_REDIS_URL or redis.url in {DEFAULT_FILE}{_OR_EMBEDDED}")
        return self.redis.url

    def origin(self, key: str) -> str:
        """Where `section.name` was set: the file, the variable, "argument" or "default"."""
        if key not in _known():
            raise SettingsError(f"unknown key {key!r}{nearest(key, _known())}")
        return self._origins.get(key, "default")

    def settings_key(self) -> Path:
        """What commands that belong together share: the settings file, or the folder when there is none."""
        return self._key

    def shown(self) -> dict[str, dict[str, object]]:
        """All values for people and JSON: durations in seconds, passwords masked."""
        return {name: {key: _plain(key, value) for key, value in section} for name, section in self}


def load_settings(**overrides: Mapping[str, object]) -> Settings:
    """The settings of this process; overrides are the strongest: `load_settings(worker={"concurrency": 5})`."""
    return Settings(**overrides)


Layer = Iterator[tuple[str, object, str]]  # key, value, where it was set


def _known() -> dict[str, str]:
    """Every key, `worker.stall_limit`, and its variable, `EXARQ_WORKER_STALL_LIMIT`."""
    sections = {name: type(field.default) for name, field in Settings.model_fields.items()}
    keys = [f"{name}.{key}" for name, section in sections.items() for key in section.model_fields]
    return {key: PREFIX + key.replace(".", "_").upper() for key in keys}


def _file_layer(file: Path | None) -> Layer:
    if file is not None:
        yield from _flat(str(file), read(file, Settings))


def _environment_layer() -> Layer:
    known = _known()
    variables = {*known.values(), FILE_VARIABLE}
    for name in sorted(os.environ):
        ours = name.upper().startswith(PREFIX) and not name.startswith(TEST_PREFIX)
        if ours and name not in variables:
            raise SettingsError(f"unknown variable {name!r}: correct or unset it{nearest(name.upper(), variables)}")
    for key, value, _ in _flat("environment", EnvSettingsSource(Settings)()):
        yield key, value, known[key]


def _flat(origin: str, data: Mapping[str, Any]) -> Layer:
    """The values of one layer as `section.name`; the first key that does not exist is an error."""
    known = _known()
    for section, values in data.items():
        if section not in Settings.model_fields:
            raise SettingsError(
                f"{origin}: unknown key {section!r}{nearest(section, [*Settings.model_fields, *known])}"
            )
        if isinstance(values, Section):
            values = values.model_dump(exclude_unset=True)
        if not isinstance(values, Mapping):
            raise SettingsError(f"{origin}: {section} must be a table such as [{section}] with its keys below")
        for name, value in values.items():
            key = f"{section}.{name}"
            if key not in known:
                raise SettingsError(f"{origin}: unknown key {key!r}{nearest(key, known)}")
            yield key, value, origin


def _one_line(error: ValidationError, origins: Mapping[str, str]) -> str:
    """The first thing that is wrong, where it was set and what would be right; never the value."""
    first = error.errors(include_url=False, include_input=False)[0]
    ours = first["type"] == "value_error"
    reason = str(first["ctx"]["error"]) if ours else re.sub(r"^\w+ should", "must", first["msg"])
    section, *names = (str(part) for part in first["loc"])
    if not names:  # about several keys, which the reason names
        causes = [origin for key, origin in origins.items() if key in reason]
        return f"{', '.join(dict.fromkeys(causes))}: {reason}"
    key = f"{section}.{names[0]}"
    field = type(Settings.model_fields[section].default).model_fields[names[0]]
    each = "each of " if len(names) > 1 else ""
    return f"{origins[key]}: {each}{key} {reason} ({field.description})"


def _plain(key: str, value: object) -> object:
    match value:
        case timedelta():
            seconds = value.total_seconds()
            return int(seconds) if seconds.is_integer() else seconds
        case tuple():
            return list(value)
        case str() if key == "url":
            return masked(value)
        case _:
            return value
