"""Rows of the settlement table: jobs with checkpoints, whose pods are replaced."""

from collections.abc import Callable
from datetime import timedelta

from tests.control.cluster import Cluster
from tests.control.operator import Operator
from tests.control.rows_once import reach_podless
from tests.control.settlement_rows import ROWS, TAKEN, Play, end, reported, row
from tests.control.stages import (
    grant_of,
    only_pod,
    reach_pending,
    reach_released,
    reach_running,
    see,
)
from tests.control.workloads import CREATING, NEVER_FOUND, REJECTED, UNSCHEDULED, disrupted, ended

from dpmoe_operator.control.pods import INDEX_DISRUPTIONS, INDEX_FAILURES
from dpmoe_operator.control.views import QUEUE_NAME
from dpmoe_trainer.contract import ExitCode, Outcome


def restarting(how: str, charged: str, outcome: str) -> Callable[[Play], Play]:
    """A row about a job on a block that opens a claim for checkpoints."""
    return row(how, charged, outcome, restarts=True)


def restarted(cluster: Cluster, operator: Operator) -> None:
    """A new pod runs where another one failed."""
    cluster.job_controller()
    see(operator)
    [uid] = [uid for uid, each in cluster.pods.items() if each["status"] == UNSCHEDULED]
    for _ in range(3):
        cluster.advance(uid)
    see(operator)


def newest(cluster: Cluster) -> str:
    return list(cluster.pods)[-1]


def attempts(cluster: Cluster) -> tuple[str, ...]:
    return tuple(cluster.journals["j"])


def last_end(cluster: Cluster, exit_code: int, message: str | None) -> None:
    cluster.set_pod(newest(cluster), ended(exit_code, message))
    cluster.job_controller()


@restarting("crashed, and completed after its restart", "the plan", "Completed")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, ExitCode.CRASHED)
    restarted(cluster, operator)
    assert cluster.pods[newest(cluster)]["metadata"]["annotations"][INDEX_FAILURES] == "1"


@restarting("restarted, and stopped; its report lists all attempts", "the steps taken", "Stopped")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, ExitCode.PEER_LOST)
    restarted(cluster, operator)
    cluster.delete("job", "j")


@restarting("evicted, and stopped after its restart; likewise", "the steps taken", "Stopped")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    cluster.set_pod(only_pod(cluster), disrupted(ended(137)))
    restarted(cluster, operator)
    assert cluster.pods[newest(cluster)]["metadata"]["annotations"][INDEX_DISRUPTIONS] == "1"
    cluster.delete("job", "j")


@restarting("failed in every attempt; the last one reported", "the steps taken", "Failed")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator, retries=1)
    end(cluster, ExitCode.CRASHED)
    restarted(cluster, operator)
    report = reported(cluster, outcome=Outcome.FAILED, attempts=attempts(cluster))
    last_end(cluster, ExitCode.CRASHED, report)


@restarting("failed in every attempt; the last one did not report", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator, retries=1)
    report = reported(cluster, outcome=Outcome.FAILED, attempts=attempts(cluster))
    end(cluster, ExitCode.CRASHED, report)
    restarted(cluster, operator)
    last_end(cluster, 137, None)


@restarting("restarted, and its report does not list all attempts", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, ExitCode.CRASHED)
    restarted(cluster, operator)
    last_end(cluster, 143, reported(cluster, attempts=attempts(cluster)[1:]))
    cluster.delete("job", "j")


@restarting("restarted, and its journal is gone", "the plan", "JournalLost")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, ExitCode.CRASHED)
    restarted(cluster, operator)
    lost = reported(cluster, outcome=Outcome.REFUSED, steps=0, attempts=(newest(cluster),))
    last_end(cluster, ExitCode.JOURNAL_LOST, lost)


