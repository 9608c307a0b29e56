"""How a value is written: durations, lists of names, addresses and what is secret in them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Annotated, Final
from urllib.parse import SplitResult, quote, unquote, unquote_plus, urlsplit

from pydantic import AfterValidator, BeforeValidator, StringConstraints, ValidatorFunctionWrapHandler, WrapValidator
from pydantic_settings import NoDecode

from worker.core.names import LONGEST_NAME, RESERVED_QUEUES, is_name

EMBEDDED = "embedded"
HOUR = timedelta(hours=1)
SHORTEST = timedelta(milliseconds=1)
LONGEST = timedelta(days=36_500)
LONGEST_STATEMENT = timedelta(days=24)  # PostgreSQL counts it in milliseconds, of 31 bits


def _duration(value: object, parse: ValidatorFunctionWrapHandler) -> timedelta:
    """Seconds or ISO 8601, more than nothing; pydantic's other spellings ("15:30") are too easy to misread."""
    try:
        if isinstance(value, str) and not value.startswith("P"):
            value = float(value)
        length: timedelta = parse("" if isinstance(value, bool) else value)
    except ValueError:
        raise ValueError('must be seconds, such as 90 or 0.5, or ISO 8601, such as "PT1M30S"') from None
    if length <= timedelta(0):
        raise ValueError("must be more than 0 seconds")
    if not SHORTEST <= length <= LONGEST:
        raise ValueError("must be between 0.001 seconds and 36,500 days")
    return length


def _an_hour_or_more(value: timedelta) -> timedelta:
    if value < HOUR:
        raise ValueError("must be an hour (3600 seconds) or more: an attempt may still ask how its job ended")
    return value


def _what_postgresql_counts(value: timedelta) -> timedelta:
    if value > LONGEST_STATEMENT:
        raise ValueError("must be 24 days (2073600 seconds) or less")
    return value


def _no_bool(value: object) -> object:
    """Python counts true as 1; a setting does not."""
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _names(value: object) -> object:
    """Names from a variable: `a,b` or JSON."""
    if not isinstance(value, str):
        return value
    if not value.lstrip().startswith("["):
        return [name.strip() for name in value.split(",") if name.strip()]
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError('must be names such as a,b or JSON such as ["a", "b"]') from None


def queue_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """Refuse an empty list, repeated names, and those that no queue can have."""
    if not all(map(is_name, names)):
        raise ValueError(f"must be names of 1 to {LONGEST_NAME} printable characters")
    if any(name.startswith(RESERVED_QUEUES) for name in names):
        raise ValueError("must not begin with arq: or exarq:; ARQ's own queue is called 'default'")
    if not names:
        raise ValueError("must name at least one")
    if len(set(names)) < len(names):
        raise ValueError("must not name one twice")
    return names


def object_name(value: str) -> str:
    """Where something of the user's own is found, as in "app.db:make_sessions"."""
    module, _, name = (value := value.strip()).partition(":")
    if not all(part.isidentifier() for part in [*module.split("."), *name.split(".")]):
        raise ValueError('must be a module and a name in it, such as "app.main:startup"')
    return value


def lowered(value: object) -> object:
    """INFO means info."""
    return value.lower() if isinstance(value, str) else value


# What may stand behind the ? of an address, and how its value looks. Whatever else there is would be an error of the
# library at the first connection, or would change what the worker reads.
_NUMBER: Final = r"[0-9]{1,9}"
_DATABASE_OPTIONS: Final = {
    **dict.fromkeys(("host", "user", "password", "passfile", "database", "krbsrvname", "gsslib"), r".+"),
    "port": rf"{_NUMBER}(,{_NUMBER})*",
    "prepared_statement_cache_size": _NUMBER,
    **dict.fromkeys(("ssl", "sslmode"), "disable|allow|prefer|require|verify-ca|verify-full"),
    "target_session_attrs": "any|primary|standby|read-write|read-only|prefer-standby",
}
_REDIS_OPTIONS: Final = {
    "db": _NUMBER,
    **dict.fromkeys(("username", "password", "client_name"), r".+"),
}
_TLS_OPTIONS: Final = {
    "ssl_cert_reqs": "none|optional|required",
    "ssl_check_hostname": "true|false|True|False|0|1",
    **dict.fromkeys(("ssl_ca_certs", "ssl_ca_path", "ssl_certfile", "ssl_keyfile"), r".+"),
}
_ALL_REDIS_OPTIONS: Final = _REDIS_OPTIONS | _TLS_OPTIONS


