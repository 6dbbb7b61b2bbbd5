"""Builds the trainer's image from this machine's own Python: no registry, no base image.

What is in it: the interpreter with its standard library, the C libraries that they are linked to,
the few packages that the trainer needs besides torch, the trainer, and the tests' stand-in for its
training loop.
"""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from tests.node.cluster import SCRIPT

IMAGE = "dpmoe.test/trainer:1"
"""A tag other than `latest`, so that the kubelet takes what is there and pulls nothing."""

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


def build_image(folder: Path) -> Path:
    """Build the image in a folder; the archive, as `docker load` would take it."""
    home = folder / "python"
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    library = home / "lib" / version
    shutil.copytree(sysconfig.get_path("stdlib"), library, ignore=LEFT_OUT)
    for package in PACKAGES:
        _copy_package(package, library / "site-packages")
    interpreter = home / "bin" / version
    interpreter.parent.mkdir()
    shutil.copy(Path(sys.executable).resolve(), interpreter)
    shutil.copy(Path(__file__).with_name("trainer.py"), folder)

    loader, libraries = _linked([interpreter, *library.rglob("*.so")])
    (folder / "lib").mkdir()
    for path in libraries:
        shutil.copy(path, folder / "lib")

    archive = folder / "trainer.tar"
    content = {"python": "/python", "lib": "/libraries", "trainer.py": "/trainer.py"}
    command = ["--entrypoint", json.dumps([f"/python/bin/{version}", "/trainer.py"])]
    for variable in ("LD_LIBRARY_PATH=/libraries", "PYTHONHOME=/python"):
        command += ["--env", variable]
    command += [f"{folder / name}:{place}" for name, place in content.items()]
    command += [f"{loader.resolve()}:{loader}"]
    maker = SCRIPT.with_name("mkimage.py")
    subprocess.run([sys.executable, maker, IMAGE, archive, *command], check=True)
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
    """The dynamic loader, and the shared libraries that binaries are linked to."""
    result = subprocess.run(["ldd", *binaries], capture_output=True, text=True, check=False)
    paths = {Path(path) for path in re.findall(r"(/\S+) \(0x", result.stdout)}
    [loader] = [path for path in paths if path.name.startswith("ld-linux")]
    return loader, sorted(paths - {loader})