@restarting("refused after an attempt that never started", "nothing", "Refused")
def _(cluster: Cluster, operator: Operator) -> None:
    """Kubernetes counts a pod that no container of ever ran, so the trainer misses a journal."""
    reach_pending(cluster, operator)
    cluster.advance(only_pod(cluster))
    see(operator)
    cluster.set_pod(only_pod(cluster), NEVER_FOUND)
    restarted(cluster, operator)
    refused = reported(cluster, outcome=Outcome.REFUSED, steps=0)
    last_end(cluster, ExitCode.JOURNAL_LOST, refused)


@restarting("drained before its container started, and refused after that", "nothing", "Refused")
def _(cluster: Cluster, operator: Operator) -> None:
    """Likewise."""
    reach_pending(cluster, operator)
    cluster.advance(only_pod(cluster))
    see(operator)
    cluster.set_pod(only_pod(cluster), disrupted(CREATING))
    see(operator)
    cluster.set_pod(only_pod(cluster), disrupted(NEVER_FOUND))
    restarted(cluster, operator)
    refused = reported(cluster, outcome=Outcome.REFUSED, steps=0)
    last_end(cluster, ExitCode.JOURNAL_LOST, refused)


@restarting("not admitted to its node, and refused after that", "nothing", "Refused")
def _(cluster: Cluster, operator: Operator) -> None:
    """Likewise."""
    reach_pending(cluster, operator)
    cluster.set_pod(only_pod(cluster), REJECTED)
    restarted(cluster, operator)
    refused = reported(cluster, outcome=Outcome.REFUSED, steps=0)
    last_end(cluster, ExitCode.JOURNAL_LOST, refused)


@restarting("paused before its container started, and refused after that", "nothing", "Refused")
def _(cluster: Cluster, operator: Operator) -> None:
    """Likewise, if something else keeps the trainer from its volume."""
    reach_pending(cluster, operator)
    for _ in range(2):
        cluster.advance(only_pod(cluster))
        see(operator)
    cluster.edit("j", suspend=True)
    stand_still(cluster, operator)
    cluster.edit("j", suspend=False)
    see(operator)
    restarted(cluster, operator)
    refused = reported(cluster, outcome=Outcome.REFUSED, steps=0)
    last_end(cluster, ExitCode.BAD_CHECKPOINT, refused)


