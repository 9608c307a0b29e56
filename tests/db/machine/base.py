"""What the rules of the machine stand on: jobs as the model has them, a move made twice, and what always holds."""

from __future__ import annotations

from dataclasses import replace
from typing import Final
from uuid import UUID

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant
from hypothesis.strategies._internal.featureflags import FeatureFlags

from tests.db.machine.model import MAX_CRASHES, Effect, Job, View
from tests.db.machine.moves import Move
from tests.db.machine.world import Row, World
from worker.core.states import FINAL, JobState
from worker.db.transitions import Held

Q, R = JobState.QUEUED, JobState.RUNNING
LEGAL: Final = {
    Q: {Q, R, JobState.CANCELLED},
    R: {R, Q, *FINAL},
    **{state: {state, Q} for state in FINAL},
}


class Base(RuleBasedStateMachine):
    def __init__(self, world: World) -> None:
        super().__init__()
        # Hypothesis would switch off half of the rules in each example, and these need one another.
        self._rules_strategy.enabled_rules_strategy = st.just(FeatureFlags())
        self.world = world
        world.steps -= 1  # the first comparison is not after a step
        world.run(world.empty())
        self.now = 0
        self.jobs: dict[UUID, Job] = {}
        self.ids: list[UUID] = []
        self.rows: dict[UUID, Row] = {}
        self.claims: list[Held] = []
        self.open: Effect | None = None
        self.workers: dict[UUID, bool] = {}
        self.drawn = 0
        self.slots = [self.new_worker(), self.new_worker()]

    # ── what the rules stand on ─────────────────────────────────────────────────────────────────────────────────────

    def draw(self) -> UUID:
        """An id whose order says nothing about when it was drawn, and which is the same at every repetition."""
        self.drawn += 1
        return UUID(int=self.drawn * 0x9E3779B97F4A7C15F39CC0605CEDC835 % 2**128)

    def new_worker(self) -> UUID:
        worker = self.draw()
        self.world.run(self.world.register(worker))
        self.workers[worker] = False
        return worker

    def view(self) -> View:
        return View(
            now=self.now,
            jobs=self.jobs,
            locked=self.open.locks if self.open else frozenset(),
            by_due=sorted(self.rows, key=lambda job_id: (self.rows[job_id].run_at, job_id)),
            by_finish=sorted(self.rows, key=lambda job_id: self.rows[job_id].finished_at or self.rows[job_id].run_at),
            workers=self.workers,
            in_rescue=self.open.rescued if self.open else None,
        )

    def held(self, picked: tuple[str, int]) -> Held:
        """A claim to answer with: the model decides whether it still holds its job."""
        kind, index = picked
        if kind == "any":
            return self.claims[index % len(self.claims)]
        if kind == "of another job":
            return Held(self.ids[index % len(self.ids)], self.claims[index % len(self.claims)].token)
        mine = [
            held for held in self.claims if held.job_id in self.jobs and self.jobs[held.job_id].is_held_by(held.token)
        ]
        return (mine or self.claims)[index % len(mine or self.claims)]

    def id(self, index: int) -> UUID:
        """A job that there is or was, or one that never was."""
        return [*self.ids, UUID(int=0)][index % (len(self.ids) + 1)]

    def make(self, move: Move, there: bool, *, commit: bool = True) -> Effect:
        """Make a move as the rule says, and hold its answer against the model's."""
        effect = move.expected(self.view())
        in_the_way = move.held if self.open and effect.locks & self.open.locks else None
        if in_the_way == "fails":
            self.world.run(self.world.send_in_vain(move))
            effect = Effect()
        elif in_the_way:
            effect = self.make_after_waiting(move, effect, commit=commit)
        elif there and self.open is None:
            assert self.world.run(self.world.send_there(move)) == effect.answer
            self.open = effect
        else:
            assert self.world.run(self.world.send(move)) == effect.answer
            self.apply(effect)
        what = in_the_way or ("there" if self.open is effect else "here")
        self.world.done[f"{move.name}, {what}{'' if effect.changed else ', nothing'}"] += 1
        return effect

    def make_after_waiting(self, move: Move, first_seen: Effect, *, commit: bool) -> Effect:
        """A statement that waited moves what it saw at first and what is still so afterwards."""
        sent = self.world.send_and_end(move, commit=commit)
        self.ended(commit=commit)
        for job_id, job in self.jobs.items():  # two moves before the next look
            self.moved(self.rows[job_id].job, job)
            self.rows[job_id] = replace(self.rows[job_id], job=job)
        seen = {job_id: job for job_id, job in self.jobs.items() if job_id in first_seen.locks}
        effect = move.expected(replace(self.view(), jobs=seen))
        assert self.world.run(sent) == effect.answer
        self.apply(effect)
        return effect

    def apply(self, effect: Effect) -> None:
        for job_id, job in effect.changed.items():
            if job is None:
                del self.jobs[job_id]
            else:
                self.jobs[job_id] = job
        if effect.worker_is_gone and effect.rescued is not None:
            self.workers.pop(effect.rescued, None)

    def ended(self, *, commit: bool) -> None:
        effect, self.open = self.open, None
        if effect is not None and commit:
            self.apply(effect)

    def there_are(self, *states: JobState) -> bool:
        return any(job.state in states for job in self.jobs.values())

    # ── what always holds ───────────────────────────────────────────────────────────────────────────────────────────

    @invariant()
    def the_rows_are_what_the_model_says(self) -> None:
        self.world.steps += 1
        self.check()

    def check(self) -> None:
        before, self.rows = self.rows, self.world.run(self.world.rows(self.now))
        assert {job_id: row.job for job_id, row in self.rows.items()} == self.jobs
        for job_id, row in self.rows.items():
            job = row.job
            assert row.started == (job.attempt > 0)
            assert (job.finished_at is not None) == (job.state in FINAL)
            assert len(job.noted) == job.attempt - (job.state in (R, JobState.SUCCEEDED)), "an attempt left no trace"
            if job_id in before:
                self.moved(before[job_id].job, job)

    def moved(self, before: Job, after: Job) -> None:
        """What no move may do, whatever the model says."""
        self.world.done["a suspect runs"] += after.suspect and (before.state, after.state) == (Q, R)
        self.world.done["a job fails for its crashes"] += after.crashes == MAX_CRASHES > before.crashes
        assert after.state in LEGAL[before.state], f"{before.state} → {after.state}"
        assert after.attempt - before.attempt == ((before.state, after.state) == (Q, R))
        if before.state in FINAL and after != before:  # a person wants it once more
            assert (after.failures, after.crashes, after.token, after.worker) == (0, 0, None, None)
            return
        assert after.failures >= before.failures
        assert after.crashes >= before.crashes
        assert (after.token, after.worker) == (before.token, before.worker) or after.attempt > before.attempt
