"""Builds trainer images from this machine's own Python: no registry, no base image.

In each are the interpreter with its standard library and the C libraries that they are linked to.
The stand-in's has the few packages that the trainer needs besides torch, and the tests' stand-in
for its training loop. The whole trainer's has all packages, and is the trainer as it is.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path

from tests.node.cluster import SCRIPT

IMAGE = "dpmoe.test/trainer:1"
"""A tag other than `latest`, so that the kubelet takes what is there and pulls nothing."""

WHOLE_IMAGE = "dpmoe.test/whole-trainer:1"
USER = 65532
"""Whom the whole trainer runs as; hostPath volumes know no fsGroup."""

PACKAGES = (
    "annotated_types",
    "dpmoe_trainer",
    "pydantic",
    "pydantic_core",
    "tqdm",
    "typing_extensions",
    "typing_inspection",
)
LEFT_OUT = shutil.ignore_patterns(
    "*.opt-?.pyc", "_test*", "_tkinter*", "config-*", "dist-packages", "ensurepip", "idlelib",
    "lib2to3", "pydoc_data", "site-packages", "test", "tests", "tkinter", "turtledemo",
)  # fmt: skip
NOT_THE_TRAINERS = ("kubernetes", "llvmlite", "matplotlib", "numba", "pip")
"""Large packages of the operator, which the trainer would not import."""

VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
PYTHON = Path("/python/bin", VERSION)
SITE_PACKAGES = Path("/python/lib", VERSION, "site-packages")
"""Where they are in an image."""


def build_image(folder: Path) -> Path:
    """Build the stand-in's image in a folder; the archive, as `docker load` would take it."""
    binaries = _copy_python(folder)
    for package in PACKAGES:
        _copy_package(package, folder / SITE_PACKAGES.relative_to("/"))
    content = [f"{Path(__file__).with_name('trainer.py')}:/trainer.py"]
    binaries += (folder / SITE_PACKAGES.relative_to("/")).rglob("*.so")
    return _pack(folder, IMAGE, binaries, content, [str(PYTHON), "/trainer.py"])


def build_whole_image(folder: Path) -> Path:
    """Build the whole trainer's image in a folder; the archive."""
    binaries = _copy_python(folder)
    packages = [path for path in _installed() if path.name not in NOT_THE_TRAINERS]
    content = [f"{path}:{SITE_PACKAGES / path.name}" for path in packages]
    binaries += [path for package in packages for path in package.rglob("*.so*")]
    # Who looks into a container finds it as in the image of the Dockerfile.
    (folder / "link").symlink_to(PYTHON)
    content += [f"{folder / 'link'}:/usr/local/bin/python"]
    options = ["--user", f"{USER}:{USER}", "--env", "PYTHONDONTWRITEBYTECODE=1"]
    entrypoint = [str(PYTHON), "-m", "dpmoe_trainer"]
    return _pack(folder, WHOLE_IMAGE, binaries, [*options, *content], entrypoint)


def _copy_python(folder: Path) -> list[Path]:
    """Copy the interpreter and its standard library into a folder; their binaries."""
    library = folder / SITE_PACKAGES.parent.relative_to("/")
    shutil.copytree(sysconfig.get_path("stdlib"), library, ignore=LEFT_OUT)
    interpreter = folder / PYTHON.relative_to("/")
    interpreter.parent.mkdir()
    shutil.copy(Path(sys.executable).resolve(), interpreter)
    return [interpreter, *library.rglob("*.so")]


def _installed() -> list[Path]:
    """Every package that is installed here, and the trainer, which may be elsewhere."""
    installed = Path(sysconfig.get_path("purelib"))
    trainer = importlib.util.find_spec("dpmoe_trainer")
    assert trainer is not None
    assert trainer.origin is not None
    return [*sorted(installed.iterdir()), Path(trainer.origin).parent]


def _pack(
    folder: Path, name: str, binaries: Iterable[Path], more: Sequence[str], entrypoint: list[str]
) -> Path:
    """Pack a folder's Python, and more, with what the binaries are linked to."""
    loader, libraries = _linked(binaries)
    (folder / "lib").mkdir()
    for path in libraries:
        shutil.copy(path, folder / "lib")
    archive = folder / "trainer.tar"
    options = ["--entrypoint", json.dumps(entrypoint)]
    for variable in ("LD_LIBRARY_PATH=/libraries", "PYTHONHOME=/python"):
        options += ["--env", variable]
    content = [f"{folder / 'python'}:/python", f"{folder / 'lib'}:/libraries"]
    content += [f"{loader.resolve()}:{loader}"]
    maker = SCRIPT.with_name("mkimage.py")
    command = [sys.executable, maker, name, archive, *options, *more, *content]
    subprocess.run(command, check=True)
    return archive


def _copy_package(name: str, target: Path) -> None:
    """Copy an importable package or module from wherever this Python finds it."""
    spec = importlib.util.find_spec(name)
    assert spec is not None, name
    assert spec.origin is not None, name
    origin = Path(spec.origin)
    if spec.submodule_search_locations:
        shutil.copytree(origin.parent, target / name, ignore=LEFT_OUT)
    else:
        shutil.copy(origin, target)


def _linked(binaries: Iterable[Path]) -> tuple[Path, list[Path]]:
    """The dynamic loader, and the system's libraries that binaries are linked to."""
    result = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False)
    paths = {Path(path) for path in re.findall(r"(/\S+) \(0x", result.stdout)}
    [loader] = [path for path in paths if path.name.startswith("ld-linux")]
    installed = Path(sysconfig.get_path("purelib"))
    return loader, sorted(path for path in paths - {loader} if installed not in path.parents)
