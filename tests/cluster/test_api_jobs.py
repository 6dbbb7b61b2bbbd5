"""The contract of Jobs, on both servers. The test plays the kubelet: it patches pods/status."""

from dataclasses import dataclass
from typing import Any

import pytest

INDEX = "batch.kubernetes.io/job-completion-index"


@dataclass
class Jobs:
    """The jobs of one namespace, and the part of a kubelet."""

    http: Any
    namespace: str

    def create(self, name="j", **spec):
        template = {
            "metadata": {"labels": {"mine": "yes"}},
            "spec": {
                "restartPolicy": "Never",
                "containers": [{"name": "main", "image": "some"}],
            },
        }
        body = {"metadata": {"name": name}, "spec": {"template": template, **spec}}
        return self.http("POST", self.path(), body)

    def path(self, name=""):
        return f"/apis/batch/v1/namespaces/{self.namespace}/jobs" + (name and f"/{name}")

    def pods(self, name="j"):
        query = f"labelSelector=batch.kubernetes.io/job-name%3D{name}"
        return self.http.get(f"/api/v1/namespaces/{self.namespace}/pods?{query}")["items"]

    def wait_for_pods(self, count, name="j"):
        """Waits until exactly `count` pods are neither finished nor being deleted."""
        query = f"labelSelector=batch.kubernetes.io/job-name%3D{name}"
        path = f"/api/v1/namespaces/{self.namespace}/pods?{query}"
        answer = self.http.eventually(
            path, lambda answer: len(running(answer.body["items"])) == count
        )
        return running(answer.body["items"])

    def wait_for_status(self, name="j", **expected):
        answer = self.http.eventually(
            self.path(name),
            lambda answer: all(answer.body["status"].get(k) == v for k, v in expected.items()),
        )
        return answer.body["status"]

    def wait_for_condition(self, kind, name="j", value="True"):
        answer = self.http.eventually(
            self.path(name), lambda answer: condition(answer.body, kind).get("status") == value
        )
        return answer.body

    def end(self, pod, code=0, **status_fields):
        """What a kubelet reports when the container has ended."""
        terminated = {"exitCode": code, "reason": "Error" if code else "Completed"}
        status = {
            "name": "main",
            "ready": False,
            "restartCount": 0,
            "image": "some",
            "imageID": "",
            "state": {"terminated": terminated},
        }
        phase = "Failed" if code else "Succeeded"
        patch = {"phase": phase, "containerStatuses": [status], **status_fields}
        path = f"/api/v1/namespaces/{self.namespace}/pods/{pod['metadata']['name']}/status"
        self.http.merge(path, {"status": patch})


def running(pods):
    return [
        pod
        for pod in pods
        if pod["status"].get("phase") not in ("Succeeded", "Failed")
        and "deletionTimestamp" not in pod["metadata"]
    ]


def condition(job, kind):
    found = [each for each in job["status"].get("conditions", []) if each["type"] == kind]
    return found[0] if found else {}


@pytest.fixture
def jobs(http, namespace):
    return Jobs(http, namespace)


def test_a_new_job_has_defaults_and_labels(jobs):
    job = jobs.create().body
    spec, uid = job["spec"], job["metadata"]["uid"]
    assert (spec["parallelism"], spec["completions"], spec["backoffLimit"]) == (1, 1, 6)
    assert (spec["completionMode"], spec["suspend"]) == ("NonIndexed", False)
    assert spec["selector"]["matchLabels"] == {"batch.kubernetes.io/controller-uid": uid}
    labels = spec["template"]["metadata"]["labels"]
    assert labels["batch.kubernetes.io/job-name"] == "j"
    assert labels["mine"] == "yes"


@pytest.mark.parametrize(
    "spec",
    [
        {"completionMode": "Indexed", "parallelism": 1},
        {"template": {"spec": {"containers": [{"name": "main", "image": "some"}]}}},
        {"template": None},
    ],
)
def test_malformed_jobs_are_invalid(jobs, spec):
    assert jobs.create(**spec).status == 422


def test_the_template_of_a_started_job_is_immutable(jobs, http):
    jobs.create()
    jobs.wait_for_status(active=1)
    job = http.get(jobs.path("j"))
    job["spec"]["template"]["spec"]["containers"][0]["image"] = "other"
    assert http("PUT", jobs.path("j"), job).status in (409, 422)
    assert http.get(jobs.path("j"))["spec"]["template"]["spec"]["containers"][0]["image"] == "some"


