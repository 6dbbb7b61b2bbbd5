"""What this process may use of its machine, and how it uses the memory.

The limits are those of its container, by cgroup v2 or v1; it sees all processors and all memory of
its node. A pod of one processor that starts a thread for each of the node's 64 runs many times
slower than with one, and a cache sized by the node's memory gets the pod killed, after its privacy
was spent.
"""

import ctypes
import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its own limits."""

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def processors(cgroup: Path = CGROUP) -> int:
    """Processors to use: at least one, and no more than the container's quota."""
    usable = len(os.sched_getaffinity(0))
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if not quota:
        first = cgroup / "cpu"
        quota, period = _read(first / "cpu.cfs_quota_us"), _read(first / "cpu.cfs_period_us")
    if not (quota.isdecimal() and period.isdecimal()):
        return usable
    return max(1, min(usable, math.ceil(int(quota) / int(period))))


def memory(cgroup: Path = CGROUP) -> int:
    """Bytes of memory that the process may use at most."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read(cgroup / "memory.max") or _read(cgroup / "memory" / "memory.limit_in_bytes")
    return min(physical, int(limit)) if limit.isdecimal() else physical


def keep_freed_memory() -> None:
    """Has the C library keep what the process frees, and take large blocks from it too.

    A step of training needs what the one before it freed. By default glibc gives blocks of more
    than 32 MiB back to the system at once, and the system clears each page when it is next touched,
    which was measured to cost a tenth of a step. Where the C library is another one, nothing
    changes.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _read(file: Path) -> str:
    """A limit as the kernel writes it, "max" or -1 for none; nothing where there is no file."""
    try:
        return file.read_text().strip()
    except OSError:
        return ""
