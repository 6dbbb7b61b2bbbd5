"""Pods that no operator saw: what the watch of pods missed, or has not brought yet."""

import pytest
from tests.control.cluster import Cluster
from tests.control.operator import Operator, settle_down
from tests.control.rows_restarted import (
    attempts,
    come_and_go,
    newest,
    restarted,
    stand_still,
)
from tests.control.settlement_rows import STEPS, TAKEN, end, reported
from tests.control.stages import grant_of, only_pod, reach_pending, reach_running, see, settled
from tests.control.workloads import ended

from dpmoe_trainer.contract import ExitCode


def crash(cluster: Cluster, steps: int = TAKEN) -> None:
    """Rank 0 ends by itself, with a report, and has no successor yet."""
    report = reported(cluster, steps=steps, attempts=attempts(cluster))
    cluster.set_pod(only_pod(cluster), ended(ExitCode.PEER_LOST, report))


def pause_and_miss_the_next(cluster: Cluster, operator: Operator) -> None:
    """The job is paused and goes on, and a pod of that start comes and goes unseen."""
    cluster.edit("j", suspend=True)
    stand_still(cluster, operator)
    cluster.edit("j", suspend=False)
    assert see(operator) == ([], ["Release"])
    come_and_go(cluster, operator)
    operator.list_pods()
    settle_down(cluster, operator)


@pytest.mark.parametrize("end_was_told", [True, False])
def test_gap_of_the_watch_may_hide_a_successor(
    cluster: Cluster, operator: Operator, end_was_told: bool
) -> None:
    reach_running(cluster, operator)
    crash(cluster)
    if end_was_told:
        see(operator)
    come_and_go(cluster, operator)
    operator.list_pods()
    settle_down(cluster, operator)
    assert settled(cluster) == ("ReportMissing", STEPS)


def test_late_watch_is_waited_for(cluster: Cluster, operator: Operator) -> None:
    """The end of the first pod was told, and what followed it was not, yet."""
    reach_running(cluster, operator)
    crash(cluster, steps=TAKEN - 1)
    see(operator)
    cluster.steps["j"] = TAKEN - 1
    come_and_go(cluster, operator)
    operator.deaf = True
    for _ in range(3):
        assert see(operator) == ([], [])
    assert grant_of(cluster).settled is None
    operator.deaf = False
    settle_down(cluster, operator)
    assert settled(cluster) == ("Stopped", TAKEN)


