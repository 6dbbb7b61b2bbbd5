"""The contract of Jobs that count failures by index, as those with checkpoints do."""

import pytest
from tests.cluster.test_api_jobs import INDEX, Jobs, condition

FAILURES = "batch.kubernetes.io/job-index-failure-count"
IGNORED = "batch.kubernetes.io/job-index-ignored-failure-count"
SPEC = {
    "completionMode": "Indexed",
    "completions": 2,
    "parallelism": 2,
    "backoffLimitPerIndex": 1,
    "maxFailedIndexes": 0,
    "podReplacementPolicy": "Failed",
    "podFailurePolicy": {
        "rules": [
            {
                "action": "FailJob",
                "onExitCodes": {"containerName": "main", "operator": "In", "values": [3, 4]},
            },
            {
                "action": "Ignore",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            },
            {
                "action": "Ignore",
                "onExitCodes": {"containerName": "main", "operator": "In", "values": [10, 143]},
            },
        ]
    },
}
"""In the shape of the operator's own manifests, with a container of the tests' name."""


@pytest.fixture
def jobs(http, namespace):
    return Jobs(http, namespace)


def of_index(pods, index):
    [pod] = [pod for pod in pods if pod["metadata"]["annotations"][INDEX] == str(index)]
    return pod


def next_pod(jobs, before):
    """The pod that replaces another, once it is there."""
    names = {before["metadata"]["name"]}
    index = before["metadata"]["annotations"][INDEX]

    def fresh(answer):
        return [
            pod
            for pod in answer.body["items"]
            if pod["metadata"]["annotations"][INDEX] == index
            and pod["metadata"]["name"] not in names
            and pod["status"].get("phase") not in ("Failed", "Succeeded")
        ]

    path = f"/api/v1/namespaces/{jobs.namespace}/pods"
    [pod] = fresh(jobs.http.eventually(path, fresh, seconds=40))
    return pod


def disrupt(jobs, pod):
    """What a kubelet reports of a pod that was evicted."""
    jobs.end(pod, code=143, conditions=[{"type": "DisruptionTarget", "status": "True"}])


def counts(pod):
    notes = pod["metadata"]["annotations"]
    return notes.get(FAILURES), notes.get(IGNORED)


def test_a_pod_knows_how_often_its_index_failed(jobs):
    job = jobs.create(**SPEC).body
    assert job["spec"]["backoffLimit"] == 2**31 - 1
    pods = jobs.wait_for_pods(2)
    assert [counts(pod) for pod in pods] == [("0", None), ("0", None)]
    first = of_index(pods, 1)
    jobs.end(first, code=1)
    second = next_pod(jobs, first)
    assert counts(second) == ("1", None)
    assert jobs.wait_for_status(failed=1, active=2)["failedIndexes"] == ""


def test_a_disrupted_pod_is_replaced_and_not_counted(jobs):
    jobs.create(**SPEC)
    first = of_index(jobs.wait_for_pods(2), 0)
    disrupt(jobs, first)
    second = next_pod(jobs, first)
    assert counts(second) == ("0", "1")
    assert "failed" not in jobs.wait_for_status(active=2)


def test_an_ignored_exit_code_is_as_a_disruption(jobs):
    jobs.create(**{**SPEC, "backoffLimitPerIndex": 0})
    first = of_index(jobs.wait_for_pods(2), 0)
    jobs.end(first, code=10)
    second = next_pod(jobs, first)
    assert counts(second) == ("0", "1")
    status = jobs.wait_for_status(active=2)
    assert "failed" not in status
    assert status["failedIndexes"] == ""


def test_an_index_that_fails_too_often_fails_the_job(jobs):
    jobs.create(**{**SPEC, "backoffLimitPerIndex": 0})
    pods = jobs.wait_for_pods(2)
    jobs.end(of_index(pods, 0), code=11)
    job = jobs.wait_for_condition("Failed")
    assert condition(job, "Failed")["reason"] == "MaxFailedIndexesExceeded"
    assert job["status"]["failedIndexes"] == "0"
    # The other pod was taken down with it, and counts.
    assert job["status"]["failed"] == 2
    assert jobs.wait_for_pods(0) == []


def test_a_final_exit_code_fails_the_job_at_once(jobs):
    jobs.create(**SPEC)
    jobs.end(of_index(jobs.wait_for_pods(2), 1), code=4)
    job = jobs.wait_for_condition("Failed")
    assert condition(job, "Failed")["reason"] == "PodFailurePolicy"
    assert job["status"]["failedIndexes"] == ""


def test_a_suspended_job_goes_on_and_forgets_its_failures(jobs, http):
    """Every change of the spec is a generation; a label is none."""
    job = jobs.create(suspend=True, **SPEC).body
    assert job["metadata"]["generation"] == 1
    job = http.merge(jobs.path("j"), {"metadata": {"labels": {"queue": "q"}}})
    assert job["metadata"]["generation"] == 1
    job = http.merge(jobs.path("j"), {"spec": {"suspend": False}})
    assert job["metadata"]["generation"] == 2
    first = of_index(jobs.wait_for_pods(2), 0)
    jobs.end(first, code=1)
    assert counts(next_pod(jobs, first)) == ("1", None)
    http.merge(jobs.path("j"), {"spec": {"suspend": True}})
    jobs.wait_for_pods(0)
    status = jobs.wait_for_condition("Suspended")["status"]
    uncounted = status.get("uncountedTerminatedPods") or {}
    assert status.get("failed", 0) + len(uncounted.get("failed") or ()) == 1
    job = http.merge(jobs.path("j"), {"spec": {"suspend": False}})
    assert job["metadata"]["generation"] == 4
    assert [counts(pod) for pod in jobs.wait_for_pods(2)] == [("0", None), ("0", None)]


def test_a_success_policy_ends_the_job_with_index_0(jobs):
    jobs.create(**SPEC, successPolicy={"rules": [{"succeededIndexes": "0"}]})
    jobs.end(of_index(jobs.wait_for_pods(2), 0))
    job = jobs.wait_for_condition("Complete")
    assert condition(job, "Complete")["reason"] == "SuccessPolicy"
    assert job["status"]["succeeded"] == 1
    assert "failed" not in job["status"]
    assert jobs.wait_for_pods(0) == []


@pytest.mark.parametrize(
    "spec",
    [
        {"completionMode": "NonIndexed", "maxFailedIndexes": None},
        {"backoffLimitPerIndex": None},
        {"maxFailedIndexes": 3},
        {"podReplacementPolicy": "TerminatingOrFailed"},
    ],
)
def test_what_contradicts_itself_is_invalid(jobs, spec):
    assert jobs.create(**{**SPEC, **spec}).status == 422


def test_how_failures_are_handled_is_immutable(jobs, http):
    jobs.create(suspend=True, **SPEC)
    answer = http(
        "PATCH",
        jobs.path("j"),
        {"spec": {"backoffLimitPerIndex": 5}},
        content_type="application/merge-patch+json",
    )
    assert answer.status == 422
