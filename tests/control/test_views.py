"""Views: what the operator takes from a kubelet's and a Job controller's words, and what not."""

from copy import deepcopy
from datetime import UTC, datetime
from typing import Any

import pytest
from tests.builders import NOW, Object, block, job
from tests.control.workloads import (
    CREATING,
    NEVER_FOUND,
    NO_IMAGE,
    REJECTED,
    RUNNING,
    RUNTIME_ID,
    SCHEDULED,
    SINCE,
    UNSCHEDULED,
    disrupted,
    ended,
    history,
    pod,
    workload,
)

from dpmoe_operator.control.pods import PodView
from dpmoe_operator.control.times import format_time, parse_time
from dpmoe_operator.control.views import BlockView, JobView, Meta, WorkloadView, stop_was_observed


def test_times_are_read_and_written_as_kubernetes_does() -> None:
    assert parse_time("2030-01-01T12:00:00Z") == NOW
    assert parse_time("2030-01-01T12:00:00.123456Z").microsecond == 123456
    assert parse_time("2030-01-01T14:00:00+02:00") == NOW
    assert format_time(NOW) == "2030-01-01T12:00:00Z"
    assert format_time(datetime(2030, 1, 1, 12, 0, 0, 999999, UTC)) == "2030-01-01T12:00:00Z"


def test_unreadable_manifests_keep_their_error() -> None:
    for view in (
        BlockView.of(block(budget={"epsilon": "x"})),
        JobView.of(job(privacy={"epsilon": "x"})),
    ):
        assert view.spec is None
        assert view.error is not None
        assert "epsilon: 'x'" in str(view.error)


def test_empty_manifests_are_unreadable_not_fatal() -> None:
    nothing: tuple[Any, ...] = (None, {}, [])
    for spec in nothing:
        manifest = job() | {"spec": spec}
        assert JobView.of(manifest).spec is None
        assert BlockView.of(manifest).spec is None


def test_metadata_of_a_stored_object() -> None:
    meta = Meta.of(job("a", "ns", uid="u", meta={"labels": None}))
    assert (meta.key, meta.uid, meta.labels) == (("ns", "a"), "u", {})


# Pods: did a container with data ever start?

NEVER: dict[str, list[Object]] = {
    "no node": [UNSCHEDULED],
    "deleted before it had a node": [UNSCHEDULED, UNSCHEDULED],
    "deleted while its image was missing": [UNSCHEDULED, NO_IMAGE, CREATING, NEVER_FOUND],
    "deleted while it was created": [SCHEDULED, CREATING, NEVER_FOUND, NEVER_FOUND],
    "drained while it was created": [CREATING, disrupted(CREATING), disrupted(NEVER_FOUND)],
    "preempted while its image was missing": [
        disrupted(NO_IMAGE, "PreemptionByScheduler"),
        disrupted(NEVER_FOUND, "PreemptionByScheduler"),
    ],
    "rejected by its node": [UNSCHEDULED, SCHEDULED, REJECTED, REJECTED],
    "rejected before its node was seen": [UNSCHEDULED, REJECTED],
    "evicted by its kubelet": [CREATING, disrupted(NEVER_FOUND, "TerminationByKubelet")],
}
MAYBE: dict[str, list[Object]] = {
    "running": [UNSCHEDULED, RUNNING],
    "ended": [UNSCHEDULED, RUNNING, ended(0)],
    "ended unseen": [UNSCHEDULED, ended(1)],
    "lost after it ran": [CREATING, RUNNING, NEVER_FOUND],
    "first seen at its end": [NEVER_FOUND],
    "deleted past the kubelet": [UNSCHEDULED, CREATING, CREATING],
    "deleted before the kubelet spoke": [UNSCHEDULED, SCHEDULED],
    "failed without a word on its container": [UNSCHEDULED, {"phase": "Failed"}],
    "failed with its node": [
        CREATING,
        disrupted(CREATING, "DeletionByPodGC") | {"phase": "Failed"},
    ],
    "drained, and gone past the kubelet": [SCHEDULED, disrupted(CREATING)],
    "drained as it began to run": [disrupted(CREATING), disrupted(ended(143))],
    "drained, and lost after it ran": [disrupted(RUNNING), disrupted(NEVER_FOUND)],
    "given up with its node, which came back empty": [
        disrupted(CREATING, "DeletionByTaintManager"),
        disrupted(NEVER_FOUND, "DeletionByTaintManager"),
    ],
    "rejected by a kubelet that had begun with it": [SCHEDULED, CREATING, REJECTED],
    "rejected by a kubelet that had said when it began with it": [
        SCHEDULED | {"startTime": SINCE},
        REJECTED,
    ],
    "rejected after it ran": [SCHEDULED, RUNNING, REJECTED],
    "first seen rejected": [REJECTED],
    "rejected, and given up with its node": [
        SCHEDULED,
        disrupted(REJECTED, "DeletionByTaintManager"),
    ],
    "failed with another word": [SCHEDULED, REJECTED | {"message": "The node was low on memory"}],
    "given up with its node, and only its end was seen": [
        CREATING,
        disrupted(NEVER_FOUND, "DeletionByTaintManager"),
    ],
    "unknown": [CREATING, {"phase": "Unknown"}],
}


