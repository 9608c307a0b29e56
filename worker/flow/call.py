"""An enqueue to be: what it may say, and where each of its options is checked."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, NamedTuple, TypeAlias, TypedDict, get_args

from worker.core.errors import ArgumentsInvalid, nearest
from worker.core.names import DEFAULT_QUEUE, LONGEST_NAME, RESERVED_QUEUES, is_name
from worker.core.options import Rules
from worker.core.outcome import ErrorText
from worker.core.priority import DEFAULT_PRIORITY, as_priority
from worker.core.retry import LONGEST_DELAY, as_delay, is_near
from worker.core.signature import Signature

Scope: TypeAlias = Literal["until_started", "until_done"]
OnConflict: TypeAlias = Literal["skip", "replace", "raise"]

LONGEST_KEY: Final = 1_000
"""The most bytes of UTF-8 a key may take: an index holds it, beside the job's name."""


class EnqueueOptions(TypedDict, total=False):
    """How one enqueue differs from its definition; what is left out, or None, is as the definition says.

    `queue`: another queue than the definition's.
    `delay`: seconds, or a timedelta, from the enqueue until the job is due.
    `run_at`: the moment it is due, with a time zone; instead of `delay`.
    `priority`: from 0, which comes first, to 9; see `worker.core.priority.STEP`.
    `expires`: no attempt starts later than this: seconds, or a timedelta, after the job is first due, or a moment with
    a time zone. What has not started by then ends as cancelled.
    `key`: while a job of this name has the key, there is no second one.
    `unique`: for how long it has it: `"until_done"` (the default), `"until_started"`, or a timedelta from the enqueue,
    and then until it is done; a job that is cancelled while it waits, or expires, gives it back at once.
    `on_conflict`: `"skip"` (the default) returns the job that has the key, which may start before your commit and so
    without what you wrote; `"raise"` raises `AlreadyEnqueued`; `"replace"` gives a job that has not started the new
    arguments, due time, priority and deadline, and has it start only after your commit. What has started, even if it
    waits for another attempt, cannot be replaced, so a replacing enqueue is unique until started.
    `longest_delay`: seconds, or a timedelta, from the first enqueue with this key until the job is due, however often
    it is replaced; without it, a key that is busy enough keeps its job waiting for ever.
    """

    queue: str | None
    delay: float | timedelta
    run_at: datetime | None
    priority: int | None
    expires: float | timedelta | datetime | None
    key: str | None
    unique: Scope | timedelta | None
    on_conflict: OnConflict
    longest_delay: float | timedelta


@dataclass(frozen=True, slots=True)
class Unique:
    """The key of one enqueue, for how long its job has it, and what to do where another has it already.

    `longest_delay` bounds the due time of a job that is replaced, from its first enqueue.
    """

    key: str
    scope: Scope
    lasts: timedelta | None
    on_conflict: OnConflict
    longest_delay: timedelta | None = None


class Call(NamedTuple):
    """One enqueue to be: a job's name, its checked arguments as JSON, and when and where it shall run."""

    name: str
    args: str
    queue: str = DEFAULT_QUEUE
    delay: timedelta = timedelta(0)
    run_at: datetime | None = None
    priority: int = DEFAULT_PRIORITY
    expires: timedelta | datetime | None = None
    unique: Unique | None = None
    signature: Signature | None = None

    def of(self, signature: Signature, args: str) -> Call:
        """The same of these arguments, which fit the signature."""
        # _replace() takes as long again as all the rest of an enqueue to be.
        return Call(
            self.name, args, self.queue, self.delay, self.run_at, self.priority, self.expires, self.unique, signature
        )

    @property
    def plain(self) -> bool:
        """Whether it says no more than what, when and where."""
        return self.unique is None and self.expires is None and self.priority == DEFAULT_PRIORITY


def template(name: str, rules: Rules, options: EnqueueOptions) -> Call:
    """An enqueue to be that has no arguments yet; raises `ArgumentsInvalid` for what cannot be."""
    known = EnqueueOptions.__annotations__
    if unknown := next((option for option in options if option not in known), None):
        raise ArgumentsInvalid(f"{name}: an enqueue has no option {unknown!r}{nearest(unknown, sorted(known))}")
    queue, priority = options.get("queue"), options.get("priority")
    try:
        delay, run_at = _due(options.get("delay", 0), options.get("run_at"))
        return Call(
            _named("name", name),
            "{}",
            rules.queue if queue is None else _queue(queue),
            delay,
            run_at,
            rules.priority if priority is None else as_priority(priority),
            _expires(options.get("expires"), delay, run_at) or rules.expires,
            _unique(options),
        )
    except (TypeError, ValueError) as error:
        raise ArgumentsInvalid(f"{name if is_name(name) else ascii(name[:LONGEST_NAME])}: {error}") from None


