"""Any interleaving of the moves of a job, against a pure model of what each of them promises.

The machine knows the answer to every statement before it is sent, and compares all rows after it. It moves jobs on two
connections: what is made `there` stays uncommitted until a later step ends it, and meanwhile a claim, a rescue or a
prune must pass its rows by, while the holder of a job must wait for them and then find them as they are.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from functools import partial
from typing import Final
from uuid import UUID

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from tests.db.machine import model, moves
from tests.db.machine.base import Base, Q, R
from tests.db.machine.keyed import Asked
from tests.db.machine.moves import Move
from tests.db.machine.world import PRIORITIES, QUEUES, World
from tests.servers import DATABASE_VARIABLE
from worker.core.states import FINAL, JobState
from worker.db.transitions import Held
from worker.flow import unique
from worker.settings import Settings
from worker.upkeep import reconcile

_SECOND_PASS: Final = DATABASE_VARIABLE in os.environ
STEPS: Final = int(os.environ.get("EXARQ_TEST_STEPS", "2000" if _SECOND_PASS else "3000"))
"""How many steps the machine takes at least; CI has it take 10,000."""

_STEPS_OF_AN_EXAMPLE: Final = 40
_MOST_JOBS: Final = 6

where = st.sampled_from([False, False, False, True])
"""Whether a move is made in a transaction that stays open."""
number = st.integers(0, _MOST_JOBS)
numbers = st.lists(number, min_size=1, max_size=4)
wait = st.sampled_from([0, 0, 1, 3])
token = st.tuples(st.sampled_from(["mine", "mine", "any", "of another job"]), st.integers(0, 9))
"""Which claim a worker answers with: one that holds its job, any that was ever made, or one of another job."""
worker = st.integers(0, 1)
queues = st.sampled_from([QUEUES, QUEUES, QUEUES[:1], QUEUES[1:]])

asked = st.lists(
    st.builds(
        Asked,
        says=st.sampled_from(["this", "that"]),
        queue=st.sampled_from(QUEUES),
        wait=wait,
        priority=st.sampled_from(PRIORITIES),
        expires=st.sampled_from([None, None, 1, 3]),
        key=st.sampled_from(["a", "a", "b", None]),
        scope=st.sampled_from(["until_started", "until_done"]),
        lasts=st.sampled_from([None, None, 1, 3]),
        on_conflict=st.sampled_from(["skip", "replace", "raise"]),
    ),
    min_size=1,
    max_size=2,
    unique_by=lambda one: one.key,
)

Verb = Callable[[Held, int], Move]
VerbOfMany = Callable[[list[Held]], Move]
one_verb: st.SearchStrategy[Verb] = st.sampled_from(moves.OF_ONE)
VerbByHand = Callable[[Collection[UUID], Collection[JobState]], Move]
by_hand: st.SearchStrategy[VerbByHand] = st.sampled_from(moves.OF_MANY_BY_HAND)
many_verb: st.SearchStrategy[VerbOfMany] = st.sampled_from([moves.succeed_many, moves.release_many])


class Machine(Base):
    """The rules: whatever two workers, a rescuer, a person, the upkeep, time and Redis can do next."""

    @initialize(first=st.sampled_from(QUEUES), second=st.sampled_from(QUEUES))
    def two_jobs_wait(self, first: str, second: str) -> None:
        self.enqueue(there=False, queue=first, wait=0)
        self.enqueue(there=False, queue=second, wait=0)

    @precondition(lambda self: len(self.ids) < _MOST_JOBS)
    @rule(there=where, queue=st.sampled_from(QUEUES), wait=wait)
    def enqueue(self, there: bool, queue: str, wait: int) -> None:
        self.ids.append(self.draw())
        self.make(moves.enqueue(self.ids[-1], queue, wait), there)

    @precondition(lambda self: len(self.ids) < _MOST_JOBS)
    @rule(there=where, asked=asked, commit=st.booleans())
    def enqueue_in_full(self, there: bool, asked: list[Asked], commit: bool) -> None:
        """With priorities, deadlines and keys: what another has already may be skipped, replaced, or refused."""
        ids = [self.draw() for _ in asked]
        effect = self.make(moves.enqueue_in_full(asked, ids), there, commit=commit)
        self.ids += [job_id for job_id in effect.changed if job_id not in self.ids]
        for happened, *_ in effect.answer if isinstance(effect.answer, list) else [effect.answer]:
            self.world.done[f"a key: {happened}"] += 1

    enqueue_in_full_ = enqueue_in_full

    @precondition(lambda self: self.there_are(Q))
    @rule(there=where, indices=numbers, worker=worker, may=st.booleans())
    def claim(self, there: bool, indices: list[int], worker: int, may: bool) -> None:
        ids = [self.id(index) for index in indices]
        token = self.draw()
        effect = self.make(moves.claim(ids, token, self.slots[worker], may_take_suspect=may), there)
        self.claims += [Held(job_id, token) for job_id in sorted(effect.changed)]

    @precondition(lambda self: self.there_are(Q))
    @rule(there=where, queues=queues, room=st.integers(1, 4), worker=worker, may=st.booleans())
    def claim_by_scan(self, there: bool, queues: tuple[str, ...], room: int, worker: int, may: bool) -> None:
        token = self.draw()
        effect = self.make(moves.scan(queues, room, token, self.slots[worker], may_take_suspect=may), there)
        self.claims += [Held(job_id, token) for job_id in sorted(effect.changed)]

    @precondition(lambda self: self.claims and self.there_are(R))
    @rule(there=where, verb=one_verb, token=token, wait=wait, commit=st.booleans())
    def complete(self, there: bool, verb: Verb, token: tuple[str, int], wait: int, commit: bool) -> None:
        self.make(verb(self.held(token), wait), there, commit=commit)

    complete_, complete__, complete___ = complete, complete, complete  # what matters most is drawn most often

    @precondition(lambda self: self.claims and self.there_are(R))
    @rule(there=where, verb=many_verb, tokens=st.lists(token, min_size=1, max_size=4), commit=st.booleans())
    def complete_many(self, there: bool, verb: VerbOfMany, tokens: list[tuple[str, int]], commit: bool) -> None:
        held = {held.job_id: held for held in map(self.held, tokens)}  # a worker holds a job once
        self.make(verb(list(held.values())), there, commit=commit)

    @precondition(lambda self: self.there_are(Q, R))
    @rule(there=where, index=number, commit=st.booleans())
    def request_cancel(self, there: bool, index: int, commit: bool) -> None:
        self.make(moves.request_cancel(self.id(index)), there, commit=commit)

    @precondition(lambda self: self.there_are(*FINAL))
    @rule(there=where, index=number, commit=st.booleans())
    def retry_by_hand(self, there: bool, index: int, commit: bool) -> None:
        self.make(moves.retry_by_hand(self.id(index)), there, commit=commit)

    @precondition(lambda self: self.jobs)
    @rule(there=where, verb=by_hand, indices=numbers, states=st.sets(st.sampled_from(sorted(JobState)), min_size=1))
    def move_many_by_hand(self, there: bool, verb: VerbByHand, indices: list[int], states: set[JobState]) -> None:
        self.make(verb({self.id(index) for index in indices}, states), there)

    @precondition(lambda self: self.there_are(R))
    @rule(there=where, worker=st.integers(0, 3))
    def rescue(self, there: bool, worker: int) -> None:
        """Mostly one whose jobs run, also under an id that nobody uses any more."""
        at_work = sorted({job.worker for job in self.jobs.values() if job.state is R and job.worker is not None})
        watched = [*at_work, *self.slots]
        self.make(moves.rescue(watched[worker % len(watched)]), there)

    @precondition(lambda self: self.there_are(R) and self.open is None)
    @rule(verb=one_verb, index=number)
    def rescue_from_a_zombie(self, verb: Verb, index: int) -> None:
        """A worker whose transaction is still open is taken for dead: its row must stay for the next rescue."""
        held = self.held(("mine", index))
        self.make(verb(held, 0), there=True)
        worker = self.jobs[held.job_id].worker if held.job_id in self.jobs else None
        if worker is not None:
            self.make(moves.rescue(worker), there=False)

    @precondition(lambda self: self.there_are(Q))
    @rule(worker=worker, room=st.integers(1, 4), may=st.booleans())
    def claim_and_die(self, worker: int, room: int, may: bool) -> None:
        self.claim_by_scan(there=False, queues=QUEUES, room=room, worker=worker, may=may)
        self.check()
        self.make(moves.rescue(self.slots[worker]), there=False)

    @precondition(lambda self: self.open is None)
    @rule(worker=worker, stops=st.booleans())
    def stop_or_start(self, worker: int, stops: bool) -> None:
        """A worker says that it stops, or a new one comes in its place: what the former held is left running."""
        if not stops:
            self.slots[worker] = self.new_worker()
            return
        self.world.run(self.world.announce_stop(self.slots[worker]))
        if self.slots[worker] in self.workers:
            self.workers[self.slots[worker]] = True

    @precondition(lambda self: self.there_are(*FINAL) and self.now)
    @rule(there=where, state=st.sampled_from(sorted(FINAL)), keep=st.integers(1, 2), batch=st.sampled_from([1, 100]))
    def prune(self, there: bool, state: JobState, keep: int, batch: int) -> None:
        if self.make(moves.prune(state, keep, batch), there).changed:
            assert self.world.run(self.world.attempts_without_a_job()) == 0

    @precondition(lambda self: self.open)
    @rule(commit=st.booleans())
    def end_what_is_open(self, commit: bool) -> None:
        self.world.run(self.world.end(commit=commit))
        self.ended(commit=commit)

    @precondition(lambda self: self.open is None and self.jobs)
    @rule(hours=st.sampled_from([1, 3]))
    def hours_pass(self, hours: int) -> None:
        self.world.run(self.world.hours_pass(hours))
        self.now += hours

    @precondition(lambda self: self.there_are(R))
    @rule(worker=worker)
    def beat(self, worker: int) -> None:
        """What a beat compares, and whom a rescuer watches."""
        slot = self.slots[worker]
        assert self.world.run(self.world.running_under(slot)) == model.running_under(self.view(), slot)
        at_work = {job.worker for job in self.jobs.values() if job.state is R}
        assert self.world.run(self.world.beats()) == dict.fromkeys(at_work) | dict.fromkeys(self.workers, 0)

    @precondition(lambda self: self.there_are(Q))
    @rule(lost=st.lists(number, max_size=2), late=st.lists(number, max_size=2))
    def reconcile(self, lost: list[int], late: list[int]) -> None:
        """Redis forgets some hints and believes of others that they are due later; a walk heals it."""
        self.world.run(self.world.spoil([self.id(index) for index in lost], [self.id(index) for index in late]))
        self.world.run(self.world.walk())
        assert model.waiting(self.view()) <= self.world.run(self.world.due_hints())


@pytest.mark.timeout(600)
def test_whatever_happens_in_whatever_order_the_rows_are_what_the_model_says(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconcile, "_PAGE", 3)
    with World(settings) as world:
        monkeypatch.setattr(unique, "uuid7s", lambda count: [world.draw() for _ in range(count)])
        run_state_machine_as_test(partial(Machine, world), settings=_examples())  # type: ignore[arg-type]  # a factory of machines, as its documentation has it

    print(f"{world.steps} steps:", *(f"\n{count:6} {what}" for what, count in sorted(world.done.items())))
    assert world.steps >= STEPS
    if not _SECOND_PASS:
        for what in (*moves.NAMES, *moves.OF_A_KEY, "a suspect runs", "a job fails for its crashes"):
            assert world.done[what] + world.done[f"{what}, here"], f"{what}: has never happened"
        for what in ("waits", "fails"):
            assert [done for done in world.done if what in done], f"none ever {what} for a locked row"


def _examples() -> settings:
    return settings(
        max_examples=STEPS // 30 + 8,
        stateful_step_count=_STEPS_OF_AN_EXAMPLE,
        derandomize="EXARQ_TEST_ANEW" not in os.environ,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
        suppress_health_check=list(HealthCheck),
    )
