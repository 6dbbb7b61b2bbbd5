"""What is done to a launched Job: released to its pods or to Kueue, timed, paused, given up."""

from datetime import timedelta

import pytest
from tests.builders import TEAM
from tests.control.cluster import Cluster
from tests.control.operator import Operator
from tests.control.stages import (
    OPENED,
    grant_of,
    kinds,
    only_pod,
    reach_launched,
    reach_pending,
    reach_released,
    reach_running,
    see,
    settled,
)
from tests.control.workloads import ended

from dpmoe_operator.control.views import PAUSED, QUEUE_NAME, RELEASED
from dpmoe_trainer.contract import ExitCode, Progress


def test_kueue_gets_a_job_once_its_launch_is_in_the_ledger(
    cluster: Cluster, operator: Operator
) -> None:
    reach_launched(cluster, operator, placement={"queueName": "gpus"})
    [workload] = cluster.workloads.values()
    assert QUEUE_NAME not in workload["metadata"]["labels"]
    operator.deliver()
    assert grant_of(cluster).launched is not None
    see(operator)
    assert workload["metadata"]["labels"][QUEUE_NAME] == "gpus"
    assert (workload["spec"]["suspend"], workload["metadata"]["generation"]) == (True, 1)
    assert see(operator) == ([], [])
    assert cluster.jobs["j"]["status"]["reason"] == "Queued"


def test_paused_job_leaves_the_queue_and_returns_to_it(
    cluster: Cluster, operator: Operator
) -> None:
    """Kueue would start it again: it is its queue's as long as it has the label."""
    reach_released(cluster, operator, placement={"queueName": "gpus"})
    [(uid, workload)] = cluster.workloads.items()
    cluster.suspend(uid, suspend=False)
    cluster.job_controller()
    see(operator)
    cluster.edit("j", suspend=True)
    assert see(operator) == ([], ["Pause"])
    assert QUEUE_NAME not in workload["metadata"]["labels"]
    assert workload["spec"]["suspend"] is True
    see(operator)
    assert "its quota in Kueue stay reserved" in cluster.jobs["j"]["status"]["message"]
    cluster.edit("j", suspend=False)
    cluster.job_controller()
    assert see(operator) == ([], ["Release"])
    assert workload["metadata"]["labels"][QUEUE_NAME] == "gpus"
    assert PAUSED not in workload["metadata"]["annotations"]
    assert RELEASED in workload["metadata"]["annotations"]
    assert workload["spec"]["suspend"] is True


def test_job_goes_on_only_once_its_last_pods_have_ended(
    cluster: Cluster, operator: Operator
) -> None:
    reach_running(cluster, operator)
    cluster.edit("j", suspend=True)
    see(operator)
    cluster.job_controller()
    cluster.edit("j", suspend=False)
    assert see(operator) == ([], [])
    cluster.kubelet()
    cluster.job_controller()
    assert see(operator) == ([], ["Release"])


def test_job_that_is_suspended_before_its_release_waits(
    cluster: Cluster, operator: Operator
) -> None:
    reach_launched(cluster, operator)
    cluster.edit("j", suspend=True)
    assert see(operator) == ([], [])
    cluster.edit("j", suspend=False)
    assert see(operator) == ([], ["Release"])


def test_pod_that_was_stopped_before_it_started_leaves_no_mark(
    cluster: Cluster, operator: Operator
) -> None:
    """The next one is the first: it would miss the journal of a pod that wrote none, and refuse."""
    reach_pending(cluster, operator)
    for _ in range(2):
        cluster.advance(only_pod(cluster))
        see(operator)
    cluster.edit("j", suspend=True)
    assert see(operator) == ([], ["Pause"])
    cluster.job_controller()
    cluster.kubelet()
    cluster.job_controller()
    assert see(operator) == ([], [])
    cluster.edit("j", suspend=False)
    assert see(operator) == ([], ["Release"])
    cluster.job_controller()
    for _ in range(3):
        cluster.advance(only_pod(cluster))
    assert see(operator) == ([], ["MarkStarted"])


def test_start_timeout_spares_a_job_that_once_started(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator, placement={"startTimeoutSeconds": 60})
    cluster.now += timedelta(seconds=61)
    assert see(operator) == ([], [])
    cluster.edit("j", suspend=True)
    for _ in range(2):
        see(operator)
        cluster.job_controller()
        cluster.kubelet()
    cluster.edit("j", suspend=False)
    see(operator)
    cluster.now += timedelta(seconds=600)
    operator.restart()
    assert see(operator) == ([], [])


