"""The Lua scripts, through their typed functions."""

from __future__ import annotations

import asyncio
import json
from datetime import timedelta
from typing import Any
from uuid import UUID, uuid4

from arq.connections import ArqRedis
from arq.jobs import deserialize_job_raw

from tests.support import heard, hints, payload_ids, until
from worker.broker import scripts
from worker.broker.hints import Hint, due_at, payload_of
from worker.broker.keys import PAYLOAD_PREFIX, queue_key, wake_key
from worker.core.priority import DEFAULT_PRIORITY
from worker.db.ids import uuid7
from worker.observe.events import QueueKeyTaken

LEASE = timedelta(seconds=10)
HERE = uuid4()


def a_hint(due_in: float = 0.0, queue: str = "default", job_id: UUID | None = None) -> Hint:
    return Hint(job_id or uuid7(), "tests.noop", queue, due_at(due_in), 1_700_000_000_123, HERE, DEFAULT_PRIORITY)


def raw(hint: Hint) -> bytes:
    return str(hint.job_id).encode()


async def now_ms(redis: ArqRedis) -> int:
    seconds, micros = await redis.time()
    return int(seconds) * 1000 + int(micros) // 1000


async def rescore(redis: ArqRedis, hint: Hint, score: float) -> None:
    await redis.zadd(queue_key(hint.queue), {raw(hint): score})


async def wakes(redis: ArqRedis, queue: str = "default") -> int:
    return int(await redis.llen(wake_key(queue)))  # type: ignore[misc]


# ── publish ─────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_publish_scores_a_hint_with_the_servers_own_time_and_the_delay(broker: ArqRedis) -> None:
    before = await now_ms(broker)
    hint = a_hint(due_in=5.0)

    put = await scripts.publish(broker, [hint], lease=LEASE)
    after = await now_ms(broker)

    assert put == 1
    rounded = 2  # the delay and the server's time, each to a whole millisecond
    assert before + 5000 - rounded <= (await hints(broker))[str(hint.job_id)] <= after + 5000 + rounded


async def test_overdue_hints_are_put_in_the_order_in_which_they_were_due(broker: ArqRedis) -> None:
    late, later, latest = a_hint(-1.0), a_hint(-60.0), a_hint(-3600.5)

    await scripts.publish(broker, [late, later, latest], lease=LEASE)

    assert list(await hints(broker)) == [str(hint.job_id) for hint in (latest, later, late)]


async def test_a_payload_is_arqs_own_layout_as_json_and_has_no_arguments(broker: ArqRedis) -> None:
    hint = a_hint(due_in=1.0)

    await scripts.publish(broker, [hint], lease=LEASE)

    payload = await broker.get(PAYLOAD_PREFIX + str(hint.job_id))
    assert payload is not None
    read: Any = deserialize_job_raw(payload, deserializer=json.loads)
    assert read == ("tests.noop", [], {}, None, 1_700_000_000_123)
    assert json.loads(payload)["x"] == str(HERE)


async def test_hints_that_go_together_keep_what_is_their_own(broker: ArqRedis) -> None:
    due, later = -5.0, 20.0
    told = {
        Hint(uuid7(), name, "default", due_at(due_in), enqueued_ms, HERE, DEFAULT_PRIORITY): due_in
        for name in ("tests.one", "tests.other")
        for due_in in (due, later)
        for enqueued_ms in (1, 2)
    }

    now = await now_ms(broker)
    put = await scripts.publish(broker, list(told), lease=LEASE)

    assert put == len(told)
    scores = await hints(broker)
    for hint, due_in in told.items():
        payload = json.loads(await broker.get(PAYLOAD_PREFIX + str(hint.job_id)) or "")
        assert (payload["f"], payload["et"]) == (hint.name, hint.enqueued_ms)
        assert (scores[str(hint.job_id)] > now) == (due_in == later)


async def test_thousands_that_are_alike_go_in_one_call(broker: ArqRedis) -> None:
    alike = a_hint()
    many = [alike._replace(job_id=uuid7()) for _ in range(3_000)]

    assert await scripts.publish(broker, many, lease=LEASE) == 3_000

    assert set(await hints(broker)) == {str(hint.job_id) for hint in many}


async def test_arqs_own_client_lists_what_was_published(broker: ArqRedis) -> None:
    hint = a_hint(due_in=1.0)

    await scripts.publish(broker, [hint], lease=LEASE)

    listed: Any
    (listed,) = await broker.queued_jobs()
    assert (listed.function, listed.job_id, listed.args, listed.kwargs) == ("tests.noop", str(hint.job_id), [], {})


