"""The picture: newer versions win, deletions count, and a pod's last word is kept or mistrusted."""

from datetime import UTC, datetime
from typing import Any

import pytest

from dpmoe_operator.kube.picture import Picture, Rewound
from dpmoe_operator.launch.launching import labels, workload_name
from dpmoe_operator.ledger.fold import LedgerState
from dpmoe_trainer.contract import JobReference

JOB = JobReference(namespace="team", name="train", uid="job-uid")


def workload(version: int = 1, *, uid: str = "w1", name: str | None = None) -> dict[str, Any]:
    return {
        "metadata": {
            "name": name or workload_name(JOB),
            "namespace": "data",
            "uid": uid,
            "resourceVersion": str(version),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": labels(JOB),
        },
        "spec": {"suspend": version == 1},
        "status": {},
    }


def pod(version: int, **status: Any) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "p",
            "namespace": "data",
            "uid": "p1",
            "resourceVersion": str(version),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": labels(JOB),
            "ownerReferences": [{"uid": "w1", "controller": True}],
        },
        "spec": {"nodeName": "node"},
        "status": {"phase": "Pending", **status},
    }


WAITING = {"containerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull"}}}]}
NEVER_FOUND = {
    "phase": "Failed",
    "containerStatuses": [
        {"state": {"terminated": {"reason": "ContainerStatusUnknown", "exitCode": 137}}}
    ],
}


def seen(picture: Picture) -> Any:
    return picture.snapshot(LedgerState(), datetime(2026, 1, 1, tzinfo=UTC)).workloads


def test_older_version_of_a_workload_does_not_replace_a_newer_one() -> None:
    picture = Picture()
    picture.on_workload("ADDED", workload(2))
    picture.on_workload("MODIFIED", workload(1))
    assert not seen(picture)["job-uid"].asked_to_suspend


def test_workload_under_another_name_is_not_ours_whatever_its_labels() -> None:
    picture = Picture()
    picture.on_workload("ADDED", workload(name="copied"))
    assert seen(picture) == {}


def test_deletion_of_an_earlier_workload_keeps_its_successor() -> None:
    picture = Picture()
    picture.on_workload("ADDED", workload(1, uid="w1"))
    picture.on_workload("ADDED", workload(5, uid="w2"))
    picture.on_workload("DELETED", workload(4, uid="w1"))
    assert seen(picture)["job-uid"].meta.uid == "w2"


def test_last_word_of_a_pod_that_never_started_proves_it() -> None:
    picture = Picture()
    picture.on_workload("ADDED", workload())
    picture.on_pod("ADDED", pod(1, **WAITING))
    picture.on_pod("DELETED", pod(2, **NEVER_FOUND))
    [view] = seen(picture)["job-uid"].pods
    assert view.gone
    assert not view.may_have_started


def test_pod_that_vanished_in_a_gap_of_the_watch_proves_nothing() -> None:
    """The informer then hands over the version that it knew already."""
    picture = Picture()
    picture.on_workload("ADDED", workload())
    picture.on_pod("ADDED", pod(1, **WAITING))
    picture.on_pod("DELETED", pod(1, **WAITING))
    [view] = seen(picture)["job-uid"].pods
    assert view.may_have_started


def test_pod_that_ran_once_has_run_whatever_comes_later() -> None:
    picture = Picture()
    picture.on_workload("ADDED", workload())
    picture.on_pod("ADDED", pod(1, phase="Running"))
    picture.on_pod("DELETED", pod(2, **NEVER_FOUND))
    [view] = seen(picture)["job-uid"].pods
    assert view.may_have_started


def test_list_after_a_gap_takes_the_witness_of_pods_that_are_over() -> None:
    picture = Picture()
    picture.on_workload("ADDED", workload())
    picture.on_pod("ADDED", pod(1, phase="Running"))
    picture.on_pods_told("data", "1", listed=True)
    assert [view.witnessed for view in seen(picture)["job-uid"].pods] == [True]
    picture.on_pod("MODIFIED", pod(2, phase="Failed"))
    picture.on_pods_told("data", "2", listed=False)
    picture.on_pods_told("elsewhere", "9", listed=True)
    assert [view.witnessed for view in seen(picture)["job-uid"].pods] == [True]
    picture.on_pods_told("data", "9", listed=True)
    assert [view.witnessed for view in seen(picture)["job-uid"].pods] == [False]
    picture.on_pod("DELETED", pod(10, phase="Failed"))
    assert [view.witnessed for view in seen(picture)["job-uid"].pods] == [False]


