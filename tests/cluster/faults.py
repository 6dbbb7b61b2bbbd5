"""What may go wrong with a running job on one machine: its processes, found and signalled."""

import json
import os
import random
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.cluster.world import OWNER, TEAM, World

from dpmoe_operator.launch.launching import workload_name
from dpmoe_operator.local.runner.guardian import MARK
from dpmoe_trainer.contract import JobReference

CLAIM = "saved"
PATIENCE_SECONDS = 300.0
VICTIMS = ("rank 0", "rank 1", "all ranks", "pod 0", "pod 1", "runner", "operator")
"""Whom a kill may hit: a rank's process, the process that started it, or who runs the cluster."""


class RunningJob:
    """A job of two pods of one rank each, as its journal and the process table show it."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.uid: str = world.job(name)["metadata"]["uid"]
        reference = JobReference(namespace=TEAM, name=name, uid=self.uid)
        self.workload = workload_name(reference)
        self.folder = world.stack.volumes / OWNER / CLAIM / TEAM / self.uid

    def attempts(self) -> list[Path]:
        """The journals of its attempts, oldest first."""
        return sorted(self.folder.glob("*.journal"))

    def steps(self, attempt: int) -> list[int]:
        """The steps that an attempt, from 1, has drawn, from 1."""
        path = self.folder / f"attempt-{attempt:04d}.journal"
        *lines, _ = path.read_text().split("\n") if path.exists() else [""]
        return [record["drawn"] for record in map(json.loads, lines) if "drawn" in record]

    def drawn(self, attempt: int) -> int:
        """The step that an attempt has reached; 0 before it takes one."""
        return max(self.steps(attempt), default=0)

    def checkpoints(self) -> list[Path]:
        """Its checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("step-*") if not path.suffix)

    def wait_for_step(self, step: int, attempt: int = 1) -> int:
        """Return as soon as that attempt, or a later one, has drawn that step; which one it was.

        A machine with much else to do may lose an attempt more than a test takes from it.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        while not self.is_over():
            newest = len(self.attempts())
            if newest >= attempt and self.drawn(newest) >= step:
                return newest
            self.world.stack.supervise()
            assert time.monotonic() < deadline, f"{self.name} never drew step {step} in {attempt}"
            time.sleep(0.02)
        return len(self.attempts())

    def is_over(self) -> bool:
        """Whether its journal says that it is complete."""
        return any('"completed"' in path.read_text() for path in self.attempts()[-1:])

    def processes(self, *, ranks: bool, index: int | None = None) -> list[int]:
        """Process ids of its ranks, or of what started them, of all pods or of one."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            environment = _environment(folder)
            if not environment.get("HOSTNAME", "").startswith(self.workload):
                continue
            if MARK not in environment or ("RANK" in environment) != ranks:
                continue
            if index is None or environment.get("PET_NODE_RANK") == str(index):
                found.append(int(folder.name))
        return found

    def settled(self) -> list[Any]:
        """Its settlements in the ledger; more than one would be a payment too much."""
        return [s for s in self.world.records("settled") if s["job"]["uid"] == self.uid]

    def end(self) -> Any:
        """Its status, once it has ended."""
        return self.world.until_state(self.name, "Completed", "Failed", seconds=PATIENCE_SECONDS)


def victims(job: RunningJob, victim: str) -> list[int]:
    """The process ids that a kill of that victim hits; none if it is gone already."""
    stack = job.world.stack
    if victim in ("runner", "operator"):
        child = stack.runner if victim == "runner" else stack.operator
        assert child is not None
        return [child.pid] if child.pid is not None and not job.is_over() else []
    if victim == "all ranks":
        return job.processes(ranks=True)
    kind, index = victim.split()
    return job.processes(ranks=kind == "rank", index=int(index))


def kill(pids: Sequence[int], number: signal.Signals = signal.SIGKILL) -> bool:
    """Signal them; whether there was anyone to hit."""
    hit = False
    for pid in pids:
        try:
            os.kill(pid, number)
            hit = True
        except ProcessLookupError:
            continue
    return hit


def flip(path: Path, choice: random.Random) -> None:
    """Change one byte of a file, as a bad disk would."""
    content = bytearray(path.read_bytes())
    content[choice.randrange(len(content))] ^= 0xFF
    path.write_bytes(content)


def _environment(process: Path) -> dict[str, str]:
    try:
        content = (process / "environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(line.split("=", 1) for line in content.split("\0") if "=" in line)
