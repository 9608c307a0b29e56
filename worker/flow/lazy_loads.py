"""Lazy loads: kept with the attempt, and told when they are more than its definition allows."""

from __future__ import annotations

from worker.db.lazy import LazyLoads
from worker.flow.holdings import Run
from worker.observe.events import LazyLoadsOverBudget, emit


def remark(run: Run, allowed: int | None, loads: LazyLoads) -> None:
    """Note on the run how often each attribute was loaded lazily."""
    over_budget = allowed is not None and loads.total > allowed
    run.remark(lazy_loads=loads.by_attribute, over_budget=over_budget)
    if allowed is not None and over_budget:
        most, count = next(iter(loads.by_attribute.items()))
        emit(
            LazyLoadsOverBudget(
                job=run.claimed.held.job_id,
                name=run.claimed.name,
                allowed=allowed,
                lazy_loads=loads.total,
                most=f"{most}: {count}",
                instead=loads.remedy,
            )
        )
