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
        self.slots = [self.new_worker(), self.new_worker()]

    # ── what the rules stand on ─────────────────────────────────────────────────────────────────────────────────────

    def draw(self) -> UUID:
        return self.world.draw()

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
            by_rank=sorted(self.rows, key=lambda job_id: (self.rows[job_id].rank, job_id)),
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
        if effect.knows & self.keys_of(self.open):  # what it would know by then is said nowhere, but PostgreSQL tells
            self.world.run(self.world.end(commit=commit))
            self.ended(commit=commit)
            self.look()
            effect = move.expected(self.view())
        wanted = effect.locks | effect.waits_for
        in_the_way = move.held if self.open and wanted & (self.open.locks | self.keys_of(self.open)) else None
        if in_the_way == "fails":
            self.world.run(self.world.send_in_vain(move))
            effect = Effect()
        elif in_the_way:
            effect = self.make_after_waiting(move, effect, commit=commit)
        elif there and self.open is None:
            answer = self.world.run(self.world.send_there(move))
            self.open = effect = move.expected(self.view())
            assert answer == effect.answer
        else:
            answer = self.world.run(self.world.send(move))
            effect = move.expected(self.view())
            assert answer == effect.answer
            self.apply(effect)
        what = in_the_way or ("there" if self.open is effect else "here")
        self.world.done[f"{move.name}, {what}{'' if effect.changed else ', nothing'}"] += 1
        return effect

    def make_after_waiting(self, move: Move, first_seen: Effect, *, commit: bool) -> Effect:
        """A statement that waited moves what it saw at first and what is still so afterwards."""
        answer = self.world.run(self.world.send_and_end(move, commit=commit))
        self.ended(commit=commit)
        for job_id, row in list(self.rows.items()):  # two moves before the next look
            if job_id in self.jobs:
                self.moved(row.job, self.jobs[job_id])
                self.rows[job_id] = replace(row, job=self.jobs[job_id])
        seen = {job_id: job for job_id, job in self.jobs.items() if move.looks_again or job_id in first_seen.locks}
        effect = move.expected(replace(self.view(), jobs=seen))
        assert answer == effect.answer
        self.apply(effect)
        return effect

    def keys_of(self, effect: Effect | None) -> frozenset[str]:
        """The keys that this gives to a job, takes from one, or that one had before and after."""
        if effect is None:
            return frozenset()
        changed = [job for job_id, after in effect.changed.items() for job in (self.jobs.get(job_id), after)]
        return frozenset(job.key for job in changed if job is not None and job.key is not None and job.has_key)

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

    def look(self) -> dict[UUID, Row]:
        """Look at the rows; the answer is how they were the last time."""
        before, self.rows = self.rows, self.world.run(self.world.rows(self.now))
        return before

    def check(self) -> None:
        before = self.look()
        assert {job_id: row.job for job_id, row in self.rows.items()} == self.jobs
        kept = [job.key for job in self.jobs.values() if job.has_key]
        assert len(kept) == len(set(kept)), "two jobs have one key"
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
        if before.state in FINAL and after.state in FINAL:
            assert replace(before, until=after.until) == after
            assert after.until in (None, before.until)
            return
        if before.state in FINAL:  # a person wants it once more
            assert (after.failures, after.crashes, after.token, after.worker) == (0, 0, None, None)
            return
        assert after.failures >= before.failures
        assert after.crashes >= before.crashes
        assert (after.token, after.worker) == (before.token, before.worker) or after.attempt > before.attempt