def _split(url: str) -> SplitResult | None:
    """The parts of an address that can be read in one way only, so that its password is where we mask it; or None."""
    try:
        parts = urlsplit(url)
        port = parts.port  # raises when it is no number
        readable = unquote(url, errors="strict")
        for host in (parts.hostname or "").split(","):
            host.encode("idna")
    except ValueError:
        return None
    stray = "://" not in url or "@" in parts.path + parts.query or parts.netloc.count("@") > 1 or "#" in url
    no_port = port == 0 or parts.netloc.endswith(":")
    hidden = "\0" in readable or any(char.isspace() or not char.isprintable() for char in url)
    return None if stray or no_port or hidden else parts


def _options(parts: SplitResult, known: Mapping[str, str], library: str) -> None:
    """Refuse an option that the library does not know; its name is not repeated, for it may be part of a password."""
    for option in parts.query.split("&") if parts.query else ():
        name, _, value = option.partition("=")
        if name not in known:
            raise ValueError(
                f"must have no options that {library} does not know; it knows {', '.join(known)}; inside a value write"
                " & as %26"
            )
        if not re.fullmatch(known[name], value):
            raise ValueError(f"must have a value for its option {name} that {library} can use")


# Messages about addresses never repeat a part of them: it could be the password.
_ENCODE = "; inside a name or password write @ / ? # % and spaces as %40 %2F %3F %23 %25 %20"


def database_url(value: str) -> str:
    """An address of PostgreSQL as SQLAlchemy wants it for asyncpg."""
    value = value.strip()
    if value == EMBEDDED:
        return value
    parts = _split(value)
    known = parts and parts.scheme in ("postgresql", "postgres", "postgresql+asyncpg")
    if parts and known and (parts.hostname or "host=" in parts.query):
        _options(parts, _DATABASE_OPTIONS, "asyncpg")
        return _for_sqlalchemy(parts)
    raise ValueError(
        f"must be {EMBEDDED} or postgresql://user:password@host:5432/database (asyncpg drives it){_ENCODE}"
    )


def _for_sqlalchemy(parts: SplitResult) -> str:
    """The address with its password where SQLAlchemy never shows it, and with asyncpg's word for libpq's sslmode."""
    before, _, host = parts.netloc.rpartition("@")
    user, _, password = before.partition(":")
    kept = []
    for option in parts.query.split("&") if parts.query else ():
        name, _, value = option.partition("=")
        if name == "user":
            user = quote(unquote_plus(value), safe="")
        elif name == "password":
            password = quote(unquote_plus(value), safe="")
        else:
            kept.append(re.sub("^sslmode=", "ssl=", option))
    login = f"{user}:{password}@" if password else f"{user}@" if user else ""
    return f"postgresql+asyncpg://{login}{host}{parts.path}{'?' if kept else ''}{'&'.join(kept)}"


def redis_url(value: str) -> str:
    """An address of Redis as redis-py wants it."""
    value = value.strip()
    if value == EMBEDDED:
        return value
    parts = _split(value)
    tcp = parts and parts.scheme in ("redis", "rediss") and parts.hostname and re.fullmatch("/?[0-9]*", parts.path)
    unix = parts and parts.scheme == "unix" and parts.path
    if parts and (tcp or unix):
        _options(parts, _ALL_REDIS_OPTIONS if parts.scheme == "rediss" else _REDIS_OPTIONS, "redis-py")
        return f"{parts.scheme}://{value.partition('://')[2]}"
    raise ValueError(
        f"must be {EMBEDDED} or redis://user:password@host:6379/0, rediss://… (TLS) or unix:///path/to/socket{_ENCODE}"
    )


def masked(url: str) -> str:
    """An address of these settings with *** for every password, before the host and in the query."""
    if url == EMBEDDED:
        return url
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    name, colon, _ = user.partition(":")
    query = "&".join(_masked_option(option) for option in parts.query.split("&"))
    return f"{parts.scheme}://{name}{':***' if colon else ''}{at}{host}{parts.path}{'?' if query else ''}{query}"


def _masked_option(option: str) -> str:
    key, equals, _ = option.partition("=")
    if option and not equals:  # what follows a raw & in a password
        return "***"
    secret = any(word in unquote(key).lower() for word in ("password", "passwd", "secret", "token"))
    return f"{key}=***" if secret else option


Duration = Annotated[timedelta, WrapValidator(_duration)]
StatementTime = Annotated[timedelta, WrapValidator(_duration), AfterValidator(_what_postgresql_counts)]
KeptFor = Annotated[timedelta, WrapValidator(_duration), AfterValidator(_an_hour_or_more)]
Count = Annotated[int, BeforeValidator(_no_bool)]
ObjectName = Annotated[str, AfterValidator(object_name)]
# NoDecode: else pydantic-settings takes JSON only, before a validator sees the text.
Names = Annotated[
    tuple[Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)], ...],
    NoDecode,
    BeforeValidator(_names),
]