async def test_a_payload_outlives_its_due_time_by_a_day(broker: ArqRedis) -> None:
    hint, overdue = a_hint(due_in=30.0), a_hint(due_in=-90_000.0)

    await scripts.publish(broker, [hint, overdue], lease=LEASE)

    day = 86_400_000
    assert day + 25_000 < await broker.pttl(PAYLOAD_PREFIX + str(hint.job_id)) <= day + 30_000
    assert day - 5_000 < await broker.pttl(PAYLOAD_PREFIX + str(overdue.job_id)) <= day


async def test_the_wake_list_never_holds_more_than_one_and_expires(broker: ArqRedis) -> None:
    for _ in range(3):
        await scripts.publish(broker, [a_hint(), a_hint()], lease=LEASE)

    assert await wakes(broker) == 1
    assert 50_000 < await broker.pttl(wake_key("default")) <= 60_000


async def test_hints_of_several_queues_go_in_one_pipeline_and_wake_a_worker_of_each(
    broker: ArqRedis, monkeypatch: Any
) -> None:
    made: list[Any] = []
    pipeline = broker.pipeline

    def counting(**options: Any) -> Any:
        made.append(pipeline(**options))
        return made[-1]

    monkeypatch.setattr(broker, "pipeline", counting)
    mail, other, more_mail = a_hint(queue="mail"), a_hint(), a_hint(queue="mail")

    put = await scripts.publish(broker, [mail, other, more_mail], lease=LEASE)

    assert (put, len(made)) == (3, 1)
    assert set(await hints(broker, "mail")) == {str(mail.job_id), str(more_mail.job_id)}
    assert set(await hints(broker)) == {str(other.job_id)}
    assert (await wakes(broker), await wakes(broker, "mail")) == (1, 1)


async def test_a_queue_whose_key_is_somebody_elses_costs_the_others_nothing(broker: ArqRedis) -> None:
    await broker.set("celery", "theirs")
    ours = a_hint()

    async with heard() as told:
        put = await scripts.publish(broker, [a_hint(queue="celery"), ours], lease=LEASE)

    assert put == 1
    assert set(await hints(broker)) == {str(ours.job_id)}
    assert [(type(one), one.queue) for one in told if isinstance(one, QueueKeyTaken)] == [(QueueKeyTaken, "celery")]
    assert await broker.get("celery") == b"theirs"


async def test_a_hint_published_again_is_there_once_with_its_new_time(broker: ArqRedis) -> None:
    first = a_hint(due_in=20.0)

    await scripts.publish(broker, [first], lease=LEASE)
    await scripts.publish(broker, [a_hint(due_in=-1.0, job_id=first.job_id)], lease=LEASE)

    assert list((await hints(broker)).values()) < [await now_ms(broker)]


async def test_only_astray_puts_what_is_missing(broker: ArqRedis) -> None:
    hint = a_hint()

    assert await scripts.publish(broker, [hint], lease=LEASE, only_astray=True) == 1

    assert await payload_ids(broker) == {str(hint.job_id)}
    assert await wakes(broker) == 1


async def test_only_astray_leaves_what_a_claim_could_have_moved_there_and_wakes_nobody(broker: ArqRedis) -> None:
    hint = a_hint(due_in=-5.0)
    await scripts.publish(broker, [hint], lease=LEASE)
    taken = await scripts.claim(broker, "default", limit=1, lease=LEASE)
    await broker.delete(wake_key("default"))

    put = await scripts.publish(broker, [hint], lease=LEASE, only_astray=True)

    assert put == 0
    assert await hints(broker) == {str(hint.job_id): taken.score}
    assert await wakes(broker) == 0


async def test_only_astray_puts_what_is_scored_later_than_a_claim_could_have_moved_it(broker: ArqRedis) -> None:
    overdue, waiting = a_hint(due_in=-5.0), a_hint(due_in=20.0)
    await rescore(broker, overdue, await now_ms(broker) + 15_000)
    await rescore(broker, waiting, await now_ms(broker) + 35_000)

    put = await scripts.publish(broker, [overdue, waiting], lease=LEASE, only_astray=True)

    scores = await hints(broker)
    assert put == 2
    assert (
        scores[str(overdue.job_id)]
        < await now_ms(broker)
        < scores[str(waiting.job_id)]
        <= await now_ms(broker) + 20_000
    )


async def test_only_astray_leaves_a_waiting_hint_within_a_lease_of_its_due_time(broker: ArqRedis) -> None:
    hint = a_hint(due_in=20.0)
    score = await now_ms(broker) + 29_000
    await rescore(broker, hint, score)

    assert await scripts.publish(broker, [hint], lease=LEASE, only_astray=True) == 0

    assert await hints(broker) == {str(hint.job_id): score}


