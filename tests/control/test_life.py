"""The life of a grant, step by step, and what happens when somebody interferes at each stage."""

from collections.abc import Callable
from datetime import datetime, timedelta

import pytest
from tests.builders import SETTINGS, TEAM, block
from tests.control.cluster import Cluster
from tests.control.operator import Killed, Operator, settle_down
from tests.control.stages import (
    ROOM_FOR_TWO,
    STAGES,
    cheap,
    grant_of,
    kinds,
    only_pod,
    reach_ended,
    reach_granted,
    reach_launched,
    reach_pending,
    reach_running,
    records,
    see,
    settled,
)

from dpmoe_operator.control.actions import Remove, SetStatus, Stop
from dpmoe_operator.control.decide import decide
from dpmoe_operator.control.steering import stop_patch
from dpmoe_operator.control.times import parse_time
from dpmoe_operator.control.views import CANCELLED, RELEASED
from dpmoe_operator.launch.launching import JOB_UID, workload_name
from dpmoe_trainer.contract import JobReference

ACCOUNT = "claim://vault/data/reviews.jsonl"


@pytest.fixture
def cluster() -> Cluster:
    """One block with room for two cheap jobs."""
    result = Cluster()
    result.apply(block(uid="b", budget=ROOM_FOR_TWO))
    return result


@pytest.fixture
def operator(cluster: Cluster) -> Operator:
    """An operator that has opened the block's account."""
    result = Operator(cluster)
    result.round()
    result.round()
    return result


def test_whole_life(cluster: Cluster, operator: Operator) -> None:
    reach_ended(cluster, operator)
    held = grant_of(cluster)
    assert held.settled is None
    assert cluster.ledger.accounts[ACCOUNT].spending.reserved == held.amounts[ACCOUNT]
    assert see(operator) == (["settled"], [])
    assert settled(cluster) == ("Completed", 4)
    assert cluster.ledger.accounts[ACCOUNT].spending.consumed == held.amounts[ACCOUNT]
    assert cluster.ledger.accounts[ACCOUNT].spending.reserved == (0,)
    status = cluster.jobs["j"]["status"]
    assert (status["state"], status["stepsDone"], status["progress"]) == ("Completed", 4, "100%")
    assert see(operator) == ([], [])


def test_order_of_effects(cluster: Cluster, operator: Operator) -> None:
    """Nothing is created before the grant is stored, nothing released before the launch is."""
    cluster.apply(cheap())
    operator.deliver()
    for stored, workloads in ((0, 0), (1, 0)):
        operator.fuse = stored
        with pytest.raises(Killed):
            operator.round()
        assert ("j" in cluster.ledger.grants) == bool(stored)
        assert len(cluster.workloads) == workloads
        operator.restart()
    operator.fuse = None
    operator.round()
    [workload] = cluster.workloads.values()
    assert workload["spec"]["suspend"] is True
    operator.fuse = 0
    with pytest.raises(Killed):
        operator.round()
    assert grant_of(cluster).launched is None
    assert RELEASED not in workload["metadata"]["annotations"]


def test_account_is_opened_before_anything_is_asked_of_it() -> None:
    cluster = Cluster()
    cluster.apply(block(uid="b"))
    cluster.apply(cheap())
    operator = Operator(cluster)
    first, _ = operator.round()
    assert records(first) == ["accountOpened"]
    second, _ = operator.round()
    assert records(second) == ["granted"]


def test_launch_waits_until_all_that_it_needs_is_known_to_exist(
    cluster: Cluster, operator: Operator
) -> None:
    """A new process found the Job; whether its ConfigMap was made it cannot know."""
    reach_granted(cluster, operator)
    operator.restart()
    assert see(operator) == ([], ["Prepare"])
    assert see(operator) == (["launched"], ["Release"])


