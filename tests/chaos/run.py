"""One chaos run: load, faults from a seed, rest, check, and the table."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from tests.chaos import measure
from tests.chaos.checker import Offence
from tests.chaos.faults import Fault, catalogue, of_workers, targets
from tests.chaos.fleet import Pace
from tests.chaos.measure import Window
from tests.chaos.screen import Screen
from tests.chaos.stage import Stage, a_stage

MIX: Final = "mix"
EVERY: Final = "every"
_TOGETHER: Final = 0.35
_HEALED_WITHIN: Final = 15.0
"""So soon, in seconds, Redis knows every waiting job again, on a machine that is busy with much else."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What to break, for how long, and from which seed."""

    fault: str
    seconds: float
    seed: str
    lease: float
    rate: float


async def run(plan: Plan, folder: Path) -> int:
    """Run the plan and show it; 0 when every invariant held."""
    screen = Screen()
    begun = time.monotonic()
    async with a_stage(folder, pace=Pace(plan.lease), seed=plan.seed, say=screen.say) as stage:
        await screen.introduce(stage, plan.seed, plan.lease)
        if plan.fault != EVERY:
            screen.say(f"the last fault begins within {plan.seconds:g} s; then all that waits has to end")
        windows: list[Window] = []
        measured: list[dict[str, Any]] = []
        async with screen.following(stage):
            stage.load(plan.rate)
            stage.calm = True
            await _settle(stage, 3.0)
            stage.calm = False
            await _break_things(stage, plan, windows, measured, screen)
            screen.say("the producers rest; waiting until every job has ended")
            found = await stage.finish()
        rows = await measure.rows(stage.engine, folder, windows, stage.blows, stage.returns, found)
        seconds = time.monotonic() - begun
        return screen.conclude(rows, found, seed=plan.seed, seconds=seconds, measured=measured, exits=stage.exits)


async def _break_things(
    stage: Stage, plan: Plan, windows: list[Window], measured: list[dict[str, Any]], screen: Screen
) -> None:
    faults, rng = catalogue(), random.Random(plan.seed)
    if plan.fault == EVERY:
        for fault in faults.values():
            if fault.run.__module__ != targets.__name__:
                await _strike(stage, [fault], windows, measured, screen)
        return
    mixable = [fault for fault in faults.values() if fault.run.__module__ != targets.__name__]
    if plan.fault == MIX and not of_workers.has_faketime():
        screen.say("without `clocks`, which needs libfaketime: apt-get install faketime")
        mixable.remove(faults[of_workers.clocks.__name__])
    ends = time.monotonic() + plan.seconds
    while time.monotonic() < ends:
        if plan.fault != MIX:
            chosen = [faults[plan.fault]]
        else:
            chosen = [rng.choice(mixable)]
            others = [fault for fault in mixable if fault.goes_with(chosen[0])]
            if others and rng.random() < _TOGETHER:
                chosen.append(rng.choice(others))
        await _strike(stage, chosen, windows, measured, screen)


async def _strike(
    stage: Stage, chosen: list[Fault], windows: list[Window], measured: list[dict[str, Any]], screen: Screen
) -> None:
    """A calm moment, the fault or two at once, and some time to recover."""
    calm_from = time.time()
    await _settle(stage, min(2.0, stage.pace.lease / 2))
    broke = time.time()
    for fault in chosen:
        screen.broken(fault)
    async with asyncio.TaskGroup() as together:
        ends = [together.create_task(_run(fault, stage)) for fault in chosen]
    mended = time.time()
    measured += [end.result() for end in ends if end.result()]
    await _settle(stage, stage.pace.lease)
    name = " + ".join(fault.name for fault in chosen)
    windows.append(Window(name, calm_from, broke, mended, time.time()))
    stage.end_excuses()
    await stage.healed(_HEALED_WITHIN)


async def _run(fault: Fault, stage: Stage) -> dict[str, Any]:
    """Break and mend; where that cannot be done the run goes on, and is not believed to have passed."""
    try:
        figures = await fault.run(stage)
    except Exception as error:
        stage.say(f"  {fault.name} failed: {error!r}")
        stage.offences.append(Offence("fault_failed", fault.name, repr(error)))
        stage.to_postgres.restore()
        stage.to_redis.restore()
        return {}
    return {"fault": fault.name, **figures} if figures else {}


async def _settle(stage: Stage, seconds: float) -> None:
    """Let work go on for so long, with as many workers as there should be."""
    await stage.begun(*stage.workers)
    await asyncio.sleep(seconds)