def test_start_timeout_is_of_all_pods(cluster: Cluster, operator: Operator) -> None:
    """One that runs without the others holds its GPU for nothing."""
    reach_running(
        cluster, operator, placement={"startTimeoutSeconds": 60}, parallelism={"workers": 2}
    )
    cluster.now += timedelta(seconds=59)
    assert see(operator) == ([], [])
    cluster.now += timedelta(seconds=2)
    assert see(operator) == ([], ["Stop"])
    for _ in range(3):
        cluster.job_controller()
        cluster.kubelet()
        see(operator)
    assert settled(cluster) == ("Stopped", 3)


def test_time_in_kueues_queue_is_no_wait_for_nodes(cluster: Cluster, operator: Operator) -> None:
    placement = {"queueName": "gpus", "startTimeoutSeconds": 60}
    reach_released(cluster, operator, placement=placement)
    cluster.now += timedelta(days=1)
    assert see(operator) == ([], [])
    [workload] = cluster.workloads
    cluster.suspend(workload, suspend=False)
    assert see(operator) == ([], []), "its pods are about to be created"
    cluster.job_controller()
    cluster.now += timedelta(seconds=60)
    assert see(operator) == ([], [])
    cluster.now += timedelta(seconds=1)
    assert see(operator) == ([], ["Stop"])


def test_status_tells_of_restarts(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    operator.picture.progress["j"] = Progress(step=3, steps=4, epsilon=0.5, steps_per_second=0.01)
    see(operator)
    assert cluster.jobs["j"]["status"]["eta"] == "1m"
    cluster.finish(only_pod(cluster), crash=True)
    see(operator)
    status = cluster.jobs["j"]["status"]
    assert (status["state"], status["reason"]) == ("Running", "Restarting")
    assert "eta" not in status, "a dead pod's is none"
    assert status["message"].startswith("trainer pod 0 ended with exit code 137 and is replaced")
    cluster.job_controller()
    for _ in range(3):
        cluster.advance(list(cluster.pods)[-1])
    see(operator)
    status = cluster.jobs["j"]["status"]
    assert (status["state"], status["reason"], status["restarts"]) == ("Running", "Training", 1)
    assert "restarted 1 time; at step" in status["message"]
    kinds = {c["type"]: c["status"] for c in status["conditions"]}
    assert kinds["Restartable"] == "True"


@pytest.mark.parametrize("code", [ExitCode.PEER_LOST, ExitCode.STOPPED])
def test_pods_that_end_with_another_cost_no_retry(
    cluster: Cluster, operator: Operator, code: ExitCode
) -> None:
    """An eviction ends all pods of a job, and marks but one of them as disrupted."""
    reach_running(cluster, operator, retries=0)
    for _ in range(2):
        cluster.set_pod(list(cluster.pods)[-1], ended(code))
        cluster.job_controller()
        last = list(cluster.pods)[-1]
        for _ in range(3):
            cluster.advance(last)
        assert see(operator) == ([], [])
    cluster.train(last, 4)
    cluster.finish(last)
    cluster.job_controller()
    see(operator)
    assert settled(cluster) == ("Completed", 4)


def test_status_names_the_kubernetes_job_where_no_pod_is_made(
    cluster: Cluster, operator: Operator
) -> None:
    cluster.refuse_pods = True
    reach_pending(cluster, operator)
    [workload] = cluster.workloads.values()
    name, namespace = workload["metadata"]["name"], workload["metadata"]["namespace"]
    message = cluster.jobs["j"]["status"]["message"]
    assert message.endswith(f"see `kubectl describe job {name} -n {namespace}`")
    assert "no trainer pod was created" in message
    cluster.refuse_pods = False
    cluster.job_controller()
    see(operator)
    assert cluster.jobs["j"]["status"]["message"].endswith("the trainer pods wait for a node")


def test_job_without_pods_is_given_up_as_it_was_seen(cluster: Cluster, operator: Operator) -> None:
    """A pod that is made meanwhile changes the Job, and the next round sees it."""
    cluster.edit("b", access=[{"namespace": TEAM, **OPENED, "checkpoints": None}])
    cluster.refuse_pods = True
    reach_pending(cluster, operator)
    cluster.delete("job", "j")
    operator.deliver()
    cluster.refuse_pods = False
    cluster.job_controller()
    _, actions = operator.round()
    assert kinds(actions) == ["Stop"]
    [workload] = cluster.workloads.values()
    assert workload["spec"]["suspend"] is False
    assert see(operator) == ([], ["Stop"])
    assert workload["spec"]["suspend"] is True


def test_pending_job_without_a_timeout_waits(cluster: Cluster, operator: Operator) -> None:
    reach_pending(cluster, operator)
    cluster.now += timedelta(days=30)
    assert see(operator) == ([], [])
