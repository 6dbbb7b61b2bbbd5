"""A pod's entry where it holds more than one rank, or one of many: starts them and watches them.

A lost rank leaves the others waiting for it, and a stopped one looks alive. So each rank tells over
a pipe that it goes on; one that is silent for longer than the plan allows is killed, and where one
fails, the others are stopped. The pod's exit code is that of the rank that knows most.

The other way round, a rank whose supervisor is gone ends at its next sign of progress.
"""

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from dpmoe_trainer.contract import Environment, ExitCode, ParallelPlan
from dpmoe_trainer.environment import Pod, Worker
from dpmoe_trainer.errors import PeerLost
from dpmoe_trainer.machine import processors

PROGRAM = (sys.executable, "-m", "dpmoe_trainer")

GRACE_SECONDS = 10.0
"""How long ranks have to end, and rank 0 to report, once another has failed."""

STARTUP_SECONDS = 300.0
"""What a rank has until its first sign of progress, if the plan allows less: imports take long."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
"""What asks a process to stop; a rank is started with them held back until it can answer."""

_LOOK_SECONDS = 0.2


def world_problem(parallel: ParallelPlan, worker: Worker | None, pod: Pod | None) -> str | None:
    """Says where the ranks that were started are not those of the plan."""
    workers, processes = parallel.workers, parallel.processes
    planned = f"the plan has {parallel.world} ranks ({workers} workers × {processes} processes)"
    if worker is not None:
        if worker.world == parallel.world and worker.rank < worker.world:
            return None
        return (
            f"parallel: {planned}, and RANK is {worker.rank} of WORLD_SIZE {worker.world}; start "
            f"as many as the plan has"
        )
    if pod is not None:
        if (pod.nodes, pod.processes) == (workers, processes) and pod.node_rank < pod.nodes:
            return None
        return (
            f"parallel: {planned}, and this is pod {pod.node_rank} of PET_NNODES {pod.nodes} with "
            f"PET_NPROC_PER_NODE {pod.processes}; start as many as the plan has"
        )
    if workers == 1:
        return None
    return (
        f"parallel.workers: {planned}, and nothing tells which this is; start each pod with "
        f"PET_NNODES, PET_NODE_RANK and PET_MASTER_ADDR, use torchrun, or set workers to 1"
    )


def most_telling(codes: Sequence[int], asked: bool) -> ExitCode:
    """The exit code of a pod whose ranks ended with `codes`; a negative one is a signal's.

    Args:
        codes: of all ranks.
        asked: whether the pod was asked to stop; if not, ranks that stopped were only tidied up.
    """
    known = {code for code in ExitCode if code in codes}
    refusals = sorted(code for code in known if ExitCode.BAD_PLAN <= code < ExitCode.PEER_LOST)
    if refusals:
        return refusals[0]
    crashed = ExitCode.CRASHED in known or any(code > 0 and code not in known for code in codes)
    # One that was asked so early that it could not answer stopped all the same.
    stopped = ExitCode.STOPPED in known or -signal.SIGTERM in codes
    killed = any(code < 0 for code in codes)
    ranking = (
        (ExitCode.HUNG, ExitCode.HUNG in known),
        (ExitCode.CRASHED, crashed),
        (ExitCode.STOPPED, asked and stopped),
        (ExitCode.PEER_LOST, ExitCode.PEER_LOST in known),
        (ExitCode.CRASHED, killed),
        (ExitCode.STOPPED, stopped),
    )
    return next((code for code, holds in ranking if holds), ExitCode.COMPLETED)


def is_silent(now: float, heard: float, beaten: bool, timeout: float) -> bool:
    """Whether a rank gave no sign for too long.

    Args:
        now: the time, in seconds.
        heard: of its last sign, or of its start.
        beaten: whether it gave any.
        timeout: what the plan allows.
    """
    return now - heard > (timeout if beaten else max(timeout, STARTUP_SECONDS))


def heartbeat(descriptor: int | None) -> Callable[[], None]:
    """What a rank calls at every sign of progress; without a supervisor, nothing happens.

    Raises:
        PeerLost: by the function; the supervisor is gone.
    """
    if descriptor is None:
        return lambda: None
    os.set_blocking(descriptor, False)
    os.set_inheritable(descriptor, False)

    def beat() -> None:
        try:
            os.write(descriptor, b".")
        except BlockingIOError:
            pass  # the supervisor is slow, and has much to read
        except OSError as error:
            raise PeerLost("the process that started this rank is gone") from error

    return beat


@dataclass
class _Child:
    """One rank's process. `ended` is its exit code, once it has one."""

    rank: int
    process: subprocess.Popen[bytes]
    pipe: int
    heard: float
    beaten: bool = False
    hung: bool = False
    ended: int | None = None