# ── claim ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_claim_takes_only_what_is_due_and_hides_it_for_a_lease(broker: ArqRedis) -> None:
    due, later = a_hint(-1.0), a_hint(5.0)
    await scripts.publish(broker, [due, later], lease=LEASE)
    old = await hints(broker)

    before = await now_ms(broker)
    taken = await scripts.claim(broker, "default", limit=10, lease=LEASE)
    after = await now_ms(broker)

    assert taken.hints == {raw(due): old[str(due.job_id)]}
    assert before + 10_000 <= taken.score <= after + 10_000
    assert await hints(broker) == {str(due.job_id): taken.score, str(later.job_id): old[str(later.job_id)]}


async def test_a_claim_never_removes_a_hint_and_what_it_hid_comes_back_by_itself(broker: ArqRedis) -> None:
    hidden, back = a_hint(-1.0), a_hint(-1.0, queue="short")
    await scripts.publish(broker, [hidden, back], lease=LEASE)

    first = await scripts.claim(broker, "default", limit=10, lease=LEASE)
    at_once = await scripts.claim(broker, "default", limit=10, lease=LEASE)
    short = await scripts.claim(broker, "short", limit=10, lease=timedelta(milliseconds=50))
    again = await until(lambda: _claimed(broker, "short"), "the hint is due again")

    assert raw(hidden) in first.hints
    assert at_once.hints == {}
    assert raw(back) in short.hints
    assert again == {raw(back): short.score}


async def _claimed(redis: ArqRedis, queue: str) -> dict[bytes, float]:
    return (await scripts.claim(redis, queue, limit=10, lease=LEASE)).hints


async def test_a_claim_takes_the_longest_due_up_to_its_limit_and_wakes_another_worker_for_the_rest(
    broker: ArqRedis,
) -> None:
    a, b, c = a_hint(-1.0), a_hint(-3.0), a_hint(-2.0)
    await scripts.publish(broker, [a, b, c], lease=LEASE)
    await broker.delete(wake_key("default"))

    taken = await scripts.claim(broker, "default", limit=2, lease=LEASE)

    assert list(taken.hints) == [raw(b), raw(c)]
    assert taken.next_due == timedelta(0)
    assert await wakes(broker) == 1


async def test_a_claim_that_took_all_wakes_nobody(broker: ArqRedis) -> None:
    await scripts.publish(broker, [a_hint(-1.0), a_hint(-2.0)], lease=LEASE)
    await broker.delete(wake_key("default"))

    await scripts.claim(broker, "default", limit=2, lease=LEASE)

    assert await wakes(broker) == 0


async def test_a_claim_tells_when_the_next_hint_is_due(broker: ArqRedis) -> None:
    await scripts.publish(broker, [a_hint(50.0), a_hint(30.0)], lease=LEASE)

    taken = await scripts.claim(broker, "default", limit=2, lease=LEASE)
    of_an_empty_queue = await scripts.claim(broker, "empty", limit=2, lease=LEASE)

    assert taken.next_due is not None
    assert timedelta(seconds=20) < taken.next_due <= timedelta(seconds=30)
    assert of_an_empty_queue.next_due is None


# ── drop ────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_drop_removes_the_hint_and_its_payload(broker: ArqRedis) -> None:
    hint, other = a_hint(-1.0), a_hint(5.0)
    await scripts.publish(broker, [hint, other], lease=LEASE)
    taken = await scripts.claim(broker, "default", limit=1, lease=LEASE)

    dropped = await scripts.drop(broker, "default", [(raw(hint), taken.score)])

    assert dropped == 1
    assert set(await hints(broker)) == await payload_ids(broker) == {str(other.job_id)}


async def test_a_claim_and_a_drop_take_more_than_one_call_of_redis_does(broker: ArqRedis) -> None:
    many = [a_hint(-1.0) for _ in range(2_001)]
    await scripts.publish(broker, many, lease=LEASE)

    taken = await scripts.claim(broker, "default", limit=len(many), lease=LEASE)
    hidden = await hints(broker)
    dropped = await scripts.drop(broker, "default", [(one, taken.score) for one in taken.hints])

    assert set(hidden.values()) == {taken.score}
    assert len(hidden) == dropped == len(many)
    assert await hints(broker) == {}
    assert await payload_ids(broker) == set()


async def test_a_drop_of_hints_of_two_claims_takes_both(broker: ArqRedis) -> None:
    first, second = a_hint(-2.0), a_hint(-1.0)
    await scripts.publish(broker, [first, second], lease=LEASE)
    taken = [await scripts.claim(broker, "default", limit=1, lease=LEASE * turn) for turn in (1, 2)]

    dropped = await scripts.drop(
        broker, "default", [(raw(first), taken[0].score), (raw(second), taken[1].score), (raw(a_hint()), 7)]
    )

    assert dropped == 2
    assert await hints(broker) == {}


