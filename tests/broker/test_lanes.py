"""Each priority has a lane of hints; a claim takes from all of a queue's lanes by rank."""

from __future__ import annotations

import random
from datetime import timedelta
from typing import Final
from uuid import UUID

from arq.connections import ArqRedis

from worker.broker import scripts
from worker.broker.hints import Hint, due_at
from worker.broker.keys import PAYLOAD_PREFIX, lane_key
from worker.core.priority import DEFAULT_PRIORITY, PRIORITIES, STEP
from worker.db.ids import uuid7

HERE: Final = UUID(int=1)
LEASE: Final = timedelta(seconds=10)


def a_hint(priority: int, due_in: float = -1.0) -> Hint:
    return Hint(uuid7(), "tests.noop", "default", due_at(due_in), 1, HERE, priority)


def raw(hint: Hint) -> bytes:
    return str(hint.job_id).encode()


async def taken_one_by_one(broker: ArqRedis, limit: int) -> list[set[bytes]]:
    batches = []
    while hints := (await scripts.claim(broker, "default", limit=limit, lease=LEASE)).hints:
        batches.append(set(hints))
    return batches


async def test_due_hints_are_taken_in_the_order_of_their_ranks(broker: ArqRedis) -> None:
    for seed in range(12):
        rng = random.Random(seed)
        steps = rng.sample(range(1, 200), rng.randint(1, 40))  # of a third of a step: no two ranks are the same
        hints = [a_hint(rng.choice(PRIORITIES), -step * STEP.total_seconds() / 3.01) for step in steps]
        limit = rng.randint(1, 5)
        await scripts.publish(broker, [*hints, a_hint(0, 60)], lease=LEASE)

        batches = await taken_one_by_one(broker, limit)

        by_rank = sorted(
            hints, key=lambda hint: hint.due_at + (hint.priority - DEFAULT_PRIORITY) * STEP.total_seconds()
        )
        assert batches == [{raw(hint) for hint in by_rank[i : i + limit]} for i in range(0, len(by_rank), limit)]
        await broker.flushdb()
        await broker.set("exarq:test:ours", "1")


async def test_an_urgent_hint_that_comes_last_is_taken_before_a_hundred_thousand_others(redis: ArqRedis) -> None:
    seconds, _ = await redis.time()
    await redis.zadd(
        lane_key("default", DEFAULT_PRIORITY), {f"{number:036}": seconds * 1000 for number in range(100_000)}
    )
    urgent = a_hint(0, 0)
    await scripts.publish(redis, [urgent], lease=LEASE)

    taken = await scripts.claim(redis, "default", limit=1, lease=LEASE)

    assert set(taken.hints) == {raw(urgent)}
    await redis.delete(lane_key("default", DEFAULT_PRIORITY))
    await scripts.drop(redis, "default", [(raw(urgent), taken.score)], priority=0)


async def test_a_hint_is_dropped_from_and_put_back_into_its_own_lane(broker: ArqRedis) -> None:
    hints = [a_hint(priority) for priority in (0, DEFAULT_PRIORITY, 9)]
    await scripts.publish(broker, hints, lease=LEASE)
    taken = await scripts.claim(broker, "default", limit=9, lease=LEASE)

    assert await scripts.put_back(broker, taken) == 3
    again = await scripts.claim(broker, "default", limit=9, lease=LEASE)
    assert again.hints == taken.hints
    assert await scripts.put_back(broker, again, {raw(hints[2]): timedelta(minutes=1)}) == 1
    for hint in hints:
        dropped = await scripts.drop(broker, "default", [(raw(hint), again.score)], priority=hint.priority)
        assert dropped == (hint.priority != 9)

    left = {hint.priority: await broker.zcard(lane_key("default", hint.priority)) for hint in hints}
    assert left == {0: 0, DEFAULT_PRIORITY: 0, 9: 1}
    assert await broker.exists(*(PAYLOAD_PREFIX + str(hint.job_id) for hint in hints)) == 1


async def test_a_hint_in_its_lane_is_not_astray_and_one_lost_from_it_is(broker: ArqRedis) -> None:
    hints = [a_hint(priority) for priority in (0, DEFAULT_PRIORITY, 9)]
    await scripts.publish(broker, hints, lease=LEASE)
    assert await scripts.publish(broker, hints, lease=LEASE, only_astray=True) == 0

    await broker.zrem(lane_key("default", 9), raw(hints[2]))
    assert await scripts.publish(broker, hints, lease=LEASE, only_astray=True) == 1
    assert await broker.zscore(lane_key("default", 9), raw(hints[2])) is not None


async def test_the_wait_is_that_of_the_lane_that_is_due_first(broker: ArqRedis) -> None:
    await scripts.publish(broker, [a_hint(DEFAULT_PRIORITY, 3_000), a_hint(9, 500)], lease=LEASE)

    taken = await scripts.claim(broker, "default", limit=1, lease=LEASE)

    assert taken.hints == {}
    assert taken.next_due is not None
    assert timedelta(seconds=400) < taken.next_due <= timedelta(seconds=500)
