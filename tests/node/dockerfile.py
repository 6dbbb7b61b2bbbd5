"""Builds a stage of a Dockerfile as root on Debian, without a container engine.

The instructions are the Dockerfile's own, each run in a folder by chroot. Only the base differs: in
place of an image of a registry, Debian's packages of the same release and of the same Python.
Stages are named by the hash of all that goes into them, so what is there is not built again.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

RELEASE = "bookworm"
BASE = ("debootstrap", "--variant=minbase", "--include=python3,python3-venv", RELEASE)
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
PROXIES = ("http_proxy", "https_proxy", "no_proxy")


@dataclass(frozen=True)
class Stage:
    """What a stage has come to: its files and how a container of it starts."""

    root: Path
    environment: Mapping[str, str] = field(default_factory=lambda: {"PATH": PATH})
    directory: str = "/"
    user: str = ""
    entrypoint: tuple[str, ...] = ()


Instruction = tuple[str, str]


class Builder:
    """Builds stages into a folder.

    Args:
        file: the Dockerfile; its own folder is the context.
        folder: where stages are put.
        wheels: the packages that pip finds, in place of an index.
    """

    def __init__(self, file: Path, folder: Path, wheels: Path) -> None:
        self._context = file.parent
        self._folder = folder
        self._wheels = wheels
        self._stages = _parse(file.read_text())

    def digest(self, name: str) -> str:
        """Of all that goes into a stage, but for what Debian and an index have of it today."""
        if name not in self._stages:
            return _hash(*BASE, self._wheels.name)
        parent, instructions = self._stages[name]
        return _hash(self.digest(parent), *(self._hash(each) for each in instructions))

    def _hash(self, instruction: Instruction) -> str:
        word, rest = instruction
        if word != "COPY":
            return _hash(word, rest)
        option, sources, _ = _copied(rest)
        if option is not None:
            return _hash(rest, self.digest(option))
        return _hash(rest, *(each for name in sources for each in _content(self._context / name)))

    def build(self, name: str) -> Stage:
        """Build a stage, and before it those that it is made from."""
        if name not in self._stages:
            return self._base()
        parent, instructions = self._stages[name]
        stage = self.build(parent)
        root = self._folder / f"{name}-{self.digest(name)}"
        with _made(root) as unfinished:
            if unfinished is not None:
                _copy(stage.root, unfinished)
            for instruction in instructions:
                stage = self._apply(instruction, stage, unfinished)
        return replace(stage, root=root)

    def forget(self, *kept: str) -> None:
        """Remove what was built of all stages but some, and all that was built of other files."""
        names = {f"{name}-{self.digest(name)}" for name in kept}
        for folder in self._folder.iterdir():
            if folder.name not in names:
                # Not under its name while it is no longer whole.
                doomed = folder.rename(folder.with_name(f".{folder.name.lstrip('.')}"))
                subprocess.run(["rm", "--recursive", "--force", doomed], check=True)

    def _base(self) -> Stage:
        root = self._folder / f"base-{self.digest('base')}"
        with _made(root) as unfinished:
            if unfinished is not None:
                _call(*BASE, unfinished)
                # What Debian calls python3 the image of a registry calls python.
                (unfinished / "usr/local/bin/python").symlink_to("/usr/bin/python3")
                shutil.rmtree(unfinished / "var/cache/apt/archives")
        return Stage(root)

    def _apply(self, instruction: Instruction, stage: Stage, root: Path | None) -> Stage:
        """What a stage is after an instruction; its files change only where `root` is given."""
        word, rest = instruction
        if word == "ENV":
            known = {f"${name}": value for name, value in stage.environment.items()}
            pairs = (pair.partition("=")[::2] for pair in rest.split())
            new = {
                name: re.sub(r"\$\w+", lambda found: known[found[0]], value)
                for name, value in pairs
            }
            return replace(stage, environment={**stage.environment, **new})
        if word == "WORKDIR":
            if root is not None:
                (root / rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
            return replace(stage, directory=rest)
        if word == "USER":
            return replace(stage, user=rest)
        if word == "ENTRYPOINT":
            return replace(stage, entrypoint=tuple(json.loads(rest)))
        if root is not None and word == "COPY":
            option, sources, target = _copied(rest)
            origin = self._context if option is None else self.build(option).root
            into = root / os.path.join(stage.directory, target).lstrip("/")
            for source in sources:
                place = into / Path(source).name if target.endswith("/") else into
                _copy(origin / source.lstrip("/"), place)
            if option is None:
                for cache in [*into.rglob("__pycache__")]:
                    shutil.rmtree(cache)
        elif root is not None and word == "RUN":
            self._run(rest, stage, root)
        assert word in ("ARG", "CMD", "COPY", "RUN"), f"{word} is not known here"
        return stage

    def _run(self, command: str, stage: Stage, root: Path) -> None:
        """Run a command in a stage, with this machine's network, and the wheels for pip."""
        wheels = root / "wheels"
        _copy(self._wheels, wheels)
        shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
        environment = {name: os.environ[name] for name in PROXIES if name in os.environ}
        environment |= {"DEBIAN_FRONTEND": "noninteractive", **stage.environment}
        environment |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels"}
        variables = [f"{name}={value}" for name, value in environment.items()]
        shell = ["sh", "-c", f'cd "{stage.directory}" && {command}']
        _call("chroot", root, "env", "-i", *variables, *shell)
        shutil.rmtree(wheels)
        (root / "etc/resolv.conf").unlink()


def _call(*command: str | Path) -> None:
    """Run a command; says how long it took."""
    begin = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{command}: {result.stdout[-2000:]}{result.stderr[-2000:]}"
    print(f"{time.monotonic() - begin:5.0f} s  {str(command[-1])[:80]}", flush=True)


def _parse(text: str) -> dict[str, tuple[str, list[Instruction]]]:
    """Each stage's parent and instructions, by its name."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    stages: dict[str, tuple[str, list[Instruction]]] = {}
    instructions: list[Instruction] = []
    for line in re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines():
        word, rest = line.split(maxsplit=1)
        if word == "FROM":
            parent, name = re.fullmatch(r"(\S+) AS (\S+)", rest).groups()  # type: ignore[union-attr]
            instructions = []
            stages[name] = parent, instructions
        else:
            instructions.append((word, rest))
    return stages


def _copied(rest: str) -> tuple[str | None, list[str], str]:
    """What COPY names: a stage, or None for the context; the sources; the target."""
    *sources, target = rest.split()
    if sources[0].startswith("--from="):
        return sources[0].removeprefix("--from="), sources[1:], target
    return None, sources, target


def _copy(source: Path, target: Path) -> None:
    """Copy a file or a folder's content, with owners and modes."""
    target.parent.mkdir(parents=True, exist_ok=True)
    origin = str(source)
    if source.is_dir():
        target.mkdir(exist_ok=True)
        origin += "/."
    subprocess.run(["cp", "--archive", "--reflink=auto", origin, target], check=True)


def _content(path: Path) -> Iterator[str]:
    """Names and hashes of a file, or of the files below a folder, but for compiled ones."""
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    for file in files:
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".so":
            yield f"{file.relative_to(path.parent)} {hashlib.sha256(file.read_bytes()).hexdigest()}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@contextmanager
def _made(folder: Path) -> Iterator[Path | None]:
    """A folder to fill that gets its name once it is whole; None where it is there already."""
    if folder.exists():
        yield None
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    unfinished.chmod(0o755)
    try:
        yield unfinished
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
