"""Each broken twin is caught by the invariant it names; a checker that cannot fail is worth nothing."""

from __future__ import annotations

import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path

import pytest
import pytest_asyncio

from tests.chaos.checker import Findings
from tests.chaos.fleet import Pace
from tests.chaos.stage import Stage, a_cluster, a_stage
from tests.chaos.twins import (
    TWINS,
    Scenario,
    a_blocked_worker,
    a_clock_ahead,
    a_kill,
    a_wait_through_kills,
    a_wipe,
    plain_arq,
    suspects,
    work,
)

pytestmark = pytest.mark.timeout(180)  # a loaded machine; each is caught in far less
_LIMIT = 60.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def cluster() -> AsyncIterator[Path]:
    """What each stage begins with a copy of, for to make it costs as much as many scenes."""
    async with a_cluster() as found:
        yield found


@pytest.mark.parametrize("name", TWINS)
async def test_a_broken_twin_is_caught_by_the_invariant_it_names(tmp_path: Path, cluster: Path, name: str) -> None:
    twin, begun, broken = TWINS[name], time.monotonic(), set[str]()

    while twin.breaks not in broken and time.monotonic() - begun < _LIMIT:
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        broken |= (await _run(folder, cluster, twin.scenario, name)).broken

    assert twin.breaks in broken, f"{name} was not caught; these were: {broken}"


async def test_an_honest_system_in_the_same_scenes_offends_against_nothing(tmp_path: Path, cluster: Path) -> None:
    async with _a_stage(tmp_path, cluster, twin=None) as stage:
        for scene in (suspects, plain_arq, work, a_wipe, a_kill, a_wait_through_kills, a_clock_ahead, a_blocked_worker):
            await scene(stage)
        found = await stage.finish()

    assert found.offences == []
    assert found.jobs > 100


async def _run(folder: Path, cluster: Path, scenario: Scenario, twin: str | None) -> Findings:
    async with _a_stage(folder, cluster, twin) as stage:
        with suppress(TimeoutError):  # a broken twin need not come to an end; what it did by then tells
            await scenario(stage)
        return await stage.finish(patience=5)


def _a_stage(folder: Path, cluster: Path, twin: str | None) -> AbstractAsyncContextManager[Stage]:
    return a_stage(
        folder,
        pace=Pace(1.0),
        seed="twins",
        producers=1,
        sync_producers=0,
        twin=twin,
        cluster=cluster,
        exarq_jobs_max_crashes=3,
    )
