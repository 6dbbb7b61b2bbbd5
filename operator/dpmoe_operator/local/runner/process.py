"""Processes that never outlive the runner.

Each leads a session of its own, so that a whole group can be killed, and three things see to it
that none is left: the runner kills the group when the main process ends, the kernel kills the main
process when the runner dies, and the guardian kills the rest.
"""

import asyncio
import contextlib
import ctypes
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from dpmoe_operator.local.runner import guardian

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None)


class Processes:
    """Starts processes and stands by them. Use it as a context manager, in the main thread.

    The main thread, since the kernel takes the death of the thread that started a process for the
    death of its parent.
    """

    def __init__(self) -> None:
        self.token = secrets.token_hex(8)
        self._guardian: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self._guardian = subprocess.Popen(
            [sys.executable, "-I", "-S", guardian.__file__, self.token],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        assert self._guardian is not None
        assert self._guardian.stdin is not None
        self._guardian.stdin.close()
        self._guardian.wait()

    async def start(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        *,
        pod: str,
        directory: Path,
        log: Path,
    ) -> "Process":
        """Starts a program.

        Args:
            argv: the program, looked up on the PATH of `env`, and its arguments.
            env: its whole environment.
            pod: the uid of the pod that it belongs to.
            directory: its working directory.
            log: the file to which its output and errors are appended.

        Raises:
            OSError: it can't be started.
        """
        with log.open("ab") as output:
            log_start = output.tell()
            process = await asyncio.create_subprocess_exec(
                *argv,
                env={**env, guardian.MARK: f"{self.token}/{pod}"},
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                preexec_fn=_die_with_parent if sys.platform == "linux" else None,
            )
        return Process(process, pod, log_start)


class Process:
    """The main process of a container; what it prints begins at `log_start` in its log."""

    def __init__(self, process: asyncio.subprocess.Process, pod: str, log_start: int):
        self.log_start = log_start
        self._process = process
        self._pod = pod

    async def wait(self) -> int:
        """Waits for its end; the exit code, or 128 and the number of the signal that killed it."""
        code = await self._process.wait()
        return code if code >= 0 else 128 - code

    def terminate(self) -> None:
        """Asks the main process to stop, as a kubelet does; it may tell its children."""
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGTERM)

    async def kill_all(self) -> None:
        """Kills it and all that it has started, as the end of a container would."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        await asyncio.to_thread(guardian.kill_marked, pod=self._pod)


def _die_with_parent() -> None:
    """Runs in the child between fork and exec: one system call and nothing else."""
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