def test_settlement_waits_until_the_pods_were_read(cluster: Cluster, operator: Operator) -> None:
    """The Job's end may be seen before its pods' last words are."""
    reach_ended(cluster, operator)
    operator.deliver()
    snapshot = operator.picture.snapshot(operator.ledger.state, cluster.now)
    assert snapshot.workloads["j"].over
    assert decide(snapshot, SETTINGS, operator.planner).records == ()


@pytest.mark.parametrize("stage", STAGES)
def test_crash_at_any_stage_changes_nothing(
    cluster: Cluster, operator: Operator, stage: str
) -> None:
    STAGES[stage](cluster, operator)
    operator.restart()
    settle_down(cluster, operator)
    assert settled(cluster) == ("Completed", 4)
    assert cluster.steps["j"] == 4


def test_release_is_given_once_on_what_was_decided(cluster: Cluster, operator: Operator) -> None:
    """Whoever gave the Job up since the decision wins: the release carries its version."""
    reach_launched(cluster, operator)
    [uid] = cluster.workloads
    workload = cluster.workloads[uid]["metadata"]
    stop = Stop("j", workload["namespace"], workload["name"], workload["resourceVersion"])
    cluster.patch_workload(uid, stop_patch(stop, "2030-01-01T12:00:00Z"))
    _, actions = operator.round()
    assert kinds(actions) == ["Release"]
    assert cluster.workloads[uid]["spec"]["suspend"] is True
    assert RELEASED not in cluster.workloads[uid]["metadata"]["annotations"]


def test_fresh_release_is_not_taken_for_a_stop(cluster: Cluster, operator: Operator) -> None:
    """A Job's status says Suspended until its controller has seen the release."""
    reach_granted(cluster, operator)
    cluster.job_controller()
    assert see(operator) == (["launched"], ["Release"])
    assert cluster.workloads[next(iter(cluster.workloads))]["status"]["conditions"]
    assert see(operator) == ([], [])
    assert grant_of(cluster).settled is None


# The DPMoEJob is deleted


DELETED = {
    "granted": ("NeverStarted", 0),
    "launched": ("NeverStarted", 0),
    "released": ("NeverStarted", 0),
    "pending": ("NeverStarted", 0),
    "running": ("Stopped", 3),
    "ended": ("Completed", 4),
}


@pytest.mark.parametrize("stage", STAGES)
def test_deleted_job_pays_what_it_used(cluster: Cluster, operator: Operator, stage: str) -> None:
    STAGES[stage](cluster, operator)
    cluster.delete("job", "j")
    settle_down(cluster, operator)
    assert settled(cluster) == DELETED[stage]
    assert cluster.workloads == {}
    assert cluster.pods == {}