def _named(what: str, word: str) -> str:
    if not is_name(word):
        raise ValueError(f"a {what} is 1 to {LONGEST_NAME} printable characters")
    return word


def _queue(queue: str) -> str:
    if queue.startswith(RESERVED_QUEUES):
        raise ValueError("no queue's name begins with arq: or exarq:; ARQ's own is called 'default'")
    return _named("queue", queue)


def _due(delay: float | timedelta, run_at: datetime | None) -> tuple[timedelta, datetime | None]:
    try:
        wait = as_delay(delay)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{error}; leave it out to run the job at once") from None
    if run_at is not None and wait:
        raise ValueError("give either delay or run_at, not both")
    return wait, None if run_at is None else _moment("run_at", run_at)


def _moment(what: str, moment: datetime) -> datetime:
    if moment.utcoffset() is None:
        raise ValueError(f"{what} needs a time zone, for example datetime.now(UTC) + timedelta(hours=1)")
    if not is_near(moment, datetime.now(UTC)):
        raise ValueError(f"{what} must lie within {LONGEST_DELAY.days:,} days of now, not at {moment}")
    return moment.astimezone(UTC)  # two that only `fold` tells apart would be equal


def _expires(
    expires: float | timedelta | datetime | None, delay: timedelta, run_at: datetime | None
) -> timedelta | datetime | None:
    if expires is None:
        return None
    if not isinstance(expires, datetime):
        wait = as_delay(expires, "expires")
        if not wait:
            raise ValueError("expires must be more than 0 seconds after the job is due; leave it out for no deadline")
        return wait
    due = datetime.now(UTC) + delay if run_at is None else run_at
    if _moment("expires", expires) <= due:
        raise ValueError(f"expires must lie after the moment the job is due, {due}, not at {expires}")
    return expires


def _unique(options: EnqueueOptions) -> Unique | None:
    key, unique, on_conflict = options.get("key"), options.get("unique"), options.get("on_conflict")
    longest = options.get("longest_delay")
    if longest is not None and on_conflict != "replace":
        raise ValueError("longest_delay bounds what on_conflict='replace' puts off; give both, or only delay")
    if key is None:
        if unique is not None or on_conflict is not None:
            raise ValueError("unique and on_conflict need a key, for example key='invoice-7'")
        return None
    if on_conflict is not None and on_conflict not in get_args(OnConflict):
        raise ValueError(f"on_conflict must be 'skip', 'replace' or 'raise', not {_shown(on_conflict)}")
    if unique is None:
        unique = "until_started" if on_conflict == "replace" else "until_done"
    lasts = unique if isinstance(unique, timedelta) else None
    if lasts is not None and not timedelta(0) < lasts <= LONGEST_DELAY:
        raise ValueError(f"unique must be more than 0 seconds and at most {LONGEST_DELAY.days:,} days, not {lasts}")
    if lasts is None and unique not in get_args(Scope):
        raise ValueError(f"unique must be 'until_started', 'until_done' or a timedelta, not {_shown(unique)}")
    if on_conflict == "replace" and unique != "until_started":
        raise ValueError(
            "on_conflict='replace' needs unique='until_started': what has started cannot be replaced, and new arguments"
            " would be lost while it runs"
        )
    scope: Scope = "until_started" if unique == "until_started" else "until_done"
    longest_delay = None if longest is None else as_delay(longest, "longest_delay")
    return Unique(_key(key), scope, lasts, on_conflict or "skip", longest_delay)


def _key(key: Any) -> str:
    if not isinstance(key, str):
        raise TypeError(f"key must be text, not {type(key).__name__}")
    size = len(key.encode("utf-8", "surrogatepass"))
    if not 0 < size <= LONGEST_KEY:
        raise ValueError(f"key must be 1 to {LONGEST_KEY:,} bytes of UTF-8, not {size:,}; hash what is longer")
    if "\0" in key or key != key.encode("utf-8", "replace").decode():
        raise ValueError(f"key has a NUL or a lone surrogate, which PostgreSQL cannot keep: {key[:50]!a}")
    return key


def _shown(value: object) -> str:
    return repr(ErrorText.of(ValueError(value)).message[:LONGEST_NAME])
