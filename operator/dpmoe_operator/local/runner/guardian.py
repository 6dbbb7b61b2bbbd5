"""Kills what the runner started when the runner is gone, however it went.

A process of its own, started by path and with the standard library alone. It waits until its
standard input ends, which happens when the runner exits or is killed, and then kills every process
whose environment carries the runner's mark: children of children and other sessions too.

The mark is read from /proc, so all this needs Linux; elsewhere it does nothing.
"""

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

MARK = "DPMOE_LOCAL_PROCESS"
"""The environment variable that marks a process: the runner's token, a slash, the pod's uid."""


_ROUNDS = 200
_ROUND_SECONDS = 0.01


def kill_marked(token: str = "", pod: str = "") -> None:
    """Kills processes by their mark until none is left, or two seconds have passed.

    More than once, since a process may start another just before it dies.

    Args:
        token: only of the runner with this token; empty for any.
        pod: only of the pod with this uid; empty for any.
    """
    assert token or pod, "this would kill the processes of every runner"
    for _ in range(_ROUNDS):
        pids = list(_marked(token, pod))
        if not pids:
            return
        for pid in pids:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_ROUND_SECONDS)


def _marked(token: str, pod: str) -> Iterator[int]:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            environment = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        for variable in environment:
            name, _, mark = variable.decode(errors="replace").partition("=")
            if name == MARK and _matches(mark, token, pod):
                yield int(folder.name)


def _matches(mark: str, token: str, pod: str) -> bool:
    its_token, _, its_pod = mark.partition("/")
    return token in ("", its_token) and pod in ("", its_pod)


def main() -> None:
    """Waits for the end of standard input, then kills."""
    for stop in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(stop, signal.SIG_IGN)
    sys.stdin.buffer.read()
    kill_marked(token=sys.argv[1])


if __name__ == "__main__":
    main()