@restarting("another attempt came and went while no operator watched", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    """The first one's report was true, and another attempt followed."""
    reach_running(cluster, operator)
    [workload] = cluster.workloads
    report = reported(cluster, steps=TAKEN - 1, attempts=attempts(cluster))
    end(cluster, ExitCode.PEER_LOST, report)
    cluster.job_controller()
    unseen = newest(cluster)
    for _ in range(3):
        cluster.advance(unseen)
    cluster.train(unseen)
    cluster.set_pod(unseen, disrupted(ended(137)))
    cluster.vanish(unseen)
    cluster.delete("job", "j")
    cluster.suspend(workload)
    operator.restart()


@restarting("another attempt came and went in a gap of the watch", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    """The same, to an operator that ran, saw the first one run, and was told of its end."""
    reach_running(cluster, operator)
    see(operator)
    report = reported(cluster, steps=TAKEN - 1, attempts=attempts(cluster))
    end(cluster, ExitCode.PEER_LOST, report)
    come_and_go(cluster, operator)
    operator.list_pods()


def come_and_go(cluster: Cluster, operator: Operator) -> None:
    """Another pod draws, and goes with the job, while the watch of pods brings nothing."""
    operator.deaf = True
    cluster.job_controller()
    unseen = newest(cluster)
    for _ in range(3):
        cluster.advance(unseen)
    cluster.train(unseen)
    cluster.delete("job", "j")
    assert see(operator) == ([], ["Stop"])
    for _ in range(2):
        cluster.job_controller()
        cluster.kubelet()
    operator.deaf = False


@restarting("suspended by its author, and deleted meanwhile", "the steps taken", "Stopped")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    see(operator)
    cluster.edit("j", suspend=True)
    assert see(operator) == ([], ["Pause"])
    stand_still(cluster, operator)
    assert cluster.jobs["j"]["status"]["state"] == "Suspended"
    cluster.delete("job", "j")


@restarting("suspended by its author, and went on", "the plan", "Completed")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    see(operator)
    cluster.edit("j", suspend=True)
    stand_still(cluster, operator)
    cluster.edit("j", suspend=False)


@restarting("preempted by Kueue, and went on", "the plan", "Completed")
def _(cluster: Cluster, operator: Operator) -> None:
    [workload] = reach_queued(cluster, operator)
    kueue_starts(cluster, operator, workload)
    kueue_stops(cluster, operator, workload)
    kueue_starts(cluster, operator, workload)


@restarting("preempted by Kueue several times, and went on", "the plan", "Completed")
def _(cluster: Cluster, operator: Operator) -> None:
    [workload] = reach_queued(cluster, operator)
    for _ in range(3):
        kueue_starts(cluster, operator, workload)
        kueue_stops(cluster, operator, workload)
    kueue_starts(cluster, operator, workload)


@restarting("preempted by Kueue several times, and deleted", "the steps taken", "Stopped")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_preempted_twice(cluster, operator)
    cluster.train(only_pod(cluster), TAKEN)
    cluster.delete("job", "j")


@restarting("the same, after a gap of the watch", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    """Each preemption is up to three changes of the spec: they may hide another start."""
    reach_preempted_twice(cluster, operator)
    operator.list_pods()
    cluster.delete("job", "j")


def reach_preempted_twice(cluster: Cluster, operator: Operator) -> None:
    """It runs for the third time."""
    [workload] = reach_queued(cluster, operator)
    for _ in range(2):
        kueue_starts(cluster, operator, workload)
        kueue_stops(cluster, operator, workload)
    kueue_starts(cluster, operator, workload)


def kueue_starts(cluster: Cluster, operator: Operator, workload: str) -> None:
    """With the node selector of a flavour in the template."""
    cluster.patch_workload(workload, {"spec": {"suspend": False, "template": {"flavour": "a100"}}})
    cluster.job_controller()
    for _ in range(3):
        cluster.advance(only_pod(cluster))
        see(operator)


def kueue_stops(cluster: Cluster, operator: Operator, workload: str) -> None:
    """And restores the template after that, in another write."""
    cluster.suspend(workload)
    cluster.patch_workload(workload, {"spec": {"template": {}}})
    stand_still(cluster, operator)


@restarting("deleted while it waits in Kueue's queue", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_queued(cluster, operator)
    cluster.delete("job", "j")


@restarting(
    "none of its pods could be made, though it keeps checkpoints", "nothing", "NeverStarted"
)
def _(cluster: Cluster, operator: Operator) -> None:
    reach_podless(cluster, operator)
    cluster.now += timedelta(seconds=61)


@restarting("the same, and another operator took over meanwhile", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    """Jobs that keep checkpoints forget pods that were disrupted."""
    reach_podless(cluster, operator)
    operator.restart()
    cluster.now += timedelta(seconds=61)


@restarting("its pods were not placed within its start timeout", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_pending(cluster, operator, placement={"startTimeoutSeconds": 60})
    cluster.now += timedelta(seconds=61)


def reach_queued(cluster: Cluster, operator: Operator) -> list[str]:
    """Released into Kueue's queue."""
    reach_released(cluster, operator, placement={"queueName": "gpus"})
    [workload] = cluster.workloads.values()
    assert workload["metadata"]["labels"][QUEUE_NAME] == "gpus"
    assert workload["spec"]["suspend"] is True
    return list(cluster.workloads)


def stand_still(cluster: Cluster, operator: Operator) -> None:
    """A suspended job: its pods are gone, and nothing more happens."""
    for _ in range(3):
        cluster.job_controller()
        cluster.kubelet()
        see(operator)
    assert cluster.pods == {}
    assert see(operator) == ([], [])
    assert grant_of(cluster).settled is None


RESTARTED = ROWS
"""With these rows in it."""
