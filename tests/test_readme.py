"""The README's example and commands, run as printed."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"

pytestmark = pytest.mark.timeout(600)  # processes start slowly on a loaded machine


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


def run(command: str, folder: Path, environment: dict[str, str]) -> str:
    shell = subprocess.run(
        ["sh", "-euc", command], cwd=folder, env=environment, capture_output=True, text=True, timeout=120
    )
    assert shell.returncode == 0, f"{command}: exit {shell.returncode}\n{shell.stderr}"
    return shell.stdout


@pytest.fixture
def environment(database_url: str, redis_url: str) -> dict[str, str]:
    """A shell's environment in which `exarq` and `python` are this environment's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("EXARQ_")}
    addresses = {"EXARQ_DATABASE_URL": database_url, "EXARQ_REDIS_URL": redis_url, "EXARQ_JOBS_MODULES": "app"}
    return {**kept, **addresses, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{kept['PATH']}"}


async def test_the_example_runs_as_printed_by_the_commands_as_printed(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    example, scheduled, test = blocks("python")
    (tmp_path / "app.py").write_text(example + scheduled, encoding="utf-8")
    (tmp_path / "test_app.py").write_text(test, encoding="utf-8")
    commands = [line for line in blocks("sh")[1].splitlines() if not line.startswith("export")]

    for command in commands:
        run(command, tmp_path, environment)
    (listed,) = json.loads(run("exarq jobs list --json", tmp_path, environment))
    shown = json.loads(run(f"exarq jobs show {listed['id']} --json", tmp_path, environment))

    for command in blocks("sh")[2].splitlines():
        run(command, tmp_path, environment)
    (ran, _) = json.loads(run("exarq jobs list --json", tmp_path, environment))
    (schedule,) = json.loads(run("exarq schedules list --json", tmp_path, environment))

    assert listed["name"] == "app.charge"
    assert (ran["name"], ran["state"]) == ("app.close_day", "queued")
    assert (schedule["name"], schedule["timezone"]) == ("app.close_day", "Europe/Berlin")
    assert shown["state"] == "succeeded"
    assert shown["result"] == "invoice 1 is paid"
    assert "1 passed" in run("python -m pytest -q -p no:cacheprovider -p no:valkey test_app.py", tmp_path, environment)


def test_the_example_is_short() -> None:
    example = blocks("python")[0]

    statements = [line for line in example.splitlines() if line.strip() and not line.lstrip().startswith("#")]

    assert len(statements) <= 20


def test_the_readme_names_the_commands_that_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (README.parent / "Makefile").read_text(), flags=re.MULTILINE))

    named = set(re.findall(r"^make ([a-z]+)$", README.read_text(), flags=re.MULTILINE))

    assert named == {"demo", "test"}
    assert named <= targets
