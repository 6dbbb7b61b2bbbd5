"""Rows of the settlement table: jobs whose pods are never replaced."""

from datetime import timedelta

from tests.control.cluster import Cluster
from tests.control.operator import Operator
from tests.control.settlement_rows import OTHER_IMAGE, ROWS, STEPS, TAKEN, end, reported, row
from tests.control.stages import (
    cheap,
    only_pod,
    reach_ended,
    reach_granted,
    reach_launched,
    reach_pending,
    reach_released,
    reach_running,
    see,
)
from tests.control.workloads import (
    CREATING,
    NEVER_FOUND,
    NO_IMAGE,
    REJECTED,
    SCHEDULED,
    disrupted,
    ended,
)

from dpmoe_trainer.contract import ExitCode, Outcome, Progress

# Never granted


@row("deleted while it waits for budget", "never granted", "-")
def _(cluster: Cluster, operator: Operator) -> None:
    cluster.apply(cheap(blocks={"names": ["nothing"]}))
    see(operator)
    cluster.delete("job", "j")


@row("no budget within its timeout", "never granted", "TimedOut")
def _(cluster: Cluster, operator: Operator) -> None:
    cluster.apply(cheap(timeoutSeconds=60))


@row("its image is not on the owner's list", "never granted", "BlockNotShared")
def _(cluster: Cluster, operator: Operator) -> None:
    cluster.apply(cheap(image="registry.example/nobody-knows:1"))


# Before the release


