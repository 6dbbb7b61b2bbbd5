"""What the rows of the settlement table are made of: a life each, and what it costs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tests.control.cluster import Cluster
from tests.control.operator import Operator
from tests.control.stages import (
    only_pod,
)
from tests.control.workloads import ended, report

from dpmoe_trainer.contract import Outcome

ACCOUNT = "claim://vault/data/reviews.jsonl"
OTHER_IMAGE = "registry.example/their-trainer:1"
STEPS, TAKEN = 4, 3
"""Steps of the plan, and those that a running trainer has taken when it is interfered with."""


@dataclass(frozen=True)
class Row:
    """A row of the table, and the life that it is about."""

    charged: str
    outcome: str
    restarts: bool
    play: Callable[[Cluster, Operator], None]


ROWS: dict[str, Row] = {}

Play = Callable[[Cluster, Operator], None]


def row(how: str, charged: str, outcome: str, *, restarts: bool = False) -> Callable[[Play], Play]:
    """Register what happens, under the first cell of its row.

    With `restarts`, to a job on a block that opens a claim for checkpoints.
    """

    def register(play: Play) -> Play:
        assert how not in ROWS
        ROWS[how] = Row(charged, outcome, restarts, play)
        return play

    return register


def reported(cluster: Cluster, **forged: Any) -> str:
    """The termination message of a trainer that was stopped, but for what is forged in it."""
    plan = cluster.plans["j"]
    answer: dict[str, Any] = {
        "plan_digest": plan.digest(),
        "job_uid": "j",
        "outcome": Outcome.STOPPED,
        "steps": TAKEN,
        **plan.privacy.model_dump(include={"noise_multiplier", "sampling_rate", "clipping_norm"}),
    }
    return report(**answer | forged)


def end(
    cluster: Cluster, exit_code: int, message: str | None = None, *, reason: str | None = None
) -> None:
    """The trainer ends."""
    cluster.set_pod(only_pod(cluster), ended(exit_code, message, reason=reason))
    cluster.job_controller()
