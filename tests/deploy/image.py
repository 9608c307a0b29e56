"""The images, made without Docker: each instruction of the Dockerfile, done in a folder that stands for the root.

Where Docker has the files of the base image, this machine's Python stands; a user and a folder that cannot be written are
real. What COPY and RUN did before any code was copied is kept, as Docker keeps a layer, until what went into it changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from tests.deploy.dockerfile import REPOSITORY, Instruction, Stage, context, stages
from tests.embedded.helpers import copy_python, runs
from worker.embedded.account import Account, Drop

_KEPT = Path(sys.prefix, ".layer")
_ABSOLUTE = re.compile(r"(?<![\w./])/(?=\w)")


@dataclass
class Image:
    """What a container is started from."""

    root: Path
    user: Drop
    environment: dict[str, str] = field(default_factory=dict)
    folder: str = "/"
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def place(self, path: str) -> Path:
        """Where a path of the image is here."""
        return self.root / self.folder.lstrip("/") / path if not path.startswith("/") else self.root / path[1:]

    def here(self, text: str) -> str:
        """The text with each absolute path as it is here."""
        return _ABSOLUTE.sub(f"{self.root}/", text)

    @property
    def files(self) -> set[str]:
        """Every file and folder there is."""
        return {str(path.relative_to(self.root)) for path in self.root.rglob("*")}

    def do(self, one: Instruction, other: Path) -> None:
        """Do one instruction; `other` is the root of the first stage."""
        match one.verb:
            case "WORKDIR":
                self.folder = one.rest
                self.place("").mkdir(parents=True, exist_ok=True)
            case "ENV":
                for word in one.words:
                    name, _, value = word.partition("=")
                    self.environment[name] = re.sub(
                        r"\$(\w+)", lambda known: self.environment[known[1]], self.here(value)
                    )
            case "COPY":
                self._copy(one.words, other)
            case "RUN":
                self._run(one.rest)
            case "ENTRYPOINT":
                self.entrypoint = one.words
            case "CMD":
                self.command = one.words

    def _copy(self, words: list[str], other: Path) -> None:
        *sources, to = words
        if sources[0].startswith("--from="):
            _link_tree(other / sources[1][1:], self.place(to))
            _tell_where_it_is(self.root, was=other)
            return
        for source in sources:
            is_folder = (REPOSITORY / source).is_dir()
            for file in context(source):
                target = self.place(to) / (file.relative_to(source) if is_folder else file.name)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(REPOSITORY / file, target)

    def _run(self, line: str) -> None:
        shell = ["/bin/sh", "-c", self.here(line)]
        done = subprocess.run(
            shell, cwd=self.place(""), env=self.environment, capture_output=True, text=True, umask=0o022
        )
        assert done.returncode == 0, f"RUN {line}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@contextmanager
def built(folder: Path, account: Account | None) -> Iterator[dict[str, Image]]:
    """The images that the Dockerfile describes, by the names of their stages; none can be written when it is complete."""
    build, *rest = stages()
    before = folder / build.name
    _with_a_kept_layer(build, before, account)
    images = {stage.name: _image(stage, folder / stage.name, before, account) for stage in rest}
    shutil.rmtree(before)
    roots = [image.root for image in images.values()]
    places = [
        place for root in roots for place in (root, *root.rglob("*")) if place.is_dir() and not place.is_symlink()
    ]
    for place in places:
        place.chmod(0o555)
    try:
        yield images
    finally:
        for place in places:
            place.chmod(0o755)


def _image(stage: Stage, root: Path, before: Path, account: Account | None) -> Image:
    """What a stage describes that takes from the first one, whose root is `before`."""
    image = _based(root, account)
    for one in stage.instructions:
        image.do(one, before)
    if account is not None:
        uid, gid = map(int, stage.last("USER").rest.split(":"))
        image.user = {"user": uid, "group": gid, "extra_groups": []}
    return image


def _with_a_kept_layer(build: Stage, root: Path, account: Account | None) -> Image:
    """The first stage, whose first RUN is not done again while nothing has changed that went into it."""
    first = [one.verb for one in build.instructions].index("RUN") + 1
    kept = _KEPT / _digest(build.instructions[:first], account)
    _KEPT.mkdir(exist_ok=True)
    with (_KEPT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests may be at it
        if not (kept / "complete").exists():
            for old in _KEPT.glob("*/"):
                shutil.rmtree(old)
            made = _based(kept / "root", account)
            for one in build.instructions[:first]:
                made.do(one, root)
            (kept / "complete").touch()
        _link_tree(kept / "root", root)
    _tell_where_it_is(root, was=kept / "root")
    image = _based(root, account)
    for number, one in enumerate(build.instructions):
        if number >= first or one.verb in {"WORKDIR", "ENV"}:  # what the rest left is in the layer
            image.do(one, root)
    return image


def _digest(instructions: list[Instruction], account: Account | None) -> str:
    """What tells a layer from another."""
    digest = hashlib.sha256(f"{sys.version} {sys.base_prefix} {account}".encode())
    for one in instructions:
        digest.update(f"{one.verb} {one.rest}\n".encode())
        for source in one.words[:-1] if one.verb == "COPY" else ():
            for file in context(source):
                digest.update((REPOSITORY / file).read_bytes())
    return digest.hexdigest()[:16]


def _based(root: Path, account: Account | None) -> Image:
    """A stage that begins: this machine's Python is where the base image has its own."""
    local = root / "usr" / "local"
    program = Path(sys.executable).resolve()
    environment = {"PATH": f"{local / 'bin'}:{os.defpath}", "HOME": str(root)}  # Docker's HOME of a number is the root
    if account is not None and not runs(str(program), account):
        environment["LD_LIBRARY_PATH"] = str(local / "lib")
        program = local / "bin" / program.name if local.exists() else Path(copy_python(local))
    (local / "bin").mkdir(parents=True, exist_ok=True)
    if not (local / "bin" / "python").is_symlink():
        (local / "bin" / "python").symlink_to(program)
    return Image(root, {}, environment)


def _tell_where_it_is(root: Path, was: Path) -> None:
    """Environments know their own path, which in an image does not change."""
    for link in [path for path in root.rglob("*") if path.is_symlink()]:
        if (target := str(link.readlink())).startswith(f"{was}/"):
            link.unlink()
            link.symlink_to(target.replace(str(was), str(root), 1))
    for file in [*root.glob("opt/*/bin/*"), *root.glob("opt/*/pyvenv.cfg")]:
        if file.is_file() and not file.is_symlink() and str(was) in (text := file.read_text()):
            mode = file.stat().st_mode
            file.unlink()  # the layer's is the same file
            file.write_text(text.replace(str(was), str(root)))
            file.chmod(mode)


def _link_tree(tree: Path, to: Path) -> None:
    shutil.copytree(tree, to, symlinks=True, copy_function=_link_or_copy, dirs_exist_ok=True)


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
