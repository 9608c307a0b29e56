"""The README's blocks and commands, run as printed."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from tests.docs.helpers import EXAMPLES, FASTAPI, started
from tests.docs.pages import README, ROOT, Reader, blocks, commands
from tests.support import state, until

pytestmark = pytest.mark.timeout(600)  # processes start slowly on a loaded machine


async def has_come_to(engine: AsyncEngine, job: str, wanted: str) -> None:
    async def has() -> bool:
        return await state(engine, UUID(job)) == wanted

    await until(has, f"the job has {wanted}", 120)


async def declared(engine: AsyncEngine) -> list[tuple[str, str]]:
    async with engine.connect() as connection:
        found = await connection.execute(text("SELECT name, timezone FROM exarq.schedule"))
        return [(name, zone) for name, zone in found]


async def test_the_first_ten_minutes_go_as_printed(engine: AsyncEngine, reader: Reader, tmp_path: Path) -> None:
    _, _, again, scheduled, _ = blocks(README, "python")
    _, _, dev, first, servers, failing = map(commands, blocks(README, "sh"))
    for block in (again, scheduled):
        reader.write(block)
    worker = dev[0].split("#")[0].split()
    async with started(
        worker, tmp_path / "log", reader.environment, ready="worker started", folder=reader.folder, cold=True
    ):
        app, listing, showing = first
        assert app.startswith("python app.py")
        paid = reader.starts_python("app.py")
        await has_come_to(engine, paid, "succeeded")
        assert paid in reader.types(listing)
        assert '"invoice 1 is paid"' in reader.types(showing, job_id=paid)

        for command in servers:
            reader.types(command)

        enqueueing, listing, showing, mending, retrying = failing
        failed = reader.types(enqueueing)
        await has_come_to(engine, failed, "failed")
        assert re.search(f"{failed} .* NoResultFound", reader.types(listing))
        assert reader.types(showing, job_id=failed).count("NoResultFound: ") == 1 + 3
        reader.types(mending)
        reader.types(retrying, job_id=failed)
        await has_come_to(engine, failed, "succeeded")

        assert reader.types("python again.py") == "invoice 1 is paid"
        assert await declared(engine) == [("app.close_day", "Europe/Berlin")]


def test_the_example_is_short() -> None:
    example = blocks(README, "python")[0]

    statements = [line for line in example.splitlines() if line.strip() and not line.lstrip().startswith("#")]

    assert len(statements) <= 20


def test_the_readme_is_read_in_ten_minutes() -> None:
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 250


def test_the_route_is_the_examples() -> None:
    route = blocks(README, "python")[1]

    assert route in (FASTAPI / "service.py").read_text(encoding="utf-8")


def test_the_readme_names_the_commands_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))

    named = set(re.findall(r"^make ([a-z]+)$", README.read_text(), flags=re.MULTILINE))

    assert named == {"demo", "test"}
    assert named <= targets


def test_the_readme_names_the_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    named = set(re.findall(r"exarq\[(\w+)\]", README.read_text(encoding="utf-8")))

    assert named == {"dev", "embedded", "uvloop"}
    assert named <= set(extras)


def test_no_link_leads_nowhere() -> None:
    pages = [README, ROOT / "worker" / "README.md", ROOT / "CHANGELOG.md", *EXAMPLES.parent.glob("*.md")]

    for page in pages:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