def test_pods_of_an_indexed_job_know_their_index(jobs):
    job = jobs.create(completionMode="Indexed", completions=2, parallelism=2).body
    pods = sorted(jobs.wait_for_pods(2), key=lambda pod: pod["metadata"]["name"])
    for index, pod in enumerate(pods):
        metadata, spec = pod["metadata"], pod["spec"]
        assert metadata["generateName"] == f"j-{index}-"
        assert metadata["name"].startswith(f"j-{index}-")
        assert metadata["labels"][INDEX] == str(index)
        assert metadata["annotations"][INDEX] == str(index)
        assert metadata["labels"]["batch.kubernetes.io/controller-uid"] == job["metadata"]["uid"]
        assert metadata["labels"]["mine"] == "yes"
        assert spec["hostname"] == f"j-{index}"
        [variable] = [
            each for each in spec["containers"][0]["env"] if each["name"] == "JOB_COMPLETION_INDEX"
        ]
        field = variable["valueFrom"]["fieldRef"]["fieldPath"]
        assert field == f"metadata.labels['{INDEX}']"
        [owner] = metadata["ownerReferences"]
        assert (owner["kind"], owner["uid"], owner["controller"]) == (
            "Job",
            job["metadata"]["uid"],
            True,
        )


def test_an_indexed_job_completes(jobs):
    jobs.create(completionMode="Indexed", completions=3, parallelism=2)
    first, second = sorted(jobs.wait_for_pods(2), key=lambda pod: pod["metadata"]["name"])
    jobs.wait_for_status(active=2, ready=0)
    jobs.end(second)
    jobs.wait_for_status(succeeded=1, completedIndexes="1", active=2)
    jobs.end(first)
    [third] = jobs.wait_for_pods(1)
    assert third["metadata"]["annotations"][INDEX] == "2"
    jobs.end(third)
    job = jobs.wait_for_condition("Complete")
    status = job["status"]
    assert condition(job, "SuccessCriteriaMet")["reason"] == "CompletionsReached"
    assert condition(job, "Complete")["reason"] == "CompletionsReached"
    assert (status["succeeded"], status["completedIndexes"]) == (3, "0-2")
    assert status["completionTime"] >= status["startTime"]
    assert "active" not in status
    assert "failed" not in status


def test_a_plain_job_counts_completions(jobs):
    jobs.create(completions=2, parallelism=1)
    [pod] = jobs.wait_for_pods(1)
    assert "annotations" not in pod["metadata"] or INDEX not in pod["metadata"]["annotations"]
    jobs.end(pod)
    jobs.wait_for_status(succeeded=1, active=1)
    [pod] = jobs.wait_for_pods(1)
    jobs.end(pod)
    assert jobs.wait_for_condition("Complete")["status"]["succeeded"] == 2


def test_finished_pods_lose_the_tracking_finalizer(jobs, http):
    jobs.create()
    [pod] = jobs.wait_for_pods(1)
    assert pod["metadata"]["finalizers"] == ["batch.kubernetes.io/job-tracking"]
    jobs.end(pod)
    jobs.wait_for_condition("Complete")
    path = f"/api/v1/namespaces/{jobs.namespace}/pods/{pod['metadata']['name']}"
    http.eventually(path, lambda answer: "finalizers" not in answer.body["metadata"])


def test_too_many_failures_fail_the_job(jobs):
    jobs.create(backoffLimit=0, parallelism=2, completions=2)
    pods = jobs.wait_for_pods(2)
    jobs.end(pods[0], code=1)
    job = jobs.wait_for_condition("FailureTarget")
    assert condition(job, "FailureTarget")["reason"] == "BackoffLimitExceeded"
    job = jobs.wait_for_condition("Failed")
    assert condition(job, "Failed")["reason"] == "BackoffLimitExceeded"
    assert "completionTime" not in job["status"]
    assert job["status"]["failed"] >= 1
    assert jobs.wait_for_pods(0) == []


def test_a_failed_pod_is_replaced(jobs):
    jobs.create(backoffLimit=3)
    [pod] = jobs.wait_for_pods(1)
    jobs.end(pod, code=1)
    jobs.wait_for_status(failed=1)
    [other] = jobs.wait_for_pods(1)
    assert other["metadata"]["name"] != pod["metadata"]["name"]