async def test_a_drop_spares_a_hint_that_was_published_anew(broker: ArqRedis) -> None:
    hint, gone = a_hint(-1.0), a_hint(-1.0)
    await scripts.publish(broker, [hint, gone], lease=LEASE)
    taken = await scripts.claim(broker, "default", limit=2, lease=LEASE)
    await scripts.publish(broker, [hint], lease=LEASE)

    dropped = await scripts.drop(broker, "default", [(raw(hint), taken.score), (raw(gone), taken.score)])

    assert dropped == 1
    assert set(await hints(broker)) == await payload_ids(broker) == {str(hint.job_id)}


async def test_a_drop_takes_the_payload_of_a_hint_that_was_evicted(broker: ArqRedis) -> None:
    hint = a_hint()
    await scripts.publish(broker, [hint], lease=LEASE)
    taken = await scripts.claim(broker, "default", limit=1, lease=LEASE)
    await broker.zrem(queue_key("default"), raw(hint))

    await scripts.drop(broker, "default", [(raw(hint), taken.score)])

    assert await payload_ids(broker) == set()


async def test_a_drop_of_what_is_gone_does_nothing(broker: ArqRedis) -> None:
    assert await scripts.drop(broker, "default", [(raw(a_hint()), 1)]) == 0


# ── put back ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_put_back_undoes_a_claim_to_the_old_scores(broker: ArqRedis) -> None:
    await scripts.publish(broker, [a_hint(-1.0), a_hint(-7_200.0)], lease=LEASE)
    before = await hints(broker)
    taken = await scripts.claim(broker, "default", limit=2, lease=LEASE)

    put = await scripts.put_back(broker, taken)

    assert put == 2
    assert await hints(broker) == before


async def test_put_back_with_waits_moves_only_those(broker: ArqRedis) -> None:
    hint, hidden = a_hint(-1.0), a_hint(-1.0)
    await scripts.publish(broker, [hint, hidden], lease=LEASE)
    taken = await scripts.claim(broker, "default", limit=2, lease=LEASE)

    before = await now_ms(broker)
    put = await scripts.put_back(broker, taken, {raw(hint): timedelta(milliseconds=1500)})
    after = await now_ms(broker)

    scores = await hints(broker)
    assert put == 1
    assert before + 1500 <= scores[str(hint.job_id)] <= after + 1500
    assert scores[str(hidden.job_id)] == taken.score


async def test_put_back_spares_a_hint_that_was_scored_anew_and_does_not_revive_one_that_is_gone(
    broker: ArqRedis,
) -> None:
    anew, gone = a_hint(-1.0), a_hint(-2.0)
    await scripts.publish(broker, [anew, gone], lease=LEASE)
    taken = await scripts.claim(broker, "default", limit=2, lease=LEASE)
    await rescore(broker, anew, 5)
    await broker.zrem(queue_key("default"), raw(gone))

    undone = await scripts.put_back(broker, taken)
    postponed = await scripts.put_back(broker, taken, dict.fromkeys(taken.hints, timedelta(seconds=1)))

    assert (undone, postponed) == (0, 0)
    assert await hints(broker) == {str(anew.job_id): 5}


# ── payloads, wait for hint ─────────────────────────────────────────────────────────────────────────────────────────


async def test_payloads_are_none_where_there_are_none(broker: ArqRedis) -> None:
    hint, unknown = a_hint(), a_hint()
    await scripts.publish(broker, [hint], lease=LEASE)

    found = await scripts.payloads(broker, [raw(hint), raw(unknown)])

    assert found == {raw(hint): payload_of(hint.name, hint.enqueued_ms, hint.installation).encode(), raw(unknown): None}


async def test_a_wait_ends_when_a_hint_is_published_into_one_of_its_queues(broker: ArqRedis) -> None:
    waiting = asyncio.create_task(scripts.wait_for_hint(broker, ["default", "mail"], limit=timedelta(seconds=30)))
    await asyncio.sleep(0)

    await scripts.publish(broker, [a_hint(queue="mail")], lease=LEASE)

    async with asyncio.timeout(20):
        await waiting


async def test_a_wait_ends_at_once_after_an_earlier_publish_and_else_at_its_limit(broker: ArqRedis) -> None:
    await scripts.publish(broker, [a_hint()], lease=LEASE)

    async with asyncio.timeout(20):
        await scripts.wait_for_hint(broker, ["default"], limit=timedelta(seconds=30))
        await scripts.wait_for_hint(broker, ["default"], limit=timedelta(milliseconds=1))

    assert await wakes(broker) == 0