def test_late_watch_that_breaks_is_not_waited_for(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    crash(cluster)
    see(operator)
    come_and_go(cluster, operator)
    operator.deaf = True
    assert see(operator) == ([], [])
    operator.list_pods()
    assert see(operator) == (["settled"], ["Remove"])
    assert settled(cluster) == ("ReportMissing", STEPS)


def test_job_that_is_stopped_before_its_pod_is_replaced_pays_what_it_did(
    cluster: Cluster, operator: Operator
) -> None:
    reach_running(cluster, operator)
    crash(cluster)
    cluster.delete("job", "j")
    assert see(operator) == ([], ["Stop"])
    settle_down(cluster, operator)
    assert settled(cluster) == ("Stopped", TAKEN)


@pytest.mark.parametrize("gap_at", ["running", "ending", "ended"])
def test_paused_pod_has_no_successor_whatever_the_watch_missed(
    cluster: Cluster, operator: Operator, gap_at: str
) -> None:
    """The Job controller let go of it while it lived: no other follows until the Job goes on."""
    reach_running(cluster, operator)
    see(operator)
    if gap_at == "running":
        operator.list_pods()
    cluster.edit("j", suspend=True)
    see(operator)
    cluster.job_controller()
    if gap_at == "ending":
        operator.list_pods()
    stand_still(cluster, operator)
    if gap_at == "ended":
        operator.list_pods()
    cluster.delete("job", "j")
    settle_down(cluster, operator)
    assert settled(cluster) == ("Stopped", TAKEN)


def test_paused_pod_that_never_started_had_no_successor(
    cluster: Cluster, operator: Operator
) -> None:
    reach_pending(cluster, operator)
    cluster.edit("j", suspend=True)
    stand_still(cluster, operator)
    operator.list_pods()
    cluster.delete("job", "j")
    settle_down(cluster, operator)
    assert settled(cluster) == ("NeverStarted", 0)


def test_pod_of_another_start_may_have_gone_unseen(cluster: Cluster, operator: Operator) -> None:
    """Two pods are known, and two starts: but both pods are of the first."""
    reach_running(cluster, operator)
    end(cluster, ExitCode.PEER_LOST)
    restarted(cluster, operator)
    cluster.vanish(next(iter(cluster.pods)))
    pause_and_miss_the_next(cluster, operator)
    assert settled(cluster) == ("ReportMissing", STEPS)


@pytest.mark.parametrize("gap", [False, True])
def test_pods_that_only_a_report_knows_may_all_be_of_one_start(
    cluster: Cluster, operator: Operator, gap: bool
) -> None:
    """Three are known, and three starts: but the two that no operator saw are of the first."""
    reach_running(cluster, operator)
    [workload] = cluster.workloads
    crash(cluster)
    for _ in range(2):
        cluster.job_controller()
    for _ in range(3):
        cluster.advance(newest(cluster))
    cluster.suspend(workload)
    for _ in range(2):
        cluster.job_controller()
        cluster.kubelet()
    cluster.vanish(only_pod(cluster))
    cluster.suspend(workload, suspend=False)
    operator.restart()
    restarted(cluster, operator)
    assert len(attempts(cluster)) == 3
    cluster.edit("j", suspend=True)
    stand_still(cluster, operator)
    if gap:
        cluster.edit("j", suspend=False)
        assert see(operator) == ([], ["Release"])
        come_and_go(cluster, operator)
        operator.list_pods()
    else:
        cluster.delete("job", "j")
    settle_down(cluster, operator)
    assert settled(cluster) == (("ReportMissing", STEPS) if gap else ("Stopped", TAKEN))


@pytest.mark.parametrize("gap", [False, True])
def test_pod_that_is_made_as_the_job_is_given_up_is_not_overlooked(
    cluster: Cluster, operator: Operator, gap: bool
) -> None:
    """The Job controller makes a pod at last, before it sees that the Job is suspended."""
    cluster.refuse_pods = True
    reach_pending(cluster, operator)
    operator.deaf = True
    cluster.delete("job", "j")
    assert see(operator) == ([], ["Stop"])
    cluster.refuse_pods = False
    cluster.create_pod(next(iter(cluster.workloads.values())))
    for _ in range(3):
        cluster.advance(only_pod(cluster))
    cluster.train(only_pod(cluster), TAKEN)
    for _ in range(2):
        cluster.job_controller()
        cluster.kubelet()
    assert cluster.pods == {}
    assert see(operator) == ([], [])
    if gap:
        operator.list_pods()
    operator.deaf = False
    settle_down(cluster, operator)
    assert settled(cluster) == (("ReportMissing", STEPS) if gap else ("Stopped", TAKEN))


def test_unseen_pod_between_two_others_is_of_no_other_start(
    cluster: Cluster, operator: Operator
) -> None:
    """As above, but the first pod of the first start was seen, and its successor was not."""
    reach_running(cluster, operator)
    [workload] = cluster.workloads
    crash(cluster)
    see(operator)
    first = only_pod(cluster)
    operator.deaf = True
    cluster.job_controller()
    for _ in range(3):
        cluster.advance(newest(cluster))
    cluster.suspend(workload)
    for _ in range(2):
        cluster.job_controller()
        cluster.kubelet()
    cluster.suspend(workload, suspend=False)
    operator.list_pods()
    operator.deaf = False
    cluster.vanish(first)
    restarted(cluster, operator)
    assert len(attempts(cluster)) == 3
    pause_and_miss_the_next(cluster, operator)
    assert settled(cluster) == ("ReportMissing", STEPS)
