"""Compiles the kernels with the system's C++ compiler, once a machine and version.

A compiled library is named by the hash of its sources and flags, so it is found again without a
compiler: first beside the sources, where an image may bring it (`python -m
dpmoe_trainer.dp.kernels` compiles it there, for all levels), then in the user's cache. It targets a
level of the x86-64 instruction set that this processor has, not the very processor, so that an
image's libraries run on any machine.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import stat
import subprocess
import tempfile
from functools import cache
from pathlib import Path

SOURCES = Path(__file__).parent

_COMPILERS = ("c++", "g++", "clang++")
_SECONDS = 120
_FLAGS = (
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-fno-math-errno",
    "-fno-trapping-math",
)
_LEVELS = {
    "x86-64-v4": {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"},
    "x86-64-v3": {"avx2", "bmi1", "bmi2", "f16c", "fma", "movbe"},
    "x86-64-v2": {"cx16", "popcnt", "sse4_1", "sse4_2", "ssse3"},
}
_LOWEST = "x86-64"


class CannotBuild(Exception):
    """There is no compiled library, and none can be made; says why."""


def find_or_build() -> Path:
    """The compiled library: an image's, the cache's, or a new one in the cache.

    Raises:
        CannotBuild: there is no compiler, or it failed.
    """
    name = library_name()
    if (SOURCES / name).is_file():
        return SOURCES / name
    cache = _cache()
    if cache is not None and (cache / name).is_file():
        return cache / name
    compiler = _compiler()
    return build(cache or Path(tempfile.mkdtemp(prefix="dpmoe-kernels-")), compiler)


def build(folder: Path, compiler: str | None = None, level: str | None = None) -> Path:
    """Compiles the library into a folder, for this processor's level unless another is named.

    Raises:
        CannotBuild: there is no compiler, or it failed.
    """
    compiler = compiler or _compiler()
    # Several processes may do this at once: each writes its own file, and the last one stays.
    descriptor, unfinished = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(descriptor)
    command = [compiler, *_flags(level), *map(str, sorted(SOURCES.glob("*.cpp"))), "-o", unfinished]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=_SECONDS)
        os.chmod(unfinished, 0o755)
        return Path(unfinished).replace(folder / library_name(level))
    except subprocess.CalledProcessError as error:
        raise CannotBuild(f"{compiler} failed: {error.stderr.strip()[-500:]}") from error
    except subprocess.TimeoutExpired as error:
        raise CannotBuild(f"{compiler} took more than {_SECONDS} s") from error
    finally:
        Path(unfinished).unlink(missing_ok=True)


def _compiler() -> str:
    found = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if found is None:
        raise CannotBuild(f"no C++ compiler ({', '.join(_COMPILERS)}) on the path")
    return found


def levels() -> tuple[str | None, ...]:
    """All levels of this machine's architecture, the processor's own or not."""
    return (*_LEVELS, _LOWEST) if platform.machine() == "x86_64" else (None,)


def library_name(level: str | None = None) -> str:
    """The file name of the library of these sources, for this processor unless a level is named."""
    digest = hashlib.sha256(" ".join(_flags(level)).encode())
    for source in sorted((*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"))):
        digest.update(source.read_bytes())
    return f"kernels-{platform.machine()}-{digest.hexdigest()[:16]}.so"


@cache
def is_slow_in_torch() -> bool:
    """Whether torch's library of products (MKL) does not use what this processor can do.

    It has AVX-512 for Intel's processors only.
    """
    if _level() != "x86-64-v4":
        return False
    return "GenuineIntel" not in Path("/proc/cpuinfo").read_text()


def _flags(level: str | None) -> tuple[str, ...]:
    level = level or _level()
    return (*_FLAGS, f"-march={level}") if level else _FLAGS


def _level() -> str | None:
    """The highest level that this processor has; None for other architectures."""
    if platform.machine() != "x86_64":
        return None
    features = _features()
    return next((level for level, needed in _LEVELS.items() if needed <= features), _LOWEST)


def _features() -> set[str]:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return {word for line in lines if line.startswith("flags") for word in line.split()}


def _cache() -> Path | None:
    """A folder that only this user may write to, as what lies there is loaded as code; or None."""
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(home) / "dpmoe" / "kernels"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
        shared = status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
        if status.st_uid == os.getuid() and not shared and os.access(folder, os.W_OK):
            return folder
    except OSError:
        pass  # A read-only file system, or a home that is not the user's.
    return None