RULES = {
    "podFailurePolicy": {
        "rules": [
            {
                "action": "FailJob",
                "onExitCodes": {"containerName": "main", "operator": "In", "values": [42]},
            },
            {
                "action": "Ignore",
                "onExitCodes": {"operator": "In", "values": [143]},
            },
            {
                "action": "Count",
                "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}],
            },
        ]
    }
}


def test_the_failure_policy_fails_a_job_at_once(jobs):
    assert jobs.create(backoffLimit=6, **RULES).status == 201
    [pod] = jobs.wait_for_pods(1)
    jobs.end(pod, code=42)
    job = jobs.wait_for_condition("Failed")
    failed = condition(job, "Failed")
    assert failed["reason"] == "PodFailurePolicy"
    name = f"{jobs.namespace}/{pod['metadata']['name']}"
    assert failed["message"] == (
        f"Container main for pod {name} failed with exit code 42 matching FailJob rule at index 0"
    )


def test_the_failure_policy_ignores_failures(jobs):
    jobs.create(backoffLimit=0, **RULES)
    [pod] = jobs.wait_for_pods(1)
    jobs.end(pod, code=143)
    [other] = jobs.wait_for_pods(1)
    jobs.end(other)
    status = jobs.wait_for_condition("Complete")["status"]
    assert "failed" not in status


def test_other_exit_codes_count(jobs):
    jobs.create(backoffLimit=0, **RULES)
    [pod] = jobs.wait_for_pods(1)
    jobs.end(pod, code=1)
    job = jobs.wait_for_condition("Failed")
    assert condition(job, "Failed")["reason"] == "BackoffLimitExceeded"


def test_a_suspended_job_waits_and_a_resumed_one_runs(jobs, http):
    jobs.create(suspend=True)
    job = jobs.wait_for_condition("Suspended")
    assert condition(job, "Suspended")["reason"] == "JobSuspended"
    assert "startTime" not in job["status"]
    assert jobs.pods() == []
    http.merge(jobs.path("j"), {"spec": {"suspend": False}})
    jobs.wait_for_pods(1)
    job = jobs.wait_for_condition("Suspended", value="False")
    assert condition(job, "Suspended")["reason"] == "JobResumed"
    assert job["status"]["startTime"]
    http.merge(jobs.path("j"), {"spec": {"suspend": True}})
    job = jobs.wait_for_condition("Suspended")
    assert jobs.wait_for_pods(0) == []
    assert "failed" not in job["status"]


def test_the_deadline_ends_a_job(jobs):
    jobs.create(activeDeadlineSeconds=1)
    jobs.wait_for_pods(1)
    job = jobs.wait_for_condition("Failed")
    assert condition(job, "Failed")["reason"] == "DeadlineExceeded"
    jobs.wait_for_pods(0)


def test_a_finished_job_is_deleted_after_its_time(jobs, http):
    jobs.create(ttlSecondsAfterFinished=1)
    [pod] = jobs.wait_for_pods(1)
    jobs.end(pod)
    http.eventually(jobs.path("j"), lambda answer: answer.status == 404)
    path = f"/api/v1/namespaces/{jobs.namespace}/pods/{pod['metadata']['name']}"
    http.eventually(path, lambda answer: answer.status == 404)


def test_deleting_a_job_takes_its_pods_along(jobs, http):
    jobs.create(parallelism=2, completions=2)
    jobs.wait_for_pods(2)
    http("DELETE", f"{jobs.path('j')}?propagationPolicy=Background")
    pods = f"/api/v1/namespaces/{jobs.namespace}/pods"
    http.eventually(pods, lambda answer: answer.body["items"] == [])


def test_deleting_a_job_orphans_its_pods_by_default(jobs, http):
    jobs.create()
    [pod] = jobs.wait_for_pods(1)
    http("DELETE", jobs.path("j"))
    http.eventually(jobs.path("j"), lambda answer: answer.status == 404)
    path = f"/api/v1/namespaces/{jobs.namespace}/pods/{pod['metadata']['name']}"
    answer = http.eventually(path, lambda answer: "finalizers" not in answer.body["metadata"])
    assert "ownerReferences" not in answer.body["metadata"]


def test_the_table_of_jobs_tells_completions(jobs, http):
    jobs.create(completions=2)
    jobs.wait_for_status(active=1)
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
    [row] = http("GET", jobs.path(), accept=accept).body["rows"]
    assert row["cells"][:3] == ["j", "Running", "0/2"]