def test_living_pod_without_its_finalizer_was_let_go() -> None:
    tracked, free = pod(1, phase="Running"), pod(2, phase="Running")
    tracked["metadata"]["finalizers"] = ["batch.kubernetes.io/job-tracking"]
    for ended, let_go in (("Running", True), ("Failed", False)):
        picture = Picture()
        picture.on_workload("ADDED", workload())
        picture.on_pod("ADDED", tracked)
        picture.on_pod("MODIFIED", free | {"status": {"phase": ended}})
        picture.on_pod("DELETED", pod(3, phase="Failed"))
        assert [view.let_go for view in seen(picture)["job-uid"].pods] == [let_go]


def test_pods_are_confirmed_for_the_job_as_it_was_read_and_once_the_watch_told_as_much() -> None:
    picture = Picture()
    picture.on_workload("ADDED", workload(4))
    picture.on_pods_told("data", "8", listed=False)
    picture.confirm_pods(seen(picture)["job-uid"], [], "9")
    view = seen(picture)["job-uid"]
    assert (view.confirmed, view.caught_up) == (True, False)
    picture.on_pods_told("data", "9", listed=False)
    assert seen(picture)["job-uid"].caught_up
    picture.on_workload("MODIFIED", workload(10))
    view = seen(picture)["job-uid"]
    assert (view.confirmed, view.caught_up) == (False, False)


def test_watch_tells_of_all_pods_of_a_job_until_it_may_have_skipped_some() -> None:
    def watched() -> bool:
        return bool(seen(picture)["job-uid"].watched)

    picture = Picture()
    picture.on_workload("ADDED", workload())
    assert seen(picture)["job-uid"].watch is None
    picture.on_pods_told("data", "1", listed=True)
    watch = seen(picture)["job-uid"].watch
    picture.on_watched("job-uid", workload(), None)
    assert not watched()
    picture.on_watched("job-uid", workload(), watch)
    assert watched()
    picture.on_pods_told("data", "2", listed=False)
    assert watched()
    picture.on_workload("ADDED", workload(5, uid="w2"))
    assert not watched()
    picture.on_watched("job-uid", workload(5, uid="w2"), watch)
    assert watched()
    picture.on_pods_told("data", "3", listed=True)
    assert not watched()
    picture.on_watched("job-uid", workload(5, uid="w2"), watch)
    assert not watched()


def test_pod_of_another_owner_is_not_counted() -> None:
    picture = Picture()
    picture.on_workload("ADDED", workload())
    stranger = pod(1)
    stranger["metadata"]["ownerReferences"] = []
    picture.on_pod("ADDED", stranger)
    assert seen(picture)["job-uid"].pods == ()


def test_status_alone_wakes_no_round() -> None:
    picture = Picture()
    block = {
        "metadata": {
            "name": "b",
            "namespace": "data",
            "uid": "b1",
            "generation": 1,
            "resourceVersion": "1",
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {},
    }
    picture.put_block(block)
    assert picture.changed.is_set()
    picture.changed.clear()
    changed = {**block, "metadata": {**block["metadata"], "resourceVersion": "2"}}
    picture.put_block({**changed, "status": {"state": "Ready"}})
    assert not picture.changed.is_set()
    changed["metadata"]["generation"] = 2
    changed["metadata"]["resourceVersion"] = "3"
    picture.put_block(changed)
    assert picture.changed.is_set()


def dpmoejob(version: int) -> dict[str, Any]:
    return {
        "metadata": {
            "name": "j",
            "namespace": "team",
            "uid": "j1",
            "resourceVersion": str(version),
            "creationTimestamp": "2026-01-01T00:00:00Z",
        },
        "spec": {},
    }


def test_fresh_list_drops_what_is_not_in_it() -> None:
    picture = Picture()
    picture.put_job(dpmoejob(5))
    picture.replace_all(([], "9"), ([], "9"))
    assert picture.job_uids() == set()


def test_what_was_created_while_a_list_was_on_its_way_stays() -> None:
    picture = Picture()
    picture.put_job(dpmoejob(10))
    picture.replace_all(([], "9"), ([], "9"))
    assert picture.job_uids() == {"j1"}


def test_what_was_deleted_while_a_list_was_on_its_way_does_not_come_back() -> None:
    picture = Picture()
    picture.put_job(dpmoejob(5))
    picture.drop_job("j1")
    picture.replace_all(([], "9"), ([dpmoejob(5)], "9"))
    assert picture.job_uids() == set()


def test_lists_from_before_end_the_process() -> None:
    """After a restored backup the versions of old objects look new, and the other way round."""
    picture = Picture()
    picture.replace_all(([], "100"), ([], "101"))
    picture.replace_all(([], "100"), ([], "101"))
    with pytest.raises(Rewound, match="from 100 to 40"):
        picture.replace_all(([], "40"), ([], "40"))
