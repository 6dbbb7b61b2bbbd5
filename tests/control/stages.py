"""The stages of a grant's life, each reached from the one before, for tests to interfere at."""

from collections.abc import Callable
from typing import Any

import pytest
from tests.builders import ABSENT, UNITS, Object, job
from tests.control.cluster import Cluster
from tests.control.operator import Killed, Operator

from dpmoe_operator.control.actions import SetStatus
from dpmoe_operator.ledger.account import Grant

OPENED: Object = {
    "models": ["models"],
    "outputs": [{"claimName": "results"}],
    "checkpoints": {"claimName": "saved"},
}
"""What a block's access opens to jobs that keep checkpoints."""

ROOM_FOR_TWO: Object = {"epsilon": "3", "orders": ["8"]}


def cheap(uid: str = "j", **rest: Any) -> Object:
    """A job of four steps over all units: two of them fit into `ROOM_FOR_TWO`."""
    spec: Object = {
        "privacy": {"epsilon": ABSENT, "noiseMultiplier": "5"},
        "training": {"steps": 4, "logicalBatch": UNITS},
    }
    return job(uid=uid, **spec | rest)


def kinds(actions: list[Any]) -> list[str]:
    return [type(action).__name__ for action in actions if not isinstance(action, SetStatus)]


def records(decision: Any) -> list[str]:
    return [next(iter(record.to_object())) for record in decision.records]


def grant_of(cluster: Cluster, uid: str = "j") -> Grant:
    return cluster.ledger.grants[uid]


def see(operator: Operator) -> tuple[list[str], list[str]]:
    """Deliver everything, run a round; its records and its actions but statuses."""
    operator.deliver()
    decision, actions = operator.round()
    return records(decision), kinds(actions)


def settled(cluster: Cluster, uid: str = "j") -> tuple[str, int]:
    """Outcome and charged steps of a closed grant."""
    record = grant_of(cluster, uid).settled
    assert record is not None
    return record.outcome, record.steps


def only_pod(cluster: Cluster) -> str:
    [uid] = cluster.pods
    return uid


def reach_granted(cluster: Cluster, operator: Operator, **spec: Any) -> None:
    cluster.apply(cheap(**spec))
    operator.deliver()
    decision, actions = operator.round()
    assert (records(decision), kinds(actions)) == (["granted"], ["Prepare"])


def reach_launched(cluster: Cluster, operator: Operator, **spec: Any) -> None:
    """The launch is in the ledger, and the process dies before the release."""
    reach_granted(cluster, operator, **spec)
    operator.deliver()
    operator.fuse = 1
    with pytest.raises(Killed):
        operator.round()
    operator.fuse = None
    assert grant_of(cluster).launched is not None
    assert not cluster.workloads[next(iter(cluster.workloads))]["metadata"]["annotations"]
    operator.restart()


def reach_released(cluster: Cluster, operator: Operator, **spec: Any) -> None:
    reach_granted(cluster, operator, **spec)
    assert see(operator) == (["launched"], ["Release"])


def reach_pending(cluster: Cluster, operator: Operator, **spec: Any) -> None:
    reach_released(cluster, operator, **spec)
    cluster.job_controller()
    assert see(operator) == ([], [])


def reach_running(cluster: Cluster, operator: Operator, **spec: Any) -> None:
    reach_pending(cluster, operator, **spec)
    for _ in range(3):
        cluster.advance(only_pod(cluster))
    cluster.train(only_pod(cluster), 3)
    [workload] = cluster.workloads.values()
    restarts = "backoffLimitPerIndex" in workload["spec"]
    assert see(operator) == ([], ["MarkStarted"] if restarts else [])


def reach_ended(cluster: Cluster, operator: Operator, **spec: Any) -> None:
    reach_running(cluster, operator, **spec)
    cluster.train(only_pod(cluster), 1)
    cluster.finish(only_pod(cluster))
    cluster.job_controller()


STAGES: dict[str, Callable[..., None]] = {
    "granted": reach_granted,
    "launched": reach_launched,
    "released": reach_released,
    "pending": reach_pending,
    "running": reach_running,
    "ended": reach_ended,
}