def test_deleted_job_is_stopped_not_killed(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    cluster.delete("job", "j")
    assert see(operator) == ([], ["Stop"])
    [workload] = cluster.workloads.values()
    assert workload["spec"]["suspend"] is True
    assert CANCELLED in workload["metadata"]["annotations"]
    cluster.job_controller()
    assert see(operator) == ([], [])
    assert grant_of(cluster).settled is None
    cluster.kubelet()
    cluster.job_controller()
    records_, actions = see(operator)
    assert (records_, actions) == (["settled"], ["Remove"])


def test_pods_words_that_come_late_are_waited_for(cluster: Cluster, operator: Operator) -> None:
    """The Job's watch may be ahead of the pods': a pod that ran must not pass for one that didn't.

    It was seen without a node; since then it ran, was stopped, and is gone.
    """
    reach_pending(cluster, operator)
    for _ in range(3):
        cluster.advance(only_pod(cluster))
    cluster.train(only_pod(cluster), 2)
    [workload] = cluster.workloads
    cluster.suspend(workload)
    cluster.job_controller()
    cluster.kubelet()
    cluster.job_controller()
    late = [event for event in cluster.pending if event[0] == "pod"]
    cluster.pending[:] = [event for event in cluster.pending if event[0] != "pod"]
    assert see(operator) == ([], [])
    cluster.pending.extend(late)
    assert see(operator) == (["settled"], ["Remove"])
    assert settled(cluster) == ("Stopped", 2)


# The Kubernetes Job is deleted by hand


@pytest.mark.parametrize("stage", STAGES)
def test_workload_deleted_by_hand(cluster: Cluster, operator: Operator, stage: str) -> None:
    STAGES[stage](cluster, operator)
    [uid] = cluster.workloads
    cluster.delete("workload", uid)
    settle_down(cluster, operator)
    if stage == "granted":
        # Nothing ran yet: it is made again.
        assert settled(cluster) == ("Completed", 4)
    else:
        assert settled(cluster) == ("WorkloadVanished", 4)
        assert cluster.workloads == {}
        status = cluster.jobs["j"]["status"]
        assert (status["state"], status["reason"]) == ("Failed", "WorkloadVanished")


def test_copy_of_the_workload_never_runs_on_the_old_grant(
    cluster: Cluster, operator: Operator
) -> None:
    """Deleted and created again by hand, with everything the old one had."""
    reach_running(cluster, operator)
    [uid] = cluster.workloads
    copy = cluster.workloads[uid]
    cluster.delete("workload", uid)
    copy["metadata"]["uid"] = "copy"
    copy["status"] = {}
    cluster.workloads["copy"] = copy
    cluster.changed("workload", "ADDED", copy)
    operator.deliver()
    _, actions = operator.round()
    assert settled(cluster) == ("WorkloadVanished", 4)
    assert [type(a) for a in actions if not isinstance(a, SetStatus)] == [Remove]
    assert cluster.workloads == {}


def test_finished_workload_deleted_by_hand_before_it_was_read(
    cluster: Cluster, operator: Operator
) -> None:
    reach_ended(cluster, operator)
    [uid] = cluster.workloads
    cluster.delete("workload", uid)
    settle_down(cluster, operator)
    assert settled(cluster) == ("WorkloadVanished", 4)


# The Kubernetes Job is suspended or started by hand


@pytest.mark.parametrize(
    ("stage", "outcome"),
    [("pending", ("NeverStarted", 0)), ("running", ("Stopped", 3)), ("ended", ("Completed", 4))],
)
def test_workload_suspended_by_hand_is_over(
    cluster: Cluster, operator: Operator, stage: str, outcome: tuple[str, int]
) -> None:
    STAGES[stage](cluster, operator)
    [uid] = cluster.workloads
    cluster.suspend(uid)
    settle_down(cluster, operator)
    assert settled(cluster) == outcome
    # It could be resumed and would spend a second time, so only a finished one is kept.
    assert bool(cluster.workloads) == (stage == "ended")


def test_workload_started_by_hand_before_its_launch_is_charged(
    cluster: Cluster, operator: Operator
) -> None:
    """Without the launch in the ledger a grant is refunded: only if really nothing ran."""
    reach_granted(cluster, operator)
    [uid] = cluster.workloads
    cluster.suspend(uid, suspend=False)
    cluster.job_controller()
    cluster.delete("job", "j")
    records_, actions = see(operator)
    assert (records_, actions) == (["settled"], ["Remove"])
    assert settled(cluster) == ("StartedByOthers", 4)
    assert cluster.pods == {}


def test_workload_started_by_hand_is_not_launched_on_top(
    cluster: Cluster, operator: Operator
) -> None:
    """The DPMoEJob is still there: its grant is closed, and nothing else is written about it."""
    reach_granted(cluster, operator)
    [uid] = cluster.workloads
    cluster.suspend(uid, suspend=False)
    cluster.job_controller()
    assert see(operator) == (["settled"], ["Remove"])
    assert settled(cluster) == ("StartedByOthers", 4)
    settle_down(cluster, operator)
    assert cluster.jobs["j"]["status"]["reason"] == "StartedByOthers"


def test_workload_started_by_hand_between_launch_and_cancellation_is_charged(
    cluster: Cluster, operator: Operator
) -> None:
    reach_launched(cluster, operator)
    [uid] = cluster.workloads
    cluster.suspend(uid, suspend=False)
    cluster.job_controller()
    cluster.delete("job", "j")
    assert see(operator) == ([], ["Stop"])
    assert see(operator)[0] == ["settled"]
    assert settled(cluster) == ("StartedByOthers", 4)
    settle_down(cluster, operator)
    assert cluster.workloads == {}


# The plan changes


def change_access(cluster: Cluster) -> None:
    cluster.edit("b", access=[])


def delete_block(cluster: Cluster) -> None:
    cluster.delete("block", "b")


def change_steps(cluster: Cluster) -> None:
    """CEL refuses this; a server without CEL does not."""
    cluster.edit("j", training={"steps": 3})


PLAN_CHANGES = [change_access, delete_block, change_steps]


@pytest.mark.parametrize("change", PLAN_CHANGES)
def test_plan_that_no_longer_holds_is_not_launched(
    cluster: Cluster, operator: Operator, change: Callable[[Cluster], None]
) -> None:
    reach_granted(cluster, operator)
    change(cluster)
    records_, actions = see(operator)
    assert (records_, actions) == (["settled"], ["Remove"])
    assert settled(cluster) == ("NeverStarted", 0)
    settle_down(cluster, operator)
    assert cluster.workloads == {}
    assert cluster.ledger.accounts[ACCOUNT].spending.total == (0,)
    message = cluster.jobs["j"]["status"]["message"]
    assert "the plan does not hold any more" in message or "changed between grant" in message


@pytest.mark.parametrize("change", PLAN_CHANGES)
@pytest.mark.parametrize("stage", ["released", "running", "ended"])
def test_launched_grant_runs_to_its_end(
    cluster: Cluster, operator: Operator, stage: str, change: Callable[[Cluster], None]
) -> None:
    """What was launched was paid for as it was: later changes are for later jobs."""
    STAGES[stage](cluster, operator)
    change(cluster)
    settle_down(cluster, operator)
    assert settled(cluster) == ("Completed", 4)


def test_priority_may_change_at_any_time(cluster: Cluster, operator: Operator) -> None:
    reach_granted(cluster, operator)
    cluster.edit("j", priority=5, ttlSecondsAfterFinished=3)
    assert see(operator) == (["launched"], ["Release"])


def test_suspending_asks_for_no_budget_but_gives_none_back(
    cluster: Cluster, operator: Operator
) -> None:
    cluster.apply(cheap(suspend=True))
    assert see(operator) == ([], [])
    assert cluster.jobs["j"]["status"]["state"] == "Suspended"
    cluster.edit("j", suspend=False)
    assert see(operator) == (["granted"], ["Prepare"])
    cluster.edit("j", suspend=True)
    settle_down(cluster, operator)
    assert settled(cluster) == ("Completed", 4)


# Pods fail


def test_crash_without_a_report_is_charged_in_full(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    cluster.finish(only_pod(cluster), crash=True)
    settle_down(cluster, operator)
    assert settled(cluster) == ("ReportMissing", 4)


def test_lost_node_is_charged_in_full(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    cluster.vanish(only_pod(cluster))
    settle_down(cluster, operator)
    assert settled(cluster) == ("ReportMissing", 4)


def test_pod_deleted_by_hand_reports_first(cluster: Cluster, operator: Operator) -> None:
    reach_running(cluster, operator)
    cluster.terminate(only_pod(cluster))
    cluster.job_controller()
    assert see(operator) == ([], [])
    settle_down(cluster, operator)
    assert settled(cluster) == ("Stopped", 3)


def test_pod_gone_while_the_operator_was_away_is_charged_in_full(
    cluster: Cluster, operator: Operator
) -> None:
    reach_running(cluster, operator)
    cluster.terminate(only_pod(cluster))
    cluster.kubelet()
    operator.restart()
    settle_down(cluster, operator)
    assert settled(cluster) == ("ReportMissing", 4)


# After the end


def test_finished_job_can_be_deleted_without_a_trace_but_the_ledgers(
    cluster: Cluster, operator: Operator
) -> None:
    reach_ended(cluster, operator)
    settle_down(cluster, operator)
    assert len(cluster.workloads) == 1
    cluster.delete("job", "j")
    assert see(operator) == ([], ["Remove"])
    settle_down(cluster, operator)
    assert cluster.workloads == {}
    assert settled(cluster) == ("Completed", 4)


def test_same_name_again_is_another_job(cluster: Cluster, operator: Operator) -> None:
    reach_ended(cluster, operator)
    settle_down(cluster, operator)
    cluster.delete("job", "j")
    cluster.apply(cheap("again"))
    settle_down(cluster, operator)
    assert settled(cluster, "again") == ("Completed", 4)
    assert cluster.ledger.accounts[ACCOUNT].spending.jobs == 2


def test_third_job_finds_the_block_exhausted(cluster: Cluster, operator: Operator) -> None:
    for uid in ("j1", "j2", "j3"):
        cluster.apply(cheap(uid))
    settle_down(cluster, operator)
    assert {"j1", "j2"} == set(cluster.ledger.grants)
    status = cluster.jobs["j3"]["status"]
    assert (status["state"], status["reason"]) == ("Rejected", "BlockExhausted")


def test_time_to_live_counts_from_the_end(cluster: Cluster, operator: Operator) -> None:
    cluster.apply(cheap("kept", ttlSecondsAfterFinished=100))
    settle_down(cluster, operator)
    ended = operator.ledger.state.grants["kept"].settlement_time
    assert ended is not None
    cluster.now = _at(ended, 99)
    assert see(operator) == ([], [])
    cluster.now = _at(ended, 101)
    assert see(operator)[1] == ["DeleteJob"]
    assert cluster.jobs == {}
    settle_down(cluster, operator)
    assert cluster.workloads == {}


def test_time_to_live_of_a_job_that_timed_out(cluster: Cluster, operator: Operator) -> None:
    """It counts from the timeout, not from the first round in which the job waited."""
    uid = cluster.apply(cheap(suspend=True, timeoutSeconds=7200, ttlSecondsAfterFinished=100))
    created = cluster.jobs[uid]["metadata"]["creationTimestamp"]
    assert see(operator) == ([], [])
    for seconds, state in ((7199, "Suspended"), (7201, "Failed"), (7299, "Failed")):
        cluster.now = _at(created, seconds)
        assert see(operator) == ([], [])
        assert cluster.jobs[uid]["status"]["state"] == state
    assert cluster.jobs[uid]["status"]["reason"] == "TimedOut"
    cluster.now = _at(created, 7301)
    assert see(operator)[1] == ["DeleteJob"]


def test_job_that_timed_out_is_never_granted(cluster: Cluster, operator: Operator) -> None:
    uid = cluster.apply(cheap(timeoutSeconds=60))
    settle_down(cluster, operator)
    assert cluster.ledger.grants == {}
    assert cluster.jobs[uid]["status"]["reason"] == "TimedOut"
    assert cluster.blocks["b"]["status"]["waiting"] == 0


def _at(time: str, seconds: int) -> datetime:
    return parse_time(time) + timedelta(seconds=seconds)


def test_job_of_nobody_is_removed(cluster: Cluster, operator: Operator) -> None:
    """A Kubernetes Job that carries our labels and no grant."""
    reach_granted(cluster, operator)
    [stray] = cluster.workloads.values()
    stray["metadata"]["labels"][JOB_UID] = "other"
    stray["metadata"]["name"] = workload_name(
        JobReference(namespace=TEAM, name="train", uid="other")
    )
    operator.restart()
    _, actions = operator.round()
    assert "Remove" in kinds(actions)
    assert all(w["metadata"]["uid"] != stray["metadata"]["uid"] for w in cluster.workloads.values())