class Supervisor:
    """Runs the ranks of one pod.

    Args:
        parallel: the plan's ranks.
        pod: which pod this is; None for the only one, on this machine.
        arguments: the trainer's command line.
        program: what to start.
    """

    def __init__(
        self,
        parallel: ParallelPlan,
        pod: Pod | None,
        arguments: Sequence[str],
        program: Sequence[str] = PROGRAM,
    ) -> None:
        self._parallel = parallel
        self._pod = pod or Pod(1, parallel.processes, 0, "127.0.0.1", str(_free_port()))
        self._command = [*program, *arguments]
        self._children: list[_Child] = []
        self._pipes = selectors.DefaultSelector()
        self._why = ""

    def run(self, stopping: Callable[[], bool]) -> tuple[ExitCode, str]:
        """Runs the ranks to their end.

        Args:
            stopping: whether the pod was asked to stop.

        Returns:
            The pod's exit code, and what there is to say beyond the ranks' own words.
        """
        asked, deadline = False, float("inf")
        try:
            for local in range(self._parallel.processes):
                self._children.append(self._start(local))
            while alive := [child for child in self._children if child.ended is None]:
                self._listen()
                for child in alive:
                    self._look_after(child)
                if stopping() and not asked:
                    asked = True
                    self._signal(signal.SIGTERM)
                if deadline == float("inf") and self._failed(asked):
                    deadline = time.monotonic() + GRACE_SECONDS
                    self._signal(signal.SIGTERM)
                if time.monotonic() > deadline:
                    self._signal(signal.SIGKILL)
        finally:
            self._signal(signal.SIGKILL)
            for child in self._children:
                child.process.wait()
                os.close(child.pipe)
            self._pipes.close()
        codes = [child.ended for child in self._children if child.ended is not None]
        return most_telling(codes, asked), self._why

    def rank_0_was_killed(self) -> bool:
        """Whether rank 0 ran here and ended without a chance to report."""
        return any(
            child.rank == 0 and child.ended is not None and (child.ended < 0 or child.hung)
            for child in self._children
        )

    def _start(self, local: int) -> _Child:
        pod = self._pod
        rank = pod.node_rank * self._parallel.processes + local
        reading, writing = os.pipe()
        os.set_blocking(reading, False)
        own = {
            "RANK": rank,
            "LOCAL_RANK": local,
            "WORLD_SIZE": self._parallel.world,
            "LOCAL_WORLD_SIZE": self._parallel.processes,
            "MASTER_ADDR": pod.master_address,
            "MASTER_PORT": pod.master_port,
            str(Environment.HEARTBEAT): writing,
        }
        threads = max(1, processors() // self._parallel.processes)
        environment = {"OMP_NUM_THREADS": str(threads)} | os.environ
        environment |= {name: str(value) for name, value in own.items()}
        # What is held back here is held back there too, and waits there for `StopFlag`.
        held = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            process = subprocess.Popen(self._command, env=environment, pass_fds=(writing,))
        except OSError:
            os.close(reading)
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held)
            os.close(writing)
        child = _Child(rank, process, reading, time.monotonic())
        self._pipes.register(reading, selectors.EVENT_READ, child)
        return child

    def _listen(self) -> None:
        """Waits a moment for signs of progress."""
        if not self._pipes.get_map():
            time.sleep(_LOOK_SECONDS)
        for key, _ in self._pipes.select(_LOOK_SECONDS):
            child: _Child = key.data
            if os.read(child.pipe, 65536):
                child.heard, child.beaten = time.monotonic(), True
            else:
                self._pipes.unregister(child.pipe)

    def _look_after(self, child: _Child) -> None:
        """Notes a child's end, or kills it for its silence."""
        code = child.process.poll()
        if code is not None:
            child.ended = code
            return
        timeout = self._parallel.timeout_seconds
        if is_silent(time.monotonic(), child.heard, child.beaten, timeout):
            child.process.kill()
            child.process.wait()
            child.ended, child.hung = ExitCode.HUNG, True
            self._why = (
                f"rank {child.rank} made no progress for {timeout} s (parallel.timeoutSeconds) and "
                f"was killed"
            )

    def _failed(self, asked: bool) -> bool:
        """Whether a rank's end means that of the others."""
        fine = {None, int(ExitCode.COMPLETED)}
        fine |= {int(ExitCode.STOPPED), -signal.SIGTERM} if asked else set()
        return any(child.ended not in fine for child in self._children)

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children:
            if child.ended is None:
                with suppress(ProcessLookupError):
                    child.process.send_signal(number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
