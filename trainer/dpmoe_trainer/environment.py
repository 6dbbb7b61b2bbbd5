"""Where one run finds its plan, data and outputs: the command line and the environment, as values.

`DPMOE_ROOT` stands for `/` in the plan's absolute paths and in the other variables: a local process
then sees the volumes of its pod below one folder. No other module reads these variables.
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NoReturn

from dpmoe_trainer.contract import VOLUMES, Environment
from dpmoe_trainer.errors import BadPlan

TERMINATION_LOG = "/dev/termination-log"
"""Where Kubernetes reads a container's termination message, unless the pod says otherwise."""

REPORT_FILE = "report.json"
"""The report's name in the folder that `--output` names."""


_VOLUME_DEPTH = 4
"""Parts of the path at which a claim is mounted: `/`, `dpmoe`, its use, its name."""


@dataclass(frozen=True)
class Worker:
    """One rank of a run, as torchrun and our own supervisor start it (RANK, LOCAL_RANK, ...)."""

    rank: int
    local_rank: int
    world: int


@dataclass(frozen=True)
class Pod:
    """One pod's place in a run, as the operator tells it (PET_*)."""

    nodes: int
    processes: int
    node_rank: int
    master_address: str
    master_port: str


@dataclass(frozen=True)
class Settings:
    """What a run reads from outside its plan.

    Attributes:
        plan: the plan's file.
        report: the file that the report is written to.
        output: the folder for the model, in place of the plan's own output; None outside the CLI.
        progress_port: the port that serves progress, as written; None serves nothing.
        root: the folder that stands for `/` in the plan's paths; None is `/` itself.
        pod_uid: the uid of the pod; None outside Kubernetes.
        failures: how many earlier pods of this index, at least, may have started.
        worker: which rank this process is, if it was started as one.
        pod: which pod of the run this is, if the operator started it.
        heartbeat: the pipe to the supervisor, if there is one.
    """

    plan: Path
    report: Path
    output: Path | None
    progress_port: str | None
    root: Path | None
    pod_uid: str | None = None
    failures: int = 0
    worker: Worker | None = None
    pod: Pod | None = None
    heartbeat: int | None = None

    @property
    def rank(self) -> int:
        """This process's rank, 0 for one alone."""
        return self.worker.rank if self.worker is not None else 0

    def resolve(self, path: str, field: str) -> Path:
        """An absolute path of the plan, below the root.

        Raises:
            BadPlan: the path climbs with `..`, which could leave the root or an opened volume, or
                a link in it leads out of the volume that it names, or into one.
        """
        found = _below(self.root, path, field)
        _refuse_detours(self.root, path, found, field)
        return found


class _Parser(argparse.ArgumentParser):
    """Raises what argparse would exit with, so that the exit code is one of the contract."""

    def error(self, message: str) -> NoReturn:
        raise BadPlan(f"command line: {message}; see --help")


def read_settings(arguments: Sequence[str], environment: Mapping[str, str]) -> Settings:
    """Reads the command line, then the environment for what it leaves open.

    Raises:
        BadPlan: the command line is malformed, or names no plan or no place for the report.
    """
    parser = _Parser(
        prog="python -m dpmoe_trainer", description="Runs one TrainingPlan under DP, or refuses it."
    )
    parser.add_argument("--plan", type=Path, help=f"plan file (default: ${Environment.PLAN})")
    parser.add_argument(
        "--output",
        type=Path,
        help=f"folder for the model and its {REPORT_FILE}, in place of the plan's output",
    )
    options = parser.parse_args(arguments)

    root = Path(environment[Environment.ROOT]) if environment.get(Environment.ROOT) else None
    plan = options.plan
    if plan is None:
        if not environment.get(Environment.PLAN):
            raise BadPlan(f"no plan: pass --plan FILE, or set {Environment.PLAN}")
        plan = _below(root, environment[Environment.PLAN], Environment.PLAN)

    if options.output is not None:
        report = options.output / REPORT_FILE
    else:
        named = environment.get(Environment.TERMINATION_LOG)
        report = _below(root, named or TERMINATION_LOG, Environment.TERMINATION_LOG)
        if not named and not report.exists():
            raise BadPlan(
                f"no place for the report: pass --output DIR, or set {Environment.TERMINATION_LOG} "
                f"({report} does not exist, so this is not a container of Kubernetes)"
            )
    return Settings(
        plan=plan,
        report=report,
        output=options.output,
        progress_port=environment.get(Environment.PROGRESS_PORT) or None,
        root=root,
        pod_uid=environment.get(Environment.POD_UID) or None,
        failures=earlier_pods(environment),
        worker=_worker(environment),
        pod=_pod(environment),
        heartbeat=_number(environment, Environment.HEARTBEAT),
    )


def earlier_pods(environment: Mapping[str, str]) -> int:
    """How many earlier pods of this index, at least, may have started; then there is a journal.

    By Kubernetes' counts, and by the operator's word where a suspended Job forgot these.

    Raises:
        BadPlan: a count is no number.
    """
    counts = (
        _number(environment, name, 0) for name in (Environment.FAILURES, Environment.DISRUPTIONS)
    )
    known = sum(count or 0 for count in counts)
    return known or int(bool(environment.get(Environment.RESUMED)))


def _worker(environment: Mapping[str, str]) -> Worker | None:
    rank = _number(environment, "RANK")
    if rank is None:
        return None
    local = _number(environment, "LOCAL_RANK", 0)
    world = _number(environment, "WORLD_SIZE", 1)
    assert local is not None, "it has a default"
    assert world is not None, "it has a default"
    return Worker(rank, local, world)


def _pod(environment: Mapping[str, str]) -> Pod | None:
    nodes = _number(environment, "PET_NNODES")
    if nodes is None:
        return None
    processes = _number(environment, "PET_NPROC_PER_NODE", 1)
    node_rank = _number(environment, "PET_NODE_RANK", 0)
    assert processes is not None, "it has a default"
    assert node_rank is not None, "it has a default"
    address = environment.get("PET_MASTER_ADDR") or "127.0.0.1"
    return Pod(nodes, processes, node_rank, address, environment.get("PET_MASTER_PORT") or "29500")


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int | None:
    value = environment.get(name)
    if not value:
        return default
    if not value.isdecimal():
        raise BadPlan(f"{name}: {value!r} is not a number; set one from 0, or unset the variable")
    return int(value)


def _below(root: Path | None, path: str, field: str) -> Path:
    pure = PurePosixPath(path)
    if ".." in pure.parts:
        raise BadPlan(f"{field}: {path!r} climbs with '..'; write the path without it")
    if root is None or not pure.is_absolute():
        return Path(pure)
    return root / pure.relative_to("/")


def _refuse_detours(root: Path | None, path: str, found: Path, field: str) -> None:
    """Refuse a path that links lead to another volume: nobody opened that one by it.

    `/proc/self/root` is such a link, in every container.
    """
    really = found.resolve()
    if PurePosixPath(path).is_relative_to(VOLUMES):
        volume = PurePosixPath(*PurePosixPath(path).parts[:_VOLUME_DEPTH])
        stays = really.is_relative_to(_below(root, str(volume), field).resolve())
    else:
        stays = not really.is_relative_to(_below(root, VOLUMES, field).resolve())
    if not stays:
        raise BadPlan(
            f"{field}: {path!r} leads by links to {str(really)!r}, which is not in the volume that "
            "the path names: name the volume itself, or put the files there in place of the link"
        )
