"""The trainer's own image: the Dockerfile's stage `trainer`, with torch and the compiled kernels.

It takes minutes to build, so it is kept in the user's cache until something in it changes. What
pip installs there is downloaded by this machine's pip, with its settings.
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.node.cluster import ROOT, SCRIPT
from tests.node.dockerfile import Builder, Stage
from tests.node.image import WHOLE_IMAGE

PYTHON = "3.11"
"""The base's."""

TOOLS = ("debootstrap", "chroot")


def lacking() -> list[str]:
    """What this machine would need to build the image, in words; empty if nothing."""
    return [tool for tool in TOOLS if shutil.which(tool) is None]


@contextmanager
def trainer_image() -> Iterator[Path]:
    """The image as an archive, which stays as long as the context does."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpmoe" / "images"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield _archive(cache)


def _archive(cache: Path) -> Path:
    wheels = cache / f"wheels-{_digest_of_packages()}"
    builder = Builder(ROOT / "Dockerfile", cache / "stages", wheels)
    archive = cache / f"trainer-{builder.digest('trainer')}.tar"
    if not archive.exists():
        for old in cache.glob("trainer-*"):
            old.unlink()
        if not wheels.exists():
            _download(wheels)
        stage = builder.build("trainer")
        _pack(stage, archive)
        builder.forget("base", "runtime")
    return archive


def _digest_of_packages() -> str:
    """Of what decides on the packages that the image needs."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    chosen = [project["build-system"], project["project"], platform.machine()]
    text = json.dumps(chosen) + (ROOT / "constraints.txt").read_text()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _download(wheels: Path) -> None:
    """Have pip download the packages, and those that build this one."""
    for old in wheels.parent.glob("wheels-*"):
        shutil.rmtree(old)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    needs = project["project"]["dependencies"]
    needs += project["project"]["optional-dependencies"]["trainer"]
    with tempfile.TemporaryDirectory(dir=wheels.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", f"{folder}/wheels"]
        pip += ["--only-binary", ":all:", "--python-version", PYTHON]
        pinned = ["--constraint", str(ROOT / "constraints.txt")]
        subprocess.run([*pip, *project["build-system"]["requires"]], check=True)
        subprocess.run([*pip, *pinned, *needs], check=True)
        Path(folder, "wheels").rename(wheels)


def _pack(stage: Stage, archive: Path) -> None:
    """Pack a stage as `docker load` would take it."""
    command = ["--user", stage.user, "--entrypoint", json.dumps(stage.entrypoint)]
    for name, value in stage.environment.items():
        command += ["--env", f"{name}={value}"]
    # What the runtime brings itself; of the devices it would be no more than a copy.
    own = ("dev", "proc", "sys")
    parts = [part for part in sorted(stage.root.iterdir()) if part.name not in own]
    command += [f"{part}:/{part.name}" for part in parts]
    unfinished = archive.with_suffix(".unfinished")
    maker = SCRIPT.with_name("mkimage.py")
    subprocess.run([sys.executable, maker, WHOLE_IMAGE, unfinished, *command], check=True)
    unfinished.rename(archive)


if __name__ == "__main__":
    with trainer_image() as made:
        print(made)
