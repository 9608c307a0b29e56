"""docker-compose.yml, read as Compose reads what of its language it uses."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import yaml

from tests.deploy.dockerfile import REPOSITORY, Stage, stages

_UNITS = {"h": "hours", "m": "minutes", "s": "seconds", "ms": "milliseconds"}


def compose() -> dict[str, Any]:
    """The file, with its anchors followed and its variables at their defaults."""
    text = (REPOSITORY / "docker-compose.yml").read_text()
    read = yaml.safe_load(re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", text))
    assert isinstance(read, dict)
    return read


def stage_of(name: str) -> Stage:
    """The stage of the Dockerfile that a service runs: the last, unless who builds its image says which."""
    services = compose()["services"]
    image = services[name]["image"]
    (build,) = [one["build"] for one in services.values() if one["image"] == image and "build" in one]
    (stage,) = [one for one in stages() if one.name == build["target"]] if isinstance(build, dict) else stages()[-1:]
    return stage


def duration(text: str) -> timedelta:
    """A duration such as `1m30s`."""
    assert re.fullmatch(r"(\d+(h|ms|m|s))+", text), f"{text!r} is no duration"
    parts = {_UNITS[unit]: int(count) for count, unit in re.findall(r"(\d+)(ms|h|m|s)", text)}
    return timedelta(**parts)