@pytest.mark.parametrize("states", NEVER.values(), ids=NEVER.keys())
def test_container_never_started(states: list[Object]) -> None:
    view = history(*states)
    assert not view.may_have_started
    assert not view.alive


@pytest.mark.parametrize("states", MAYBE.values(), ids=MAYBE.keys())
def test_container_may_have_started(states: list[Object]) -> None:
    assert history(*states).may_have_started


def test_restarted_container_has_started() -> None:
    """restartPolicy is Never, but a pod that says otherwise is believed."""
    state = {"waiting": {"reason": "CrashLoopBackOff"}}
    again: Any = {"phase": "Pending", "containerStatuses": [{"state": state, "restartCount": 1}]}
    assert PodView.of(pod(again)).may_have_started
    again["containerStatuses"][0] = {"state": state, "lastState": {"terminated": {}}}
    assert PodView.of(pod(again)).may_have_started


def test_waiting_pod_has_not_started_as_long_as_it_is_there() -> None:
    for state in (SCHEDULED, CREATING, NO_IMAGE):
        view = PodView.of(pod(state))
        assert not view.may_have_started
        assert view.alive


def test_last_word_seen_twice_stays_what_it_was() -> None:
    """A fresh list may bring the same object again."""
    end = history(NO_IMAGE, NEVER_FOUND, gone=False)
    assert not PodView.of(pod(NEVER_FOUND)).following(end).may_have_started
    ran = history(RUNNING, NEVER_FOUND, gone=False)
    assert PodView.of(pod(NEVER_FOUND)).following(ran).may_have_started


def test_what_ran_once_has_started_whatever_is_said_later() -> None:
    ran = history(CREATING, RUNNING, gone=False)
    for state in (SCHEDULED, CREATING, NO_IMAGE):
        assert PodView.of(pod(state)).following(ran).may_have_started


def test_container_that_had_a_time_or_an_id_was_found() -> None:
    waiting = history(NO_IMAGE, gone=False)
    for field, value in (("startedAt", SINCE), ("containerID", RUNTIME_ID), ("reason", "Error")):
        found = deepcopy(NEVER_FOUND)
        found["containerStatuses"][0]["state"]["terminated"][field] = value
        assert PodView.of(pod(found), gone=True).following(waiting).may_have_started


def test_pod_fields() -> None:
    view = PodView.of(pod(NO_IMAGE, index="3"))
    assert view.index == 3
    assert view.waiting == "ErrImagePull: no such image"
    assert (view.exit_code, view.message, view.running) == (None, None, False)
    view = PodView.of(pod(ended(4, "text")))
    assert (view.exit_code, view.message, view.ended) == (4, "text", True)
    assert PodView.of(pod(RUNNING)).running


@pytest.mark.parametrize("index", [None, "", "x", "-1"])
def test_pod_that_hides_its_index_counts_as_rank_0(index: str | None) -> None:
    assert PodView.of(pod(RUNNING, index=index)).index == 0


def test_pod_without_status_is_alive_and_unscheduled() -> None:
    view = PodView.of(pod(None, node=None))
    assert view.alive
    assert not view.may_have_started


# Kubernetes Jobs: is it over?

SUSPENDED = {"Suspended": "JobSuspended"}


def over(manifest: Object, *pods: PodView) -> bool:
    return WorkloadView.of(manifest, pods).over


def test_finished_jobs_are_over() -> None:
    assert over(workload(conditions={"Complete": ""}))
    assert over(workload(conditions={"FailureTarget": "", "Failed": "DeadlineExceeded"}))
    assert not over(workload(conditions={"FailureTarget": ""}))
    assert not over(workload(conditions={"SuccessCriteriaMet": ""}))
    assert not over(workload(active=1))


def test_job_that_was_just_released_is_not_over() -> None:
    """Its status still says Suspended until the Job controller has noticed."""
    assert not over(workload(suspend=False, conditions=SUSPENDED))


def test_suspended_job_is_over_only_after_its_release() -> None:
    assert over(workload(suspend=True, conditions=SUSPENDED))
    assert not over(workload(suspend=True, released=False, conditions=SUSPENDED))