@row("deleted while its budget is reserved", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_granted(cluster, operator)
    cluster.delete("job", "j")


@row("a block or the job changed between grant and launch", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_granted(cluster, operator)
    cluster.edit("b", access=[])


@row("deleted after launch, before release", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_launched(cluster, operator)
    cluster.delete("job", "j")


@row("somebody else let its pods run before the operator did", "the plan", "StartedByOthers")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_granted(cluster, operator)
    [uid] = cluster.workloads
    cluster.suspend(uid, suspend=False)
    cluster.job_controller()


# Before the pod runs


@row("deleted before any of its pods was made", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_released(cluster, operator)
    cluster.delete("job", "j")


@row("deleted so early that its pods may yet be made", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    """The Job controller has not seen the release, and its status tells of the time before."""
    reach_granted(cluster, operator)
    cluster.job_controller()
    assert see(operator) == (["launched"], ["Release"])
    cluster.delete("job", "j")


@row("none of its pods could be made within its start timeout", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_podless(cluster, operator)
    cluster.now += timedelta(seconds=61)


@row("the same, and the operator was restarted meanwhile", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_podless(cluster, operator)
    operator.restart()
    cluster.now += timedelta(seconds=61)


def reach_podless(cluster: Cluster, operator: Operator) -> None:
    """Released, and the Job controller can make no pod."""
    cluster.refuse_pods = True
    reach_released(cluster, operator, placement={"startTimeoutSeconds": 60})
    cluster.job_controller()
    assert see(operator) == ([], [])


@row("deleted while its pod waits for a node or an image", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_pending(cluster, operator)
    cluster.advance(only_pod(cluster))
    cluster.set_pod(only_pod(cluster), NO_IMAGE)
    see(operator)
    cluster.delete("job", "j")


@row("drained or preempted before its container started", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_pending(cluster, operator)
    cluster.advance(only_pod(cluster))
    see(operator)
    cluster.set_pod(only_pod(cluster), disrupted(CREATING))
    see(operator)
    cluster.set_pod(only_pod(cluster), disrupted(NEVER_FOUND))
    cluster.job_controller()


@row("its node's kubelet did not admit its pod", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_pending(cluster, operator)
    cluster.set_pod(only_pod(cluster), SCHEDULED)
    see(operator)
    cluster.set_pod(only_pod(cluster), REJECTED)
    cluster.job_controller()


@row("its pod never started before the deadline", "nothing", "NeverStarted")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_pending(cluster, operator)
    cluster.terminate(only_pod(cluster))
    cluster.job_controller()


# The trainer's own end


@row("completed, and its report answers the plan", "the plan", "Completed")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_ended(cluster, operator)


@row("deleted while it runs, and its trainer reports", "the steps taken", "Stopped")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    cluster.delete("job", "j")


@row("stopped early (SIGTERM), and its trainer reports", "the steps taken", "Stopped")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, 143, reported(cluster))


@row("failed before it touched data, and reported", "nothing", "Refused")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_pending(cluster, operator)
    message = reported(cluster, outcome=Outcome.REFUSED, steps=0, message="no such file")
    end(cluster, ExitCode.BAD_MODEL, message)


@row("failed after it touched data, and reported", "the steps taken", "Failed")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, ExitCode.CRASHED, reported(cluster, outcome=Outcome.FAILED))


@row("crashed without a report", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, 1)


@row("killed for memory (OOM)", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, 137, reason="OOMKilled")


@row("evicted before it could report", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    cluster.set_pod(only_pod(cluster), ended(137) | {"reason": "Evicted"})
    cluster.job_controller()


# The pod or the Job is taken away


@row("its Kubernetes Job was suspended by somebody else", "the steps taken", "Stopped")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    [uid] = cluster.workloads
    cluster.suspend(uid)


@row("its pod was deleted by hand, with time to report", "the steps taken", "Stopped")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    cluster.terminate(only_pod(cluster))


@row("its pod was deleted by hand, by force", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    uid = only_pod(cluster)
    cluster.terminate(uid)
    cluster.vanish(uid)


@row("its pod went while no operator watched", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    cluster.terminate(only_pod(cluster))
    cluster.kubelet()
    operator.restart()


@row("its node was lost", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    cluster.vanish(only_pod(cluster))


@row("more than one pod ran as rank 0", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    [workload] = cluster.workloads.values()
    cluster.create_pod(workload)
    for uid in cluster.pods:
        cluster.set_pod(uid, ended(143, reported(cluster)))
    cluster.job_controller()


@row("somebody let it start again while no operator watched", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    """What the first pod drew is in no report that is left, and the Job controller forgot it."""
    reach_running(cluster, operator)
    start_again(cluster)
    for _ in range(3):
        cluster.advance(only_pod(cluster))
    operator.restart()
    cluster.delete("job", "j")


@row("the same, and its second pod never started", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    start_again(cluster)
    operator.restart()
    cluster.delete("job", "j")


def start_again(cluster: Cluster) -> None:
    """Suspended and resumed by hand."""
    [uid] = cluster.workloads
    cluster.suspend(uid)
    cluster.job_controller()
    cluster.kubelet()
    cluster.suspend(uid, suspend=False)
    cluster.job_controller()


@row("its Kubernetes Job was deleted by somebody else", "the plan", "WorkloadVanished")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    [uid] = cluster.workloads
    cluster.delete("workload", uid)


@row("its Kubernetes Job was replaced by a copy", "the plan", "WorkloadVanished")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    [uid] = cluster.workloads
    copy = cluster.workloads[uid]
    cluster.delete("workload", uid)
    copy["metadata"]["uid"] = "copy"
    copy["status"] = {}
    cluster.workloads["copy"] = copy
    cluster.changed("workload", "ADDED", copy)


# The report is not to be believed


@row("its report is malformed", "the plan", "ReportMissing")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, 143, reported(cluster)[:-9])


@row("its report claims completion after too few steps", "the plan", "ReportRefused")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, 0, reported(cluster, outcome=Outcome.COMPLETED))


@row("its report counts more steps than the plan has", "the plan", "ReportRefused")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, 143, reported(cluster, steps=STEPS + 1))


@row("its report counts fewer steps than its progress showed", "the plan", "ReportRefused")
def _(cluster: Cluster, operator: Operator) -> None:
    """Shown to an operator that is gone by the time of the report."""
    reach_running(cluster, operator)
    operator.picture.progress["j"] = Progress(step=TAKEN, steps=STEPS, epsilon=0.1)
    see(operator)
    operator.restart()
    end(cluster, 143, reported(cluster, steps=TAKEN - 1))


@row("its report names another σ, q or C", "the plan", "ReportRefused")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, 143, reported(cluster, noise_multiplier=5.000001))


@row("its report is another job's", "the plan", "ReportRefused")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, 143, reported(cluster, job_uid="another"))


@row("its report answers another plan", "the plan", "ReportRefused")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, 143, reported(cluster, plan_digest="1" * 64))


@row("its report contradicts its exit code", "the plan", "ReportRefused")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    end(cluster, 0, reported(cluster))


# Another image


@row("its image is trusted, but not the operator's own: it completed", "the plan", "Completed")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_ended(cluster, operator, image=OTHER_IMAGE)


@row("its image is trusted, but not the operator's own: it stopped early", "the plan", "Charged")
def _(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator, image=OTHER_IMAGE)
    end(cluster, 143, reported(cluster))


ONCE = ROWS
"""With these rows in it."""
