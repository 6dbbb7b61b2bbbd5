"""What this process may use of its machine, by the limits of its container (cgroup v2).

A container sees all processors and all memory of its node. A pod of one processor that starts a
thread for each of the node's 64 runs many times slower than with one, and a cache sized by the
node's memory gets the pod killed, after its privacy was spent.
"""

import math
import os
from pathlib import Path

CGROUP = Path("/sys/fs/cgroup")
"""Where a container finds its own limits."""


def processors(cgroup: Path = CGROUP) -> int:
    """Processors to use: at least one, and no more than the container's quota."""
    usable = len(os.sched_getaffinity(0))
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if not (quota.isdecimal() and period.isdecimal()):
        return usable
    return max(1, min(usable, math.ceil(int(quota) / int(period))))


def memory(cgroup: Path = CGROUP) -> int:
    """Bytes of memory that the process may use at most."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _read(cgroup / "memory.max")
    return min(physical, int(limit)) if limit.isdecimal() else physical


def _read(file: Path) -> str:
    """A limit as the kernel writes it; "max" where there is none."""
    try:
        return file.read_text().strip()
    except OSError:
        return "max"
