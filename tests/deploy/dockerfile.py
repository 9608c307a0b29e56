"""The Dockerfile and .dockerignore, read as Docker reads what of their languages they use."""

from __future__ import annotations

import fnmatch
import json
import re
import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
VERBS = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


@dataclass(frozen=True)
class Instruction:
    """One instruction, on one line."""

    verb: str
    rest: str

    @property
    def words(self) -> list[str]:
        """Its words; of the exec form, what is in the brackets."""
        return exec_form(self.rest) if self.rest.startswith("[") else shlex.split(self.rest)


@dataclass(frozen=True)
class Stage:
    """What one FROM begins."""

    base: str
    name: str
    instructions: list[Instruction]

    def last(self, verb: str) -> Instruction:
        """The instruction of this verb that counts."""
        return [one for one in self.instructions if one.verb == verb][-1]

    @property
    def stop_signal(self) -> signal.Signals:
        """What a container of it is sent when it is to stop."""
        said = [one.rest for one in self.instructions if one.verb == "STOPSIGNAL"]
        return signal.Signals[said[-1]] if said else signal.SIGTERM

    @property
    def health_check(self) -> tuple[dict[str, str], list[str]]:
        """The options of the health check, and its command."""
        options, command = re.fullmatch(r"((?:--\S+ )*)CMD (.*)", self.last("HEALTHCHECK").rest).groups()  # type: ignore[union-attr]
        return dict(re.findall(r"--([\w-]+)=(\S+)", options)), exec_form(command)


def exec_form(text: str) -> list[str]:
    """The words of a command that no shell reads."""
    words = json.loads(text)
    assert isinstance(words, list)
    assert words
    assert all(isinstance(word, str) for word in words), text
    return words


def stages() -> list[Stage]:
    """The stages of the Dockerfile."""
    text = re.sub(r"^\s*#.*\n", "", (REPOSITORY / "Dockerfile").read_text(), flags=re.MULTILINE)
    found: list[Stage] = []
    for line in re.sub(r"\\\n\s*", "", text).splitlines():
        verb, _, rest = line.strip().partition(" ")
        if not verb:
            continue
        assert verb in VERBS, f"what is {verb}? Docker may know it, the tests do not"
        if verb == "FROM":
            base, _, name = rest.partition(" AS ")
            found.append(Stage(base, name, []))
        else:
            found[-1].instructions.append(Instruction(verb, rest.strip()))
    return found


def context(path: str) -> list[Path]:
    """The files that COPY finds below a path of the repository, relative to it: those that .dockerignore leaves."""
    let_in = [REPOSITORY / line[1:] for line in _patterns() if line.startswith("!")]  # all else is ignored
    files = {file for place in let_in for file in (place, *place.rglob("*")) if file.is_file()}
    found = sorted(file.relative_to(REPOSITORY) for file in files if file.is_relative_to(REPOSITORY / path))
    return [file for file in found if not _is_ignored(file)]


def _patterns() -> list[str]:
    lines = (REPOSITORY / ".dockerignore").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def _is_ignored(file: Path) -> bool:
    """As the last pattern says that fits the file or a folder it is in."""
    ignored = False
    for line in _patterns():
        pattern = line.removeprefix("!")
        if any(_fits(place, pattern) for place in (file, *file.parents[:-1])):
            ignored = not line.startswith("!")
    return ignored


def _fits(place: Path, pattern: str) -> bool:
    if pattern.startswith("**/"):
        return fnmatch.fnmatchcase(place.name, pattern.removeprefix("**/"))
    return len(place.parts) == len(Path(pattern).parts) and fnmatch.fnmatchcase(str(place), pattern)