def test_job_whose_pods_still_end_is_not_over() -> None:
    assert not over(workload(suspend=True, conditions=SUSPENDED, terminating=1))
    assert not over(workload(suspend=True, conditions=SUSPENDED, active=1))


def test_known_pod_that_is_alive_keeps_a_job_from_being_over() -> None:
    """Whatever a lagging status says: its report is still to come."""
    for manifest in (
        workload(suspend=True, conditions=SUSPENDED),
        workload(conditions={"Failed": ""}),
    ):
        for state in (None, UNSCHEDULED, CREATING, RUNNING):
            assert not over(manifest, PodView.of(pod(state)))
        assert over(manifest, PodView.of(pod(RUNNING), gone=True))
        assert over(manifest, PodView.of(pod(ended(0))))


def test_job_that_nobody_let_run() -> None:
    fresh = workload(suspend=True, released=False, conditions=SUSPENDED)
    assert not WorkloadView.of(fresh, ()).may_have_run
    for manifest in (
        workload(suspend=True),
        workload(suspend=False, released=False),
        workload(suspend=True, released=False, active=1),
        workload(suspend=True, released=False, failed=1),
    ):
        assert WorkloadView.of(manifest, ()).may_have_run
    assert WorkloadView.of(fresh, (PodView.of(pod(UNSCHEDULED, node=None)),)).may_have_run


ON, OFF = {"Suspended": "JobSuspended"}, {}


def state(generation: int, conditions: Any, *, suspend: bool = True) -> Object:
    manifest = workload(suspend=suspend, conditions=conditions)
    manifest["metadata"]["generation"] = generation
    return manifest


@pytest.mark.parametrize(
    ("before", "now", "already", "observed"),
    [
        (state(2, OFF, suspend=False), state(3, ON), False, True),
        (state(3, OFF), state(3, ON), False, True),
        (state(2, OFF, suspend=False), state(3, OFF), False, False),
        (state(2, ON, suspend=False), state(3, ON), False, False),
        (state(3, ON), state(3, ON), False, False),
        (state(3, ON), state(3, ON), True, True),
        (state(3, ON), state(4, ON), True, True),
        (state(3, ON), state(5, ON), True, False),
        (state(3, ON), state(4, ON, suspend=False), True, False),
        (state(2, OFF, suspend=False), state(4, ON), False, False),
    ],
    ids=[
        "both at once",
        "status follows",
        "not yet",
        "status of before the start",
        "never seen to change",
        "nothing changed",
        "another change of the spec",
        "it may have been started between",
        "started again",
        "gap",
    ],
)
def test_suspension_is_observed_where_its_condition_is_seen_to_come(
    before: Object, now: Object, already: bool, observed: bool
) -> None:
    assert stop_was_observed(before, now, already=already) is observed


def test_all_pods_are_known_to_a_watch_that_was_there_from_the_start() -> None:
    stopped = workload(suspend=True, conditions=SUSPENDED)
    known = {"watched": True, "caught_up": True, "stop_observed": True}
    assert WorkloadView.of(stopped, (), **known).all_pods_known
    for missing in known:
        assert not WorkloadView.of(stopped, (), **known | {missing: False}).all_pods_known
    failed = workload(conditions={"Failed": ""})
    assert WorkloadView.of(failed, (), watched=True, caught_up=True).all_pods_known


def test_job_is_podless_as_long_as_nothing_tells_of_a_pod() -> None:
    def podless(*pods: PodView, **fields: Any) -> bool:
        manifest = workload(**fields)
        manifest["spec"] |= {"backoffLimit": 0}
        return WorkloadView.of(manifest, pods).podless

    assert podless()
    assert podless(active=0, uncountedTerminatedPods={})
    assert not podless(PodView.of(pod(UNSCHEDULED, node=None)))
    assert not podless(suspend=True)
    assert not podless(released=False)
    for count in ("active", "ready", "terminating", "succeeded", "failed"):
        assert not podless(**{count: 1})
    assert not podless(uncountedTerminatedPods={"failed": ["pod-1"]})
    again = workload()
    again["metadata"]["generation"] = 4
    assert not WorkloadView.of(again, ()).podless
    restartable = workload()
    restartable["spec"]["backoffLimitPerIndex"] = 3
    assert not WorkloadView.of(restartable, ()).podless


def test_workload_fields() -> None:
    view = WorkloadView.of(
        workload(conditions={"Failed": "BackoffLimitExceeded"}, failed=1, succeeded=2), ()
    )
    assert (view.outcome, view.reason, view.ended) == ("Failed", "BackoffLimitExceeded", 3)
    pods = tuple(PodView.of(pod(RUNNING, uid=f"p{i}", index=str(i))) for i in (0, 1, 0))
    assert len(WorkloadView.of(workload(), pods).first_pods) == 2
