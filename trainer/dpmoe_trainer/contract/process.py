"""How a trainer process is started, and how it ends."""

from enum import IntEnum, StrEnum

VOLUMES = "/dpmoe"
"""Where a pod's claims are mounted, each at `/dpmoe/<use>/<claim>`."""

PROGRESS_PORT = 8475
"""Port of rank 0's progress endpoint, unless the environment says otherwise."""


class Environment(StrEnum):
    """Names of the environment variables that a trainer process reads.

    `ROOT` is the folder that stands for `/` in the plan's absolute paths and in the other
    variables; it is unset in a container, and the local process runner sets it to the folder in
    which it lays out the pod's volumes.
    """

    ROOT = "DPMOE_ROOT"
    PLAN = "DPMOE_PLAN"
    TERMINATION_LOG = "DPMOE_TERMINATION_LOG"
    PROGRESS_PORT = "DPMOE_PROGRESS_PORT"
    POD_UID = "DPMOE_POD_UID"
    """Of the pod that the process runs in; unset outside Kubernetes."""
    FAILURES = "DPMOE_FAILURES"
    """How many pods of this index failed before this one, by Kubernetes' own count."""
    HEARTBEAT = "DPMOE_HEARTBEAT"
    """The pipe that a rank tells its supervisor through that it lives: a file descriptor."""
    DISRUPTIONS = "DPMOE_DISRUPTIONS"
    """How many were evicted, preempted or drained before this one, likewise; may be empty."""
    RESUMED = "DPMOE_RESUMED"
    """Set once rank 0 of the run was seen running: a suspended Job forgets its counts."""


class ExitCode(IntEnum):
    """How the trainer's process ends; the operator never retries the codes from 3 to 9.

    Of the others, `PEER_LOST` is the end of a rank whose collective failed since another rank was
    gone, and `HUNG` that of a rank that made no progress for as long as the plan allows.
    """

    COMPLETED = 0
    CRASHED = 1
    BAD_PLAN = 3
    ACCOUNTING_MISMATCH = 4
    BUDGET_EXHAUSTED = 5
    BAD_DATA = 6
    BAD_MODEL = 7
    JOURNAL_LOST = 8
    BAD_CHECKPOINT = 9
    PEER_LOST = 10
    HUNG = 11
    STOPPED = 143


FINAL_CODES = tuple(code for code in ExitCode if 3 <= code <= 9)
"""Ends that another try would only repeat."""

OTHERS_CODES = (ExitCode.PEER_LOST, ExitCode.STOPPED)
"""Ends that another pod or somebody outside brought about: no failure of the pod itself."""
